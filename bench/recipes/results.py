"""What a recipe's curves come to: the table, the picture, the page, written anew after every curve."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from run import Run
from sadmoe import DynamicK, moe_layers
from sadmoe.batches import run, samples_in, to_device
from sadmoe.files import checksum, replacing
from sadmoe.gates import Gate
from sadmoe.masks import record_masks
from sadmoe.model_report import short_names
from sadmoe.modules import device_of, evaluating
from sadmoe.report import Heat, Page, Panel, Series, plot_curves, write_page
from sadmoe.tables import format_table
from sadmoe.timing import machine
from torch import nn
from torch.utils._pytree import tree_leaves
from workload import Dense, Point, Workload, inputs, sweep

KEPT = (0.99, 0.98)  # of the dense metric, at which savings are told
SPREAD = 0.1  # of times, between the quartiles over the median: told where it is as wide
SHOWN = 0.5  # of a curve's best: points that keep less are in no picture, whose scale they would take


class Results:
    """Curves as they come, and the files that tell of them."""

    def __init__(self, work: Workload, run: Run, dense: Dense, facts: dict[str, Any]):
        self.work, self.run, self.dense = work, run, dense
        self.facts = {
            "title": work.title,
            "machine": machine(),
            "commit": commit(),
            "samples": {
                part: sum(map(samples_in, getattr(work, part))) for part in ("train", "picks", "tests")
            },
            "metric": work.metric_name,
            "dense": dense.tests,
            "dense_on_picks": dense.picks,
            "also": {f"{name} of dense": value(work.dense) for name, value in work.also.items()},
            **facts,
        }
        self.curves: dict[str, list[Point]] = {}
        self.saved = Saved(work, run)
        self.heat: Heat | None = None
        self.histograms: dict[str, list[int]] = {}

    def add(
        self,
        name: str,
        model: nn.Module,
        gates: Sequence[tuple[str, Gate]],
        *,
        timed: bool = False,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Measures a model under every gate, if that is not done, and writes all that is known. The first one's tokens
        are looked into.   prepare: see `sweep`."""
        with self.run.stage(name):
            seconds = self.run.effort.timed if timed else 0.0
            of = {
                "model": checksum(model.state_dict()),
                "gates": [str(gate) for _, gate in gates],
                "timed": seconds,
            }
            points = self.saved.get(name, of)
            if points is None:
                points = sweep(self.work, model, gates, self.dense, seconds, prepare)
                self.saved.put(name, of, points)
            self.curves[name] = points
            if self.heat is None:
                self.look_into(model)
        self.write()

    def look_into(self, model: nn.Module) -> None:
        """The heat map, and the histograms of the layers, at the working tau."""
        for layer in moe_layers(model).values():
            layer.gate = DynamicK(working_tau(self.curves))
        with evaluating(model), record_masks(model) as record:
            for batch in self.work.tests:
                batch = to_device(batch, device_of(model))
                with record.batch(batch):
                    run(model, inputs(batch))
        counts = zip(short_names(record.layers), record.layers.values(), strict=True)
        self.histograms = {name: one.histogram.tolist() for name, one in counts}
        setting = f"tau {working_tau(self.curves):g}"
        for name, value in self.work.also.items():
            with evaluating(model):
                self.facts["also"][f"{name} at {setting}"] = value(model)
        self.heat = self.work.heat(model)

    def write(self) -> None:
        """JSON, PNG and HTML."""
        curves = self.curves
        self.run.out.mkdir(parents=True, exist_ok=True)
        found = {**self.facts, "seconds": self.run.seconds, "kept": best(curves)}
        found["curves"] = {name: [asdict(point) for point in points] for name, points in curves.items()}
        found["histograms"] = self.histograms  # by layer: tokens, by how many experts they run
        self.run.file("json").write_text(json.dumps(found, indent=1))
        pictures(self.work, curves, self.dense.tests, self.run.file("png"))
        write_page(self.run.file("html"), self.page())

    def table(self) -> str:
        """What each method saves, as people read it."""
        return format_table(*kept_table(best(self.curves)))

    def page(self) -> Page:
        """The HTML report."""
        return Page(
            title=self.work.title,
            facts={
                self.work.metric_name: listed(self.facts["controls"], 4),
                **({"also": listed(self.facts["also"], 4)} if self.work.also else {}),
                "every neuron on, after": listed(self.facts["after"], 4),
                "router R²": listed(self.facts["router_r2"], 3),
                "heat map and histograms": f"the first method at tau {working_tau(self.curves):g}",
                "machine": self.facts["machine"],
            },
            table=kept_table(best(self.curves)),
            notes=(
                "Each row: the gate of fewest FLOPs that keeps that share of the dense metric on data beside the tests,"
                " and what it keeps on the tests, ± one standard error.",
                f"Times faster: ± the distance of the quartiles of the times, where it is {SPREAD:.0%} or more of the"
                " median, dense or converted, whichever is wider.",
                f"The curves leave out gates that keep less than {SHOWN:.0%} of their best.", *self.work.notes
            ),
            panels=panels(self.work, self.curves, self.dense.tests),
            heats=[self.heat] if self.heat is not None else [],
            histograms=self.histograms,
        )  # fmt: skip


class Saved:
    """Curves of an earlier start of the same run, each with what it is of: model, gates, samples, machine."""

    def __init__(self, work: Workload, run: Run):
        self.path = run.state / "curves.json"
        device = torch.cuda.get_device_name() if run.device.startswith("cuda") else run.device
        samples = checksum({str(i): sample for i, sample in enumerate(tree_leaves([work.picks, work.tests]))})
        self.on = {"machine": machine(), "device": device, "samples": samples}
        self.curves: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.curves = json.loads(self.path.read_text())

    def get(self, name: str, of: Mapping[str, Any]) -> list[Point] | None:
        """The points of a curve that was measured to its end."""
        found = self.curves.get(name)
        if found is None:
            return None
        if found["of"] != {**of, **self.on}:
            print(
                f"{self.path} has this curve of another model, machine, gates or tests: it is measured again"
            )
            return None
        return [Point(**point) for point in found["points"]]

    def put(self, name: str, of: Mapping[str, Any], points: Sequence[Point]) -> None:
        """Keeps a curve. A kill leaves the old file or the new one."""
        self.curves[name] = {"of": {**of, **self.on}, "points": [asdict(point) for point in points]}
        with replacing(self.path) as beside:
            beside.write_text(json.dumps(self.curves, indent=1))


def commit() -> str:
    """Of this checkout, with what was not committed told."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def listed(values: Mapping[str, float], digits: int) -> str:
    """Names and numbers in one line; "none" where there are none."""
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items()) or "none"


def best(curves: dict[str, list[Point]]) -> dict[str, dict[str, Any]]:
    """Of each curve the point of fewest FLOPs that keeps that much of the dense metric on the picks; null where none
    does."""
    found: dict[str, dict[str, Any]] = {}
    for share in KEPT:
        for name, points in curves.items():
            enough = [point for point in points if point.picked >= share]
            point = min(enough, key=lambda p: p.flops, default=None)
            found.setdefault(f"{share:.0%}", {})[name] = None if point is None else asdict(point)
    return found


def working_tau(curves: dict[str, list[Point]]) -> float:
    """Of the first curve: the tau of fewest FLOPs that keeps 98 % on the picks, else the one that keeps most."""
    points = next(iter(curves.values()))
    enough = [p for p in points if p.picked >= KEPT[-1]]
    chosen = min(enough, key=lambda p: p.flops) if enough else max(points, key=lambda p: p.picked)
    return float(chosen.setting.removeprefix("tau "))


def kept_table(kept: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what each method saves at each share of the dense metric."""
    header = (
        "method",
        "of dense",
        "gate",
        "kept on tests",
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
                rows.append((name, share, "none does", *[""] * 6))
                continue
            gains = ", ".join(f"{timer} {told}" for timer, told in times_faster(point).items())
            saved = (f"{1 - point['flops']:.1%}", f"{1 - point['ffn_flops']:.1%}")
            rows.append(
                (
                    name,
                    share,
                    point["setting"],
                    kept_by(point),
                    *saved,
                    f"{point['share']:.1%}",
                    f"{point['spread']:.1%}",
                    gains,
                )
            )
    return header, rows


def kept_by(point: Mapping[str, Any]) -> str:
    """What a point keeps of the dense metric on the tests, with its standard error where that is known."""
    error = point.get("error")
    return f"{point['kept']:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")


def times_faster(point: Mapping[str, Any], unit: str = "") -> dict[str, str]:
    """How many times faster than dense a point is by each timer, with the spread of the times where it is SPREAD or
    more: it tells how little such a number may be worth."""
    spreads = {timer: point.get("spreads", {}).get(timer, 0.0) for timer in point["gains"]}
    return {
        timer: f"{gain:.2f}{unit}" + (f" ± {spreads[timer]:.0%}" if spreads[timer] >= SPREAD else "")
        for timer, gain in point["gains"].items()
    }


def panels(work: Workload, curves: dict[str, list[Point]], dense: float) -> list[Panel]:
    """The metric against FLOPs, and against each timer that timed a point. What has lost too much is left out."""
    curves = {
        name: [p for p in points if p.kept >= SHOWN * max(q.kept for q in points)]
        for name, points in curves.items()
    }

    def series(x: Callable[[Point], float], some: dict[str, list[Point]]) -> list[Series]:
        lines = [
            Series(name, [x(p) for p in points], [p.metric for p in points], [p.setting for p in points])
            for name, points in some.items()
        ]
        return lines

    good = "upper" if work.higher_is_better else "lower"
    flops = series(lambda p: 100 * p.flops, curves)
    least = min((x for one in flops for x in one.x), default=0.0)
    flops.append(Series("dense", [min(least, 90.0), 100.0], [dense, dense], marks=False))
    made = [
        Panel(
            "FLOPs", "executed FLOPs of the whole model, % of dense", work.metric_name, flops, f"{good} left"
        )
    ]
    for timer in work.timers:
        timed = {name: [p for p in points if timer in p.gains] for name, points in curves.items()}
        if some := {name: points for name, points in timed.items() if points}:
            gains = series(lambda p, timer=timer: p.gains[timer], some)
            heading, better = f"Wall time, {timer}", f"{good} right"
            made.append(Panel(heading, "times faster than dense", work.metric_name, gains, better))
    return made


def pictures(work: Workload, curves: dict[str, list[Point]], dense: float, path: Path) -> None:
    """The panels as a PNG."""
    made = [replace(p, series=[replace(s, labels=()) for s in p.series]) for p in panels(work, curves, dense)]
    plot_curves(path, made, work.title)
