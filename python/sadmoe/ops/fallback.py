"""Every op in plain torch, for devices without a kernel and for `call`."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, library

from sadmoe import reference
from sadmoe.ops.call import BY_TORCH, OLDEST, WITH_WARNING, check_devices, check_values, is_too_old
from sadmoe.ops.functions import dynamic_k_select, router_scores, sparse_experts

IN_TORCH = "runs in plain torch, every expert computed: right, not fast"
WIDENED = "widens the weights at every call: right, not fast"


def with_one_warning(name: str, function: Callable[..., Tensor], how: str) -> Callable[..., Tensor]:
    """The function, which checks what kernels check of its values, and says at its first call on a device how it does
    without one."""
    warned: set[str] = set()

    @wraps(function)
    def fallback(*args: Any, **kwargs: Any) -> Tensor:
        values = (*args, *kwargs.values())
        check_devices(*values)
        check_values(name, values)
        _check_layouts(name, values)
        device = args[0].device
        if device.type not in warned:
            warned.add(device.type)
            what = device.type if how == WIDENED else _described(device)
            warnings.warn(f"sadmoe::{name} has no kernel for {what} and {how}", stacklevel=2)
        return function(*args, **kwargs)

    return fallback


def _described(device: torch.device) -> str:
    if device.type != "cuda" or not is_too_old(device):
        return device.type
    found = torch.cuda.get_device_capability(device)
    return "a GPU of compute capability {}.{}, only from {}.{} on,".format(*found, *OLDEST)


def _check_layouts(name: str, values: Iterable[Any]) -> None:
    """Of the CPU, all that comes here: tensors that are not plain."""
    for value in values:
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_quantized):
            found = value.dtype if value.is_quantized else value.layout
            raise RuntimeError(
                f"sadmoe::{name}: tensors must be strided, and not quantized by torch, got {found}"
            )


# `sparse_experts_int8` by `sparse_experts`: the weights become floats first.
sparse_experts_widened = partial(reference.sparse_experts_int8, by=sparse_experts)


def dynamic_k_moe_widened(
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
    """`dynamic_k_moe_int8` by ops: the experts are those of `router_scores` and `dynamic_k_select` there."""
    mask = dynamic_k_select(router_scores(x, v1, v2), tau)
    return sparse_experts_widened(
        x, mask, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, scale_out, act
    )


BY_TORCH |= {
    "router_scores": reference.router_scores,
    "dynamic_k_select": reference.dynamic_k_select,
    "sparse_experts": reference.sparse_experts,
    "dynamic_k_moe": reference.dynamic_k_moe,
    "sparse_experts_int8": sparse_experts_widened,
    "dynamic_k_moe_int8": dynamic_k_moe_widened,
}

_rules = library.Library("sadmoe", "IMPL")
_rules.impl("_masked_activation_", reference.masked_activation_, "CompositeExplicitAutograd")
for _name, _by_torch in BY_TORCH.items():
    _how = WIDENED if _name.endswith("_int8") else IN_TORCH
    WITH_WARNING[_name] = with_one_warning(_name, _by_torch, _how)
    _rules.impl(_name, WITH_WARNING[_name], "CompositeExplicitAutograd")
