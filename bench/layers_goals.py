"""What grids of layers.py say of the aims: how many cells reach each, and of those that miss it where their time goes.

    python bench/layers_goals.py FILE.json [FILE.json ...] [--misses]

The aims, of independent masks where nothing else is said:
  floor 0.80       fp32, 16 tokens and more, a tenth of the experts and more: of_floor, see layers.py
  floor 0.90       likewise, at most 768 wide, a quarter and more
  few 0.80         fp32, up to 8 tokens: of_floor
  ideal 0.80       bf16, experts of 64 and more, 256 tokens and more, a quarter and more: of_ideal
  ideal 0.65       likewise, experts of 32
  few ideal 1.00   bf16, up to 8 tokens: of_ideal
  int8 3.00        fp32 over int8, one token at a quarter
  dense 0.95       dense torch over sadmoe, masks of all kinds: at most 1.05 times as long as dense
  layer 0.95       dense torch over the layer, which may run densely itself
  peers 1.00       the fastest peer over sadmoe, masks of all kinds

--misses: a line for each miss, and of a call's time in percent what the router, the executed products and reading the
weights take at the least, by the rates of layers.py, and what is left. Where products and reading together are about
all of it, they did not hide each other; what is left of calls of a few microseconds is mostly the call itself; with
many tokens it is products that run below the rate of a large one.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import command
import torch
from layer_problem import shape_of
from layers import needs
from layers_summary import best_peer, ratio

TENTH, QUARTER = 0.09, 0.23  # what may run where 0.1 and 0.25 were asked for
Cell = dict


@dataclass(frozen=True)
class Aim:
    """least: of `figure` in every cell that it is for and that was timed."""

    name: str
    least: float
    figure: Callable[[Cell], float | None]
    of: Callable[[Cell], bool]


def is_of(
    dtype: str | None = None,
    tokens: int = 1,
    up_to: int = 1 << 30,
    share: float = 0.0,
    s: tuple[int, ...] = (),
    wide: int = 1 << 30,
) -> Callable[[Cell], bool]:
    """Cells of independent masks: at least so many tokens and such a share, of those sizes, at most so wide."""

    def fits(cell: Cell) -> bool:
        return (
            cell["masks"] == "independent"
            and (dtype is None or cell["dtype"] == dtype)
            and tokens <= cell["T"] <= up_to
            and cell["share"] >= share
            and (not s or cell["s"] in s)
            and shape_of(cell["layer"], cell["s"]).d <= wide
        )

    return fits


AIMS = [
    Aim("floor 0.80", 0.8, lambda cell: cell["of_floor"], is_of("float32", 16, share=TENTH)),
    Aim("floor 0.90", 0.9, lambda cell: cell["of_floor"], is_of("float32", 16, share=QUARTER, wide=768)),
    Aim("few 0.80", 0.8, lambda cell: cell["of_floor"], is_of("float32", up_to=8)),
    Aim("ideal 0.80", 0.8, lambda cell: cell["of_ideal"], is_of("bfloat16", 256, share=QUARTER, s=(64, 128))),
    Aim("ideal 0.65", 0.65, lambda cell: cell["of_ideal"], is_of("bfloat16", 256, share=QUARTER, s=(32,))),
    Aim("few ideal 1.00", 1.0, lambda cell: cell["of_ideal"], is_of("bfloat16", up_to=8)),
    Aim(
        "int8 3.00",
        3.0,
        lambda cell: ratio(cell, "sadmoe", "int8") if cell["share"] < 0.4 else None,
        is_of("float32", up_to=1, share=0.15),
    ),
    Aim("dense 0.95", 1 / 1.05, lambda cell: ratio(cell, "dense", "sadmoe"), lambda cell: True),
    Aim("layer 0.95", 1 / 1.05, lambda cell: ratio(cell, "dense", "layer"), lambda cell: True),
    Aim("peers 1.00", 1.0, best_peer, lambda cell: True),
]


def told(aim: Aim, cells: list[Cell]) -> str:
    """How many cells reach it, by their tokens."""
    found = {id(cell): figure for cell in cells if (figure := aim.figure(cell)) is not None}
    lines = []
    for low, high in itertools.pairwise((1, 9, 65, 1025, math.inf)):
        some = [cell for cell in cells if id(cell) in found and low <= cell["T"] < high]
        if some:
            figures, tokens = [found[id(cell)] for cell in some], [cell["T"] for cell in some]
            reached = sum(figure >= aim.least for figure in figures)
            spread = f"{min(figures):6.2f} {statistics.median(figures):6.2f} {max(figures):6.2f}"
            lines.append(
                f"{aim.name:15} {min(tokens):5} to {max(tokens):4} {reached:6} of {len(figures):4} {spread}"
            )
    return "\n".join(lines)


def miss(aim: Aim, cell: Cell, figure: float) -> str:
    """A cell, and where its time goes."""
    layer, itemsize = shape_of(cell["layer"], cell["s"]), getattr(torch, cell["dtype"]).itemsize
    least = needs(layer, cell["T"], cell["share"], cell["union"], itemsize, cell["limits"])
    time = cell["seconds"]["sadmoe"]
    parts = "".join(f"{seconds / time:9.0%}" for seconds in least.values())
    left = time - sum(least.values())
    where = f"{cell['layer']:>14} {cell['dtype']:>8} {cell['s']:4} {cell['T']:5} {cell['share']:6.1%}"
    return f"{aim.name:15} {where} {figure:6.2f} {time * 1e6:9.0f}{parts} {left / time:8.0%} {cell['masks'].split()[0]}"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--misses", action="store_true")
    args = parser.parse_args()
    read = [json.loads(file.read_text()) for file in args.files]
    for machine in sorted({one["machine"] for one in read}):
        print(f"# {machine}")
    cells = [cell for one in read for cell in one["rows"]]
    print("aim              tokens          reached           least median   most")
    for aim in AIMS:
        if lines := told(aim, [cell for cell in cells if aim.of(cell)]):
            print(lines)
    if not args.misses:
        return
    heads = f"{'layer':>14} {'dtype':>8} {'s':>4} {'T':>5}  share  found        us"
    print(f"\n{'missed':15} {heads} products  reading   router     left masks")
    for aim in AIMS:
        for cell in filter(aim.of, cells):
            figure = aim.figure(cell)
            if figure is not None and figure < aim.least:
                print(miss(aim, cell, figure))


if __name__ == "__main__":
    main()
