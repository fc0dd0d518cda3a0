"""A small model of two FFNs, and what is compared of it."""

import torch
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


def data(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 7, D, generator=generator) for _ in range(n)]


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()
