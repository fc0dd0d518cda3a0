"""What is checked of every config, before the values of its fields."""

from collections.abc import Callable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

Config = TypeVar("Config")
NUMBERS = {int: ("__index__", "an int"), float: ("__float__", "a number")}  # NumPy's and torch's are as good


def check_config(config: Any, kind: type[Config]) -> Config:
    """The config. Raises TypeError unless it is of that kind."""
    if isinstance(config, kind):
        return config
    name = kind.__name__
    hint = f": give {name}(**config)" if isinstance(config, dict) else ""
    raise TypeError(f"config must be a {name}, got a {type(config).__name__}{hint}")


def check_fields(config: Any) -> None:
    """Raises TypeError where a field of a config dataclass is not of the type that it is declared with."""
    for field in fields(config):
        value = getattr(config, field.name)
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        if not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(map(_said, kinds))
            raise TypeError(f"{type(config).__name__}: {field.name} must be {wanted}, got {value!r}")


def _is(value: Any, kind: Any) -> bool:
    if kind in NUMBERS:
        return hasattr(value, NUMBERS[kind][0])
    if get_origin(kind) is Callable:
        return callable(value)
    return not isinstance(kind, type) or isinstance(
        value, kind
    )  # of Literals their configs say what they may be


def _said(kind: Any) -> str:
    if kind is NoneType:
        return "None"
    if get_origin(kind) is Callable:
        return "a function"
    return NUMBERS[kind][1] if kind in NUMBERS else f"a {kind.__name__}"
