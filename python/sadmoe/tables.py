"""Numbers and rows, for people and in files."""

import json
import math
from collections.abc import Sequence
from typing import Any


def to_json(value: Any, indent: int = 1) -> str:
    """As JSON; a number that is not finite, which it has no word for, becomes null."""
    return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their header, first column to the left, the others to the right, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    for line, cells in zip(lines, aligned, strict=True):
        cells[0] = line[0].ljust(widths[0])
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """The first lines, and where there are more than `most`, how many more."""
    more = len(lines) - most
    return [*lines[:most], *([f"... and {more} more"] if more > 0 else [])]


def si(number: float) -> str:
    """Three digits and the unit's prefix: 1.18 M, 42 k, 7."""
    number = float(f"{number:.3g}")  # first, or 999,900 would be 1e+03 k
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{prefix}"
    return f"{number:.3g}"


def divisors(n: int) -> str:
    """What divides n, the smallest 16 first, for a message: 1, 2, 3, 6."""
    found = [i for i in range(1, n + 1) if n % i == 0]
    return ", ".join(map(str, found[:16])) + (", ..." if len(found) > 16 else "")
