"""Gradients of the ops by hand, the mask held constant. Only inputs are saved: intermediates are computed again."""

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from sadmoe.reference import ACTIVATIONS, dequantized_experts, linear_of_experts, of_chosen

aten = torch.ops.aten
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (gradient of act(z), z) -> gradient of z
    "relu": lambda grad, z: aten.threshold_backward(grad, z, 0),
    "gelu": lambda grad, z: aten.gelu_backward(grad, z),
    "gelu_tanh": lambda grad, z: aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": lambda grad, z: _silu_backward(grad, z),
    "quick_gelu": lambda grad, z: _silu_backward(grad, 1.702 * z),
    "relu2": lambda grad, z: grad * (2 * F.relu(z)),
}


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return aten.silu_backward(grad, z)
    opened = z.sigmoid()  # torch's has no gradient of its own
    return grad * opened * (1 + z * (1 - opened))


def of_router_scores(grad: Tensor, x: Tensor, v1: Tensor, v2: Tensor) -> tuple[Tensor | None, ...]:
    """Of x [T, d], v1 [r, d] and v2 [E, r], from grad [T, E]: `reference.router_scores`. None where not required."""
    rows, first, second = x.float(), v1.float(), v2.float()
    z = rows @ first.T
    hidden = F.relu(z)
    grad = grad * (hidden @ second.T).sign()
    grad_z = aten.threshold_backward(grad @ second, z, 0)
    of_x = (grad_z @ first).to(x.dtype) if _needed(x) else None
    of_v1 = (grad_z.T @ rows).to(v1.dtype) if _needed(v1) else None
    return of_x, of_v1, (grad.T @ hidden).to(v2.dtype) if _needed(v2) else None


def of_sparse_experts(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    b_out: Tensor | None,
    act: str,
) -> tuple[Tensor | None, ...]:
    """Of x, w_up, w_down, b_up, w_gate, b_gate and b_out, from grad [T, d_out]: `reference.sparse_experts`.

    None for those that are None or require no gradient.
    """
    experts = len(w_up)
    # Of others it may be inf, whose slope is NaN.
    up = of_chosen(linear_of_experts(x, w_up, b_up), mask, experts)
    grad_hidden = of_chosen(grad @ w_down.flatten(0, 1).T, mask, experts)
    if w_gate is None:
        hidden = ACTIVATIONS[act](up)
        grad_up, grad_gate = BACKWARD[act](grad_hidden, up), None
    else:
        gate = of_chosen(linear_of_experts(x, w_gate, b_gate), mask, experts)
        opened = ACTIVATIONS[act](gate)
        hidden = opened * up
        grad_up, grad_gate = grad_hidden * opened, BACKWARD[act](grad_hidden * up, gate)

    grad_x = grad_up @ w_up.flatten(0, 1) if _needed(x) else None
    if grad_x is not None and w_gate is not None and grad_gate is not None:
        grad_x = grad_x + grad_gate @ w_gate.flatten(0, 1)
    of_w_down = (hidden.T @ grad).view_as(w_down) if _needed(w_down) else None
    of_b_out = grad.sum(0) if _needed(b_out) else None
    of_w_up, of_b_up = _of_linear(grad_up, x, w_up, b_up)
    of_w_gate, of_b_gate = _of_linear(grad_gate, x, w_gate, b_gate)
    return grad_x, of_w_up, of_w_down, of_b_up, of_w_gate, of_b_gate, of_b_out


def of_sparse_experts_int8(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
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
    act: str,
) -> tuple[Tensor | None, ...]:
    """Of x and the arguments from w_up to b_out: `reference.sparse_experts_int8`. Weights and scales have none."""
    experts = dequantized_experts(
        x.dtype, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out
    )
    of_x, _, _, of_b_up, _, of_b_gate, of_b_out = of_sparse_experts(grad, x, mask, *experts, act)
    return of_x, None, None, None, None, of_b_up, None, None, of_b_gate, of_b_out, None


def _of_linear(
    grad: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight [E, s, d] and bias [E, s], from grad [T, E * s] of what they made of x [T, d]."""
    if grad is None:
        return None, None
    of_weight = (grad.T @ x).view_as(weight) if _needed(weight) else None
    return of_weight, grad.sum(0).view_as(bias) if _needed(bias) else None


def _needed(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.requires_grad
