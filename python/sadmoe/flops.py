"""Counting what a model computes, by the rule of the paper's evaluation code (arXiv 2310.04361, appendix B).

One multiply-add is one FLOP. Matrix products and convolutions count their multiply-adds; the bias of a linear
layer is free. Ops of sadmoe outside converted layers, as in mixtures of experts, count executed pairs.
Elementwise arithmetic, exp, tanh, sigmoid, GELU, SiLU, comparisons, cumulative sums, embeddings: 1 per output
element. Mean and sum: 1 per input element. Softmax: 2 per element. Layer norm: 5 per element, 4 without weights.
Attention: two products, 3 per score and 1 more where a mask is added. ReLU, powers, roots, copies and everything
else: nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sadmoe.batches import Batch, run, to_device
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import device_of, evaluating


def count_flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of model(batch) in eval mode, all samples and padding included, without its converted layers.

    So for a dense model that is all of it. `batch` is moved to where the model is, and the model really runs,
    which on the meta device costs no arithmetic; there masks say nothing, so sadmoe's ops count every expert.
    """
    with evaluating(model), FlopCount(model) as count:
        run(model, to_device(batch, device_of(model)))
    return count.flops


class FlopCount:
    """A context that adds up, in `flops`, what `model` runs inside it, without its converted layers.

    It may be entered again after it was left. What else runs inside counts, too: read batches outside, for some are
    computed as they are.
    """

    def __init__(self, model: nn.Module):
        self.flops = 0
        self.model = model
        self._paused = 0
        self._inside = ExitStack()

    def add(self, flops: int) -> None:
        """Counts that many, unless inside something that is counted as a whole or not at all."""
        if not self.is_paused:
            self.flops += flops

    @property
    def is_paused(self) -> bool:
        """Whether nothing is counted."""
        return self._paused > 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not counted."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __enter__(self) -> "FlopCount":
        with ExitStack() as inside:
            inside.enter_context(torch.compiler.set_stance("force_eager"))  # flex_attention compiles itself
            for layer in (module for module in self.model.modules() if isinstance(module, DynamicKMoE)):
                inside.enter_context(layer.register_forward_pre_hook(self._enter_layer, prepend=True))
                inside.enter_context(layer.register_forward_hook(self._leave_layer, always_call=True))
            inside.enter_context(_Attention(self))
            inside.enter_context(_Operations(self))
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._inside.close()

    def _enter_layer(self, *_: Any) -> None:
        self._paused += 1

    def _leave_layer(self, *_: Any) -> None:
        self._paused -= 1


class _Attention(TorchFunctionMode):
    """Counts attention where it is called: below, it is another set of operations on every device."""

    def __init__(self, count: FlopCount):
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.count.add(_attention(*args, **kwargs))
        with self.count.paused():
            return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, count: FlopCount):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # one operation of several functions, which count nothing
            if func.name() == "flex_attention":
                self.count.add(_attention(*args[:3]))
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        # nn.MultiheadAttention hides the call from _Attention.
        if (
            func.namespace == "aten"
            and name.startswith("_scaled_dot_product_")
            and not name.endswith("_backward")
        ):
            self.count.add(_attention_op(args, kwargs))
            return func(*args, **kwargs)
        rule = _rule_of(func)
        if rule is None:
            with self:  # in inference mode, operations arrive whole that are made of others
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if not self.count.is_paused:
            self.count.add(rule(args, out))
        return out


def _rule_of(func: Any) -> Callable[[Any, Any], int] | None:
    """What an operation counts, of its arguments and result; None of one that is nothing, or made of others."""
    name = func.overloadpacket.__name__
    if func.namespace == "aten":
        return _RULES.get(name.rstrip("_"))
    if func.namespace == "sadmoe" and (formula := flop_registry.get(func.overloadpacket)):
        return lambda args, out: formula(*args, out_val=out) // 2  # torch counts two a multiply-add
    return _product(0) if (func.namespace, name) == ("transformers", "grouped_mm_fallback") else None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **kwargs: Any
) -> int:
    scores = query[..., 0].numel() * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1] + 3 + (attn_mask is not None))


def _attention_op(args: Any, kwargs: Any) -> int:
    """Of what attention is on a device, with the mask fourth or by its name."""
    masks = (*args[3:4], kwargs.get("attn_mask"), kwargs.get("attn_bias"))
    return _attention(*args[:3], next((mask for mask in masks if isinstance(mask, Tensor)), None))


def _product(left: int) -> Callable[[Any, Any], int]:
    """A matrix product whose left factor is argument number `left`."""
    return lambda args, out: out.numel() * args[left].shape[-1]


def _per_output(args: Any, out: Any) -> int:
    return out.numel() if isinstance(out, Tensor) else 0


def _per_input(args: Any, out: Any) -> int:
    return args[0].numel()


def _softmax(args: Any, out: Any) -> int:
    return 2 * out.numel()


def _layer_norm(args: Any, out: Any) -> int:
    return (4 if args[2] is None else 5) * args[0].numel()


def _rms_norm(args: Any, out: Any) -> int:
    rows = args[0].numel() // math.prod(args[1])
    return (2 if args[2] is None else 3) * args[0].numel() + rows


def _convolution(args: Any, out: Any) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return x.numel() * weight[0].numel() if transposed else out.numel() * weight[0].numel()


_ELEMENTWISE = [
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "exp",
    "tanh",
    "sigmoid",
    "abs",
    "gelu",
    "silu",
    "cumsum",
    "embedding",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]

_RULES: dict[str, Callable[[Any, Any], int]] = {
    "mm": _product(0),
    "bmm": _product(0),
    "addmm": _product(1),
    "baddbmm": _product(1),
    "mv": _product(0),
    "_grouped_mm": _product(0),
    "convolution": _convolution,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "mean": _per_input,
    "sum": _per_input,
    **dict.fromkeys(_ELEMENTWISE, _per_output),
}
