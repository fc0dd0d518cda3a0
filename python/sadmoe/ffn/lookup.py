"""Paths of modules and attributes inside a module."""

from typing import Any

from torch import nn

from sadmoe.modules import unwrapped


def join(*paths: str) -> str:
    """One module path out of several, of which some may be empty."""
    return ".".join(p for p in paths if p)


def is_module(block: nn.Module, path: str) -> bool:
    """Whether there is a module at `path`."""
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def lookup(block: nn.Module, path: str) -> tuple[dict[str, Any], str, Any]:
    """The dict that holds a module or attribute, its name in it, and itself.

    An attribute hides a module of the same name, as in Python. Raises AttributeError where there is neither.
    """
    owner_path, _, name = path.rpartition(".")
    owner = unwrapped(block.get_submodule(owner_path))
    table: dict[str, Any] = owner.__dict__ if name in owner.__dict__ else owner._modules
    if name not in table:
        raise AttributeError(f"{type(owner).__name__} has no {name}")
    return table, name, table[name]


def put(block: nn.Module, path: str, new: Any) -> None:
    """Replaces the module or attribute at `path`."""
    table, name, _ = lookup(block, path)
    table[name] = new
