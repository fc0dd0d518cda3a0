"""The one training loop of sadmoe: an objective, a penalty, a schedule."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import NOTHING_AGAIN, Batch, Batches, to_device
from sadmoe.modules import device_of
from sadmoe.randomness import Apart, reseed, seeded
from sadmoe.training import processes
from sadmoe.training.config import LoopConfig, Step
from sadmoe.training.objective import Objective
from sadmoe.training.resume import Kept, Saver

PenaltyOf = Callable[[Any], Tensor]
Read = Callable[[], tuple[int | None, Batch]]  # reads a batch, see `_endless`
UNKEPT = Kept(None, "training", {})
BIASES = ("b_up", "b_gate")  # of a converted layer, [E, s]
MEMORY = ("kept_bytes",)  # fields of a config that no result depends on: a killed run goes on with others


def no_penalty(batch: Any) -> Tensor:
    """Of a run that has its objective alone."""
    return torch.zeros((), device="cpu")


def train(
    model: nn.Module,
    batches: Batches,
    config: LoopConfig,
    objective: Objective,
    penalty_of: PenaltyOf = no_penalty,
    *,
    progress: bool,
    at: Callable[[float], None] = lambda done: None,
    kept: Kept = UNKEPT,
) -> list[Step]:
    """Minimises objective(batch, index) + alpha * penalty_of(batch) by the config's schedule.

    at(done) is called before each update with the share of the run that is over.   kept: the run's name, also for its
    bar and its errors, where it saves itself, and what beside config and weights makes it another run.
    In a process group the batches of each update are shared out; every process must be given the same ones. Buffers
    that differ at the end, such as a BatchNorm's running statistics, become their mean over the processes. Random
    numbers, such as those of dropout, are drawn by the seed and the number of the batch: the same in one process or
    several, and after a run was taken up again. The caller's own random state is left as it was.
    Raises RuntimeError under torch.inference_mode, whose tensors cannot be trained; a no_grad around it is lifted.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{kept.name} was called under torch.inference_mode, where nothing can be trained: leave it first"
        )
    processes.as_first_([*model.parameters(), *model.buffers()])
    update = _Update(kept.name, model, config, objective, penalty_of, _endless(batches, config.seed))
    saver = None
    if kept.checkpoint is not None:
        told = {name: value for name, value in asdict(config).items() if name not in MEMORY}
        of_run = replace(kept, run={"config": {**told, **kept.run}})
        saver = Saver(of_run, model, update.optimizer, penalty_of)
    history, before = update.resumed(saver)
    device, started, found = device_of(model), time.perf_counter() - before, len(history)
    if not processes.is_same(found, device):
        raise RuntimeError(
            f"checkpoint: this process found a run of {found} updates, and others not: give a folder that all "
            "processes see"
        )
    with (
        seeded(model, config.seed) as update.cuda_devices,
        tqdm(
            total=config.steps or math.ceil(config.seconds or 0),
            initial=found if config.steps else 0,
            unit="step" if config.steps else "s",
            desc=kept.name,
            disable=not progress,
        ) as bar,
    ):

        def elapsed() -> float:
            return time.perf_counter() - started

        def state() -> dict[str, Any]:
            return {"history": [astuple(step) for step in history], "seconds": elapsed()}

        while (done := processes.of_first(_done(config, len(history), elapsed()), device)) < 1:
            at(done)
            with torch.enable_grad():
                history.append(update(done, len(history)))
            if saver is not None:
                saver.save(state)
            bar.update(1 if config.steps else min(int(elapsed()), bar.total) - bar.n)
            bar.set_postfix(objective=f"{history[-1].objective:.4f}", penalty=f"{history[-1].penalty:.4f}")
    if len(history) > found:
        processes.mean_(buffer for buffer in model.buffers() if buffer.is_floating_point())
        if saver is not None:
            saver.save(state, last=True)
    return history


class _Update:
    """One update after the other, by AdamW."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        config: LoopConfig,
        objective: Objective,
        penalty_of: PenaltyOf,
        stream: Iterator[Read],
    ):
        self.rank, self.world = processes.place()
        if config.accumulate % self.world:
            raise ValueError(
                f"accumulate must be a multiple of the {self.world} processes that share the batches of an update, got "
                f"{config.accumulate}"
            )
        self.name, self.config, self.stream = name, config, stream
        self.objective, self.penalty_of = objective, penalty_of
        self.device = device_of(model)
        self.cuda_devices: list[int] = []  # on which random numbers are drawn
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                f"model: no parameter of this {type(model).__name__} requires a gradient, so {name} has none to train"
            )
        if short := {p.dtype for p in self.parameters if p.dtype.itemsize < 4}:
            warnings.warn(
                f"{name} trains weights in {', '.join(sorted(map(str, short)))}, which lose small updates, and AdamW's "
                "means small gradients: give it the model in float32, under torch.autocast(..., torch.bfloat16)",
                stacklevel=2,
            )
        biases = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] in BIASES}
        decayed = [p for p in self.parameters if p.dim() > 1 and id(p) not in biases]
        rest = [p for p in self.parameters if p.dim() <= 1 or id(p) in biases]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=all(map(_is_plain, self.parameters)),
        )

    def resumed(self, saver: Saver | None) -> tuple[list[Step], float]:
        """History and seconds of what is saved, the batches that it used left behind; nothing at the first start."""
        state = None if saver is None else saver.resume()
        if state is None:
            return [], 0.0
        history = [Step(*step) for step in state["history"]]
        if _done(self.config, len(history), state["seconds"]) < 1:
            for _ in range(len(history) * self.config.accumulate):
                next(self.stream)
        return history, state["seconds"]

    def __call__(self, done: float, number: int) -> Step:
        alpha, lr = self.config.alpha_at(done), self.config.lr_at(done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # before torch 2.11 what ran without gradients leaves weights that have none
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for turn in range(self.config.accumulate):
            read = next(self.stream)
            if turn % self.world == self.rank:
                reseed(self.cuda_devices, self.config.seed, number * self.config.accumulate + turn)
                index, batch = read()
                totals += self._backward(to_device(batch, self.device), index, alpha)
        processes.sum_([totals])
        value, penalty = totals.tolist()
        if not (math.isfinite(value) and math.isfinite(penalty)):
            raise FloatingPointError(
                f"{self.name} diverged at update {number}: objective {value}, penalty {penalty}; lower lr or alpha"
            )
        self._sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"{self.name} diverged at update {number}: objective {value}, but a gradient of norm {norm}; lower lr "
                "or alpha, or look for a root or a quotient of 0 in the loss"
            )
        self.optimizer.step()
        torch.clear_autocast_cache()  # an autocast around the whole run keeps the weights of before the step
        return Step(value, penalty, alpha, lr)

    def _backward(self, batch: Batch, index: int | None, alpha: float) -> Tensor:
        """Adds the gradients of one batch; its objective and penalty, as shares of the update's."""
        value = self.objective(batch, index)
        penalty = self.penalty_of(batch)
        parts = 1 / self.config.accumulate
        whole = value + alpha * penalty.to(value.device)
        if not whole.requires_grad:
            raise ValueError(
                f"{self.name}: no parameter that requires a gradient has a part in the objective: let others require "
                "one, or choose an objective that they reach"
            )
        (whole * parts).backward()
        return torch.stack([one.detach().to(self.device).double() for one in (value, penalty)]) * parts

    def _sum_gradients(self) -> None:
        """Over the processes. A parameter that no batch of any process reached keeps no gradient, as in one process, so
        that it is not decayed."""
        if self.world == 1:
            return
        reached = torch.tensor([float(p.grad is not None) for p in self.parameters], device=self.device)
        processes.sum_([reached])
        for p, times in zip(self.parameters, reached.tolist(), strict=True):
            if times and p.grad is None:
                p.grad = torch.zeros_like(p)
        processes.sum_(p.grad for p in self.parameters if p.grad is not None)


def _is_plain(p: Tensor) -> bool:
    """Whether a fused AdamW can take it: not complex, and a view without gaps, as its moments and gradients have none,
    and it walks all by one index."""
    return not p.is_complex() and torch.empty_like(p, device="meta").stride() == p.stride()


def _done(config: LoopConfig, steps: int, seconds: float) -> float:
    """Share of the run that is over: by steps the middle of the next one, so that no update has lr 0; 1
    ends it."""
    if config.steps is not None:
        return (steps + 0.5) / config.steps if steps < config.steps else 1.0
    assert config.seconds is not None
    share = seconds / config.seconds
    return min(max(share, 1e-3), 0.999) if steps == 0 else share  # one update at least


def _endless(batches: Batches, seed: int) -> Iterator[Read]:
    """The batches again and again: a sequence in a new order each time, and no batch of it read before it is asked for;
    anything else in its own. With indices where one gives the same batch again: a list or tuple does, others say so by
    an attribute `same_again`. What a DataLoader draws is not moved by what a model draws in between."""
    generator, apart = torch.Generator().manual_seed(seed), Apart(seed)
    while True:
        if isinstance(batches, Sequence):
            same = isinstance(batches, list | tuple) or getattr(batches, "same_again", False)
            for i in torch.randperm(len(batches), generator=generator, device="cpu").tolist():
                yield partial(_read, batches, i, i if same else None)
            continue
        gave = False
        with apart:
            iterator = iter(batches)
        while True:
            try:
                with apart:
                    batch = next(iterator)
            except StopIteration:
                break
            gave = True
            yield partial(_read, [batch], 0, None)
        if not gave:
            raise ValueError(NOTHING_AGAIN)


def _read(batches: Sequence[Batch], i: int, index: int | None) -> tuple[int | None, Batch]:
    return index, batches[i]
