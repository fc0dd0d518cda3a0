"""Constants of the cost model for this card: what bench_cuda measured, and dense products by torch.

    bench_cuda constants raw.json && python bench/cuda_constants.py raw.json constants.json

The result has the form of python/sadmoe/crossover/gpu_constants.json: `sadmoe.crossover.cards(path)` reads it.
"""

import json
from pathlib import Path

import command
import torch
from cuda_timing import graph_seconds
from sadmoe.crossover import CONSTANTS, card_for


def dense_rate(dtype: torch.dtype) -> float:
    """FLOP/s of torch's own product of 8192 x 2048 x 8192, on random numbers."""
    x = torch.randn(8192, 2048, device="cuda", dtype=dtype)
    w = torch.randn(8192, 2048, device="cuda", dtype=dtype)
    times = graph_seconds({"product": lambda i: x @ w.T}, calls=4)
    return 2 * 8192 * 2048 * 8192 / times["product"].median


def constants(raw: dict, source: str) -> dict:
    """A card's table: measured values where there are some, those of the nearest known card for the others."""
    nearest = card_for(tuple(raw["capability"]))
    table = json.loads(CONSTANTS.read_text())[nearest.name]
    dense = {"dense_16": dense_rate(torch.bfloat16), "dense_32": dense_rate(torch.float32)}
    measured = {name: raw[name] for name in table if name in raw} | dense
    for bits in (16, 32):
        measured[f"ours_{bits}"] = raw[f"products_{bits}"] / dense[f"dense_{bits}"]
    if not nearest.hopper_16:
        table["hopper_16"] |= {"value": 0, "source": "it has no products of warpgroups"}
    elif "products_16_hopper" in raw:
        measured["hopper_16"] = raw["products_16_hopper"] / dense["dense_16"]
    for name, value in measured.items():
        table[name] |= {"value": value, "source": source, "measured": True}
    return table


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    raw = json.loads(args.raw.read_text())
    torch.backends.cuda.matmul.allow_tf32 = False
    table = constants(raw, f"bench_cuda and cuda_constants.py on {raw['name']}, torch {torch.__version__}")
    args.out.write_text(json.dumps({raw["name"]: table}, indent=1) + "\n")
    for name, entry in table.items():
        print(f"{name:12} {entry['value']!s:24} {'measured' if entry['measured'] else 'not measured'}")


if __name__ == "__main__":
    main()
