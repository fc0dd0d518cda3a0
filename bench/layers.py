"""One layer over a grid of shapes, tokens, shares and kinds of masks, beside dense torch and the peers.

    python bench/layers.py [--layers 384x1536 576x1536-glu] [--s 32] [--tokens 1 256] [--shares 0.25]
                           [--masks independent skewed] [--dtypes float32 bfloat16] [--isas all]
                           [--peers loop grouped_mm int8] [--stack 128] [--threads 1] [--out FOLDER]

Without options: the whole grid, which takes hours. sadmoe's time holds the router and the selection; the peers get the
mask for free. Masks: independent, those of a random router at the tau of the share; skewed, a few experts run for most
tokens; clustered, neighbouring tokens run the same experts; recorded, of a converted model (`--recorded FILE` that
record_masks.py wrote), where shape and s match, at their own share. All but independent are no router's: sadmoe then
runs its three ops one after another. All kinds of a share take turns with one dense. Cells in which no expert runs are
left out. sadmoe is timed on the first of --isas, the others are columns of their own; with several, each call switches
first, a few microseconds of its time.

Peers: loop, a Python loop over experts; eager and grouped_mm, transformers' two; torch_grouped_mm, torch's own product
and no more; int8, sadmoe with its experts' weights in int8, its router's in 16 bits; packed, not by default, sadmoe
with packed experts; layer, not by default and for independent masks alone, the module, which may run all experts by
torch's products, by the costs of --calibrate or those that came with sadmoe. "-": one of the peer's tensors would be
over --memory GiB.

Variants take turns, call by call: the more of them, the less does one find of its weights and its code in the caches.
--stack MIB: they take turns after as many copies of the layer, at least two, as have MIB MiB of weights, one after
another, as in a model: a layer finds the code that the one before used, and its weights come from memory, as a buffer
of 256 MiB is read beforehand. Times are of one layer; calls, --seconds, --least and --patience of the whole stack.

speedup: dense over sadmoe. of_ideal: the same times the share. of_floor: floor over sadmoe, where
  floor = max(executed FLOPs / peak, bytes of the weights that some token needs / bandwidth) + the router's own floor
with the rate of a large product, torch's or that of sadmoe with every expert on, whichever is faster, once for each
size of experts, and the rate of reading a buffer as large as the weights of the layer, or stack, (GB/s), which takes
turns with the variants of a cell: what they leave in the caches, and others of the memory's rate, is the same for all.
Writes layers.json, what is printed as layers.md, and a picture of each shape and dtype.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import command
import torch
from layer_problem import (
    LAYERS,
    ROUTER_WIDTH,
    Copies,
    LayerShape,
    problem,
    shape_of,
    weights,
    with_mask,
)
from mask_kinds import clustered, recorded, skewed
from sadmoe import ops, paths
from sadmoe.measure_costs import measure_costs
from sadmoe.timing import Timing, machine, measure
from torch import Tensor
from variants import (
    Kept,
    as_layer,
    checked,
    dense,
    eager,
    grouped_mm,
    int8,
    largest,
    layer_of,
    loop,
    packed,
    sadmoe,
    torch_grouped_mm,
)

SIZES = [16, 24, 32, 64, 128]
TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024, 4096]
SHARES = [0.05, 0.1, 0.25, 0.5, 1.0]
MASKS = ["independent", "skewed", "clustered", "recorded"]
CACHED = torch.ones(2**26)  # floats, more than any cache holds
WIDE = 128  # neurons of an expert that wastes nothing
PEERS = {
    "loop": loop, "eager": eager, "grouped_mm": grouped_mm, "torch_grouped_mm": torch_grouped_mm, "int8": int8,
    "packed": packed, "layer": as_layer,
}  # fmt: skip


def product_rate(layer: LayerShape, dtype: torch.dtype) -> float:
    """FLOPs a second of a large product, torch's or the op's."""
    x, w = torch.randn(1024, layer.d).to(dtype), torch.randn(layer.f, layer.d).to(dtype)
    neurons = w.unflatten(0, (-1, WIDE if layer.f % WIDE == 0 else layer.s))
    all_of_them = torch.ones(len(x), len(neurons), dtype=torch.bool)
    calls = {
        "product": lambda: torch.nn.functional.linear(x, w),
        "op": lambda: ops.sparse_experts(x, all_of_them, neurons, neurons, act="relu"),  # two products
    }
    times = {name: t.median for name, t in measure(calls).items()}
    return 2 * len(x) * layer.d * layer.f / min(times["product"], times["op"] / 2)


def weight_bytes(layer: LayerShape, dtype: torch.dtype) -> int:
    return layer.matrices * layer.d * layer.f * dtype.itemsize


def stacked(layer: LayerShape, dtype: torch.dtype, args: argparse.Namespace) -> int:
    """Layers of a stack."""
    return 1 if args.stack is None else max(2, math.ceil(args.stack * 2**20 / weight_bytes(layer, dtype)))


def reading(layer: LayerShape, dtype: torch.dtype, layers: int) -> Callable[[], Tensor]:
    """Reads a buffer as large as the weights of so many layers, the faster of two ways."""
    buffer = torch.ones(layers * weight_bytes(layer, dtype) // 4)  # as floats, whatever the dtype
    ways: dict[str, Callable[[], Tensor]] = {"sum": buffer.sum, "dot": lambda: buffer.dot(buffer)}
    times = measure(ways, seconds=0.1)
    return ways[min(times, key=lambda name: times[name].median)]


def needs(
    layer: LayerShape, T: int, share: float, union: float, itemsize: int, limit: dict[str, float]
) -> dict[str, float]:
    """Seconds that the executed products take at the least, reading the weights that they need, and the router."""
    neurons, router = layer.f * layer.matrices * layer.d, ROUTER_WIDTH * (layer.d + layer.experts)
    return {
        "products": 2 * T * share * neurons / limit["flops"],
        "reading": union * neurons * itemsize / limit["bytes"],
        "router": max(2 * T * router / limit["flops"], router * itemsize / limit["bytes"]),
    }


def floor(layer: LayerShape, mask: Tensor, dtype: torch.dtype, limit: dict[str, float]) -> float:
    """Seconds of all that a call needs, where products hide the reading or are hidden by it."""
    share, union = mask.float().mean().item(), mask.any(0).float().mean().item()
    least = needs(layer, len(mask), share, union, dtype.itemsize, limit)
    return max(least["products"], least["reading"]) + least["router"]


def masks(
    layer: LayerShape, w: SimpleNamespace, T: int, args: argparse.Namespace
) -> Iterator[dict[str, SimpleNamespace]]:
    """Problems by kind of mask, those of a share together. A share of 1 has one kind, recorded masks their own."""
    for share in args.shares:
        ops.use_cpu_isa(args.isas[0])
        p = problem(w, T, share)
        found = {"independent": p} if "independent" in args.masks else {}
        for name, make in (("skewed", skewed), ("clustered", clustered)):
            if name in args.masks and share < 1:
                found[name] = with_mask(p, make(T, layer.experts, share))
        yield found
    if args.recorded:
        for name, mask in recorded(args.recorded, layer, T):
            yield {f"recorded {name}": with_mask(problem(w, T, mask.float().mean().item()), mask)}


def with_isa(isa: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def switched() -> Tensor:
        ops.use_cpu_isa(isa)
        return run()

    return switched


class OneCopy(Copies):
    """The same for all variants: a layer of a stack, which finds no weights in the caches in any case."""

    def of(self, p: SimpleNamespace, variant: object) -> SimpleNamespace:
        return super().of(p, None)


class Stack:
    """Calls one after another, and what the last one returned."""

    def __init__(self, calls: list[Kept]) -> None:
        self.calls = calls

    def __call__(self) -> None:
        for call in self.calls:
            call()

    @property
    def result(self) -> Tensor:
        return self.calls[-1].result


def sparse(p: SimpleNamespace, kind: str, copies: Copies, args: argparse.Namespace) -> dict[str, Kept]:
    """Those of the peers that fit the memory, and sadmoe: by the first instruction set's name "sadmoe"."""
    found = {
        name: PEERS[name](copies.of(p, (kind, name)))
        for name in args.peers
        if largest(name, p) <= args.memory * 2**30 and (p.routed or name != "layer")
    }
    first, *others = args.isas
    ours = {"sadmoe": first} | {isa: isa for isa in others}
    found |= {name: sadmoe(copies.of(p, (kind, name))) for name in ours}
    if others:  # else chosen once, by main
        for name, isa in (ours | dict.fromkeys(("int8", "packed", "layer"), first)).items():
            if name in found:
                found[name] = with_isa(isa, found[name])
    return {name: Kept(call) for name, call in found.items()}


def ways(
    problems: dict[str, SimpleNamespace], copies: Copies, args: argparse.Namespace
) -> dict[tuple[str, str], Kept]:
    """Dense, and for each kind of mask what runs sparsely: by kind and name."""
    some = next(iter(problems.values()))
    found = {("all", "dense"): Kept(dense(copies.of(some, "dense")))}
    for kind, p in problems.items():
        found |= {(kind, name): call for name, call in sparse(p, kind, copies, args).items()}
    return found


def timed(
    problems: dict[str, SimpleNamespace],
    stack: list[Copies],
    read: Callable[[], Tensor],
    args: argparse.Namespace,
) -> Iterator[tuple[str, dict[str, Timing]]]:
    """By kind of mask, times of dense and read, which take turns with all of them, and of what runs sparsely."""
    layers = [ways(problems, copies, args) for copies in stack]
    calls = {key: Stack([layer[key] for layer in layers]) for key in layers[0]}
    evict = None if args.stack is None else lambda _: CACHED.sum()
    times = measure({**calls, ("all", "read"): read}, args.seconds, args.least, args.patience, evict)
    each = {key: Timing(t.median / len(stack), t.spread, t.calls) for key, t in times.items()}
    for kind, p in problems.items():
        checked(p, {name: call.result for (of, name), call in calls.items() if of == kind})
        yield kind, {name: time for (of, name), time in each.items() if of in (kind, "all")}


def result(p: SimpleNamespace, times: dict[str, Timing], limit: dict[str, float], least: float) -> dict:
    ours, whole = times["sadmoe"].median, times["dense"].median
    share, shown = p.mask.float().mean().item(), {n: t for n, t in times.items() if n != "read"}
    return {
        "share": share, "union": p.mask.any(0).float().mean().item(),
        "seconds": {n: t.median for n, t in shown.items()}, "spread": {n: round(t.spread, 2) for n, t in shown.items()},
        "calls": {n: t.calls for n, t in shown.items()}, "floor": least,
        "speedup": whole / ours, "of_ideal": share * whole / ours, "of_floor": least / ours, "limits": limit,
    }  # fmt: skip


def rounded(value: object) -> object:
    """To four digits, all that a time has."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Printed:
    """Says a line, and keeps it for layers.md."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)

    def write(self, path: Path) -> None:
        command.write(path, "\n".join([f"`{command.typed()}`", "", "```", *self.lines, "```", ""]))


def as_json(title: str, rows: list[dict]) -> str:
    """A row a line."""
    lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
    return f'{{"machine": {json.dumps(title)}, "command": {json.dumps(command.typed())}, "rows": [\n{lines}\n]}}\n'


def line(row: dict, variants: list[str]) -> str:
    def told(name: str) -> str:
        if name not in row["seconds"]:
            return f"{'-':>17}"
        spread = f"±{row['spread'][name]:4.0%}" if row["calls"][name] > 1 else " once"
        return f"{row['seconds'][name] * 1e3:11.3f} {spread}"

    figures = "".join(f"{row[n]:9.2f}" for n in ("speedup", "of_ideal", "of_floor"))
    rate = f"{row['limits']['bytes'] / 1e9:6.1f}"
    times = "".join(map(told, variants))
    return f"{row['T']:5d} {row['share']:6.1%} {row['union']:6.1%}{times}{figures}{rate}  {row['masks']}"


def cells(args: argparse.Namespace, say: Printed) -> Iterator[dict]:
    """Measures and tells the grid."""
    variants = ["dense", *args.peers, *args.isas[1:], "sadmoe"]
    for name, dtype, s in itertools.product(args.layers, args.dtypes, args.s):
        layer, kind = shape_of(name, s), getattr(torch, dtype)
        if layer.f % s:
            say(f"\n{name}: f = {layer.f} is not a multiple of s = {s}, left out")
            continue
        ops.use_cpu_isa(args.isas[0])
        layers = stacked(layer, kind, args)
        peak, read = product_rate(layer, kind), reading(layer, kind, layers)
        say(f"\n{name}, s {s}, E {layer.experts}, {layer.act}, {dtype}; peak {peak / 1e9:.0f} GFLOP/s")
        heads = "".join(f"{n:>17}" for n in variants)
        say(f"    T  share  union{heads}  speedup of_ideal of_floor  GB/s")
        w = weights(layer, kind)
        stack = [Copies(w)] if args.stack is None else [OneCopy(w) for _ in range(layers)]
        if args.calibrate:
            paths.use_costs([measure_costs(layer_of(w), args.tokens)])
        for T in args.tokens:
            cell = {"layer": name, "s": s, "dtype": dtype, "isa": args.isas[0], "T": T}
            for some in masks(layer, w, T, args):
                problems = {masked_by: p for masked_by, p in some.items() if p.mask.any()}
                for masked_by, times in timed(problems, stack, read, args) if problems else ():
                    p = problems[masked_by]
                    limit = {"flops": peak, "bytes": weight_bytes(layer, kind) / times["read"].median}
                    found = result(p, times, limit, floor(layer, p.mask, kind, limit))
                    row = cell | {"masks": masked_by} | found
                    say(line(row, variants))
                    yield row


def arguments() -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--s", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS[:3])
    parser.add_argument("--recorded", type=Path, help="masks that record_masks.py wrote")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--isas", nargs="+", default=["auto"], help="of sadmoe.ops.cpu_isas(); all; auto, the fastest"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        default=[name for name in PEERS if name not in ("packed", "layer")],
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="the layer's costs, as sadmoe bench --calibrate would"
    )
    parser.add_argument("--stack", type=float, metavar="MIB", help="of weights, in layers one after another")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.6, help="for each variant of a cell")
    parser.add_argument("--least", type=int, default=7, help="calls of each variant of a cell, however long")
    parser.add_argument(
        "--patience", type=float, default=math.inf, help="seconds after which a variant has had its calls"
    )
    parser.add_argument("--memory", type=float, default=2, help="GiB of the largest tensor of a peer")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.isas == ["all"]:
        args.isas = ops.cpu_isas()
    if ("recorded" in args.masks) != bool(args.recorded):
        parser.error("--masks recorded and --recorded FILE go together")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    ops.use_cpu_isa(args.isas[0])
    if args.out:
        from layers_plot import draw  # needs matplotlib: told now, not after hours
    title, rows, say = machine(), [], Printed()
    say(f"# {title}\nTimes in ms: median and distance of the quartiles.")
    with torch.inference_mode():
        for row in cells(args, say):
            rows.append(row)
            if args.out:  # after every cell: a long run may be cut off
                args.out.mkdir(parents=True, exist_ok=True)
                command.write(args.out / "layers.json", as_json(title, rows))
                say.write(args.out / "layers.md")
    if args.out:
        draw(rows, title, args.out)


if __name__ == "__main__":
    main()
