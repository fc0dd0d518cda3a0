"""Pictures of the rows of layers.py: speed-up against share, a panel for every number of tokens."""

from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLUMNS = 3
SHARES, SPEEDUPS = [5, 10, 25, 50, 100], [0.25, 0.5, 1, 2, 5, 10, 20]  # ticks; shares in %


def draw(rows: list[dict], title: str, folder: Path) -> None:
    """One picture of each shape and dtype, a line of each s and kind of mask that the rows have."""

    def of_picture(row: dict) -> str:
        return f"{row['layer']}-{row['dtype']}"

    for name, part in groupby(sorted(rows, key=of_picture), of_picture):
        _picture(list(part), f"{name}: {title}", folder / f"{name}.png")


def _line(row: dict, rows: list[dict]) -> str:
    """What tells a row's line from the others."""
    parts = (f"s {row['s']}", row["masks"].split()[0])
    kinds = ({r["s"] for r in rows}, {r["masks"].split()[0] for r in rows})
    return ", ".join(part for part, kind in zip(parts, kinds, strict=True) if len(kind) > 1) or "sadmoe"


def _picture(rows: list[dict], title: str, path: Path) -> None:
    tokens = sorted({row["T"] for row in rows})
    columns = min(COLUMNS, len(tokens))
    height = -(-len(tokens) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4.4 * columns, 3.4 * height + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(tokens) :]:
        axis.axis("off")
    for axis, T in zip(axes.flat, tokens, strict=False):
        _panel(axis, T, rows)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axis: pyplot.Axes, T: int, rows: list[dict]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points = lines.setdefault(_line(row, rows), [])
        if row["T"] == T:
            points.append((row["share"] * 100, row["speedup"]))
    for name, points in lines.items():
        x, y = [share for share, _ in sorted(points)], [speedup for _, speedup in sorted(points)]
        axis.plot(x, y, "." if name.endswith("recorded") else "o-", label=name, markersize=4)
    axis.plot(SHARES, [100 / share for share in SHARES], ":", color="0.5", label="ideal: 1 / share")
    axis.axhline(1, color="0.5", linewidth=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        title=f"T = {T}",
        xlabel="executed share, %",
        ylabel="speed-up over dense",
    )
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
        one.set_minor_formatter("")
    axis.set_xticks(SHARES, SHARES)
    axis.set_yticks(SPEEDUPS, SPEEDUPS)
    axis.grid(alpha=0.3)
