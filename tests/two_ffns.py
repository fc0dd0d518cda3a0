"""A small model of two FFNs, and what is compared of it."""

import torch
from sadmoe.sparsify import SparsifyConfig, sparsify_
from tiny_models import Residual
from torch import Tensor, nn

D, FF = 24, 60


class Plain(nn.Module):
    """An FFN with dropout whose activation is a module."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.expand, self.act, self.contract = nn.Linear(D, FF), act, nn.Linear(FF, D)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.contract(self.act(self.expand(x))))


def two_ffns(act: type[nn.Module] = nn.ReLU, make=Plain) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Residual(make(act()) if make is Plain else make()) for _ in range(2))
    return nn.Sequential(*blocks).eval()


class KeepsTable(nn.Module):
    """Adds a table of positions, made of a parameter, which it keeps in evaluation mode, as timm's TinyViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.kept = nn.Parameter(torch.ones(D)), {}

    def train(self, mode: bool = True) -> nn.Module:
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + 2 * self.places
        if not self.kept:
            self.kept["table"] = 2 * self.places
        return x + self.kept["table"]


def data(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 7, D, generator=generator) for _ in range(n)]


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def short(**kw) -> SparsifyConfig:
    return SparsifyConfig(**({"steps": 6, "lr": 5e-3, "alpha": 1.0} | kw))


def run_sparsify(model: nn.Module, config: SparsifyConfig, batches=None, loss=None):
    batches = data() if batches is None else batches
    return sparsify_(model, batches, config, loss=loss, progress=False)
