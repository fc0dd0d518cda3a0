"""The configs of transformers that modules of a model hold."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def configs_in(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """Each config once, with the names of the modules that hold it."""
    names: dict[int, tuple[Any, list[str]]] = {}
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        if hasattr(config, "model_type"):  # else it is the user's own, and no business of ours
            names.setdefault(id(config), (config, []))[1].append(name)
    return list(names.values())


def own_configs(model: nn.Module) -> Callable[[], None]:
    """Gives the model copies of its configs, which other models may hold too; call what it returns to undo it.

    A config inside another, that of an encoder say, stays the same object in both places.
    """
    memo: dict[int, Any] = {}
    former = [(model.get_submodule(name), config) for config, owners in configs_in(model) for name in owners]
    copies = [copy.deepcopy(config, memo) for _, config in former]
    for (module, _), config in zip(former, copies, strict=True):
        module.__dict__["config"] = config

    def undo() -> None:
        for module, config in former:
            module.__dict__["config"] = config

    return undo
