"""Pictures of curves, by matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = 10  # of matplotlib, after which they come again with other marks
MARKS = "oD^v"


@dataclass(frozen=True)
class Series:
    """One line of a plot: points (x, y) in order, each with an optional label.

    line: whether they are joined. marks: whether each is marked; a line without is dashed: a level to compare with.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    line: bool = True
    marks: bool = True

    @property
    def is_level(self) -> bool:
        """Whether it is a line without marks."""
        return self.line and not self.marks


@dataclass(frozen=True)
class Panel:
    """One chart of curves. better: what the reader should look for, as "upper left"."""

    heading: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    better: str = ""


def plot_curves(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Writes a picture of panels side by side; a name has one colour and mark in all, told below. Needs matplotlib."""
    pyplot = matplotlib_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.2 * len(panels), 4.9), squeeze=False, layout="constrained"
    )
    looks: dict[str, int] = {}
    lines: dict[str, Any] = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        for one in panel.series:
            again, colour = divmod(looks.setdefault(one.name, len(looks)), COLOURS)
            mark = MARKS[again % len(MARKS)]
            look = "--" if one.is_level else f"{mark}-" if one.line else "s"
            drawn = "0.35" if one.is_level else f"C{colour}"
            (lines[one.name],) = axis.plot(one.x, one.y, look, markersize=5, color=drawn)
            for x, y, label in zip(one.x, one.y, one.labels, strict=False):
                axis.annotate(
                    label, (x, y), textcoords="offset points", xytext=(5, -11), fontsize=8, color="0.35"
                )
        axis.set(title=panel.heading, xlabel=panel.x_label, ylabel=panel.y_label)
        axis.grid(alpha=0.3)
    columns = 2 * len(panels)
    figure.legend(
        [*lines.values()], [*lines], loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def matplotlib_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises ImportError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
