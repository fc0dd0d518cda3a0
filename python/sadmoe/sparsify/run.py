"""The ready training of a dense model to be sparse: `sparsify_` and its report."""

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn

from sadmoe.batches import Batches, check_batches, settle
from sadmoe.checks import Filter, check_config
from sadmoe.ffn import FFNSite, find_ffns, swap_activations_
from sadmoe.modules import mode, refuse_compiled, refuse_distributed
from sadmoe.randomness import seeded
from sadmoe.reference import RECTIFIERS
from sadmoe.sparsify.config import SparsifyConfig
from sadmoe.sparsify.penalty import LayerSparsity, SparsityLoss, measure_first, measure_sparsity
from sadmoe.training import Checkpoint, Step, processes
from sadmoe.training.guards import all_or_nothing
from sadmoe.training.loop import train
from sadmoe.training.objective import Loss, Objective, distill_hidden, distill_logits, task
from sadmoe.training.resume import Kept, check_checkpoint, held_to

logger = logging.getLogger(__name__)
MEASURED_BATCHES = 8  # of the training batches, for the sparsity before and after


@dataclass(frozen=True)
class SparsifyReport:
    """Sparsity of each FFN before and after, and the history of the run. Prints as a table."""

    before: list[LayerSparsity]
    after: list[LayerSparsity]
    history: list[Step]
    seconds: float

    @property
    def zero(self) -> float:
        """Share of exact zeros after the run, over all FFNs."""
        return _share(self.after, "zero")

    @property
    def zero_before(self) -> float:
        """The same before the run."""
        return _share(self.before, "zero")

    @property
    def small(self) -> float:
        """Share below 1 % of the token's largest activation after the run, over all FFNs."""
        return _share(self.after, "small")

    def __str__(self) -> str:
        rows = [
            (a.name, a.f, b.zero, a.zero, b.small, a.small)
            for b, a in zip(self.before, self.after, strict=True)
        ]
        old = [_share(self.before, key) for key in ("zero", "small")]
        rows.append(("all", sum(a.f for a in self.after), old[0], self.zero, old[1], self.small))
        width = max(len("FFN"), *(len(row[0]) for row in rows))
        lines = [f"{'FFN':{width}}  {'neurons':>7}  {'exactly 0':>16}  {'below 1 % of max':>16}"]
        for name, f, *shares in rows:
            b0, a0, b1, a1 = (f"{100 * share:.1f}" for share in shares)
            lines.append(f"{name:{width}}  {f:>7}  {b0:>5} -> {a0:>5} %  {b1:>5} -> {a1:>5} %")
        last = self.history[-1]
        lines.append(
            f"{len(self.history)} updates in {self.seconds:.0f} s, the last: objective {last.objective:.4f}, "
            f"penalty {last.penalty:.4f} at alpha {last.alpha:.3g}"
        )
        return "\n".join(lines)


def sparsify_(
    model: nn.Module,
    batches: Batches,
    config: SparsifyConfig,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    filter: Filter | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> SparsifyReport:
    """Fine-tunes the model in place so that fewer neurons are active: objective + alpha * penalty.

    It trains every parameter that requires a gradient; freeze what should stay. With a distilling objective
    a frozen copy of the model as it was is the teacher, or `teacher`, and dropout is off. Lists are shuffled by
    `config.seed`, a DataLoader goes by its own order; with `steps` two runs on one machine are equal.
    Padding counts nowhere. For mixed precision call it under torch.autocast. The global random state and
    training flags are left alone; gradients are dropped.

    loss: (model, batch) -> scalar that runs the model itself, as in `calibrate_`, for the objective "task";
    the model's own `.loss` if None.   teacher: a model of the same blocks, such as the one that
    `replace_projections_` was given a copy of; in eval mode meanwhile.
    filter: which FFNs, as in `find_ffns`.   checkpoint: where to resume from after a kill, see `Checkpoint`; with
    processes, see `SparsifyConfig.accumulate`.   Source: arXiv 2310.04361, section 3.1.
    Raises ValueError and TypeError for wrong input, FloatingPointError where the loss is not finite.
    Whatever is raised, the model is as it was before, bit for bit.
    """
    check_config(config, SparsifyConfig)
    check_checkpoint(checkpoint)
    check_batches(batches)
    refuse_compiled(model)
    refuse_distributed(model)
    if loss is not None and config.objective != "task":
        raise ValueError(f'loss is used by objective "task" alone, got objective={config.objective!r}')
    if teacher is not None and config.objective == "task":
        raise ValueError('teacher is used by the distilling objectives, got objective="task"')
    if teacher is not None:
        refuse_compiled(teacher, "teacher")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    with seeded(model, config.seed):  # a DataLoader may draw a number
        sites = find_ffns(model, filter, batches=batches, loss=loss)
    started = time.perf_counter()
    with all_or_nothing(model), seeded(model, config.seed):
        processes.as_first_([*model.parameters(), *model.buffers()])  # the teacher is a copy of it
        acts = {site.name: site.act for site in sites}
        before, sample = measure_first(model, batches, sites, loss, MEASURED_BATCHES)
        dense = None
        if config.objective != "task":
            dense = copy.deepcopy(model).requires_grad_(False) if teacher is None else teacher
        if config.relu_swap:
            dense_acts = [site for site in sites if site.act not in RECTIFIERS]
            swap_activations_(model, dense_acts, "relu")
        objective = _objective(model, dense, config, sites, loss)
        held = {} if checkpoint is None else held_to(teacher, loss=loss)
        with (
            mode(model, train=config.objective == "task"),
            nullcontext() if dense is None else mode(dense, train=False),
        ):
            if dense is not None:
                settle(model, sample)
            penalty = SparsityLoss(model, sites, penalty=config.penalty, displacement=config.displacement)
            with penalty:
                kept = Kept(checkpoint, "sparsify", {"acts": acts, **held})
                history = train(model, batches, config, objective, penalty, progress=progress, kept=kept)
        after = measure_sparsity(model, sample, sites, loss=loss)
    report = SparsifyReport(before, after, history, time.perf_counter() - started)
    logger.info("sparsified %d FFNs: %.1f %% of the activations are exactly 0", len(sites), 100 * report.zero)
    return report


def _objective(
    model: nn.Module,
    dense: nn.Module | None,
    config: SparsifyConfig,
    sites: Sequence[FFNSite],
    loss: Loss | None,
) -> Objective:
    if dense is None:
        return task(model, loss, 'objective="distill_hidden"')
    if config.objective == "distill_logits":
        return distill_logits(model, dense, kept_bytes=config.kept_bytes)
    return distill_hidden(model, dense, sites, kept_bytes=config.kept_bytes)


def _share(layers: Sequence[LayerSparsity], key: str) -> float:
    return sum(getattr(layer, key) * layer.f for layer in layers) / sum(layer.f for layer in layers)
