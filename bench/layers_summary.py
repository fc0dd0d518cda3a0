"""What a grid of layers comes to: a line for each kind of mask, dtype, range of tokens and share of the experts.

    python bench/layers_summary.py FILE.json [FILE.json ...]      # that layers.py wrote

x dense: dense torch's time over sadmoe's, the least, the median and the most of the cells; slower: cells below 1.
loop, eager, grouped_mm, torch: the least of the same against these peers (torch_grouped_mm is the last); best peer: the
least and the median against the fastest of them in each cell, and the cells where it beats sadmoe. int8: the median of
dense over sadmoe with its experts in int8. avx512, avx2, portable: the median of dense over sadmoe by these
instructions. of_ideal, of_floor: the least and the median, see layers.py. "-": not timed in any cell. At the end of a
kind, of all cells in which not every expert runs: dense over sadmoe, the median, and the 5th to the 95th percentile.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import command

TOKENS = [(1, 8), (16, 64), (256, 1024), (4096, 4096)]
PEERS = {"loop": 6, "eager": 6, "grouped_mm": 11, "torch_grouped_mm": 6}  # and the widths of their columns
SHARES = {"5 to 15 %": (0.0, 0.15), "a quarter": (0.15, 0.4), "half": (0.4, 0.99), "all": (0.99, 1.0)}


def kinds(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """By kind of mask, independent ones first; recorded ones of all layers together."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["masks"] != "independent"):
        found.setdefault(row["masks"].split()[0], []).append(row)
    yield from found.items()


def groups(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """By name, those that are not empty."""
    for dtype in sorted({row["dtype"] for row in rows}, reverse=True):
        for least, most in TOKENS:
            for share, (low, high) in SHARES.items():
                found = [
                    row
                    for row in rows
                    if row["dtype"] == dtype and least <= row["T"] <= most and low < row["share"] <= high
                ]
                tokens = f"{least} to {most}" if most > least else f"{least}"
                if found:
                    yield f"{dtype:9} {tokens:>11}  {share:10}", found


def ratio(row: dict, name: str, of: str = "sadmoe") -> float | None:
    """Seconds of one variant over another's, None where one was not timed."""
    seconds = row["seconds"]
    return seconds[name] / seconds[of] if {name, of} <= seconds.keys() else None


def best_peer(row: dict) -> float | None:
    """The same of the fastest peer over sadmoe."""
    seconds = [row["seconds"][name] for name in PEERS if name in row["seconds"]]
    return min(seconds) / row["seconds"]["sadmoe"] if seconds else None


def over(rows: list[dict], name: str, of: str = "sadmoe") -> list[float]:
    """Of every row in which both were timed."""
    return [found for row in rows if (found := ratio(row, name, of)) is not None]


def line(rows: list[dict]) -> str:
    dense, best = over(rows, "dense"), [found for row in rows if (found := best_peer(row)) is not None]
    cells = [f"{len(rows):5d} {sum(x < 1 for x in dense):6d}"]
    cells.append(f"{min(dense):7.2f} {statistics.median(dense):6.2f} {max(dense):6.2f}")
    cells += [told(over(rows, peer), min, width) for peer, width in PEERS.items()]
    cells.append(f"{told(best, min, 7)} {told(best, statistics.median, 5)} {sum(x < 1 for x in best):4d}")
    for name, width in {"int8": 6, "avx512": 7, "avx2": 6, "portable": 9}.items():
        cells.append(told(over(rows, "dense", name), statistics.median, width))
    for name in ("of_ideal", "of_floor"):
        found = [row[name] for row in rows]
        cells.append(f"{min(found):6.2f} {statistics.median(found):5.2f}")
    return " ".join(cells)


def told(values: list[float], which: Callable[[list[float]], float], width: int) -> str:
    return f"{which(values):{width}.2f}" if values else f"{'-':>{width}}"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    read = [json.loads(path.read_text()) for path in parser.parse_args().files]
    for machine in sorted({one["machine"] for one in read}):
        print(f"# {machine}")
    rows = [row for one in read for row in one["rows"]]
    heads = "cells slower              x dense   loop  eager  grouped_mm  torch    best peer wins"
    heads += "   int8  avx512   avx2  portable     of_ideal     of_floor"
    for kind, same in kinds(rows):
        print(f"{kind:36}{heads}")
        told = list(groups(same))
        for name, found in told:
            print(f"{name}   {line(found)}")
        for dtype in sorted({row["dtype"] for row in same}, reverse=True):
            gains = over(
                [row for row in same if row["dtype"] == dtype and row["share"] <= SHARES["half"][1]], "dense"
            )
            if len(gains) > 1:
                low, *_, high = statistics.quantiles(gains, n=20, method="inclusive")
                middle = f"median {statistics.median(gains):.2f}, nine of ten {low:.2f} to {high:.2f}"
                print(f"{dtype:9} not every expert on: {len(gains)} cells, x dense: {middle}")
        if others := len(same) - sum(len(found) for _, found in told):
            print(f"and {others} cells of other numbers of tokens")


if __name__ == "__main__":
    main()
