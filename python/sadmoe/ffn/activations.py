"""Which activation a module or a function is, found by calling it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sadmoe import reference
from sadmoe.ffn.quiet import quiet
from sadmoe.undo import snapshot


class Activation(nn.Module):
    """A function of `reference.ACTIVATIONS` for which torch has no module."""

    def __init__(self, act: str):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return reference.ACTIVATIONS[self.act](x)

    def extra_repr(self) -> str:
        return self.act


ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {  # of each key of `reference.ACTIVATIONS`
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "quick_gelu": partial(Activation, "quick_gelu"),
    "relu2": partial(Activation, "relu2"),
}
PASSES = (nn.Dropout, nn.Identity)  # what lets its input through in evaluation mode
_FUNCTIONS = {F.relu, F.gelu, F.silu, torch.relu}


def which_activation(fn: Callable[[Tensor], Tensor]) -> str | None:
    """The key of `reference.ACTIVATIONS` that fn computes on [-12, 12], to 1e-5, else None."""
    grid = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu")
    try:
        y = fn(grid.clone())
        errors = {name: (y - act(grid)).abs().max().item() for name, act in reference.ACTIVATIONS.items()}
    except Exception:  # whatever a foreign function raises, it is not an activation
        return None
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < 1e-5 else None


def is_bare(module: nn.Module) -> bool:
    """Whether it has no children, parameters or buffers."""
    return next(module.children(), None) is None and not module._parameters and not module._buffers


def activation_children(module: nn.Module) -> dict[str, str | None]:
    """Children that may be activations (no weights, no children, no dropout), each with its key or None."""
    found: dict[str, str | None] = {}
    several_places = isinstance(module, nn.Sequential)  # elsewhere it is one of two names that forward reads
    children = module._modules.items() if several_places else module.named_children()
    for name, child in children:
        if child is not None and is_bare(child) and not isinstance(child, PASSES):
            put_back = snapshot(child)  # it may keep what it was given
            with quiet(child):
                found[name] = which_activation(child)
            put_back()
    return found


def activation_attributes(module: nn.Module) -> dict[str, str]:
    """Attributes of a module that hold an activation function (torch's own, or named after an activation)."""
    found = {}
    for name, value in module.__dict__.items():
        known = callable(value) and any(getattr(value, "func", value) is one for one in _FUNCTIONS)
        if known or (callable(value) and "act" in name.lower() and not isinstance(value, type)):
            act = which_activation(value)
            if act is not None:
                found[name] = act
    return found
