"""One HTML file that tells a whole result: no server, no script, nothing fetched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sadmoe.report.plots import Panel
from sadmoe.report.svg import bars, curves, escaped, heat, sample


@dataclass(frozen=True)
class Heat:
    """Executed shares in [0, 1] by row and column: layers by tokens of a sentence, or patches of an image."""

    heading: str
    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]


@dataclass(frozen=True)
class Page:
    """What a report shows, from the top down. histograms: layer -> tokens by their number of experts, [E + 1]."""

    title: str
    facts: Mapping[str, str]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]
    panels: Sequence[Panel] = ()
    heats: Sequence[Heat] = ()
    histograms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    notes: Sequence[str] = ()


STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --faint: #667085; --line: #e3e6ec; --paper: #fff;
  --heat: 33, 102, 172; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b58900; --c5: #56b4e9;
  --c6: #7a5195; --c7: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --faint: #98a2b3; --line: #2d3442; --paper: #12161d;
  --heat: 120, 180, 240; --c0: #4aa8e0; --c1: #f0824a; --c2: #35c79a; --c7: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
h3 { font-size: .95rem; margin: .4rem 0 0; } p, li { color: var(--faint); margin: .2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .6rem 0; }
dt { color: var(--faint); } dd { margin: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1.2rem; }
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: .8rem 1.2rem; }
.histograms div { font-size: 12px; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; height: auto; } .scroll svg { max-width: none; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.grid, .axis { stroke: var(--line); fill: none; } .bar { fill: var(--c0); }
.mean { stroke: var(--c1); stroke-width: 1.5; } .cell { fill: rgba(var(--heat), calc(0.04 + 0.96 * var(--v))); }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: 13px; }
.key svg { display: inline; vertical-align: -2px; }
.scale { display: inline-block; width: 120px; height: 10px; vertical-align: -1px; margin: 0 .4rem;
  background: linear-gradient(to right, rgba(var(--heat), .04), rgb(var(--heat))); }
"""


def write_page(path: Path, page: Page) -> None:
    """Writes the page as one HTML file in UTF-8."""
    parts = [f"<h1>{escaped(page.title)}</h1>", _facts(page.facts)]
    parts += [f'<div class="scroll">{_table(*page.table)}</div>']
    parts += [f"<p>{escaped(note)}</p>" for note in page.notes]
    if page.panels:
        names = dict.fromkeys(one.name for panel in page.panels for one in panel.series)
        looks = {name: i for i, name in enumerate(names)}  # one in every panel
        panels = [_panel(panel, looks) for panel in page.panels]
        parts += ['<h2>What it costs and keeps</h2><div class="panels">', *panels, "</div>"]
    parts += [_heat(one) for one in page.heats]
    if page.histograms:
        parts.append("<h2>Experts of a token, layer by layer</h2>")
        parts.append("<p>How many tokens ran how many experts, from none to all; the line is the mean.</p>")
        cells = [f"<div>{escaped(name)}{bars(counts)}</div>" for name, counts in page.histograms.items()]
        parts.append(f'<div class="histograms">{"".join(cells)}</div>')
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(page.title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    whole = f"{head}{view}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    path.write_text(whole, encoding="utf-8")


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _panel(panel: Panel, looks: Mapping[str, int]) -> str:
    key = "".join(
        f'<span><svg width="14" height="14" viewBox="-7 -7 14 14">{sample(one, looks[one.name])}</svg> '
        f"{escaped(one.name)}</span>"
        for one in panel.series
    )
    better = f" <small>(better: {escaped(panel.better)})</small>" if panel.better else ""
    chart = curves(panel.series, panel.x_label, panel.y_label, looks)
    return f'<div><h3>{escaped(panel.heading)}{better}</h3>{chart}<div class="key">{key}</div></div>'


def _heat(one: Heat) -> str:
    scale = '<p>share of the experts that run: none<span class="scale"></span>all</p>'
    picture = heat(one.values, one.rows, one.columns, "of the experts")
    return f'<h2>{escaped(one.heading)}</h2>{scale}<div class="scroll">{picture}</div>'
