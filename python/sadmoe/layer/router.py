"""The module that predicts which experts matter to a token."""

import torch
from torch import Tensor, nn

from sadmoe import ops
from sadmoe.layer.held import held


class Router(nn.Module):
    """Two layers without biases that predict the output norm of every expert: |relu(x v1ᵀ) v2ᵀ|.

    v1 [r, d], v2 [E, r], which ask for no gradient: `fit_routers_` trains them, a model's own loss never does.
    target_power: of the norms, what it was trained to predict, see `RouterConfig`; saved with a model.
    Source: arXiv 2310.04361, section 3.
    """

    def __init__(
        self,
        d: int,
        experts: int,
        width: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.target_power = 1.0
        v1, v2 = (torch.empty(n, m, device=device, dtype=dtype) for n, m in ((width, d), (experts, width)))
        self.v1, self.v2 = nn.Parameter(v1, requires_grad=False), nn.Parameter(v2, requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's initialisation of a linear layer, for both."""
        for v in (self.v1, self.v2):
            nn.init.kaiming_uniform_(v, a=5**0.5)

    def cast_(self, dtype: torch.dtype) -> None:
        """As `to(dtype)`, but in parameters of its own: the former ones stay what they were."""
        self.v1, self.v2 = (nn.Parameter(v.to(dtype), v.requires_grad) for v in self.weights())

    def weights(self) -> tuple[Tensor, Tensor]:
        """v1, v2: the order of the ops."""
        return held(self, "v1"), held(self, "v2")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> scores [..., E], float32, >= 0."""
        scores = ops.router_scores(x.reshape(-1, x.shape[-1]), *self.weights())
        return scores.reshape(*x.shape[:-1], scores.shape[-1])

    def extra_repr(self) -> str:
        return f"d={self.v1.shape[1]}, width={self.v1.shape[0]}, experts={self.v2.shape[0]}" + (
            "" if self.target_power == 1 else f", target_power={self.target_power:g}"
        )
