"""The configs of transformers that modules of a model hold."""

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from weakref import ref

from torch import nn

# By the id of a config: itself, and what it was copied from. An entry goes when its config does.
_origins: dict[int, tuple[ref[Any], list[ref[Any]]]] = {}


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

    A config inside another, that of an encoder say, stays the same object in both places: also where the encoder was
    given a copy of it before, alone; but in a deep copy of the model nothing is known of that.
    """
    memo: dict[int, Any] = {}
    held = configs_in(model)
    for origin, own in reversed(parted_configs(model)):  # what is inside another first
        if not any(origin is config for config, _ in held):
            memo[id(origin)] = copy.deepcopy(own, memo)
    former = [(model.get_submodule(name), config) for config, owners in held for name in owners]
    copies = [copy.deepcopy(config, memo) for _, config in former]
    for (module, config), new in zip(former, copies, strict=True):
        module.__dict__["config"] = new
        also = [memo[id(origin)] for origin in _origins_of(config) if id(origin) in memo]
        _note_origins(new, [config, *_origins_of(config), *(one for one in also if one is not new)])

    def undo() -> None:
        for module, config in former:
            module.__dict__["config"] = config

    return undo


def parted_configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """What a part of the model was given a copy of for itself, and that copy, where the rest of the model still has
    what it was copied from."""
    held = [config for config, _ in configs_in(model)]
    if not any(map(_origins_of, held)):
        return []
    inside = {id(each): each for config in held for each in _with_inner(config)}
    return [
        (inside[id(origin)], config)
        for config in held
        for origin in _origins_of(config)
        if id(origin) in inside
    ]


def _with_inner(config: Any) -> Iterator[Any]:
    yield config
    for value in getattr(config, "__dict__", {}).values():
        if hasattr(value, "model_type"):
            yield from _with_inner(value)


def _note_origins(new: Any, origins: list[Any]) -> None:
    key = id(new)
    with suppress(TypeError):  # of a class without weak references
        _origins[key] = (ref(new, lambda _: _origins.pop(key, None)), list(map(ref, origins)))


def _origins_of(config: Any) -> list[Any]:
    _, origins = _origins.get(id(config), (None, []))
    return [origin for each in origins if (origin := each()) is not None]
