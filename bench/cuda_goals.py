"""What tables of cuda_peers.py on an H100 say of the aims: met or missed, cell by cell.

    python bench/cuda_goals.py TABLE.json...

The aims are for bf16 and an H100. prefill: time of the way that a layer takes, with its router, over plain dense.
decode: of one token microseconds, in a graph, with weights that L2 does not hold, for the share that it really runs,
between those aimed at in proportion; of 8 tokens 1.15 times what the needed weights take from memory, and 6 us. never
worse: in every cell that way takes at most 1.05 times what dense takes; one that failed took forever. peers: in every
cell it is faster than grouped_mm and Triton. Of the first two only independent masks count; what was not measured is
named. Exit status 3 where an aim is missed.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import command
import numpy as np
from layer_problem import shape_of

MISSED = 3  # exit status
NEVER_WORSE = 1.05
MEMORY = 3.0e12  # bytes/s that an H100 reads
PREFILL = {  # (layer, s, tokens): time over dense, by share
    ("768x3072", 24, 8192): {0.05: 0.55, 0.1: 0.80},
    ("768x3072", 64, 50432): {0.05: 0.30, 0.1: 0.40, 0.25: 0.80},
    ("768x3072", 128, 50432): {0.05: 0.25, 0.1: 0.33, 0.25: 0.55, 0.5: 0.95},
    ("2048x16384-glu", 32, 8192): {0.05: 0.25, 0.1: 0.40, 0.25: 0.90},
    ("2048x16384-glu", 128, 8192): {0.05: 0.18, 0.1: 0.26, 0.25: 0.48, 0.5: 0.85},
    ("4096x11008-glu", 172, 8192): {0.05: 0.19, 0.1: 0.26, 0.25: 0.50, 0.5: 0.85},
}
ONE_TOKEN = {  # layer, of any s: microseconds by share
    "768x3072": {0.1: 7.5, 0.25: 8, 0.5: 8.5},
    "2048x16384-glu": {0.1: 14, 0.25: 25, 0.5: 43},
    "4096x11008-glu": {0.1: 17, 0.25: 32, 0.5: 56},
}
FEW = 8  # tokens of the aim by bytes


@dataclass(frozen=True)
class Aim:
    """found and most in the same unit; found None: the cell was not measured."""

    what: str
    cell: str
    found: float | None
    most: float

    @property
    def verdict(self) -> str:
        return "not measured" if self.found is None else "met" if self.found <= self.most else "missed"


def aims(rows: list[dict]) -> Iterator[Aim]:
    """Of the rows of tables by cuda_peers.py. Where a way that a layer may take failed, its time is infinite."""
    for (layer, s, tokens), most in PREFILL.items():
        for share, aim in most.items():
            meant = [r for r in independent(rows, layer, tokens) if (r["s"], r["asked"]) == (s, share)]
            cell = f"{layer} s {s}, T {tokens}, {share:.0%}"
            yield Aim("prefill", cell, over_dense(meant[0]) if meant else None, aim)
    for layer, most in ONE_TOKEN.items():
        shares, times = list(most), list(most.values())
        meant = [row for row in independent(rows, layer, 1) if row["asked"] in most]
        for row in meant:
            yield Aim("decode", name(row), microseconds(row), float(np.interp(row["share"], shares, times)))
        for share in sorted(most.keys() - {row["asked"] for row in meant}):
            yield Aim("decode", f"{layer}, T 1, {share:.0%}", None, most[share])
        few = independent(rows, layer, FEW)
        for row in few:
            shape = shape_of(layer, row["s"])
            needed = row["union"] * shape.f * shape.d * shape.matrices * 2
            yield Aim("decode", name(row), microseconds(row), 1.15e6 * needed / MEMORY + 6)
        if not few:
            yield Aim("decode", f"{layer}, T {FEW}", None, math.inf)
    for row in rows:
        yield Aim("never worse", name(row), over_dense(row), NEVER_WORSE)
        yield Aim("peers", name(row), 1 / row["peer"] if "peer" in row else None, 1.0)


def over_dense(row: dict) -> float:
    """Time of the way that a layer takes, over plain dense."""
    return row.get("auto", math.inf)


def independent(rows: list[dict], layer: str, tokens: int) -> list[dict]:
    return [r for r in rows if (r["layer"], r["T"], r["masks"]) == (layer, tokens, "independent")]


def microseconds(row: dict) -> float:
    """Of the way that a layer takes."""
    return 1e6 * over_dense(row) * row["seconds"].get("dense", math.inf)


def name(row: dict) -> str:
    return f"{row['layer']} s {row['s']}, T {row['T']}, {row['share']:.0%}, {row['masks']}"


def main() -> int:
    parser = command.parser(__doc__)
    parser.add_argument("tables", type=Path, nargs="+", help="JSON files of cuda_peers.py")
    args = parser.parse_args()
    tables = [json.loads(table.read_text()) for table in args.tables]
    rows = [row for table in tables for row in table["rows"]]
    if not rows:
        parser.error(f"no cells in {', '.join(map(str, args.tables))}")
    found = list(aims(rows))
    print(*sorted({f"# {table['machine']}" for table in tables}), sep="\n")
    if not all("H100" in table["machine"] for table in tables):
        print("# not all of an H100, whose the aims are: read the verdicts with that in mind")
    for what in ("prefill", "decode", "never worse", "peers"):
        of_kind = [aim for aim in found if aim.what == what]
        counts = [sum(aim.verdict == v for aim in of_kind) for v in ("met", "missed", "not measured")]
        print(f"{what}: {counts[0]} met, {counts[1]} missed, {counts[2]} not measured")
        for aim in of_kind:
            if aim.verdict != "met":
                value = "" if aim.found is None else f": {aim.found:.2f}, the aim {aim.most:.2f}"
                print(f"  {aim.verdict}: {aim.cell}{value}")
    return MISSED if any(aim.verdict == "missed" for aim in found) else 0


if __name__ == "__main__":
    sys.exit(main())
