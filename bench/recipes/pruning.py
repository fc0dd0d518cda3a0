"""Structured pruning as a baseline: the neurons that add most on average stay, for every token; nothing is chosen."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

from sadmoe import SparsifyConfig
from sadmoe.batches import run, to_device
from sadmoe.demo.rows import added_to, masked
from sadmoe.ffn import FFNSite, find_ffns
from sadmoe.mixed import fast_training
from sadmoe.modules import device_of, evaluating, mode
from sadmoe.training.loop import UNKEPT, train
from sadmoe.training.objective import OutputLoss, distill_hidden
from sadmoe.training.resume import Kept
from torch import Tensor, nn

MULTIPLE = 8  # of neurons, so that a narrow product is no slower than it has to be


def pruned(model: nn.Module, batches: Sequence[Any], share: float) -> nn.Module:
    """A copy in which every FFN keeps that share of its neurons, those of largest mean |a_j| |w_down,j| over the
    batches."""
    model = copy.deepcopy(model)
    sites = find_ffns(model)
    sums: dict[str, Tensor] = {}
    with evaluating(model), masked(sites, added_to(sums)):
        for batch in batches:
            run(model, to_device(batch, device_of(model)))
    for site in sites:
        mean = sums[site.name]
        count = max(1, round(share * len(mean) / MULTIPLE)) * MULTIPLE
        keep_(site, mean.topk(min(count, len(mean))).indices.sort().values)
    return model


def trained(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Any],
    config: SparsifyConfig,
    output_loss: OutputLoss | Literal["logits"] | None,
    kept: Kept = UNKEPT,
) -> nn.Module:
    """The pruned model, after it was trained towards the dense one as ours is."""
    with fast_training(model, dense), mode(dense, train=False):
        sites = find_ffns(model)
        objective = distill_hidden(model, dense, sites, output_loss, kept_bytes=config.kept_bytes)
        train(model, batches, config, objective, progress=True, kept=kept)
    model.zero_grad(set_to_none=True)
    return model.eval()


def keep_(site: FFNSite, neurons: Tensor) -> None:
    """Leaves those neurons [n] alone in the layers of an FFN, in place."""
    for role, linear in site.linears.items():
        if not isinstance(linear, nn.Linear) or site.parts.gate_half is not None:
            raise TypeError(
                f"{site.name}: pruning is of nn.Linear, one for each part, and {role} is {linear}"
            )
        cut = neurons if role != "down" else slice(None), neurons if role == "down" else slice(None)
        linear.weight = nn.Parameter(linear.weight.detach()[cut].contiguous())
        if linear.bias is not None and role != "down":
            linear.bias = nn.Parameter(linear.bias.detach()[neurons])
        linear.out_features, linear.in_features = linear.weight.shape
