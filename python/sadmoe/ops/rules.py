"""What torch must know of every op beside its kernels: shapes, gradients, FLOPs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from sadmoe.forward import without_autocast
from sadmoe.ops import gradients
from sadmoe.ops.autocast import ARGUMENTS
from sadmoe.ops.call import check_devices
from sadmoe.ops.compiled import OPS
from sadmoe.ops.functions import dynamic_k_select, router_scores

# Shapes, for meta tensors, torch.compile and torch.export.


@library.register_fake("sadmoe::router_scores")
def _router_scores_shape(x: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    check_devices(x, v1, v2)
    return x.new_empty((x.shape[0], v2.shape[0]), dtype=torch.float32)


@library.register_fake("sadmoe::dynamic_k_select")
def _dynamic_k_select_shape(scores: Tensor, tau: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


@library.register_fake("sadmoe::sparse_experts")
@library.register_fake("sadmoe::sparse_experts_int8")
def _sparse_experts_shape(x: Tensor, mask: Tensor, w_up: Tensor, w_down: Tensor, *rest: Any) -> Tensor:
    check_devices(x, mask, w_up, w_down, *rest)
    return x.new_empty((x.shape[0], w_down.shape[2]))


@library.register_fake("sadmoe::dynamic_k_moe")
@library.register_fake("sadmoe::dynamic_k_moe_int8")
def _dynamic_k_moe_shape(
    x: Tensor, v1: Tensor, v2: Tensor, w_up: Tensor, w_down: Tensor, *rest: Any
) -> Tensor:
    check_devices(x, v1, v2, w_up, w_down, *rest)
    return x.new_empty((x.shape[0], w_down.shape[2]))


# Gradients, with the mask held constant: see `gradients`.

Gradient = Callable[..., tuple[Tensor | None, ...]]


def _as_forward(backward: Gradient) -> Gradient:
    """The gradient out of autocast: what was kept is of the dtypes of the forward pass, also in another one's block."""

    def run(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device):
            return backward(ctx, grad)

    return run


def _keep_router(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _router_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gradients.of_router_scores(grad, *ctx.saved_tensors)


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _experts_backward(gradient: Gradient, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mask, *weights = ctx.saved_tensors
    of_x, *of_weights = gradient(grad, x, mask, *weights, ctx.act)
    return of_x, None, *of_weights, None


def _keep_moe(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tau, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _moe_backward(gradient: Gradient, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, v1, v2, *weights = ctx.saved_tensors
    # By the kernels, as before, though the gradients be those of a vmap, which else runs plain torch.
    mask = OPS.dynamic_k_select.default(OPS.router_scores.default(x, v1, v2), ctx.tau)
    of_x, *of_weights = gradient(grad, x, mask, *weights, ctx.act)
    return of_x, None, None, *of_weights, None, None


library.register_autograd("sadmoe::router_scores", _as_forward(_router_backward), setup_context=_keep_router)
for _suffix, _gradient in (("", gradients.of_sparse_experts), ("_int8", gradients.of_sparse_experts_int8)):
    for _name, _backward, _keep in (
        ("sparse_experts", _experts_backward, _keep_experts),
        ("dynamic_k_moe", _moe_backward, _keep_moe),
    ):
        _backward = _as_forward(partial(_backward, _gradient))
        library.register_autograd(f"sadmoe::{_name}{_suffix}", _backward, setup_context=_keep)


# FLOPs that were really executed (torch counts a multiply-add as two). Without data, as many as there can be.


def _pairs_flops(pairs: int, w_up: Tensor, w_down: Tensor, w_gate: Tensor | None) -> int:
    inputs = 1 if w_gate is None else 2
    return 2 * pairs * w_up.shape[1] * (inputs * w_up.shape[2] + w_down.shape[2])


def _executed(mask: Tensor) -> int:
    has_data = type(mask) in (Tensor, torch.nn.Parameter) and mask.device.type != "meta"
    return int(mask.sum()) if has_data else mask.numel()


def _flops_of(name: str) -> Callable[..., int]:
    def formula(*args: Any, **kwargs: Any) -> int:
        given = dict(zip(ARGUMENTS[name], args, strict=False)) | kwargs
        flops, mask = 0, given.get("mask")
        if "v1" in given:
            x, v1, v2 = given["x"], given["v1"], given["v2"]
            flops = 2 * x.shape[0] * v1.shape[0] * (v1.shape[1] + v2.shape[0])
            if "w_up" in given:
                mask = dynamic_k_select(router_scores(x, v1, v2), given.get("tau", 0.0))
        if mask is None:
            return flops
        return flops + _pairs_flops(_executed(mask), given["w_up"], given["w_down"], given.get("w_gate"))

    return formula


for _name in ARGUMENTS:
    register_flop_formula(getattr(OPS, _name), get_raw=True)(_flops_of(_name))
