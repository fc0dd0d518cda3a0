"""The calls that a model makes of its modules, to be made again."""

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from sadmoe.batches import Batch, each_tensor, run, to_device
from sadmoe.ffn.linears import linear_shape
from sadmoe.ffn.probe import Call
from sadmoe.ffn.sites import Parts
from sadmoe.hooks import calls_seen, takes_hooks, uncompiled
from sadmoe.modules import device_of, evaluating


def record_calls(
    model: nn.Module, names: Iterable[str], batch: Batch, runner: Callable[[nn.Module, Batch], Any] = run
) -> tuple[dict[str, Call], set[str]]:
    """A call of each of these modules while the model runs a batch, as a way to call it: the first that can be kept.
    And the linear layers that ran.

    The arguments are kept as they were, caches too, and given in the dtype of the probe.
    """
    calls: dict[str, Call] = {}
    ran: set[str] = set()

    def see(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in calls:
            return
        with suppress(Exception):  # of a foreign argument, which then cannot be given again
            calls[name] = _again(copy.deepcopy((args, kwargs)))

    modules = {name: model.get_submodule(name) for name in names}
    linears = {name: m for name, m in model.named_modules() if takes_hooks(m) and linear_shape(m) is not None}
    seen, told = calls_seen(modules, see), calls_seen(linears, lambda name, *_: ran.add(name))
    with uncompiled(), seen, told, evaluating(model):
        runner(model, to_device(batch, device_of(model)))
    return calls, ran


def _again(arguments: Any) -> Call:
    def call(block: nn.Module, parts: Parts, x: Tensor) -> Any:
        def as_x(t: Tensor) -> Tensor:
            return t.to(x.dtype) if t.is_floating_point() else t

        args, kwargs = each_tensor(copy.deepcopy(arguments), as_x)
        return block(*args, **kwargs)

    return call
