"""The modules that replace an FFN: a router, and the experts with a gate."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadmoe import ops, reference
from sadmoe.gates import DynamicK, Gate

NORM_FLOOR = 1e-12  # norms below it are 0: what rounding leaves of a silent expert


class Router(nn.Module):
    """Two layers without biases that predict the output norm of every expert: |relu(x v1ᵀ) v2ᵀ|.

    v1 [r, d], v2 [E, r]. Source: arXiv 2310.04361, section 3.
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
        self.v1 = nn.Parameter(torch.empty(width, d, device=device, dtype=dtype))
        self.v2 = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's initialisation of a linear layer, for both."""
        for v in (self.v1, self.v2):
            nn.init.kaiming_uniform_(v, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> scores [..., E], float32, >= 0."""
        scores = ops.router_scores(x.reshape(-1, x.shape[-1]), self.v1, self.v2)
        return scores.reshape(*x.shape[:-1], scores.shape[-1])

    def extra_repr(self) -> str:
        return f"d={self.v1.shape[1]}, width={self.v1.shape[0]}, experts={self.v2.shape[0]}"


class DynamicKMoE(nn.Module):
    """A dense FFN cut into E experts of s neurons, of which each token runs those its router picks.

    Equivalent in torch: `reference.sparse_experts(x, gate.mask(router(x)), ...)`. With `gate = DynamicK(0.0)` it is
    the dense FFN, computed densely.

    w_up, w_gate [E, s, d]; w_down [E, s, d_out]; b_up, b_gate [E, s]; b_out [d_out]; permutation [E * s]: the neuron
    of the dense FFN that each slot holds. `dropout` acts on the output, in training only.
    """

    w_up: nn.Parameter
    w_down: nn.Parameter
    w_gate: nn.Parameter | None
    b_up: nn.Parameter | None
    b_gate: nn.Parameter | None
    b_out: nn.Parameter | None
    permutation: Tensor

    def __init__(
        self,
        d: int,
        experts: int,
        expert_size: int,
        act: str,
        *,
        router_width: int = 128,
        d_out: int | None = None,
        gated: bool = False,
        bias: tuple[str, ...] = (),
        dropout: float = 0.0,
        gate: Gate | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """bias: which of "b_up", "b_gate", "b_out" exist. Weights start uninitialised: they are copied or loaded."""
        super().__init__()
        if act not in reference.ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(reference.ACTIVATIONS)}, got {act!r}")
        unknown = set(bias) - {"b_up", "b_gate", "b_out"}
        if unknown:
            raise ValueError(f"bias may name b_up, b_gate and b_out, got {', '.join(sorted(unknown))}")
        d_out = d if d_out is None else d_out
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        shapes = {
            "w_up": (experts, expert_size, d),
            "w_down": (experts, expert_size, d_out),
            "w_gate": (experts, expert_size, d) if gated else None,
            "b_up": (experts, expert_size) if "b_up" in bias else None,
            "b_gate": (experts, expert_size) if "b_gate" in bias else None,
            "b_out": (d_out,) if "b_out" in bias else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **kw)))
        self.register_buffer("permutation", torch.arange(experts * expert_size, device=device))
        self.router = Router(d, experts, router_width, **kw)
        self.act = act
        self.dropout = dropout
        self.gate: Gate = DynamicK(0.0) if gate is None else gate
        self.check_nan = False
        self.norms_hook: Callable[[Tensor], None] | None = (
            None  # sees the norms of a gate on true norms, in training
        )

    @property
    def experts(self) -> int:
        return self.w_up.shape[0]

    @property
    def expert_size(self) -> int:
        return self.w_up.shape[1]

    def expert_weights(
        self,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """w_up, w_down, b_up, w_gate, b_gate, b_out: the order of the ops."""
        return self.w_up, self.w_down, self.b_up, self.w_gate, self.b_gate, self.b_out

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., d_out]."""
        rows = x.reshape(-1, x.shape[-1])
        gate = self.gate
        if self.check_nan and rows.isnan().any():
            raise ValueError(
                "DynamicKMoE: x has NaN, for which no expert can be chosen; an earlier layer made it"
            )
        if gate.true_norms:
            y = self._by_true_norms(rows)
        elif not isinstance(gate, DynamicK):
            y = ops.sparse_experts(rows, self.mask(rows), *self.expert_weights(), act=self.act)
        elif gate.tau == 0.0:
            y = self._down(self._hidden(rows))
        else:
            y = ops.dynamic_k_moe(
                rows, self.router.v1, self.router.v2, *self.expert_weights(), tau=gate.tau, act=self.act
            )
        y = F.dropout(y, self.dropout, self.training)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def mask(self, x: Tensor) -> Tensor:
        """The experts that `forward` runs: x [..., d] -> bool [..., E]."""
        rows = x.reshape(-1, x.shape[-1])
        scores = self.expert_norms(rows) if self.gate.true_norms else self.router(rows)
        return self.gate.mask(scores).reshape(*x.shape[:-1], self.experts)

    @torch.no_grad()
    def expert_norms(self, x: Tensor) -> Tensor:
        """L2 norm of every expert's output, without b_out: x [T, d] -> [T, E], float32 (the router's target)."""
        return self._norms(self._hidden(x))

    def _by_true_norms(self, x: Tensor) -> Tensor:
        """Every expert is computed to know its norm, so this path is plain torch; gradients hold the mask constant."""
        hidden = self._hidden(x)
        norms = self._norms(hidden)
        if self.norms_hook is not None:
            self.norms_hook(norms)
        kept = hidden.unflatten(-1, (self.experts, self.expert_size)).where(
            self.gate.mask(norms.detach()).unsqueeze(-1), 0
        )
        return self._down(kept.flatten(-2))

    def _norms(self, hidden: Tensor) -> Tensor:
        """Through the Gram matrices G_e = W_down,e W_down,eᵀ: the norm squared is aᵀ G_e a, so no [T, E, d] is made.

        hidden [T, E * s] -> [T, E], float32, differentiable: the floor keeps the root's slope finite at silent experts.
        """
        by_expert = hidden.float().unflatten(-1, (self.experts, self.expert_size)).transpose(0, 1)
        w_down = self.w_down.float()
        squared = (by_expert @ (w_down @ w_down.transpose(1, 2)) * by_expert).sum(-1)
        return squared.clamp(min=NORM_FLOOR**2).sqrt().masked_fill(squared <= NORM_FLOOR**2, 0).t()

    def _hidden(self, x: Tensor) -> Tensor:
        """Activations of every neuron, in slot order: [T, d] -> [T, E * s]."""
        act = reference.ACTIVATIONS[self.act]
        up = F.linear(x, self.w_up.flatten(0, 1), None if self.b_up is None else self.b_up.flatten())
        if self.w_gate is None:
            return act(up)
        return (
            act(
                F.linear(x, self.w_gate.flatten(0, 1), None if self.b_gate is None else self.b_gate.flatten())
            )
            * up
        )

    def _down(self, hidden: Tensor) -> Tensor:
        w_down = self.w_down.flatten(0, 1)
        return hidden @ w_down if self.b_out is None else torch.addmm(self.b_out, hidden, w_down)

    def extra_repr(self) -> str:
        d_out = self.w_down.shape[2]
        return (
            f"d={self.w_up.shape[2]}, experts={self.experts}, expert_size={self.expert_size}, act={self.act}"
            + (", gated" if self.w_gate is not None else "")
            + (f", d_out={d_out}" if d_out != self.w_up.shape[2] else "")
            + f", gate={self.gate}"
        )
