"""Linear modules seen as matrices, whichever way round: Linear stores [out, in], Conv1D [in, out]."""

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of anything that presents itself as a linear layer, else None."""
    if _is_conv1d(module):
        n_in, n_out = cast(Tensor, module.weight).shape
        return n_in, n_out
    shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return shape if all(isinstance(n, int) for n in shape) else None  # type: ignore[return-value]


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of what is known to be a linear layer."""
    shape = linear_shape(linear)
    assert shape is not None
    return shape


def why_not_plain(module: nn.Module) -> str | None:
    """Why the weights of a linear layer cannot be read and put back (quantised, wrapped), else None.

    A class of its own that holds no more than nn.Linear does is plain (Falcon's): what it computes, the probe tells.
    """
    kind = type(module).__name__
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    more = {*module._parameters, *module._buffers} - {"weight", "bias"} if own_forward else set()
    if more or not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        held = f" that holds {', '.join(sorted(more))} too" if more else ""
        kind = f"{type(module).__module__}.{kind}" if kind == "Linear" else kind  # peft's, say
        return f"is a {kind}{held}; only nn.Linear and transformers' Conv1D can be read (merge adapters, dequantise)"
    own = module.__dict__.get("forward")
    as_left = own == MethodType(type(module).forward, module)  # as accelerate leaves it, its hooks removed
    if (own is not None and not as_left) or next(module.children(), None) is not None:
        return f"is a {kind} that something wraps or parametrises; remove that first"
    weight: Any = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        of = f" and dtype {weight.dtype}" if isinstance(weight, Tensor) else ""
        return f"has a weight of type {type(weight).__name__}{of}, not a float nn.Parameter"
    if sorted(weight.shape) != sorted(linear_shape(module) or ()):
        return f"has a weight of shape {list(weight.shape)}, not {linear_shape(module)} (sharded? gather it first)"
    bias: Any = getattr(module, "bias", None)
    if bias is not None and type(bias) is not nn.Parameter:
        return f"has a bias of type {type(bias).__name__}, not an nn.Parameter (pruned? prune.remove it)"
    return None


def weight_rows(module: nn.Module) -> Tensor:
    """The weight as [out, in]: a detached view."""
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if _is_conv1d(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias [out], detached, if there is one."""
    bias = cast(Tensor | None, module.bias)
    return None if bias is None else bias.detach()


def strip_(module: nn.Module) -> None:
    """Moves the weights to the meta device: shape, dtype and requires_grad stay, the memory goes."""
    for name, p in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad))


def fill_(module: nn.Module, rows: Tensor, bias: Tensor | None, trainable: tuple[bool, bool]) -> None:
    """New parameters for a linear layer. rows [out, in]; trainable: requires_grad of weight and bias."""
    weight = (rows.t() if _is_conv1d(module) else rows).contiguous()
    module.weight = nn.Parameter(weight, requires_grad=trainable[0])
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=trainable[1])


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, by its name and its shape: transformers itself is never imported."""
    if type(module).__name__ != "Conv1D":  # else its weight may be computed whenever it is asked for
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2
