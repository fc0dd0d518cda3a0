"""A converted model at several tau: what it computes, how long that takes, and how far it is from itself at tau = 0."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from sadmoe.batches import answer, evaluating, run
from sadmoe.cost import cost
from sadmoe.dial import converted_layers, tau
from sadmoe.tables import format_table

HEADER = ("tau", "executed share", "FFN FLOPs of dense", "error", "ms", "faster than tau 0")
PASSES = 3  # of the model over the batches, of which the median counts


@dataclass(frozen=True)
class Point:
    """One tau. share: executed pairs. ffn_flops, flops: of the converted layers and of the whole model, over dense.
    error: |y - y0| / |y0| of the last hidden states or logits at real tokens, y0 at tau = 0. seconds: of a pass over
    the batches. gain: how many times faster than at tau = 0, where no router is asked."""

    tau: float
    share: float
    ffn_flops: float
    flops: float
    error: float
    seconds: float
    gain: float

    def cells(self) -> tuple[str, ...]:
        """Its row under HEADER."""
        return (
            f"{self.tau:g}",
            f"{self.share:.1%}",
            f"{self.ffn_flops:.1%}",
            f"{self.error:.4f}",
            f"{self.seconds * 1e3:.0f}",
            f"{self.gain:.2f}x",
        )


def evaluate(
    model: nn.Module, batches: Sequence[Any], taus: Sequence[float], *, progress: bool = False
) -> list[Point]:
    """Runs a converted transformers model over batches at every tau; its gates come back."""
    converted_layers(model)
    errors = _errors(model, batches, taus)
    with tau(model, 0.0):
        dense_seconds = _seconds(model, batches)
    points = []
    for value, error in zip(tqdm(taus, "tau", disable=not progress), errors, strict=True):
        with tau(model, value):
            seconds = dense_seconds if value == 0 else _seconds(model, batches)
            report = cost(model, batches)
        rest = report.rest or 0.0
        whole = (rest + report.executed) / (rest + report.dense)
        ffns = report.executed / report.dense
        points.append(Point(value, report.share, ffns, whole, error, seconds, dense_seconds / seconds))
    return points


def table(points: Sequence[Point]) -> str:
    """The points as people read them."""
    return format_table(HEADER, [point.cells() for point in points])


def _errors(model: nn.Module, batches: Sequence[Any], taus: Sequence[float]) -> list[float]:
    """|y - y0| / |y0| at every tau, a batch at a time: what a language model says of one batch is large enough."""
    size, wrong = 0.0, [0.0] * len(taus)
    with evaluating(model):
        for batch in batches:
            with tau(model, 0.0):
                dense = answer(model, batch)
            size += dense.square().sum().item()
            for i, value in enumerate(taus):
                with tau(model, value):
                    wrong[i] += (answer(model, batch) - dense).square().sum().item()
    return [math.sqrt(one / size) for one in wrong]


def _seconds(model: nn.Module, batches: Sequence[Any]) -> float:
    """Of one pass over the batches."""
    seconds = []
    with evaluating(model):
        for _ in range(PASSES):
            started = time.perf_counter()
            for batch in batches:
                run(model, batch)
            seconds.append(time.perf_counter() - started)
    return median(seconds)
