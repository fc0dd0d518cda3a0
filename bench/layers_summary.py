"""What a grid of layers comes to: a line for each kind of mask, dtype, range of tokens and share of the experts.

    python bench/layers_summary.py FILE.json [FILE.json ...]      # that layers.py wrote

x dense: dense torch's time over sadmoe's, the least, the median and the most of the cells; slower: cells below 1.
x loop, x grouped_mm: the least of the same against these peers. int8: the median of dense over sadmoe with its experts
in int8. of_ideal, of_floor: the least and the median, see layers.py. Cells where no expert runs are left out.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

TOKENS = [(1, 8), (16, 64), (256, 1024), (4096, 4096)]
SHARES = {"5 to 15 %": (0.0, 0.15), "a quarter": (0.15, 0.4), "half": (0.4, 0.7), "all": (0.7, 1.0)}


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


def over(rows: list[dict], name: str, of: str = "sadmoe") -> list[float]:
    """Times of a variant over those of another, where both were taken."""
    return [row["seconds"][name] / row["seconds"][of] for row in rows if {name, of} <= row["seconds"].keys()]


def line(rows: list[dict]) -> str:
    dense = over(rows, "dense")
    cells = [f"{len(rows):5d} {sum(x < 1 for x in dense):6d}"]
    cells.append(f"{min(dense):8.2f} {statistics.median(dense):6.2f} {max(dense):6.2f}")
    for peer in ("loop", "grouped_mm"):
        found = over(rows, peer)
        cells.append(f"{min(found):10.2f}" if found else f"{'-':>10}")
    int8 = over(rows, "dense", "int8")
    cells.append(f"{statistics.median(int8):6.2f}" if int8 else f"{'-':>6}")
    for name in ("of_ideal", "of_floor"):
        found = [row[name] for row in rows]
        cells.append(f"{min(found):9.2f} {statistics.median(found):5.2f}")
    return " ".join(cells)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    read = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    for machine in sorted({one["machine"] for one in read}):
        print(f"# {machine}")
    rows = [row for one in read for row in one["rows"]]
    heads = "cells slower        x dense          x loop grouped_mm   int8       of_ideal        of_floor"
    for kind, same in kinds(rows):
        print(f"{kind:36}{heads}")
        for name, found in groups(same):
            print(f"{name}   {line(found)}")


if __name__ == "__main__":
    main()
