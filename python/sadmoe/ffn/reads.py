"""What a model reads of a module beside calling it, which another kind of module may not have."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import nn

from sadmoe.batches import Batches, device_of, evaluating, run, to_device
from sadmoe.ffn.lookup import lookup, put


class _Called(nn.Module):
    """Calls the module that it stands for, gives all else of it, and notes that."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.__dict__ |= {"module": module, "read": {}}  # in no table of modules or parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["module"], name)
        self.__dict__["read"][name] = True
        return value


def what_else_is_read(model: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, list[str]]:
    """The attributes, such as weight, that are read of each of these modules while the model runs the first batch:
    of those of which any is. The model is left as it was."""
    modules = {name: lookup(model, name)[2] for name in names}
    watched = {name: _Called(module).train(module.training) for name, module in modules.items()}
    try:
        for name, module in watched.items():
            put(model, name, module)
        with evaluating(model):
            for batch in islice(batches, 1):
                run(model, to_device(batch, device_of(model)))
    finally:
        for name, module in modules.items():
            put(model, name, module)
    return {name: list(read) for name, one in watched.items() if (read := one.__dict__["read"])}
