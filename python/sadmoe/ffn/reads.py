"""What a model reads of a module beside calling it, which another kind of module may not have."""

from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Any

from torch import nn

from sadmoe.batches import Batches, device_of, evaluating, run, to_device
from sadmoe.ffn.lookup import lookup, put


class _Called(nn.Module):
    """Calls the module that it stands for, gives all else of it, and notes that."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.read: dict[str, None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        module = super().__getattr__("module")
        if name == "module":
            return module
        value = getattr(module, name)
        self.read[name] = None
        return value


def what_else_is_read(model: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, list[str]]:
    """The attributes, such as weight, that are read of each of these modules while the model runs the first batch:
    of those of which any is. Where it does not run, those until then. The model is left as it was."""
    modules = {name: lookup(model, name)[2] for name in names}
    watched = {name: _Called(module).train(module.training) for name, module in modules.items()}
    try:
        for name, module in watched.items():
            put(model, name, module)
        with (
            suppress(Exception),
            evaluating(model),
        ):  # of a foreign forward: whoever uses the modules will see it
            for batch in islice(batches, 1):
                run(model, to_device(batch, device_of(model)))
    finally:
        for name, module in modules.items():
            put(model, name, module)
    return {name: list(one.read) for name, one in watched.items() if one.read}
