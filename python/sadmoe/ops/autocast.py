"""Autocast: activations and experts take its dtype; the router stays as it is, for its float32 decisions, and so do the
scales of int8, of which float16 does not hold the small ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from sadmoe.ops.compiled import OPS

KEPT = {"v1", "v2", "scale_up", "scale_down", "scale_gate", "scale_out"}  # arguments by name
ARGUMENTS = {  # of each op, by position
    name: tuple(argument.name for argument in getattr(OPS, name).default._schema.arguments)
    for name in (
        "router_scores",
        "sparse_experts",
        "dynamic_k_moe",
        "sparse_experts_int8",
        "dynamic_k_moe_int8",
    )
}


def _cast(name: str, value: Any, device: str) -> Any:
    if name in KEPT:
        return value
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value  # as of torch's own ops
    return value.to(torch.get_autocast_dtype(device)) if value.device.type == device else value


def cast_all(name: str, args: tuple[Any, ...], device: str) -> list[Any]:
    """The arguments of an op, by its name, as autocast gives them to it."""
    return [_cast(argument, value, device) for argument, value in zip(ARGUMENTS[name], args, strict=False)]


def _autocast_rule(name: str, device: str) -> Callable[..., Tensor]:
    op = getattr(OPS, name)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        cast_kwargs = {key: _cast(key, value, device) for key, value in kwargs.items()}
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast_all(name, args, device), **cast_kwargs)

    return rule


_rules = library.Library("sadmoe", "IMPL")
for _name in ARGUMENTS:
    for _device in ("cpu", "cuda", "mps", "xpu"):
        _rules.impl(_name, _autocast_rule(_name, _device), f"Autocast{_device.upper()}")
