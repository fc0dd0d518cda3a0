"""Autocast: activations and experts take its dtype; the router stays as it is, for its float32 decisions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from sadmoe.ops.compiled import OPS

ROUTER_ARGUMENTS = {  # by position
    "router_scores": (1, 2),
    "sparse_experts": (),
    "dynamic_k_moe": (1, 2),
    "sparse_experts_int8": (),
    "dynamic_k_moe_int8": (1, 2),
}


def _cast(value: Any, device: str) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == device
    return value.to(torch.get_autocast_dtype(device)) if floats else value


def cast_all(name: str, args: tuple[Any, ...], device: str) -> list[Any]:
    """The arguments of an op, by its name, as autocast gives them to it."""
    kept = ROUTER_ARGUMENTS[name]
    return [value if i in kept else _cast(value, device) for i, value in enumerate(args)]


def _autocast_rule(name: str, device: str) -> Callable[..., Tensor]:
    op = getattr(OPS, name)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        cast_kwargs = {key: _cast(value, device) for key, value in kwargs.items()}
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast_all(name, args, device), **cast_kwargs)

    return rule


_rules = library.Library("sadmoe", "IMPL")
for _name in ROUTER_ARGUMENTS:
    for _device in ("cpu", "cuda"):
        _rules.impl(_name, _autocast_rule(_name, _device), f"Autocast{_device.upper()}")
