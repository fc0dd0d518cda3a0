"""Fine-tuning of converted layers one at a time, each to compute what its dense FFN did: no pass through the model.

Well conditioned and cheap, so it takes high rates and does most of the work within minutes; what the layers do to each
other it does not see, see `finetune_`.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.batches import Batches, check_batches
from sadmoe.checks import check_config
from sadmoe.dial import trainable_layers
from sadmoe.ffn import DenseFFN, FFNSite, find_ffns
from sadmoe.finetune import ExpertPenalty, FinetuneConfig, trains
from sadmoe.forward import without_autocast
from sadmoe.inputs import CHUNK, held_out_and_batches, stream_inputs
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import mode, refuse_distributed
from sadmoe.randomness import seeded
from sadmoe.training.config import Step
from sadmoe.training.guards import all_or_nothing
from sadmoe.training.loop import train
from sadmoe.training.resume import Checkpoint, Kept, check_checkpoint, held_to

logger = logging.getLogger(__name__)
LEAST = 1e-6  # of the mean of |x|^2 + |t|^2, at least, by which an error is divided: a token may be all zeros


@dataclass(frozen=True)
class LayerFit:
    """One layer after its training. error: mean over tokens of |y - t|^2 / (|x|^2 + |t|^2), and share: executed, both
    on true norms at the threshold of the run, on tokens held out from it."""

    name: str
    error: float
    share: float
    history: list[Step]
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.history)} updates in {self.seconds:.0f} s, relative error {self.error:.4f} "
            f"at an executed share of {self.share:.1%}"
        )


def finetune_layers_(
    model: nn.Module,
    batches: Batches,
    config: FinetuneConfig,
    *,
    teacher: nn.Module,
    batch_tokens: int = 1024,
    max_tokens: int = 32768,
    max_bytes: int = 2**30,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> list[LayerFit]:
    """Fine-tunes every converted layer in place on its own: mean of |y - t|^2 / (|x|^2 + |t|^2) + alpha * penalty.

    x is what enters the FFN, t what the FFN of the same name in `teacher`, the dense model, makes of it while
    `teacher` runs the batches, y what the layer does while experts of small true norm are skipped, as in
    `finetune_`, whose config holds here for each layer; `seconds` are for all layers together. Routers are not
    trained: `fit_routers_` afterwards.

    batch_tokens: in each update, about.   max_tokens: inputs of a layer to train on, of which a tenth is held out.
    max_bytes: of inputs held together, see `stream_inputs`.
    checkpoint: where to resume from after a kill, a file for each layer, see `Checkpoint`.
    A layer that is frozen is only measured. Raises ValueError where all are, or where `teacher` has no FFN of a
    layer's name and sizes. After any error the model is as it was.
    """
    check_config(config, FinetuneConfig)
    check_checkpoint(checkpoint)
    check_batches(batches)
    refuse_distributed(model)
    if config.tau is None:
        raise ValueError("finetune_layers_ picks experts by their true norms: give config.tau a threshold")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    layers = trainable_layers(model)
    with seeded(model, config.seed):  # a DataLoader may draw a number
        sites = _teachers(teacher, layers, batches)
    trained = sum(map(trains, layers.values()))
    if not trained:
        raise ValueError("no parameter of a converted layer requires a gradient, so there is none to train")
    if config.seconds is not None:
        config = replace(config, seconds=config.seconds / trained)
    fits, by_name = [], {site.name: site for site in sites}
    acts = {name: [site.act, layers[name].act] for name, site in by_name.items()}
    about = {"batch_tokens": batch_tokens, "acts": acts, **({} if checkpoint is None else held_to(teacher))}
    with all_or_nothing(model), mode(model, train=False), seeded(model, config.seed):
        for name, rows in stream_inputs(
            teacher,
            {name: site.first for name, site in by_name.items()},
            batches,
            max_tokens=max_tokens,
            max_bytes=max_bytes,
            seed=config.seed,
            progress=progress,
        ):
            dense = by_name[name].dense()
            kept = Kept(checkpoint, name, {**about, "tokens": len(rows)})
            fits.append(_fit(layers[name], dense, rows, batch_tokens, config, kept, progress))
            logger.info("fine-tuned %s", fits[-1])
    return fits


def _fit(
    layer: DynamicKMoE,
    dense: DenseFFN,
    rows: Tensor,
    batch_tokens: int,
    config: FinetuneConfig,
    kept: Kept,
    progress: bool,
) -> LayerFit:
    started = time.perf_counter()
    order = torch.randperm(len(rows), device="cpu")  # what is seeded is the model's device, not the teacher's
    rows = rows[order.to(rows.device)]
    with without_autocast(rows.device):
        targets = torch.cat([dense(part) for part in rows.split(CHUNK)])
    rows, targets = rows.to(layer.w_up), targets.to(layer.w_up.device)  # the teacher's may be others
    # Of the residual sum, token by token.
    scale = rows.float().square().sum(-1) + targets.float().square().sum(-1)
    scale = scale.clamp(min=max(LEAST * scale.mean().item(), torch.finfo(scale.dtype).tiny))
    test, batches = held_out_and_batches(
        kept.name, {"rows": rows, "targets": targets, "scale": scale}, batch_tokens
    )

    def error(batch: Any, index: int | None = None) -> Tensor:
        wrong = layer(batch["rows"]).float() - batch["targets"].float()
        return wrong.square().sum(-1).div(batch["scale"]).mean()

    with ExpertPenalty(layer, {kept.name: layer}, config) as penalty:
        history = []
        if trains(layer):
            history = train(
                layer, batches, config, error, penalty, progress=progress, at=penalty.at, kept=kept
            )
        penalty.at(1.0)
        with torch.no_grad():
            missed, share = error(test).item(), layer.mask(test["rows"]).float().mean().item()
    return LayerFit(kept.name, missed, share, history, time.perf_counter() - started)


def _teachers(teacher: nn.Module, layers: dict[str, DynamicKMoE], batches: Batches) -> list[FFNSite]:
    sites = {site.name: site for site in find_ffns(teacher, batches=batches)}
    wrong = [
        name
        for name, layer in layers.items()
        if name not in sites or not _as_large(sites[name].dense(), layer)
    ]
    if wrong:
        raise ValueError(
            f"teacher must be the dense model, but has no FFN like {', '.join(wrong)}; it has {', '.join(sites)}"
        )
    return [sites[name] for name in layers]


def _as_large(dense: DenseFFN, layer: DynamicKMoE) -> bool:
    shape = layer.shape
    return (dense.d, dense.f, dense.d_out) == (shape.d, shape.experts * shape.expert_size, shape.d_out)
