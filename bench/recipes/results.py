"""What a recipe's curves come to: the table, the picture, the page."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sadmoe.batches import device_of, evaluating, run, to_device
from sadmoe.masks import record_masks
from sadmoe.model_report import short_names
from sadmoe.report import Page, Panel, Series, plot_curves
from torch import nn
from workload import Point, Workload, inputs

KEPT = (0.99, 0.98)  # of the dense metric, at which savings are told


def best(work: Workload, curves: dict[str, list[Point]]) -> dict[str, dict[str, Any]]:
    """Of each curve the point of fewest FLOPs that keeps that much of the dense metric; null where none does."""
    found: dict[str, dict[str, Any]] = {}
    for share in KEPT:
        for name, points in curves.items():
            enough = [point for point in points if point.kept >= share]
            point = min(enough, key=lambda p: p.flops, default=None)
            found.setdefault(f"{share:.0%}", {})[name] = None if point is None else asdict(point)
    return found


def working_tau(curves: dict[str, list[Point]]) -> float:
    """Of the first curve: the tau of fewest FLOPs that keeps 98 %, else the one that keeps most."""
    points = next(iter(curves.values()))
    enough = [p for p in points if p.kept >= KEPT[-1]]
    chosen = min(enough, key=lambda p: p.flops) if enough else max(points, key=lambda p: p.kept)
    return float(chosen.setting.removeprefix("tau "))


def kept_table(kept: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what each method saves at each share of the dense metric."""
    header = (
        "method",
        "of dense",
        "gate",
        "FLOPs saved",
        "of the layers",
        "k mean",
        "k spread",
        "times faster",
    )
    rows = []
    for share, by_curve in kept.items():
        for name, point in by_curve.items():
            if point is None:
                rows.append((name, share, "none does", *[""] * 5))
                continue
            gains = ", ".join(f"{timer} {gain:.2f}" for timer, gain in point["gains"].items())
            saved = (f"{1 - point['flops']:.1%}", f"{1 - point['ffn_flops']:.1%}")
            rows.append(
                (
                    name,
                    share,
                    point["setting"],
                    *saved,
                    f"{point['share']:.1%}",
                    f"{point['spread']:.1%}",
                    gains,
                )
            )
    return header, rows


def panels(work: Workload, curves: dict[str, list[Point]], dense: float) -> list[Panel]:
    """The metric against FLOPs, and against each timer."""

    def series(x: Callable[[Point], float], some: dict[str, list[Point]]) -> list[Series]:
        lines = [
            Series(name, [x(p) for p in points], [p.metric for p in points], [p.setting for p in points])
            for name, points in some.items()
        ]
        return lines

    good = "upper" if work.higher_is_better else "lower"
    level = Series("dense", [0.0, 100.0], [dense, dense])
    flops = [*series(lambda p: 100 * p.flops, curves), level]
    made = [
        Panel(
            "FLOPs", "executed FLOPs of the whole model, % of dense", work.metric_name, flops, f"{good} left"
        )
    ]
    for timer in work.timers:
        timed = {name: points for name, points in curves.items() if all(timer in p.gains for p in points)}
        gains = series(lambda p, timer=timer: p.gains[timer], timed)
        made.append(
            Panel(f"Wall time, {timer}", "times faster than dense", work.metric_name, gains, f"{good} right")
        )
    return made


def pictures(work: Workload, curves: dict[str, list[Point]], dense: float, path: Path) -> None:
    """The panels as a PNG."""
    made = [
        (p.heading, p.x_label, p.y_label, [_unlabelled(s) for s in p.series])
        for p in panels(work, curves, dense)
    ]
    plot_curves(path, made, work.title)


def _unlabelled(series: Series) -> Series:
    return Series(series.name, series.x, series.y)


def page(work: Workload, curves: dict[str, list[Point]], found: dict[str, Any], model: nn.Module) -> Page:
    """The HTML report, its heat map and histograms with the model as its gates stand."""
    with evaluating(model), record_masks(model) as record:
        for batch in work.tests:
            batch = to_device(batch, device_of(model))
            with record.batch(batch):
                run(model, inputs(batch))
    names = short_names(record.layers)
    controls_told = ", ".join(f"{name} {value:.4f}" for name, value in found["controls"].items())
    return Page(
        title=work.title,
        facts={
            work.metric_name: controls_told,
            "router R²": ", ".join(f"{name} {r2:.3f}" for name, r2 in found["router_r2"].items()),
            "heat map and histograms": f"the first method at tau {working_tau(curves):g}",
            "machine": found["machine"],
        },
        table=kept_table(found["kept"]),
        notes=("Each row: the gate of fewest FLOPs that keeps that share of the dense metric.", *work.notes),
        panels=panels(work, curves, found["dense"]),
        heats=[work.heat(model)],
        histograms={n: c.histogram.tolist() for n, c in zip(names, record.layers.values(), strict=True)},
    )
