"""One layer, the same mask, every way to run it: sadmoe, dense torch, a loop over experts, torch's grouped product.

That one by itself, for just the pairs that run (torch_grouped_mm), and as transformers calls it (grouped_mm).

    python bench/peers.py [--d 384 --f 1536 --s 32] [--share 0.25] [--threads 1] [--dtype float32] [--int8]
                          [--json FILE]

sadmoe's time holds the router and the selection; the peers are given the mask, and grouped_mm its index lists, for
free. Masks are those of a random router at the tau that gives the share. --int8: beside it sadmoe with its experts'
weights in int8, and its router's in 16 bits.
"""

import argparse
import json
from pathlib import Path

import torch
from command import command
from layer_problem import Copies, LayerShape, problem, weights
from sadmoe.timing import machine, measure
from variants import Kept, checked, dense, grouped_mm, int8, loop, sadmoe, torch_grouped_mm

TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024, 4096]
OURS = ("sadmoe", "int8")


def width(name: str) -> int:
    return max(13, len(name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"d": 384, "f": 1536, "s": 32, "r": 128, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.f % args.s:
        parser.error(f"argument --s: expected a divisor of --f {args.f}, got {args.s}; try 32")
    args.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    title = f"{machine()}, d={args.d} f={args.f} s={args.s} E={args.f // args.s} relu, {args.dtype}"
    print(f"# {title}")
    ways = {"dense": dense, "sadmoe": sadmoe} | ({"int8": int8} if args.int8 else {})
    ways |= {"loop": loop, "torch_grouped_mm": torch_grouped_mm, "grouped_mm": grouped_mm}
    print(
        f"{'T':>5} {'share':>6}  {'  '.join(f'{name:>{width(name)}}' for name in ways)}   "
        f"{'sadmoe is faster than':69}" + "  int8 than dense" * args.int8
    )
    rows, held = [], weights(LayerShape(args.d, args.f, args.s), args.dtype, args.r)
    copies = Copies(held)
    with torch.inference_mode():
        for T in args.tokens:
            p = problem(held, T, args.share)
            variants = {name: Kept(way(copies.of(p, name))) for name, way in ways.items()}
            times = measure(variants)
            checked(p, {name: call.result for name, call in variants.items()})
            share = p.mask.float().mean().item()
            cells = "  ".join(
                f"{f'{t.median * 1e3:.3f} ±{t.spread:4.0%}':>{width(name)}}" for name, t in times.items()
            )
            seconds = {name: time.median for name, time in times.items()}
            gains = {name: t / seconds["sadmoe"] for name, t in seconds.items() if name not in OURS}
            told = "  ".join(f"{name} {gain:5.2f}x" for name, gain in gains.items())
            of_int8 = f"  {seconds['dense'] / seconds['int8']:14.2f}x" if args.int8 else ""
            print(f"{T:5d} {share:6.1%}  {cells}   {told}{of_int8}")
            spread = {name: round(time.spread, 2) for name, time in times.items()}
            rows.append({"T": T, "share": share, "seconds": seconds, "spread": spread, "gains": gains})
    print("Times in ms: median and distance of the quartiles.")
    if args.json:
        args.json.write_text(json.dumps({"machine": title, "command": command(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
