"""The ready training loop: `sparsify_` and its configuration and report."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import Batch, Batches, check_batches, device_of, to_device
from sadmoe.ffn import FFNSite, find_ffns, swap_activations_
from sadmoe.sparsify.guards import all_or_nothing, mode, seeded
from sadmoe.sparsify.objective import Loss, Objective, distill_hidden, distill_logits, task
from sadmoe.sparsify.penalty import PENALTIES, LayerSparsity, Penalty, SparsityLoss, measure_sparsity

logger = logging.getLogger(__name__)
Schedule = Literal["constant", "linear", "linear_warmup"]
Goal = Literal["task", "distill_hidden", "distill_logits"]
MEASURED_BATCHES = 8  # of the training batches, for the sparsity before and after


@dataclass(frozen=True)
class SparsifyConfig:
    """How a model is made sparse. Give `steps`, which makes the run repeatable, or `seconds`."""

    steps: int | None = None  # updates of the weights
    seconds: float | None = None  # of wall time for the updates, instead of steps
    objective: Goal = "distill_hidden"  # needs no labels; the task's loss is what the paper trains on
    penalty: Penalty = "hoyer"  # the paper's choice for ReLU models; "l1" is its older one
    alpha: float = 0.3  # weight of the penalty per f (see SparsityLoss): 80 % zeros in MiniLM within minutes
    schedule: Schedule = (
        "linear_warmup"  # of alpha: over the first half, then flat; "linear" over the whole run
    )
    relu_swap: bool = True  # activations become ReLU first: only that makes exact zeros
    displacement: float = (
        -10.0
    )  # where GELU and SiLU are pushed to when they are kept; the paper's code has -10
    lr: float = 2e-4  # AdamW's, at the end of its warm-up; then it falls linearly to 0
    warmup: float = 0.1  # share of the run in which lr rises
    weight_decay: float = 0.01  # of the matrices, not of biases and norms
    grad_clip: float = 1.0  # largest norm of the gradient, as in the paper's code
    seed: int = 0  # of the order of the batches and of dropout

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                f"give steps or seconds, one of the two, got steps={self.steps} and seconds={self.seconds}"
            )
        for name, choices in (
            ("objective", get_args(Goal)),
            ("penalty", tuple(PENALTIES)),
            ("schedule", get_args(Schedule)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("steps", "seconds", "lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        for name in ("alpha", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the run in [0, 1), got {self.warmup}")

    def alpha_at(self, done: float) -> float:
        """Weight of the penalty when the share `done` of the run, in [0, 1], is over."""
        return (
            self.alpha * {"constant": 1.0, "linear": done, "linear_warmup": min(2 * done, 1.0)}[self.schedule]
        )

    def lr_at(self, done: float) -> float:
        """Learning rate when the share `done` of the run, in [0, 1], is over."""
        return self.lr * (done / self.warmup if done < self.warmup else (1 - done) / (1 - self.warmup))


@dataclass(frozen=True)
class Step:
    """One update: objective and penalty before it (the penalty divided by f, without alpha)."""

    objective: float
    penalty: float
    alpha: float
    lr: float


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
    filter: Callable[[str], bool] | None = None,
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
    `replace_projections_` was given a copy of; put into eval mode.
    filter: which FFNs, as in `find_ffns`.   Source: arXiv 2310.04361, section 3.1.
    Raises ValueError and TypeError for wrong input, FloatingPointError where the loss is not finite.
    Whatever is raised, the model is as it was before, bit for bit.
    """
    check_batches(batches)
    if loss is not None and config.objective != "task":
        raise ValueError(f'loss is used by objective "task" alone, got objective={config.objective!r}')
    if teacher is not None and config.objective == "task":
        raise ValueError('teacher is used by the distilling objectives, got objective="task"')
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    sites = find_ffns(model, filter)
    started = time.perf_counter()
    with (
        all_or_nothing(model) as undo,
        mode(model, train=config.objective == "task"),
        seeded(model, config.seed),
    ):
        sample = list(islice(batches, MEASURED_BATCHES))
        before = measure_sparsity(model, sample, sites)
        dense = None
        if config.objective != "task":
            dense = copy.deepcopy(model).requires_grad_(False) if teacher is None else teacher
            dense.eval()
        if config.relu_swap:
            undo.append(swap_activations_(model, sites, "relu"))
        objective = _objective(model, dense, config, sites, loss)
        with SparsityLoss(model, sites, penalty=config.penalty, displacement=config.displacement) as sparsity:
            history = train(model, batches, config, objective, sparsity, progress)
        after = measure_sparsity(model, sample, sites)
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
        return task(model, loss)
    if config.objective == "distill_logits":
        return distill_logits(model, dense)
    return distill_hidden(model, dense, sites)


def train(
    model: nn.Module,
    batches: Batches,
    config: SparsifyConfig,
    objective: Objective,
    penalty_of: Callable[[Any], Tensor],
    progress: bool,
    at: Callable[[float], None] = lambda done: None,
) -> list[Step]:
    """Minimises objective(batch) + alpha * penalty_of(batch or None) by the config's schedule.

    at(done) is called before each update with the share of the run that is over.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    history: list[Step] = []
    device, stream, started = device_of(model), _endless(batches, config.seed), time.perf_counter()
    with tqdm(
        total=config.steps or math.ceil(config.seconds or 0),
        unit="step" if config.steps else "s",
        desc="sparsify",
        disable=not progress,
    ) as bar:
        while (done := _done(config, len(history), time.perf_counter() - started)) < 1:
            at(done)
            alpha, lr = config.alpha_at(done), config.lr_at(done)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = to_device(next(stream), device)
            value = objective(batch)
            penalty = penalty_of(batch if isinstance(batch, Mapping) else None)
            _check_finite(value, penalty, len(history))
            optimizer.zero_grad(set_to_none=True)
            (value + alpha * penalty).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            torch.clear_autocast_cache()  # an autocast around the whole run keeps the weights of before the step
            history.append(Step(value.item(), penalty.item(), alpha, lr))
            bar.update(1 if config.steps else min(int(time.perf_counter() - started), bar.total) - bar.n)
            bar.set_postfix(objective=f"{history[-1].objective:.4f}", penalty=f"{history[-1].penalty:.4f}")
    return history


def _done(config: SparsifyConfig, steps: int, seconds: float) -> float:
    """Share of the run that is over: by steps the middle of the next one, so that no update has lr 0; 1
    ends it."""
    if config.steps is not None:
        return (steps + 0.5) / config.steps if steps < config.steps else 1.0
    assert config.seconds is not None
    return max(seconds / config.seconds, 1e-3) if steps == 0 else seconds / config.seconds


def _endless(batches: Batches, seed: int) -> Iterator[Batch]:
    """The batches again and again: a list in a new order each time, anything else in its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if isinstance(batches, Sequence):
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())
        else:
            yield from batches


def _check_finite(value: Tensor, penalty: Tensor, step: int) -> None:
    if not (value.isfinite() and penalty.isfinite()):
        raise FloatingPointError(
            f"sparsify_ diverged at update {step}: objective {value.item()}, penalty {penalty.item()}; "
            "lower lr or alpha"
        )


def _share(layers: Sequence[LayerSparsity], key: str) -> float:
    return sum(getattr(layer, key) * layer.f for layer in layers) / sum(layer.f for layer in layers)
