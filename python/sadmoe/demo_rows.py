"""What the demo tells: what each way to run the model costs, keeps and gains, as rows of a table and as a picture."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.batches import evaluating, run
from sadmoe.cost import cost, cost_of_masks
from sadmoe.demo import Fidelity, embeddings, fidelity
from sadmoe.dial import converted_layers, tau
from sadmoe.ffn import FFNSite, find_ffns
from sadmoe.masks import MaskRecord, record_masks
from sadmoe.report import Series, plot_curves
from sadmoe.tables import format_table

CONVERTED = "converted"
TIMED = 4  # batches of the held-out texts whose time is taken


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
    for name, keep in (
        ("dense, best half of the neurons of each token", lambda c, site: top_half(c)),
        ("dense, the same half for all tokens", lambda c, site: top_half(average[site.name]).expand_as(c)),
        ("dense, FFN off", lambda c, site: torch.zeros_like(c, dtype=torch.bool)),
    ):
        with masked(sites, keep):
            rows.append(Row(name, None, None, None, fidelity(embeddings(dense, tests), wanted)))
    return rows, wanted


def top_half(contribution: Tensor) -> Tensor:
    """bool [..., f]: the half of the neurons of largest contribution, ties in."""
    return contribution > contribution.median(dim=-1, keepdim=True).values


@contextmanager
def masked(sites: Sequence[FFNSite], keep: Callable[[Tensor, FFNSite], Tensor]) -> Iterator[None]:
    """Inside, only the neurons of keep(contributions [..., f], site) reach the down projection.

    A neuron's contribution is |a_j| |w_down,j|, the norm of what it adds to the output.
    """

    def hook(site: FFNSite) -> Any:
        norms = site.dense().w_down.norm(dim=1)
        return lambda module, args: (args[0] * keep(args[0].abs() * norms, site), *args[1:])

    handles = [site.down.register_forward_pre_hook(hook(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contributions(
    dense: nn.Module, sites: Sequence[FFNSite], tests: Sequence[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense model's embeddings, and the mean contribution of each neuron, [f], by site."""
    sums: dict[str, Tensor] = {}
    with masked(sites, added_to(sums)):
        return embeddings(dense, tests), sums


def added_to(sums: dict[str, Tensor]) -> Callable[[Tensor, FFNSite], Tensor]:
    """For `masked`: keeps all, and adds the mean contribution of each neuron, [f], to that of its site."""

    def keep(contribution: Tensor, site: FFNSite) -> Tensor:
        mean = contribution.flatten(0, -2).mean(0)
        sums[site.name] = sums.get(site.name, torch.zeros_like(mean)) + mean
        return torch.ones_like(contribution, dtype=torch.bool)

    return keep


def sweep(
    dense: nn.Module,
    model: nn.Module,
    taus: Sequence[float],
    tests: Sequence[Mapping[str, Tensor]],
    wanted: Tensor,
    name: str = CONVERTED,
) -> list[Row]:
    """The converted model at every tau: what it costs, keeps, and how fast it is."""
    texts = sum(len(batch["input_ids"]) for batch in tests)
    rest = cost(model, tests).rest
    gains = times(dense, model, taus, tests[:: max(1, len(tests) // TIMED)])
    rows = []
    for value in taus:
        with tau(model, value), record_masks(model) as record:
            embedded = torch.cat([embedded_with(record, model, batch) for batch in tests])
            report = cost_of_masks(model, record.layers, texts, rest)
        kept = fidelity(embedded, wanted)
        rows.append(Row(name, value, report.share, report.of_dense, kept, *gains[value]))
    return rows


def embedded_with(record: MaskRecord, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The embeddings of one batch, its masks recorded."""
    with record.batch(batch):
        return embeddings(model, [batch])


def times(
    dense: nn.Module, model: nn.Module, taus: Sequence[float], tests: Sequence[Any], rounds: int = 3
) -> dict[float, tuple[float, float, float]]:
    """By tau: gain of the FFNs, gain of the whole model, and its seconds: sums over the batches of medians over rounds.

    Dense and every tau take turns at every batch, so that the machine's moods fall on all alike.
    """
    plain = [(site.first, site.down) for site in find_ffns(dense)]
    ours = [(layer, layer) for layer in converted_layers(model).values()]
    totals: dict[float | None, list[float]] = {one: [0.0, 0.0] for one in (None, *taus)}  # None: dense
    for batch in tests:
        passes: dict[float | None, list[tuple[float, float]]] = {one: [] for one in totals}
        for _ in range(rounds):
            for value, seconds in passes.items():
                if value is None:
                    seconds.append(one_pass(dense, plain, batch))
                else:
                    with tau(model, value):
                        seconds.append(one_pass(model, ours, batch))
        for value, seconds in passes.items():
            for i, column in enumerate(zip(*seconds, strict=True)):
                totals[value][i] += median(column)
    dense_ffn, dense_whole = totals[None]
    return {
        value: (dense_ffn / totals[value][0], dense_whole / totals[value][1], totals[value][1])
        for value in taus
    }


def one_pass(
    model: nn.Module, ends: Sequence[tuple[nn.Module, nn.Module]], batch: Any
) -> tuple[float, float]:
    """Seconds inside the FFNs, each from the start of its first module to the end of its last, and of the model."""
    inside: list[float] = []
    handles = [
        first.register_forward_pre_hook(lambda *_: inside.append(-time.perf_counter())) for first, _ in ends
    ]
    handles += [last.register_forward_hook(lambda *_: inside.append(time.perf_counter())) for _, last in ends]
    try:
        with evaluating(model):
            started = time.perf_counter()
            run(model, batch)
            return sum(inside), time.perf_counter() - started
    finally:
        for handle in handles:
            handle.remove()


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
        panels.append(
            (heading, label, axis, [Series("converted", x, y, labels), Series("dense", [1], [1], line=False)])
        )
    plot_curves(path, panels, "MiniLM-L6 on held-out paragraphs of Python's documentation")
