"""Measured costs of the sparse op, in a file: what `sadmoe bench --calibrate` writes and a layer's choice reads.

A cost is seconds of the sparse op over seconds of the dense path for the same tokens and mask, router and selection
in both: below 1 the op is faster. With every expert, at tau = 0, neither asks a router. T tokens, as everywhere.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from sadmoe.crossover import LayerShape
from sadmoe.files import replacing

FORMAT = 1
BUILT_IN = Path(__file__).with_name("cpu_costs.json")

Curve = tuple[tuple[float, float], ...]  # (executed share, cost), shares ascending in (0, 1]
Key = tuple[str, str, LayerShape]
V = TypeVar("V")


@dataclass(frozen=True)
class Costs:
    """One shape of layer on one device. dtype: torch's name for it; threads: of torch, while it was measured."""

    device: str
    dtype: str
    layer: LayerShape
    threads: int
    curves: Mapping[int, Curve]  # by T
    # By T, the cost at tau = 0 where it was measured.
    every_expert: Mapping[int, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What it is looked up by. Not the threads: the same call gives the same bits for any number of them."""
        return self.device, self.dtype, self.layer

    def sparse_until(self, tokens: int, slack: float = 1.0) -> float:
        """The largest executed share at which the op costs at most `slack`, at the measured T nearest to tokens."""
        return sparse_until(_nearest(self.curves, tokens), slack)

    def cost_of_every_expert(self, tokens: int) -> float | None:
        """The cost at tau = 0 at the measured T nearest to tokens, None where there is none."""
        return _nearest(self.every_expert, tokens) if self.every_expert else None


def _nearest(by_tokens: Mapping[int, V], tokens: int) -> V:
    return by_tokens[min(by_tokens, key=lambda T: abs(math.log(T / tokens)))]


def sparse_until(curve: Curve, slack: float) -> float:
    """The largest share at which the cost is at most `slack`, 0 where there is none.

    Cost is linear between measured shares. Past the last it is taken to grow as the share does, which overestimates
    it, as part of it is the router's; below the first it is that of the first.
    """
    if curve[0][1] > slack:
        return 0.0
    for (low, below), (high, above) in pairwise(curve):
        if above > slack:
            return low + (high - low) * (slack - below) / (above - below)
    share, cost = curve[-1]
    return min(1.0, share * slack / cost)


def cache_file(folder: Path | None = None) -> Path:
    """The file of this user's measurements: in `folder`, by default `sadmoe` in the user's cache folder. Raises
    FileNotFoundError where the user has none."""
    if folder is not None:
        return folder / "costs.json"
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no folder for measured costs: {error}; set XDG_CACHE_HOME to one"
        ) from error
    return home / "sadmoe" / "costs.json"


def write(path: Path, rows: Iterable[Costs]) -> None:
    """Replaces the file at once, with its folder made where it is missing."""
    table = [_plain(row) for row in rows]
    text = json.dumps({"format": FORMAT, "crc32": _crc32(table), "rows": table}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text + "\n")


def read(path: Path) -> dict[Key, Costs]:
    """What `write` wrote, {} where there is no file. Raises ValueError that says what to do where it is damaged."""
    if not path.exists():
        return {}
    try:
        whole = json.loads(path.read_text())
        if whole["format"] != FORMAT:
            raise ValueError(f"has format {whole['format']}, this sadmoe reads {FORMAT}")
        if _crc32(whole["rows"]) != whole["crc32"]:
            raise ValueError("its checksum is wrong")
        rows = [_costs(row) for row in whole["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}, the measured costs of layers, is damaged ({error}): delete it, or measure again with "
            "`sadmoe bench --model MODEL --calibrate --force`"
        ) from error
    return {row.key: row for row in rows}


def _plain(row: Costs) -> dict[str, Any]:
    curves = {str(T): [list(point) for point in curve] for T, curve in row.curves.items()}
    every_expert = {str(T): cost for T, cost in row.every_expert.items()}
    return {**asdict(row), "curves": curves, "every_expert": every_expert}


def _costs(row: Mapping[str, Any]) -> Costs:
    """Raises ValueError, KeyError or TypeError where it is not what `_plain` makes."""
    curves = {int(T): tuple((float(s), float(c)) for s, c in curve) for T, curve in row["curves"].items()}
    for T, curve in curves.items():
        shares = [share for share, _ in curve]
        sane = T > 0 and shares and shares == sorted(set(shares)) and shares[0] > 0 and shares[-1] <= 1
        if not sane or not all(0 < cost < math.inf for _, cost in curve):
            raise ValueError(f"the costs at T = {T} are no costs: {curve}")
    if not curves:
        raise ValueError("a layer has no costs")
    every_expert = {int(T): float(cost) for T, cost in row["every_expert"].items()}
    if any(T < 1 or not 0 < cost < math.inf for T, cost in every_expert.items()):
        raise ValueError(f"the costs of every expert are no costs: {every_expert}")
    return Costs(
        row["device"], row["dtype"], LayerShape(**row["layer"]), int(row["threads"]), curves, every_expert
    )


def _crc32(rows: Any) -> int:
    return zlib.crc32(json.dumps(rows, sort_keys=True).encode())
