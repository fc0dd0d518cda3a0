"""Models that are converted in tests, how, and what is left of them."""

from collections.abc import Callable
from itertools import count

import torch
from sadmoe.convert import ConvertConfig, convert_
from sadmoe.masks import record_masks
from sadmoe.routers import RouterConfig
from tiny_models import TINY, UserFFN
from torch import Tensor, nn

ROUTER = RouterConfig(width=8, steps=30)
CONFIG = ConvertConfig(expert_size=5, router=ROUTER)


def model_and_batches(name: str = "user glu") -> tuple[nn.Module, list]:
    return TINY[name].model(), [TINY[name].batch()]


def convert(model: nn.Module, batches: list, **changes):
    config = {"expert_size": 5, "router": ROUTER} | changes
    return convert_(model, batches, ConvertConfig(**config), progress=False)


def fingerprint(model: nn.Module) -> list:
    """Every object that hangs in the model, its attributes and hooks, and the bits of its tensors."""
    found: list = []
    for name, module in model.named_modules():
        tables = {
            k: {key: id(v) for key, v in t.items()} for k, t in module.__dict__.items() if isinstance(t, dict)
        }
        plain = {k: id(v) for k, v in module.__dict__.items() if k not in tables}
        found.append((name, id(module), module.training, tables, plain))
    found += [(k, v.detach().clone().view(torch.uint8).tolist()) for k, v in model.state_dict().items()]
    return [*found, [(p.requires_grad, p.grad is None) for p in model.parameters()]]


def raising(error: type[BaseException], after: int, original: Callable) -> Callable:
    """The original for the first calls, then an error once it has done its work."""
    calls = count()

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) >= after:
            raise error("injected")
        return result

    return wrapped


class Caller(nn.Module):
    """Calls its FFN as the function says."""

    def __init__(self, call: Callable):
        super().__init__()
        self.mlp, self.call = Named(), call

    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(self.mlp, x)


class Named(UserFFN):
    """An FFN whose input has another name, and that takes more than it needs."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states) * scale


def rows() -> Tensor:
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))


def record(model: nn.Module) -> dict:
    with record_masks(model) as seen:
        model(rows())
    return seen.layers
