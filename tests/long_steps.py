"""The steps that take long, each on a small model, and how they are killed."""

import copy
import functools

import sadmoe
import torch
from sadmoe import Checkpoint, ConvertConfig, FinetuneConfig, RouterConfig, SparsifyConfig
from tiny_models import TINY, tokens
from torch import Tensor, nn

STEPS = 6


def batches(n: int = 5) -> list[dict[str, Tensor]]:
    ids = (torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(n))
    return [tokens() | {"input_ids": one} for one in ids]


def converted() -> tuple[nn.Module, nn.Module]:
    """A dense model, and the same converted."""
    return copy.deepcopy(converted_once())


@functools.cache
def converted_once() -> tuple[nn.Module, nn.Module]:
    dense = TINY["bert"].model()
    model = copy.deepcopy(dense)
    config = ConvertConfig(experts=6, tau=0.2, router=RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, batches(), config, progress=False)
    return dense, model


def sparsify(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = SparsifyConfig(
        steps=STEPS, objective="task", lr=1e-3, seed=3
    )  # dropout is on: random state counts
    return sadmoe.sparsify_(
        model, data or batches(), config, loss=mean_square, checkpoint=checkpoint, progress=False
    )


def finetune(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = FinetuneConfig(steps=STEPS, lr=1e-3)
    return sadmoe.finetune_(
        model, data or batches(), config, teacher=dense, checkpoint=checkpoint, progress=False
    )


def finetune_layers(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = FinetuneConfig(steps=STEPS // 2, lr=1e-3)
    return sadmoe.finetune_layers_(
        model, data or batches(), config, teacher=dense, batch_tokens=8, checkpoint=checkpoint, progress=False
    )


def fit_routers(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = RouterConfig(steps=4, width=4)
    return sadmoe.fit_routers_(model, data or batches(), config, checkpoint=checkpoint)


def replace_projections(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = sadmoe.ProjectionConfig(steps=2)
    return sadmoe.replace_projections_(
        model, data or batches(), config, checkpoint=checkpoint, progress=False
    )


def convert(model: nn.Module, dense: nn.Module, checkpoint: Checkpoint | None, data=None):
    config = ConvertConfig(experts=6, tau=0.2, cluster="activity", router=RouterConfig(steps=4, width=4))
    return sadmoe.convert_(model, data or batches(), config, checkpoint=checkpoint, progress=False)


def mean_square(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state.square().mean()


def start(step) -> tuple[nn.Module, nn.Module]:
    dense, model = converted()
    return (
        (copy.deepcopy(dense), dense) if step in (sparsify, replace_projections, convert) else (model, dense)
    )


class Killed(Exception):
    """Stands for whatever ends a run."""


class KilledAt(list):
    """Batches that end the run when they are asked for one the n-th time."""

    def __init__(self, values: list, n: int):
        super().__init__(values)
        self.left = n

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(i)


TRAINS = {
    finetune_layers: "layerwise.train",
    replace_projections: "attention.train",
    fit_routers: "routers.fit_router_",
    convert: "convert.build.fit_router_",
}
ALL = [sparsify, finetune, finetune_layers, fit_routers, replace_projections, convert]


def assert_close_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To rounding, of which AdamW makes more. Attention does not feel the bias of the keys: its gradient is nothing
    but rounding, and so is where AdamW takes it."""
    assert a.keys() == b.keys()
    for key in a:
        if not key.endswith("key.bias"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
