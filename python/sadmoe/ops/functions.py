"""The ops as Python functions, with their documentation."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sadmoe import reference
from sadmoe.ops.call import lacks_kernels, run
from sadmoe.ops.compiled import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take

_ROUTER_SCORES = OPS.router_scores.default
_DYNAMIC_K_SELECT = OPS.dynamic_k_select.default
_SPARSE_EXPERTS = OPS.sparse_experts.default
_DYNAMIC_K_MOE = OPS.dynamic_k_moe.default
_SPARSE_EXPERTS_INT8 = OPS.sparse_experts_int8.default
_DYNAMIC_K_MOE_INT8 = OPS.dynamic_k_moe_int8.default
_MASKED_ACTIVATION_ = OPS._masked_activation_.default


def router_scores(x: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    """Predicted output norm of every expert, `relu(x @ v1.T) @ v2.T` without its sign, in float32.

    x [T, d], v1 [r, d], v2 [E, r], each float32, bfloat16 or float16 -> float32 [T, E], >= 0.
    Raises RuntimeError that names the argument whose shape or dtype does not fit. Source: arXiv 2310.04361, section 3.
    """
    return run(_ROUTER_SCORES, x, v1, v2)


def dynamic_k_select(scores: Tensor, tau: float) -> Tensor:
    """Dynamic-k rule, `scores >= tau * scores.amax(-1, keepdim=True)`.

    scores float32 [T, E], 0 <= tau <= 1 (0: every expert, 1: the top one and its ties) -> bool [T, E].
    An all-zero row selects every expert; a negative score counts as 0; NaN is never selected.
    Source: arXiv 2310.04361, section 3 (its code calls this dynk_max and uses 1 - tau).
    """
    return run(_DYNAMIC_K_SELECT, scores, tau)


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
    """Sum of the experts that the mask picks, unweighted, plus b_out once: `reference.sparse_experts`.

    x [T, d], mask bool [T, E], w_up, w_gate [E, s, d], w_down [E, s, d_out], b_up, b_gate [E, s], b_out [d_out];
    act a key of `reference.ACTIVATIONS` -> [T, d_out] of x's dtype. Sums in float32, experts in ascending order,
    of weights in float32 every 16 by themselves first: a token's result does not depend on its neighbours, the
    number of threads or the run, bit for bit. On the CPU w_up and w_gate may be `packed`; what is neither that nor
    contiguous is copied at every call.
    """
    return run(_SPARSE_EXPERTS, x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out, act)


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
    """`sparse_experts(x, dynamic_k_select(router_scores(x, v1, v2), tau), ...)` in one call.

    Gradients reach x and the experts with the mask held constant; v1 and v2 get none (train them on `router_scores`).
    """
    return run(_DYNAMIC_K_MOE, x, v1, v2, w_up, w_down, b_up, w_gate, b_gate, b_out, tau, act)


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
) -> Tensor:
    """`sparse_experts` of weights in int8: a neuron's are its row of integers times its scale.

    w_up, w_gate, w_down int8, shapes as there; scale_up, scale_gate, scale_down floating [E, s]; scale_out floating
    [d_out], if given, multiplies the columns of w_down as well; x, biases and the result as there. A token's row of x,
    and its activations in each expert, are rounded to at most 65535 steps over twice the largest of them; products with
    the weights and their sums within an expert are then exact. Only the CPU has kernels for it; on other devices
    `sparse_experts` runs on weights that are widened at every call, without that rounding and with one warning.
    Gradients reach x and biases.
    """
    experts = w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    return run(_SPARSE_EXPERTS_INT8, x, mask, *experts, act)


def dynamic_k_moe_int8(
    x: Tensor,
    v1: Tensor,
    v2: Tensor,
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
    tau: float = 0.0,
    act: str = "relu",
) -> Tensor:
    """`dynamic_k_moe` of weights in int8, as `sparse_experts_int8` takes them."""
    experts = w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    return run(_DYNAMIC_K_MOE_INT8, x, v1, v2, *experts, tau, act)


def masked_activation_(up: Tensor, gate: Tensor | None, choice: Tensor, tau: float, act: str) -> None:
    """Hidden activations of dense products in one pass, in place; for no gradients and no graphs.

    up, gate [T, E * s]; choice [T, E], a bool mask, or float32 scores, of which `dynamic_k_select` takes those that
    reach tau: up becomes act(up), or of a GLU act(gate) * up, and 0 of experts not chosen, also where it was NaN.
    up is contiguous, gate of its dtype; computed in float32, rounded once. Raises RuntimeError where a gradient would
    have to pass, in torch.func's transforms and under forward-mode gradients.
    """
    tracked = torch.is_grad_enabled() and (up.requires_grad or (gate is not None and gate.requires_grad))
    if tracked or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "masked_activation_ writes in place, past autograd: call it under torch.no_grad(), or on tensors that "
            "require no gradient, and outside torch.func and forward-mode gradients"
        )
    if lacks_kernels(up):
        reference.masked_activation_(up, gate, choice, tau, act)
        return
    with torch._C._AutoDispatchBelowAutograd():
        _MASKED_ACTIVATION_(up, gate, choice, tau, act)
    if not up.is_inference():  # who kept it for a gradient then errs, as with torch's own
        torch.autograd.graph.increment_version(up)
