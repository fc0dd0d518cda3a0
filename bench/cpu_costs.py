"""Measures the costs that come with sadmoe, python/sadmoe/cpu_costs.json, for machines without their own: those
of this machine's kernels, others stay.

    python bench/cpu_costs.py [--layers 384x1536 576x1536-glu] [--s 16 64] [--out FILE]

What `sadmoe bench --calibrate` measures, on one thread, of layers with random weights. A layer that runs by the same
kernels goes by the likest of them, in fp32 by other kernels by those of sadmoe.paths.ELSEWHERE.
"""

import dataclasses
import itertools
from pathlib import Path

import command
import torch
from layer_problem import LAYERS, shape_of, weights
from sadmoe import measured, paths
from sadmoe.measure_costs import TOKENS, costs_table, measure_costs
from variants import layer_of

DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--s", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path("python/sadmoe/cpu_costs.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, s, dtype in itertools.product(args.layers, args.s, DTYPES):
        costs = measure_costs(layer_of(weights(shape_of(name, s), dtype)), args.tokens)
        rows.append(dataclasses.replace(costs, device=paths.kernels_name()))
        print(f"{name}, s {s}, {dtype}\n{costs_table(costs)}\n", flush=True)
    others = [row for row in measured.read(args.out).values() if row.device != paths.kernels_name()]
    measured.write(args.out, [*others, *rows])


if __name__ == "__main__":
    main()
