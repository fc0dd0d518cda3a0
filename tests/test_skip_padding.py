"""What leaves padding out counts it where it is told to."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import sadmoe
import torch
from converted import random_rows
from sadmoe.convert import ConvertConfig
from states import same, state
from tiny_models import UserFFN
from torch import Tensor, nn

ROUTER = sadmoe.RouterConfig(width=4, steps=20)


class Unmoved(nn.Module):
    """Takes a mask of padding and computes the same, so that nothing but what is counted depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = UserFFN(nn.ReLU())

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + self.ffn(x)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(2)
    return Unmoved().eval()


@pytest.fixture(scope="module")
def skipping(dense) -> nn.Module:
    model = copy.deepcopy(dense)
    sadmoe.convert_(model, batches(None), ConvertConfig(experts=5, router=ROUTER), progress=False)
    sadmoe.set_tau(model, 0.6)
    return model


def batches(mask: Tensor | None) -> list[dict[str, Tensor]]:
    """Rows of which the last are unlike all others."""
    rows = random_rows(20 * 9).reshape(10, 2, 9, 24)
    rows[:, :, 5:] = rows[:, :, 5:].abs() * 3
    return [{"x": x} if mask is None else {"x": x, "attention_mask": mask} for x in rows]


def fitted(model: nn.Module, batches: list, skip_padding: bool) -> dict[str, Tensor]:
    sadmoe.fit_routers_(model, batches, ROUTER, skip_padding=skip_padding)
    return state(model)


def made(model: nn.Module, batches: list, skip_padding: bool) -> dict[str, Tensor]:
    sadmoe.restore_(model)
    config = ConvertConfig(experts=5, router=ROUTER, skip_padding=skip_padding)
    sadmoe.convert_(model, batches, config, progress=False)
    return state(model)


def made_up_for(model: nn.Module, batches: list, skip_padding: bool) -> dict[str, Tensor]:
    sadmoe.compensate_(model, batches, rank=2, skip_padding=skip_padding, progress=False)
    return state(model)


WAYS: dict[str, Callable[[nn.Module, list, bool], Any]] = {
    "convert_": made,
    "fit_routers_": fitted,
    "compensate_": made_up_for,
    "cost": lambda model, batches, skip: sadmoe.cost(model, batches, skip_padding=skip),
    "calibrate_": lambda *args: calibrated(sadmoe.calibrate_, *args),
    "calibrate_layers_": lambda *args: calibrated(sadmoe.calibrate_layers_, *args),
}


def calibrated(calibrate: Callable, model: nn.Module, batches: list, skip_padding: bool) -> float:
    return calibrate(model, batches, budget=0.7, skip_padding=skip_padding).share


@pytest.mark.parametrize("name", WAYS)
def test_padding_counts_where_it_is_asked_for(name, skipping):
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, 5:] = 0

    def found(mask: Tensor | None, skip_padding: bool) -> Any:
        return WAYS[name](copy.deepcopy(skipping), batches(mask), skip_padding)

    def alike(a: Any, b: Any) -> bool:
        return same(a, b) if isinstance(a, dict) else a == b

    without, counted, left_out = found(None, True), found(mask, False), found(mask, True)
    assert alike(counted, without)
    assert not alike(left_out, without)
