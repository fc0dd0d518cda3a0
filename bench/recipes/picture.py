"""README's picture: of runs with --bf16, the metric over times faster than dense in float32, a panel a run.

R=bench/results; python bench/recipes/picture.py $R/w3-zen5.json $R/w1-zen5.json --out $R/bf16.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sadmoe.report import Panel, Series, plot_curves

SHOWN = {
    "sadmoe, dynamic k": "converted, fp32",
    "in bf16: dense": "dense, bf16",
    "in bf16: dynamic k": "converted, bf16",
    "pruned": "pruned, fp32",
    "in bf16: pruned": "pruned, bf16",
}


def panel(found: dict[str, Any]) -> Panel:
    """The dense model, and of each curve shown, in the first size of experts, the points that were timed; pruned
    models, where there are any."""
    series = [Series("dense, fp32", [1.0], [found["dense"]], line=False)]
    for begin, name in SHOWN.items():
        curves = [points for method, points in found["curves"].items() if method.startswith(begin)]
        some = curves if "pruned" in begin else curves[:1]  # a curve a width; else the first size of experts
        timed = [point for points in some for point in points if point["gains"]]
        if not timed:
            continue
        gains = [next(iter(point["gains"].values())) for point in timed]
        series.append(Series(name, gains, [point["metric"] for point in timed], line=len(timed) > 1))
    heading = f"{found['title']}\n{found['machine'].partition('), ')[0]})"
    return Panel(heading, "times faster than dense in fp32", found["metric"], series)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = [json.loads(path.read_text()) for path in args.files]
    plot_curves(args.out, [panel(one) for one in found], "The metric over wall time, two threads")


if __name__ == "__main__":
    main()
