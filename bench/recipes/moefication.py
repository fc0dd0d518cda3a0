"""MoEfication (arXiv 2110.01786) as a baseline: k-means on input weights, its router, static top-k.

Its router tells which experts are active, not how large their outputs are: two layers with tanh between, trained with
binary cross-entropy on each expert's summed activation over the largest in sight.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from sadmoe import Checkpoint, ConvertConfig, RouterConfig, SparsifyConfig, convert_, moe_layers, tau
from sadmoe.batches import Batches
from sadmoe.inputs import held_out_and_batches, stream_inputs
from sadmoe.layer import DynamicKMoE
from sadmoe.randomness import seeded
from sadmoe.reference import linear_of_experts
from sadmoe.training.loop import train
from sadmoe.training.resume import Kept
from torch import Tensor, nn

WIDTH = 128  # of the router, as in that paper's re-implementation
PROJECTION_WIDTH = 32  # of one of attention's projections, which that paper does not have: ours


class ActivityRouter(nn.Module):
    """x v1ᵀ, tanh, v2ᵀ: logits that an expert is active. v1 [r, d], v2 [E, r]: the names that costs are told by."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.v1, self.v2 = (nn.Parameter(v.detach().clone()) for v in (like.v1, like.v2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x.float(), self.v1.float())), self.v2.float())


def moefied(
    dense: nn.Module,
    batches: Batches,
    expert_size: int,
    steps: int,
    tokens: int,
    checkpoint: Checkpoint,
    seed: int,
) -> nn.Module:
    """A copy of a ReLU model in experts, with that router in every layer. Its gates are for the caller: TopK.

    checkpoint: where the routers are saved, to be taken up again after a kill.
    """
    model = copy.deepcopy(dense)
    config = ConvertConfig(
        expert_size=expert_size, cluster="weights", router=RouterConfig(width=WIDTH, steps=1),
        projection_router=RouterConfig(width=PROJECTION_WIDTH, steps=1), max_tokens=min(tokens, 8192), seed=seed,
    )  # fmt: skip
    convert_(model, batches, config, progress=False)
    layers = moe_layers(model)
    with tau(model, 0.0), seeded(model, seed):
        for name, rows in stream_inputs(model, layers, batches, max_tokens=tokens):
            layers[name].router = fitted(layers[name], rows, steps, checkpoint, name, seed)
    return model


def fitted(
    layer: DynamicKMoE, rows: Tensor, steps: int, checkpoint: Checkpoint, name: str, seed: int
) -> ActivityRouter:
    """The router of one layer, from what enters it."""
    with torch.no_grad():
        sums = torch.cat([activity(layer, part) for part in rows.split(2048)])
    router = ActivityRouter(layer.router)
    _, chunks = held_out_and_batches(name, {"rows": rows, "labels": sums / sums.max().clamp(min=1e-12)}, 512)

    def objective(batch: Any, index: int | None = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(router(batch["rows"]), batch["labels"])

    config = SparsifyConfig(steps=steps, alpha=0.0, lr=1e-3, seed=seed)
    kept = Kept(checkpoint, name, {})
    train(router, chunks, config, objective, progress=False, kept=kept)
    return router


def activity(layer: DynamicKMoE, rows: Tensor) -> Tensor:
    """Summed activations of each expert's neurons: [T, d] -> [T, E]."""
    weight, bias = (layer.w_up, layer.b_up) if layer.w_gate is None else (layer.w_gate, layer.b_gate)
    gate = linear_of_experts(rows, weight, bias)
    return gate.relu().unflatten(-1, (layer.experts, layer.expert_size)).sum(-1)
