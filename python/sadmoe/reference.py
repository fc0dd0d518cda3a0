"""What every kernel must compute, in plain torch. Slow on purpose: read this first.

Letters: T tokens, d width of the input, d_out of the output, E experts, s neurons per expert, r router width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(z: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return z * torch.sigmoid(1.702 * z)


def relu2(z: Tensor) -> Tensor:
    """The square of ReLU."""
    return F.relu(z).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": quick_gelu,
    "relu2": relu2,
}
ROUNDS_TO_0 = 2.0**-150  # the largest that is 0 in float32
RECTIFIERS = ("relu", "relu2")  # those that are exactly 0 wherever the pre-activation is below 0


def router_scores(x: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    """Predicted output norm of every expert: |relu(x v1ᵀ) v2ᵀ|, in float32 (arXiv 2310.04361, section 3).

    x [T, d], v1 [r, d], v2 [E, r] -> [T, E], every entry >= 0.
    """
    hidden = F.relu(F.linear(x.float(), v1.float()))
    return F.linear(hidden, v2.float()).abs()


def dynamic_k_select(scores: Tensor, tau: float) -> Tensor:
    """Dynamic-k rule: expert e runs for token t iff scores[t, e] >= tau * max(scores[t]), compared in float32.

    tau = 0 runs every expert, tau = 1 only the best and its ties; an all-zero row runs every expert.
    Negative scores count as 0. A NaN is never selected and never the maximum.
    scores [T, E], 0 <= tau <= 1 -> bool [T, E].
    """
    finite_or_inf = ~scores.isnan()
    clamped = scores.float().clamp(min=0).where(finite_or_inf, -1.0)
    if tau <= ROUNDS_TO_0 or scores.shape[0] == 0:  # 0 * inf would be NaN
        return finite_or_inf
    return (clamped >= tau * clamped.amax(dim=-1, keepdim=True)) & finite_or_inf


def sparse_experts(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """Sum over the experts of the mask, unweighted, plus the output bias once.

    Plain: act(x w_upᵀ + b_up) w_down.   GLU: (act(x w_gateᵀ + b_gate) * (x w_upᵀ + b_up)) w_down.
    x [T, d], mask bool [T, E], w_up, w_gate [E, s, d], w_down [E, s, d_out], b_up, b_gate [E, s], b_out [d_out]
    -> [T, d_out] of x's dtype.
    """
    gate = None if w_gate is None else linear_of_experts(x, w_gate, b_gate)
    hidden = masked_activation(linear_of_experts(x, w_up, b_up), gate, mask, act, experts=len(w_up))
    y = hidden @ w_down.flatten(0, 1)
    return y if b_out is None else y + b_out


def of_chosen(neurons: Tensor, mask: Tensor, experts: int) -> Tensor:
    """neurons [T, E * s], 0 of experts outside the mask [T, E], also where they were NaN."""
    if mask.shape[-2:] != (neurons.shape[-2], experts):
        raise RuntimeError(f"mask must be [T, E] = {[neurons.shape[-2], experts]}, got {list(mask.shape)}")
    by_expert = neurons.reshape(*neurons.shape[:-1], experts, neurons.shape[-1] // experts)
    return by_expert.where(mask.unsqueeze(-1), 0).reshape(neurons.shape)


def masked_activation(up: Tensor, gate: Tensor | None, mask: Tensor, act: str, experts: int) -> Tensor:
    """act(up), or act(gate) * up, [T, E * s], 0 of experts outside the mask [T, E]: of pre-activations that are 0
    there, as every act is 0 at 0, so that gradients of what overflowed in other experts are 0, too."""
    up = of_chosen(up, mask, experts)
    return ACTIVATIONS[act](up) if gate is None else ACTIVATIONS[act](of_chosen(gate, mask, experts)) * up


def dynamic_k_moe(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    tau: float = 0.0,
    act: str = "relu",
) -> Tensor:
    """router_scores, dynamic_k_select and sparse_experts in one: [T, d] -> [T, d_out]."""
    mask = dynamic_k_select(router_scores(x, v1, v2), tau)
    return sparse_experts(x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out, act)


def masked_activation_(up: Tensor, gate: Tensor | None, choice: Tensor, tau: float, act: str) -> None:
    """up [T, E * s] becomes act(up), or act(gate) * up, and 0 of experts outside the choice.

    choice [T, E]: a bool mask, or float32 scores of which those run that reach tau.
    """
    mask = choice if choice.dtype == torch.bool else dynamic_k_select(choice, tau)
    up.copy_(masked_activation(up, gate, mask, act, experts=mask.shape[1]))


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype, scale_out: Tensor | None = None) -> Tensor:
    """Experts' weights [E, s, n] in int8 by the scale of every neuron, [E, s], and of every column, [n], as floats.
    Raises RuntimeError, as kernels do, where they are not int8, or scales of other shapes."""
    wanted = weight.shape[:2], weight.shape[2:]
    if (
        weight.dtype != torch.int8
        or weight.dim() != 3
        or (scale.shape, (wanted[1] if scale_out is None else scale_out.shape)) != wanted
    ):
        raise RuntimeError(
            f"weights must be int8 [E, s, n] with scales [E, s] and [n], got {weight.dtype} {list(weight.shape)}, "
            f"{list(scale.shape)} and {None if scale_out is None else list(scale_out.shape)}"
        )
    rows = weight.float() * scale.float().unsqueeze(-1)
    return (rows if scale_out is None else rows * scale_out.float()).to(dtype)


def dequantized_experts(
    dtype: torch.dtype,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Tensor,
    scale_down: Tensor,
    b_up: Tensor | None,
    w_gate: Tensor | None,
    scale_gate: Tensor | None,
    b_gate: Tensor | None,
    b_out: Tensor | None,
    scale_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """w_up, w_down, b_up, w_gate, b_gate, b_out as floats, from what `sparse_experts_int8` takes."""
    if (w_gate is None) != (scale_gate is None):
        raise RuntimeError("w_gate and scale_gate need each other")
    up, down = dequantized(w_up, scale_up, dtype), dequantized(w_down, scale_down, dtype, scale_out)
    gate = None if w_gate is None or scale_gate is None else dequantized(w_gate, scale_gate, dtype)
    return up, down, b_up, gate, b_gate, b_out


def sparse_experts_int8(
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    scale_up: Tensor,
    scale_down: Tensor,
    b_up: Tensor | None = None,
    w_gate: Tensor | None = None,
    scale_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_out: Tensor | None = None,
    scale_out: Tensor | None = None,
    act: str = "relu",
    *,
    by: Callable[..., Tensor] = sparse_experts,
) -> Tensor:
    """`sparse_experts` of weights in int8, each neuron's times its scale: scale_up, scale_down, scale_gate [E, s]; the
    columns of w_down times scale_out [d_out] as well, if it is given. by: what computes it of the widened weights."""
    experts = dequantized_experts(
        x.dtype, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    )
    return by(x, mask, *experts, act)


def linear_of_experts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, d] by all neurons: weight [E, s, d], bias [E, s] -> [T, E * s]."""
    return F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
