"""What the demo tells: what each way to run the model costs, keeps and gains, as rows of a table and as a picture."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.batches import run
from sadmoe.cost import cost, cost_of_masks
from sadmoe.demo import Fidelity, embeddings, fidelity
from sadmoe.dial import converted_layers, tau
from sadmoe.ffn import FFNSite, find_ffns
from sadmoe.hooks import hooks_on
from sadmoe.masks import MaskRecord, record_masks
from sadmoe.modules import evaluating
from sadmoe.report import Panel, Series, plot_curves
from sadmoe.tables import format_table

CONVERTED = "converted"
TIMED = 4  # batches of the held-out texts whose time is taken
ROUNDS = 4  # in which it is, after one to warm up

Keep = Callable[
    [Tensor, FFNSite], Tensor
]  # contributions [..., f] of a site's neurons -> bool, those that stay


@dataclass(frozen=True)
class Row:
    """One way to run the model. share: executed. flops: of the whole model over dense. ffn_gain, gain: how many times
    faster than dense the FFNs and the whole model are, dense run in turn with it; seconds: of one pass of the model."""

    name: str
    tau: float | None
    share: float | None
    flops: float | None
    fidelity: Fidelity
    ffn_gain: float | None = None
    gain: float | None = None
    seconds: float | None = None


def controls(dense: nn.Module, tests: Sequence[Any]) -> tuple[list[Row], Tensor]:
    """The dense model, and three that show whether the metric notices the FFNs: off, half static, half by an oracle;
    and the dense model's embeddings."""
    sites = find_ffns(dense)
    wanted, average = contributions(dense, sites, tests)
    rows = [Row("dense", None, 1.0, 1.0, fidelity(wanted, wanted), 1.0, 1.0)]
    for name, keep in kept_in_controls(average).items():
        with masked(sites, keep):
            rows.append(Row(f"dense, {name}", None, None, None, fidelity(embeddings(dense, tests), wanted)))
    return rows, wanted


def kept_in_controls(average: Mapping[str, Tensor]) -> dict[str, Keep]:
    """By name, for `masked`. average: the mean contribution of each neuron, [f], by site."""
    return {
        "best half of the neurons of each token": lambda c, site: top_half(c),
        "the same half for all tokens": lambda c, site: top_half(average[site.name]).expand_as(c),
        "FFN off": lambda c, site: torch.zeros_like(c, dtype=torch.bool),
    }


def top_half(contribution: Tensor) -> Tensor:
    """bool [..., f]: the half of the neurons of largest contribution, those that tie with the median left out."""
    return contribution > contribution.median(dim=-1, keepdim=True).values


@contextmanager
def masked(sites: Sequence[FFNSite], keep: Keep) -> Iterator[None]:
    """Inside, only the neurons of keep(contributions [..., f], site) reach the down projection.

    A neuron's contribution is |a_j| |w_down,j|, the norm of what it adds to the output.
    """

    def hook(site: FFNSite) -> Any:
        norms = site.dense().w_down.norm(dim=1)
        return lambda module, args: (args[0] * keep(args[0].abs() * norms, site), *args[1:])

    with hooks_on(site.down.register_forward_pre_hook(hook(site)) for site in sites):
        yield


def contributions(
    dense: nn.Module, sites: Sequence[FFNSite], tests: Sequence[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense model's embeddings, and the mean contribution of each neuron, [f], by site."""
    sums: dict[str, Tensor] = {}
    with masked(sites, added_to(sums)):
        return embeddings(dense, tests), sums


def added_to(sums: dict[str, Tensor]) -> Keep:
    """For `masked`: keeps all, and adds the mean contribution of each neuron, [f], to that of its site."""

    def keep(contribution: Tensor, site: FFNSite) -> Tensor:
        mean = contribution.flatten(0, -2).mean(0)
        sums[site.name] = sums.get(site.name, torch.zeros_like(mean)) + mean
        return torch.ones_like(contribution, dtype=torch.bool)

    return keep


@dataclass(frozen=True)
class Way:
    """A converted model at some tau, by the name of its row."""

    name: str
    model: nn.Module
    tau: float


def sweep(
    dense: nn.Module, ways: Sequence[Way], tests: Sequence[Mapping[str, Tensor]], wanted: Tensor
) -> list[Row]:
    """What each way costs, keeps, and how fast it is."""
    texts = sum(len(batch["input_ids"]) for batch in tests)
    rest = cost(ways[0].model, tests).rest
    gains = times(dense, ways, tests[:: max(1, len(tests) // TIMED)])
    rows = []
    for way, gain in zip(ways, gains, strict=True):
        with tau(way.model, way.tau), record_masks(way.model) as record:
            embedded = torch.cat([embedded_with(record, way.model, batch) for batch in tests])
            report = cost_of_masks(way.model, record.layers, texts, rest)
        rows.append(Row(way.name, way.tau, report.share, report.of_dense, fidelity(embedded, wanted), *gain))
    return rows


def embedded_with(record: MaskRecord, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The embeddings of one batch, its masks recorded."""
    with record.batch(batch):
        return embeddings(model, [batch])


def times(dense: nn.Module, ways: Sequence[Way], tests: Sequence[Any]) -> list[tuple[float, float, float]]:
    """Of each way: gain of the FFNs, gain of the whole model, and its seconds: sums over the batches of medians.

    Dense and all ways take turns at every batch, so that the machine's moods fall on all alike, in an order that is new
    every round, for what one leaves in the caches makes the next faster or slower.
    """
    plain = [(site.first, site.down) for site in find_ffns(dense)]
    ours = [[(layer, layer) for layer in converted_layers(way.model).values()] for way in ways]

    def seconds_of(i: int, batch: Any) -> tuple[float, float]:
        if i == len(ways):
            return one_pass(dense, plain, batch)
        with tau(ways[i].model, ways[i].tau):
            return one_pass(ways[i].model, ours[i], batch)

    order, shuffle = list(range(len(ways) + 1)), random.Random(0).shuffle
    totals = [[0.0, 0.0] for _ in order]  # of the ways, and of dense
    for batch in tests:
        passes: list[list[tuple[float, float]]] = [[] for _ in order]
        for _ in range(1 + ROUNDS):
            shuffle(order)
            for i in order:
                passes[i].append(seconds_of(i, batch))
        for total, seconds in zip(totals, passes, strict=True):
            for part, column in enumerate(zip(*seconds[1:], strict=True)):
                total[part] += median(column)
    *found, (dense_ffn, dense_whole) = totals
    return [(dense_ffn / ffn, dense_whole / whole, whole) for ffn, whole in found]


def one_pass(
    model: nn.Module, ends: Sequence[tuple[nn.Module, nn.Module]], batch: Any
) -> tuple[float, float]:
    """Seconds inside the FFNs, each from the start of its first module to the end of its last, and of the model."""
    inside: list[float] = []
    begins = (f.register_forward_pre_hook(lambda *_: inside.append(-time.perf_counter())) for f, _ in ends)
    done = (last.register_forward_hook(lambda *_: inside.append(time.perf_counter())) for _, last in ends)
    with hooks_on(begins), hooks_on(done), evaluating(model):
        started = time.perf_counter()
        run(model, batch)
        return sum(inside), time.perf_counter() - started


def table(rows: Sequence[Row]) -> str:
    """The rows as people read them."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    header = ("", "tau", "executed", "FLOPs", "cosine", "Spearman", "FFNs faster", "model faster", "ms")
    return format_table(
        header,
        [
            (
                row.name,
                cell(row.tau, ".4f"),
                cell(row.share, ".1%"),
                cell(row.flops, ".1%"),
                f"{row.fidelity.cosine:.4f}",
                f"{row.fidelity.spearman:.4f}",
                cell(row.ffn_gain, ".2f"),
                cell(row.gain, ".2f"),
                cell(None if row.seconds is None else row.seconds * 1e3, ".0f"),
            )
            for row in rows
        ],
    )


def picture(rows: Sequence[Row], path: Path) -> None:
    """Fidelity of the converted model against its cost, and against its speed."""
    ours = [row for row in rows if row.name == CONVERTED]
    axis = "cosine to the dense model's embeddings"
    panels = []
    for heading, label, key in (
        ("cost (labels: executed share of the experts)", "FLOPs of the whole model, share of dense", "flops"),
        ("wall time on this machine", "whole model, times faster than dense", "gain"),
    ):
        points = sorted((getattr(row, key), row.fidelity.cosine, f"{row.share:.0%}") for row in ours)
        x, y, labels = zip(*points, strict=True)
        series = [Series("converted", x, y, labels), Series("dense", [1], [1], line=False)]
        panels.append(Panel(heading, label, axis, series))
    plot_curves(path, panels, "MiniLM-L6 on held-out paragraphs of Python's documentation")
