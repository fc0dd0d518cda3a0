"""A converted model at several tau: what it computes, how long that takes, and how far it is from itself at tau = 0."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import evaluating, run
from sadmoe.cost import cost
from sadmoe.dial import converted_layers, tau
from sadmoe.tables import format_table

HEADER = ("tau", "executed share", "FFN FLOPs of dense", "error", "ms", "faster than tau 0")
PASSES = 3  # of the model over the batches, of which the median counts


@dataclass(frozen=True)
class Point:
    """One tau. share: executed pairs. ffn_flops, flops: of the converted layers and of the whole model, over dense.
    error: |y - y0| / |y0| of the last hidden states or logits at real tokens, y0 at tau = 0. seconds: of a pass over
    the batches. gain: how many times faster than at tau = 0."""

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
    model: nn.Module, batches: Sequence[dict[str, Any]], taus: Sequence[float], *, progress: bool = False
) -> list[Point]:
    """Runs a converted transformers model over batches of text at every tau; its gates come back."""
    converted_layers(model)
    with tau(model, 0.0):
        dense, dense_seconds = _outputs(model, batches)
    points = []
    for value in tqdm(taus, "tau", disable=not progress):
        with tau(model, value):
            outputs, seconds = (dense, dense_seconds) if value == 0 else _outputs(model, batches)
            report = cost(model, batches)
        rest, error = report.rest or 0.0, ((outputs - dense).norm() / dense.norm()).item()
        whole = (rest + report.executed) / (rest + report.dense)
        ffns = report.executed / report.dense
        points.append(Point(value, report.share, ffns, whole, error, seconds, dense_seconds / seconds))
    return points


def table(points: Sequence[Point]) -> str:
    """The points as people read them."""
    return format_table(HEADER, [point.cells() for point in points])


def _outputs(model: nn.Module, batches: Sequence[dict[str, Any]]) -> tuple[Tensor, float]:
    """What the model says of every real token, [tokens, n], and the seconds of one pass."""
    seconds = []
    with evaluating(model):
        for _ in range(PASSES):
            started, found = time.perf_counter(), []
            for batch in batches:
                output = run(model, batch)
                found.append(output["logits"] if "logits" in output else output[0])
            seconds.append(time.perf_counter() - started)
    real = [
        y[batch["attention_mask"].bool()] if y.dim() == 3 else y
        for y, batch in zip(found, batches, strict=True)
    ]
    return torch.cat([y.float() for y in real]), median(seconds)
