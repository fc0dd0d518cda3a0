"""What a model reads of a module beside calling it, which a module of another kind may not have."""

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from torch import nn

from sadmoe.batches import Batches, run, to_device
from sadmoe.hooks import uncompiled
from sadmoe.modules import device_of, evaluating

ANY = {*dir(nn.Module), "training"}  # what every module has


def what_else_is_read(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches
) -> dict[str, list[str]]:
    """The attributes, such as weight, that are read of each of these modules, but by their own calls, while the model
    runs the first batch: by name, of those of which any is. If the model does not run, those until then."""
    read: dict[str, dict[str, None]] = {name: {} for name in modules}
    kinds = {name: type(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__class__ = _noting(kinds[name], read[name])
        # Of a foreign forward: whoever uses the modules will see what it raises.
        with suppress(Exception), uncompiled(), evaluating(model):
            for batch in islice(batches, 1 if modules else 0):
                run(model, to_device(batch, device_of(model)))
    finally:
        for name, module in modules.items():
            module.__class__ = kinds[name]
    return {name: list(names) for name, names in read.items() if names}


def _noting(kind: type[Any], read: dict[str, None]) -> type[Any]:
    """A kind of module that is one of `kind`, and notes which attributes are read from outside of its calls."""
    depth = 0

    def noted(name: str, value: Any) -> Any:
        if depth == 0 and name not in ANY and not name.startswith("_"):
            read[name] = None
        return value

    class Noting(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return super().__call__(*args, **kwargs)
            finally:
                depth -= 1

        def __getattribute__(self, name: str) -> Any:
            return noted(name, super().__getattribute__(name))

        def __getattr__(self, name: str) -> Any:
            return noted(name, super().__getattr__(name))

    return Noting
