"""What every recipe saved, by method, from the JSON files that the recipes wrote: the tables of bench/results.

Of each method the setting of fewest FLOPs that keeps 99 or 98 % of the dense metric on data beside the tests ("picked
on: apart"; in earlier files on the tests themselves), and what it keeps on the tests. FLOPs saved: of the whole model /
of the converted layers. Times faster: ± the distance of the quartiles, where it is 10 % of the times or more.
That, method by method, is every-setting.txt. --short: the table of tasks.md, a line a run, at the first share of the
dense metric: FLOPs of the whole model saved, and times faster where that was timed, by the best size of experts; what
the tests keep, where the setting was picked apart.

python bench/recipes/summary.py [--short] [bench/results/w1-cpu.json ...]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from results import kept_by, listed, times_faster
from sadmoe.tables import format_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
GROUPS = {  # columns of the short table, by how the names of their methods begin
    "dynamic k": "sadmoe, dynamic k",
    "static top-k": "the same, static top-k",
    "tuned static": "fine-tuned with static top-k",
    "pruned": "pruned",
    "oracle": "the same, oracle gate",
    "no fine-tuning": "no fine-tuning, FFNs only",
    "MoEfication": "MoEfication",
}


def row(method: str, kept: dict[str, Any]) -> tuple[str, ...]:
    """What a method saves at each share of the dense metric; nothing where no gate of it keeps that much."""
    cells = [method]
    for by_method in kept.values():
        point = by_method[method]
        if point is None:
            cells += ["none", "", "", ""]
            continue
        cells += [
            f"{point['setting']}: {kept_by(point)}",
            f"{1 - point['flops']:.1%} / {1 - point['ffn_flops']:.1%}",
            f"{point['share']:.1%} ± {100 * point['spread']:.1f}",
            ", ".join(times_faster(point).values()),
        ]
    return tuple(cells)


def room(points: list[dict[str, Any]]) -> str:
    """How much of a model a curve is about, by its point of fewest experts: what is left is its routers'."""
    least = min(points, key=lambda point: point["share"])
    converted = (1 - least["flops"]) / (1 - least["ffn_flops"])
    routers = least["ffn_flops"] - least["share"]
    fewest = 1 - converted * (1 - routers)
    return (
        f"converted: {converted:.0%} of the FLOPs, routers {routers:.0%} of those; "
        f"with no expert run {1 / fewest:.2f} times fewer FLOPs"
    )


def picked_on(found: dict[str, Any]) -> str:
    """Which data a run's settings were picked on."""
    return "apart" if "dense_on_picks" in found else "the tests"


def short_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    by_method = next(iter(found["kept"].values()))
    kernels = found["machine"].rpartition("kernels ")[2]
    cells = [name, found["title"].partition(",")[0].partition(": ")[2], kernels, picked_on(found)]
    for begin in GROUPS.values():
        points = [point for method, point in by_method.items() if method.startswith(begin) and point]
        if not points:
            cells.append("none" if any(method.startswith(begin) for method in by_method) else "")
            continue
        best = min(points, key=lambda point: point["flops"])
        gains = " and ".join(times_faster(best, unit="x").values())
        kept = f" ({kept_by(best)})" if "picked" in best else ""
        cells.append(f"{1 - best['flops']:.1%}" + (f", {gains}" if gains else "") + kept)
    return tuple(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("w*.json")))
    args = parser.parse_args()
    if args.short:
        rows = [short_row(path.stem, json.loads(path.read_text())) for path in args.files]
        print(format_table(("run", "model", "kernels", "picked on", *GROUPS), rows))
        return
    for path in args.files:
        found = json.loads(path.read_text())
        told = found["metric"]
        print(f"{path.stem}. {found['title']}. {told}: {listed(found['controls'], 4)}")
        print(f"settings picked on: {picked_on(found)}")
        if after := found.get("after"):
            print(f"every neuron on, after {listed(after, 4)}")
        if also := found.get("also"):
            print(listed(also, 4))
        print(f"router R²: {listed(found['router_r2'], 2)}")
        print(room(next(iter(found["curves"].values()))))
        print(f"{found['machine']}, {sum(found['seconds'].values()) / 60:.0f} minutes in all")
        timers = [list(point["gains"]) for points in found["curves"].values() for point in points]
        print("faster: " + ", ".join(max(timers, key=len, default=[])))
        header = ["method"]
        for share in found["kept"]:
            header += [f"{share} of dense: kept", "FLOPs saved", "experts run", "faster"]
        methods = next(iter(found["kept"].values()))
        print(format_table(tuple(header), [row(method, found["kept"]) for method in methods]) + "\n")


if __name__ == "__main__":
    main()
