"""The expert that every token runs."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from sadmoe import ops
from sadmoe.gates import DynamicK, Gate

Scales = tuple[tuple[float, float], ...]


class SharedExpert(nn.Module):
    """A small FFN beside the experts that a router picks: relu(x w_upᵀ) w_down + b_out.

    w_up [m, d], w_down [m, d_out], b_out [d_out], uninitialised: `compensate_` makes them. scales: how much of it is
    added at which tau, (tau, scale) from (0, 0) on, linear in between: the smaller tau, the less is skipped. power: of
    the norms that those tau compare, the router's when they were measured; it may be fitted to another since.
    Source: the shared experts of DeepSeekMoE, arXiv 2401.06066, section 3.2.
    """

    def __init__(
        self,
        d: int,
        width: int,
        d_out: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        scales: Scales = ((0.0, 0.0), (1.0, 1.0)),
        power: float = 1.0,
    ):
        super().__init__()
        self.scales = scales
        self.power = power
        self.w_up = nn.Parameter(torch.empty(width, d, device=device, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(width, d_out, device=device, dtype=dtype))
        self.b_out = nn.Parameter(torch.empty(d_out, device=device, dtype=dtype))

    def scale(self, gate: Gate, power: float) -> float:
        """How much of it is added to what that gate picks; by another rule than dynamic-k the last of `scales`.
        power: of the norms that the router predicts now."""
        if type(gate) is not DynamicK:
            return self.scales[-1][1]
        tau = self.compared(gate, power)
        for (low, before), (high, after) in pairwise(self.scales):
            if tau < high:
                return before + (after - before) * (tau - low) / (high - low)
        return self.scales[-1][1]

    def compared(self, gate: DynamicK, power: float) -> float:
        """The tau of a gate among those of `scales`. One on true norms compares these, a router their power."""
        return gate.tau ** (self.power if gate.true_norms else self.power / power)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d_out], by the op of experts: a token's bits do not depend on its neighbours."""
        everyone = x.new_ones(x.shape[0], 1, dtype=torch.bool)
        up, down = self.w_up.unsqueeze(0), self.w_down.unsqueeze(0)
        return ops.sparse_experts(x, everyone, up, down, b_out=self.b_out, act="relu")

    @property
    def width(self) -> int:
        """Its neurons."""
        return self.w_up.shape[0]

    def extra_repr(self) -> str:
        return f"d={self.w_up.shape[1]}, width={self.width}, d_out={self.w_down.shape[1]}"
