"""What is checked of arguments that many functions take: configs by their fields' types, filters."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from operator import index
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")
Filter = Callable[[str], bool]  # of a name, of a layer, an FFN or a projection: False leaves it alone


def check_config(config: Any, kind: type[Config]) -> Config:
    """The config. Raises TypeError unless it is of that kind."""
    if isinstance(config, kind):
        return config
    name = kind.__name__
    hint = f": give {name}(**config)" if isinstance(config, dict) else f": give {name}(...)"
    raise TypeError(f"config must be a {name}, got {type(config).__name__}{hint}")


def check_fields(config: Any) -> None:
    """Raises TypeError where a field of a config dataclass is not of the type that it is declared with, and ValueError
    where it is none of a Literal's. Numbers of NumPy and torch become Python's, which JSON and generators take."""
    for field in fields(config):
        value = getattr(config, field.name)
        union = get_origin(field.type) is Union or isinstance(field.type, UnionType)
        kinds = get_args(field.type) if union else (field.type,)
        if any(_is(value, kind) for kind in kinds):
            continue
        for kind in kinds:
            if get_origin(kind) is Literal:
                check_choice(f"{type(config).__name__}: {field.name}", value, get_args(kind))
        for kind in (int, float):
            with suppress(TypeError, ValueError, RuntimeError):  # what tensors of several numbers raise
                if kind in kinds and not isinstance(value, str):
                    object.__setattr__(config, field.name, index(value) if kind is int else float(value))
                    break
        else:
            wanted = " or ".join(map(_said, kinds))
            raise TypeError(f"{type(config).__name__}: {field.name} must be {wanted}, got {value!r}")


def check_range(config: Any, *names: str, least: float | None = None, above: float | None = None) -> None:
    """Raises ValueError where a field of a config dataclass is below `least`, not above `above`, NaN or inf. None
    passes."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        what = f"{type(config).__name__}: {name}"
        if least is not None and not value >= least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
        if above is not None and not value > above:
            raise ValueError(f"{what} must be above {above}, got {value}")
        if value == math.inf:
            raise ValueError(f"{what} must be finite, got {value}")


@contextmanager
def named(name: str) -> Iterator[None]:
    """A ValueError from inside begins with the name of what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_number(what: str, value: Any, where: str = "") -> None:
    """Raises TypeError unless the value, which is said to be `what`, is a number, of Python, NumPy or torch; where: it
    must be."""
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} must be a number{where}, got {value!r}")


def check_choice(what: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless the value, which is said to be `what`, is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}")


def check_filter(filter: Any) -> None:
    """Raises TypeError unless it is a function, or None."""
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be a function of a name, or None, got {filter!r}")


def _is(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is Callable:
        return callable(value)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or kind)


def _said(kind: Any) -> str:
    if kind is NoneType:
        return "None"
    if get_origin(kind) is Callable:
        return "a function"
    if kind in (int, float):
        return "an int" if kind is int else "a number"
    return f"a {(get_origin(kind) or kind).__name__}"
