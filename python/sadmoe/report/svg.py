"""Charts as SVG text, for pages that need neither a server nor a library. Colours are the page's CSS variables."""

import html
import math
from collections.abc import Mapping, Sequence

from sadmoe.report.plots import Series

WIDTH, HEIGHT = 460, 320  # of a chart of curves, in CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
LABELLED = 8  # points of the first series that are labelled beside their tooltips
COLOURS = 8  # --c0 to --c7 of the page
MARKS = ("M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-4,-4h8v8h-8z", "M0,-5l5,9h-10z", "M0,-6l5,6l-5,6l-5,-6z")


def escaped(text: object) -> str:
    """Text that may stand anywhere in HTML."""
    return html.escape(str(text))


def curves(series: Sequence[Series], x_label: str, y_label: str, looks: Mapping[str, int]) -> str:
    """Lines with a mark and a tooltip at every point, on axes with round ticks; the page draws the legend.
    looks: name of a series -> which colour and mark are its own."""
    points = [(x, y) for one in series for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
    if not points:
        return "<p>no points</p>"
    x_ticks, y_ticks = (ticks([point[i] for point in points]) for i in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(f"{y_label} over {x_label}")}">'
    ]
    for x in x_ticks:
        px, _ = at(x, y_ticks[0])
        parts.append(f'<path class="grid" d="M{px:.1f},{TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    for y in y_ticks:
        _, py = at(x_ticks[0], y)
        parts.append(f'<path class="grid" d="M{LEFT},{py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escaped(x_label)}</text>'
    )
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        f'<text transform="translate(13,{middle}) rotate(-90)" text-anchor="middle">{escaped(y_label)}</text>'
    )
    for one in series:
        look = looks[one.name]
        places = [at(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
        if one.line and len(places) > 1:
            path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(_stroke(path, look, dashed=one.is_level))
        if one.is_level:
            continue
        labels = [*one.labels, *[""] * len(one.x)]
        told = [(x, y, text) for x, y, text in zip(one.x, one.y, labels, strict=False) if math.isfinite(y)]
        if one is series[0] and len(told) <= LABELLED:
            for (px, py), (_, _, text) in zip(places, told, strict=True):
                end = px > 0.85 * WIDTH  # else it would run out of the picture
                place = f'x="{px + (-7 if end else 7):.1f}" y="{py - 7:.1f}" text-anchor="{"end" if end else "start"}"'
                parts.append(f"<text {place}>{escaped(text)}</text>")
        for (px, py), (x, y, text) in zip(places, told, strict=True):
            tip = escaped(f"{one.name} {text}: {x:.4g}, {y:.4g}".replace(" :", ":"))
            parts.append(f'<g transform="translate({px:.1f},{py:.1f})">{mark(look)}<title>{tip}</title></g>')
    return "".join([*parts, "</svg>"])


def mark(look: int) -> str:
    """A mark, by form and colour."""
    return f'<path d="{MARKS[look % len(MARKS)]}" style="fill:var(--c{look % COLOURS})"/>'


def sample(series: Series, look: int) -> str:
    """What stands for a series in a legend: its mark, or a piece of its line."""
    return _stroke("M-7,0H7", look, dashed=True) if series.is_level else mark(look)


def _stroke(path: str, look: int, *, dashed: bool) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    style = f"stroke:var(--c{look % COLOURS})"
    return f'<path d="{path}" fill="none" style="{style}" stroke-width="2"{dashes}/>'


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers at equal steps, from at or below the least value to at or above the greatest."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def bars(counts: Sequence[int]) -> str:
    """How many tokens ran 0, 1, ... E experts, their mean as a line; at most as many bars as pixels allow."""
    width, height = 170, 64
    total, experts = sum(counts), len(counts) - 1
    group = math.ceil(len(counts) / 57)
    grouped = [sum(counts[i : i + group]) for i in range(0, len(counts), group)]
    top, step = max([*grouped, 1]), width / len(grouped)
    parts = [f'<svg viewBox="0 0 {width} {height + 14}" style="max-width:{width}px" role="img">']
    for i, count in enumerate(grouped):
        if count:
            tall, k = max(count / top * height, 0.8), i * group
            upto = f"-{min(k + group - 1, experts)}" if group > 1 else ""
            tip = f"{k}{upto} experts: {count / total:.1%} of the tokens"
            parts.append(
                f'<rect class="bar" x="{i * step:.2f}" y="{height - tall:.2f}" width="{max(step - 0.6, 0.6):.2f}" '
                f'height="{tall:.2f}"><title>{tip}</title></rect>'
            )
    if total:
        mean = sum(k * count for k, count in enumerate(counts)) / total
        x = (mean + 0.5) / group * step
        parts.append(f'<path class="mean" d="M{x:.1f},0V{height}"/>')
    parts.append(f'<path class="axis" d="M0,{height}H{width}"/><text x="0" y="{height + 12}">0</text>')
    parts.append(f'<text x="{width}" y="{height + 12}" text-anchor="end">{experts}</text></svg>')
    return "".join(parts)


def heat(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], unit: str) -> str:
    """Cells of [rows][columns] in [0, 1], darker for more; the names of rows at the left, of columns above."""
    cell, left = 22, 8 + 6.3 * max([len(row) for row in rows], default=0)
    top = 10 + 5.6 * max([len(column) for column in columns], default=0)
    width, height = left + cell * len(columns) + 40, top + cell * len(rows) + 4
    parts = [f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">']
    for j, column in enumerate(columns):
        x = left + (j + 0.6) * cell
        parts.append(
            f'<text transform="translate({x:.1f},{top - 5:.1f}) rotate(-60)">{escaped(column)}</text>'
        )
    for i, row in enumerate(rows):
        y = top + i * cell
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 15:.1f}" text-anchor="end">{escaped(row)}</text>')
        for j, value in enumerate(values[i]):
            tip = escaped(f"{row} {columns[j]}: {value:.1%} {unit}".strip())
            parts.append(
                f'<rect x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell - 1}" height="{cell - 1}" class="cell" '
                f'style="--v:{value:.4f}"><title>{tip}</title></rect>'
            )
    return "".join([*parts, "</svg>"])
