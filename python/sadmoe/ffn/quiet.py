"""Running a module of someone's model without leaving a trace in it."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, no autocast, and none of the module's forward hooks fire."""
    modules = list(module.modules())
    training = [m.training for m in modules]
    hooks = [{name: m.__dict__[name] for name in _HOOKS} for m in modules]
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
        try:
            for m in modules:
                m.training = False
                m.__dict__.update({name: OrderedDict() for name in _HOOKS})
            yield
        finally:
            for m, flag, saved in zip(modules, training, hooks, strict=True):
                m.training = flag
                m.__dict__.update(saved)
