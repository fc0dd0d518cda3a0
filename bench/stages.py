"""Where a call's time goes: the router, the selection, the experts, each by its own op, and the fused op of all three.

    python bench/stages.py [--layers 384x1536 768x3072] [--s 32] [--tokens 16 256] [--shares 0.1 0.25]
                           [--dtype float32] [--stack 64] [--threads 1]

Layer after layer, through so many MiB of weights, at least two layers, as in a model: code is in the caches, weights
are not. Masks are independent, those of a random router. Times in us, medians; beside router and experts what their
products would take at the rate of a large one (torch's), and what the weights that some token needs would take at the
rate of a buffer as large as the stack; rows: tokens for each expert. The fused op keeps scores and mask in the caches.
"""

import itertools
import math
from functools import partial

import command
import torch
from layer_problem import LAYERS, ROUTER_WIDTH, copied, problem, shape_of, weights, with_weights
from layers import product_rate, reading, weight_bytes
from sadmoe import ops
from sadmoe.timing import machine, measure
from variants import experts

HEADER = (
    f"{'layer':>14} {'s':>4} {'T':>5}  share  rows   router  products   select  experts  products  reading"
    f" {'fused':>8}"
)


def row(name: str, s: int, T: int, share: float, dtype: torch.dtype, stack: float) -> str:
    """Measures a cell."""
    layer = shape_of(name, s)
    w, size = weights(layer, dtype), weight_bytes(layer, dtype)
    layers = max(2, math.ceil(stack * 2**20 / size))
    p = problem(w, T, share)
    each = [with_weights(p, copied(w)) for _ in range(layers)]
    scores = ops.router_scores(p.x, p.v1, p.v2)
    calls = {
        "router": lambda q: ops.router_scores(q.x, q.v1, q.v2),
        "select": lambda q: ops.dynamic_k_select(scores, q.tau),
        "experts": lambda q: ops.sparse_experts(q.x, q.mask, *experts(q), act=q.act),
        "fused": lambda q: ops.dynamic_k_moe(q.x, q.v1, q.v2, *experts(q), tau=q.tau, act=q.act),
    }

    def through(call: partial) -> None:
        for q in each:
            call(q)

    ways = {name: partial(through, call) for name, call in calls.items()}
    times = measure(ways | {"read": reading(layer, dtype, layers)})
    us = {name: 1e6 * t.median / layers for name, t in times.items()}
    flop_us = product_rate(layer, dtype) / 1e6
    router = 2 * T * ROUTER_WIDTH * (layer.d + layer.experts) / flop_us
    products = 2 * int(p.mask.sum()) * s * layer.matrices * layer.d / flop_us
    union, rows = p.mask.any(0).float().mean().item(), p.mask.sum().item() / layer.experts
    return (
        f"{name:>14} {s:4} {T:5} {p.mask.float().mean():6.1%} {rows:5.1f} {us['router']:8.0f} {router:9.0f}"
        f" {us['select']:8.0f} {us['experts']:8.0f} {products:9.0f} {union * us['read']:8.0f} {us['fused']:8.0f}"
    )


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=["384x1536", "576x1536-glu", "768x3072"]
    )
    parser.add_argument("--s", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--stack", type=float, default=64, metavar="MIB")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"# {machine()}, {args.dtype}\n{HEADER}")
    with torch.inference_mode():
        for cell in itertools.product(args.layers, args.s, args.tokens, args.shares):
            print(row(*cell, getattr(torch, args.dtype), args.stack), flush=True)


if __name__ == "__main__":
    main()
