"""A converted model at several tau: what it computes, how long that takes, and how far it is from the dense model."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import Batch, Batches, check_batches, check_repeats, run, samples_in, to_device
from sadmoe.cost import cost
from sadmoe.dial import converted_layers, tau
from sadmoe.ffn import moe_layers, projection_mlps
from sadmoe.flops import FlopCount
from sadmoe.modules import device_of, evaluating
from sadmoe.padding import answer
from sadmoe.randomness import SEED, seeded
from sadmoe.tables import format_table
from sadmoe.timing import Timing, waiting

PASSES = 3  # of each variant over the batches, in turns, of which the median counts


@dataclass(frozen=True)
class Point:
    """One tau, or None: the gates as they were. share: executed pairs. ffn_flops: of the converted layers over what
    they replace, of attention the MLPs. flops: of the whole model over the dense one; where that was not given, over
    this one with dense layers, MLPs of attention among them. error: |y - y0| / |y0| of the last hidden states or logits
    at real tokens, y0 those of `base`: "dense", the model that this one was converted from, or "tau 0", itself with
    every expert on. seconds: of a pass over the batches, the median. spread: of the passes, the distance from the
    fastest to the slowest as a share of that. gain: how many times faster than `base`, of medians."""

    tau: float | None
    share: float
    ffn_flops: float
    flops: float
    error: float
    seconds: float
    spread: float
    gain: float
    base: str

    def cells(self) -> tuple[str, ...]:
        """Its row under `header`."""
        return (
            "saved" if self.tau is None else f"{self.tau:g}",
            f"{self.share:.1%}",
            f"{self.ffn_flops:.1%}",
            f"{self.flops:.1%}",
            f"{self.error:.4f}",
            f"{self.seconds * 1e3:.{0 if self.seconds >= 0.1 else 2}f} ±{self.spread:4.0%}",
            f"{self.gain:.2f}x",
        )


@dataclass(frozen=True)
class _Variant:
    """A model as it is, or a converted one at a tau."""

    model: nn.Module
    tau: float | None = None

    def on(self) -> AbstractContextManager[Any]:
        """While it is entered, its model is the variant."""
        return nullcontext() if self.tau is None else tau(self.model, self.tau)

    def answer(self, batch: Batch) -> Tensor:
        """On the CPU."""
        with self.on():
            return answer(self.model, to_device(batch, device_of(self.model))).cpu()

    def seconds(self, batches: Batches) -> float:
        """Of a pass over the batches, without reading them."""
        device, total = device_of(self.model), 0.0
        with seeded(self.model, SEED), self.on():  # a DataLoader gives all variants the same
            for batch in batches:
                call = waiting(partial(run, self.model, to_device(batch, device)), device)
                started = time.perf_counter()
                call()
                total += time.perf_counter() - started
        return total


def evaluate(
    model: nn.Module,
    batches: Batches,
    taus: Sequence[float | None],
    *,
    dense: nn.Module | None = None,
    progress: bool = False,
) -> list[Point]:
    """Runs a converted transformers model over batches at every tau, at None by the gates that it has, which come back.

    dense: the model that it was converted from, which errors and times are then measured against, instead of tau = 0.
    Raises ValueError where taus are none, dense is converted itself, or its outputs are of other sizes or all 0.
    """
    converted_layers(model)
    check_batches(batches)
    taus = _listed(taus)
    if dense is not None and moe_layers(dense):
        raise ValueError(
            "dense must be the model that this one was converted from, and is a converted one itself"
        )
    base = _Variant(model, 0.0) if dense is None else _Variant(dense)
    variants = [_Variant(model, value) for value in taus]
    with evaluating(model), evaluating(base.model):
        with seeded(model, SEED):
            errors = _errors(base, variants, batches, progress)
        reports = []
        for variant in tqdm(variants, "cost", disable=not progress):
            with variant.on():
                reports.append(cost(model, batches))
        whole = _flops_per_sample(dense, batches) if dense is not None and projection_mlps(model) else None
        times = _times([base, *variants], batches, progress)
    name = "tau 0" if dense is None else "dense"
    found = zip(variants, reports, errors, strict=True)
    return [
        Point(
            variant.tau,
            r.share,
            r.layers_of_dense,
            flops,
            error,
            t.median,
            t.spread,
            times[base].median / t.median,
            name,
        )
        for variant, r, error in found
        for t in [times[variant]]
        for flops in [r.of_dense if whole is None else ((r.rest or 0.0) + r.executed) / whole]
    ]


def _flops_per_sample(model: nn.Module, batches: Batches) -> float:
    device, samples, count = device_of(model), 0, FlopCount(model)
    with seeded(model, SEED):  # the same as `cost`'s
        for batch in batches:
            batch = to_device(batch, device)
            samples += samples_in(batch)
            with count:
                run(model, batch)
    return count.flops / samples


def _listed(taus: Any) -> list[float | None]:
    """Them. Raises TypeError or ValueError where they are no list of at least one."""
    if not isinstance(taus, Iterable) or isinstance(taus, str):
        raise TypeError(f"taus must be a list of numbers, or None among them, got {taus!r}: give [{taus!r}]")
    if not (found := list(taus)):
        raise ValueError("taus must be a list of numbers, or None among them, got none: give [0.0, 0.1]")
    return found


def header(base: str) -> tuple[str, ...]:
    """The names of a point's cells."""
    return (
        "tau",
        "executed share",
        "layers' FLOPs",
        "all FLOPs",
        f"error to {base}",
        "ms",
        f"faster than {base}",
    )


def table(points: Sequence[Point]) -> str:
    """The points of one evaluation as people read them."""
    return format_table(header(points[0].base), [point.cells() for point in points])


def _errors(base: _Variant, variants: Sequence[_Variant], batches: Batches, progress: bool) -> list[float]:
    """|y - y0| / |y0| of every variant, a batch at a time: what a language model says of one batch is large enough."""
    size, wrong = 0.0, [0.0] * len(variants)
    for batch in tqdm(batches, "errors", disable=not progress):
        wanted = base.answer(batch)
        if size == 0:
            check_repeats([wanted], [base.answer(batch)], type(base.model).__name__)
        size += wanted.square().sum().item()
        for i, variant in enumerate(variants):
            found = variant.answer(batch)
            if found.shape != wanted.shape:
                raise ValueError(
                    f"dense must be the model that this one was converted from: of a batch it returns "
                    f"{tuple(wanted.shape)} numbers, the converted one {tuple(found.shape)}"
                )
            wrong[i] += (found - wanted).square().sum().item()
    if size == 0:
        raise ValueError(
            "all outputs that errors would be relative to are 0: the model or the batches are empty"
        )
    if not math.isfinite(size):
        raise ValueError(
            "outputs that errors would be relative to are not finite, or as large as what some models put in the place "
            "of logits that they rule out: give the model without its head, as AutoModel loads it, or on the command "
            "line a folder that such a model was saved to"
        )
    return [math.sqrt(one / size) for one in wrong]


def _times(variants: Sequence[_Variant], batches: Batches, progress: bool) -> dict[_Variant, Timing]:
    """Of one pass of each over the batches: they take turns, so that the machine's moods fall on all alike. The spreads
    are whole ranges, for of so few passes there are no quartiles."""
    turns: dict[_Variant, list[float]] = {variant: [] for variant in variants}
    passes = [variant for _ in range(PASSES) for variant in variants]
    for variant in tqdm(passes, "timing", disable=not progress):
        turns[variant].append(variant.seconds(batches))
    return {
        variant: Timing(middle, (max(times) - min(times)) / middle, len(times))
        for variant, times in turns.items()
        for middle in [median(times)]
    }
