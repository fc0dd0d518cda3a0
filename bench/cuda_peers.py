"""One layer on a CUDA device, the same mask, every way to run it: dense torch, with a mask, grouped_mm, Triton, sadmoe.

    python bench/cuda_peers.py [--constants constants.json] [--layers 768x3072 4096x11008-glu] [--tokens 1 8 ...]
                               [--shares 0.25] [--masks independent skewed] [--recorded FILE] [--json FILE]
                               [--no-hopper] [--go-on]

bf16, graphs of several calls; where tokens are few, each with weights of its own, as many as L2 does not hold (at
most 64 sets, which small layers at small shares do not fill). The times of sadmoe and masked, dense products with a
mask as a layer runs them, hold the router and the selection; the other peers are given the mask, and grouped_mm and
Triton their index lists, for free. Masks: see layers.py; all but independent are no router's: sadmoe then runs its
three ops one after another. Recorded ones, of a file by record_masks.py, are of its own layers, at their own shares,
besides the others; with `--layers` and nothing after it, alone. Columns: share of pairs executed; union of the
weights that some token needs; times in us; eta: what dense would take for the share (few tokens: the union) over
sadmoe's time; floor: the least the card could take over sadmoe's time; auto: time of the way that a layer takes by
sadmoe.crossover if it may choose (set_batch_invariant(False)), the op or products with a mask, over plain dense;
peer: the faster of grouped_mm and Triton over that way. A peer that fails is n/a, and why stands below. The file has
the spread as well: from the first tenth to the last, over the median. cuda_goals.py says which aims it reaches.

--no-hopper: without the kernels of sm_90a, where they fail. A cell that fails has a row without times, and the exit
status is 1; one in which the device fails, or that is not done in 90 s, ends the run, with status 3 and its rows
written. --go-on begins after the last cell that the same command has tried with the same kernels; one that
failed is not tried again: remove the file for that.
"""

import argparse
import itertools
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import command
import torch
import torch.nn.functional as F
from cuda_timing import captured, graph_seconds
from layer_problem import LayerShape, shape_of, tau_of_share
from mask_kinds import clustered, recorded, recorded_shapes, skewed
from sadmoe import crossover, ops, reference
from sadmoe.crossover import CONSTANTS, Card, card_for, cards
from torch import Tensor

SIZES = {  # of experts, by layer
    "768x3072": [24, 64, 128],
    "1024x4096": [64, 512],
    "2048x16384-glu": [32, 128],
    "4096x11008-glu": [86, 172],
}
TOKENS = [8192, 1, 8, 512, 64, 2048, 2, 4, 16]  # what tells most first, for a run that is cut off
IMAGES, NARROW = 256 * 197, 768  # tokens of a batch of images, and the widest layer that they are timed in
SHARES = [0.05, 0.1, 0.25, 0.5, 1.0]
MASKS = {"skewed": skewed, "clustered": clustered}  # and independent, those of the layer's own router
NAMES = ("dense", "masked", "grouped_mm", "triton", "sadmoe")
HEADER = (
    "     T    s  share  union"
    + "".join(f"{n:>12}" for n in NAMES)
    + "    eta  floor   auto   peer way, masks"
)
ROUTER_WIDTH = 128
COLD = 200e6  # bytes that L2 does not hold
MOST_SETS = 64  # of weights, one a call of a graph
CELL_SECONDS = 90.0  # of a cell, in which kernels that do not hang are done
MOST_BYTES = 4 << 30  # of the rows that grouped_mm gathers, several times over


def problem(shape: LayerShape, T: int, share: float, mask: Tensor | None) -> SimpleNamespace:
    """Weight sets to take turns, tokens, a random router at the tau that gives the share, and its mask or the given."""
    d, E, s, gated = shape.d, shape.experts, shape.s, shape.gated
    g = torch.Generator("cuda").manual_seed(T)

    def normal(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=g, device="cuda") * scale).bfloat16()

    layer = crossover.LayerShape(d, d, E, s, ROUTER_WIDTH, gated)
    read = 2 * share * layer.neurons * layer.neuron_width
    sets = min(MOST_SETS, int(COLD / read) + 1) if T <= 64 else 1
    p = SimpleNamespace(layer=layer, T=T, x=normal(T, d, scale=1), v1=normal(ROUTER_WIDTH, d, scale=d**-0.5))
    p.v2 = normal(E, ROUTER_WIDTH, scale=ROUTER_WIDTH**-0.5)
    p.act = shape.act
    p.up = [normal(E, s, d, scale=d**-0.5) for _ in range(sets)]
    p.gate = [normal(E, s, d, scale=d**-0.5) for _ in range(sets)] if gated else [None] * sets
    p.down = [normal(E, s, d, scale=shape.f**-0.5) for _ in range(sets)]
    others = ops.router_scores(normal(4096, d, scale=1), p.v1, p.v2)
    p.tau = 0.0 if share == 1 else tau_of_share(others, share)
    p.routed = mask is None
    own = ops.dynamic_k_select(ops.router_scores(p.x, p.v1, p.v2), p.tau)
    p.mask = own if mask is None else mask.to(own.device)
    p.scores_of_mask = torch.where(p.mask, 1.0, torch.nan)  # NaN reaches no tau
    expert, row = p.mask.T.nonzero(as_tuple=True)
    p.rows, counts = row.int(), torch.bincount(expert, minlength=E)
    p.ends, p.most = counts.cumsum(0).int(), int(counts.max())
    p.starts = torch.cat([p.ends.new_zeros(1), p.ends])
    return p


def products(p: SimpleNamespace, i: int) -> tuple[Tensor, Tensor | None]:
    """Of all neurons: up, and gate of a GLU."""
    gate = p.gate[i]
    return F.linear(p.x, p.up[i].flatten(0, 1)), None if gate is None else F.linear(p.x, gate.flatten(0, 1))


def sadmoe(p: SimpleNamespace, i: int) -> Tensor:
    w = (p.up[i], p.down[i], None, p.gate[i], None, None)
    if p.routed:
        return ops.dynamic_k_moe(p.x, p.v1, p.v2, *w, tau=p.tau, act=p.act)
    return ops.sparse_experts(p.x, ops.dynamic_k_select(scores(p), p.tau), *w, act=p.act)


def scores(p: SimpleNamespace) -> Tensor:
    """The router's, or, after the same work, those of the mask that takes the place of its own."""
    own = ops.router_scores(p.x, p.v1, p.v2)
    return own if p.routed else p.scores_of_mask


def dense(p: SimpleNamespace, i: int) -> Tensor:
    up, gate = products(p, i)
    return (F.relu(up) if gate is None else F.silu(gate) * up) @ p.down[i].flatten(0, 1)


def masked(p: SimpleNamespace, i: int) -> Tensor:
    up, gate = products(p, i)
    ops.masked_activation_(up, gate, scores(p), p.tau, p.act)
    return up @ p.down[i].flatten(0, 1)


def grouped_mm(p: SimpleNamespace, i: int) -> Tensor:
    x = p.x[p.rows]
    up = torch._grouped_mm(x, p.up[i].transpose(1, 2), offs=p.ends)
    if p.gate[i] is None:  # in place, for torch begins rows on 16 bytes, and wants them so
        h = up.relu_()
    else:
        h = F.silu(torch._grouped_mm(x, p.gate[i].transpose(1, 2), offs=p.ends), inplace=True).mul_(up)
    return torch.zeros_like(p.x).index_add_(0, p.rows, torch._grouped_mm(h, p.down[i], offs=p.ends))


def triton(p: SimpleNamespace, i: int) -> Tensor:
    from triton_experts import experts

    return experts(p.x, p.rows, p.starts, p.most, p.up[i], p.gate[i], p.down[i])


def usable(
    p: SimpleNamespace, peers: list[Callable], reasons: set[str]
) -> dict[str, Callable[[int], Tensor]]:
    """The peers that run here and compute the same thing; why the others do not is added to the reasons."""
    w = [None if w is None else w.float() for w in (p.up[0], p.down[0], None, p.gate[0], None, None)]
    truth = reference.sparse_experts(p.x.float(), p.mask, *w, act=p.act)
    found: dict[str, Callable[[int], Tensor]] = {}
    gathered = p.rows.numel() * p.x.shape[1] * p.x.itemsize
    for peer in peers:
        if peer is grouped_mm and gathered > MOST_BYTES:
            reasons.add(f"grouped_mm: more than {MOST_BYTES >> 30} GiB of gathered rows")
            continue
        try:
            torch.cuda.empty_cache()  # what a peer leaves unwritten is NaN, and not what the one before it wrote
            torch.full_like(p.x, torch.nan)
            error = ((peer(p, 0).float() - truth).norm() / truth.norm()).item()
            if peer is not dense and not error < 0.01:
                raise ArithmeticError(f"relative error {error:.2g}")
            captured(lambda i, peer=peer: peer(p, 0), 1)
        except Exception as failure:
            torch.cuda.synchronize()
            reasons.add(f"{peer.__name__}: {str(failure).splitlines()[0][:160]}")
            continue
        found[peer.__name__] = lambda i, peer=peer: peer(p, i % len(p.up))
    return found


def floor(p: SimpleNamespace, share: float, union: float, card: Card) -> float:
    """Seconds: the executed products at the rate of dense ones, or the needed weights and rows from memory."""
    layer = p.layer
    work = 2 * p.T * share * layer.neurons * layer.neuron_width / card.dense_16
    read = 2 * (union * layer.neurons * layer.neuron_width + layer.router_weights + 2 * p.T * layer.d)
    return max(work, read / card.memory)


def measured(p: SimpleNamespace, card: Card, reasons: set[str]) -> dict:
    share = p.mask.float().mean().item()
    union = p.mask.any(0).float().mean().item()
    calls = usable(p, [dense, masked, grouped_mm, triton, sadmoe], reasons)
    timings = graph_seconds(calls, max(len(p.up), 8 if p.T <= 512 else 3))
    times = {name: t.median for name, t in timings.items()}
    spread = {name: t.spread for name, t in timings.items()}
    row = {"T": p.T, "share": share, "union": union, "seconds": times, "spread": spread}
    if {"dense", "masked", "sadmoe"} <= times.keys():
        ours, needed = times["sadmoe"], union if p.T <= 64 else share
        way = "sparse" if share <= crossover.crossover(p.layer, p.T, card, masked=True) else "dense"
        row |= {
            "eta": needed * times["dense"] / ours,
            "floor": floor(p, share, union, card) / ours,
            "way": way,
        }
        auto = times["masked"] if way == "dense" else ours
        row["auto"] = auto / times["dense"]
        if others := [times[peer] for peer in ("grouped_mm", "triton") if peer in times]:
            row["peer"] = min(others) / auto
    return row


def line(row: dict) -> str:
    cells = [f"{row['seconds'][n] * 1e6:11.1f}" if n in row["seconds"] else f"{'n/a':>11}" for n in NAMES]
    peer = f"{row['peer']:6.2f}" if "peer" in row else f"{'n/a':>6}"
    tail = (
        f"{row['eta']:6.2f} {row['floor']:6.2f} {row['auto']:6.2f} {peer} {row['way']}"
        if "eta" in row
        else ""
    )
    sizes = f"{row['T']:6d} {row['s']:4d} {row['share']:6.1%} {row['union']:6.1%}"
    return f"{sizes} {' '.join(cells)} {tail}, {row['masks']}"


def kinds(shape: LayerShape, T: int, args: argparse.Namespace) -> Iterator[tuple[str, float, Tensor | None]]:
    """Names of masks, their shares, and those that are not of the layer's own router."""
    for masks, share in itertools.product(args.masks, args.shares):
        if masks == "independent":
            yield masks, share, None
        elif share < 1:  # else all are the same
            yield masks, share, MASKS[masks](T, shape.experts, share)


def recorded_kinds(
    shape: LayerShape, T: int, args: argparse.Namespace
) -> Iterator[tuple[str, float, Tensor]]:
    """The same of a layer in the file of recorded masks."""
    for name, mask in recorded(args.recorded, shape, T):
        yield f"recorded {name}", mask.float().mean().item(), mask


def cells(args: argparse.Namespace) -> Iterator[tuple[dict, int, Tensor | None]]:
    """The grid: what a cell is of, its tokens, and its mask, if that is no router's."""
    tables = [([shape_of(name, s) for s in SIZES[name]], kinds) for name in args.layers]
    if args.recorded:
        tables += [([shape], recorded_kinds) for shape in recorded_shapes(args.recorded)]
    for shapes, kinds_of in tables:
        tokens = args.tokens or [IMAGES] * (shapes[0].d <= NARROW) + TOKENS
        for T, shape in itertools.product(tokens, shapes):
            for masks, share, mask in kinds_of(shape, T, args):
                yield {"layer": shape, "s": shape.s, "masks": masks, "asked": share}, T, mask


def measured_cell(
    cell: dict, T: int, mask: Tensor | None, card: Card, reasons: set[str]
) -> tuple[dict | None, bool]:
    """Its row, without times where it failed, None where nothing runs under its mask; and whether the device is still
    there."""
    shape = cell["layer"]
    try:
        p = problem(shape, T, cell["asked"], mask)
        row = cell | {"layer": shape.name} | measured(p, card, reasons) if p.mask.any() else None
        return row, True
    except Exception as failure:
        told = f"{shape.name}, s {shape.s}, {T} tokens, {cell['masks']}, {cell['asked']:.0%}"
        reasons.add(f"FAILED {told}: {type(failure).__name__}: {str(failure)[:160]!r}")
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return failed(cell, T), False
    return failed(cell, T), True


def failed(cell: dict, T: int) -> dict:
    """A row without times."""
    of = {"layer": cell["layer"].name, "T": T, "share": cell["asked"]}
    return cell | of | {"union": 1.0, "seconds": {}, "spread": {}}


@contextmanager
def hung(seconds: float, told: Callable[[], None]) -> Iterator[None]:
    """Where what is inside takes longer, told is called, and the process ends as where the device failed."""

    def end() -> None:
        try:
            told()
        finally:
            os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def card_of(path: Path | None, hopper: bool) -> Card:
    card = next(iter(cards(path).values())) if path else card_for(torch.cuda.get_device_capability())
    return card if hopper else replace(card, hopper_16=0.0)


def told_before(path: Path | None, told: dict) -> dict:
    """What was written there by a run that tells the same of itself."""
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text())
    return {} if any(before.get(key) != told[key] for key in told) else before


def checksum(constants: Path | None) -> int:
    """Of the kernels, and of the constants by which ways are chosen."""
    files = [*Path(ops.__file__).parents[1].glob("_ops*"), *([] if constants is None else [constants])]
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--constants", type=Path, help=f"measured on this card; otherwise {CONSTANTS.name}")
    parser.add_argument("--layers", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", help=f"{TOKENS}, and {IMAGES} in narrow layers")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--masks", nargs="+", choices=["independent", *MASKS], default=["independent"])
    parser.add_argument("--recorded", type=Path, help="masks that record_masks.py wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-hopper", action="store_true")
    parser.add_argument("--go-on", action="store_true", help="after the last cell that --json has tried")
    args = parser.parse_args()
    command.check_writable(parser, args.json)
    if not args.layers and not args.recorded:
        parser.error("--layers without a name leaves only the layers of --recorded FILE, which is not given")
    card = card_of(args.constants, hopper=not args.no_hopper)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, bf16"
    print(f"# {machine}; not measured of the cost model: {', '.join(card.unmeasured) or 'nothing'}")
    if args.no_hopper:
        torch.ops.sadmoe._use_hopper(False)
    told = {
        "machine": machine,
        "command": command.typed().replace(" --go-on", ""),
        "build": checksum(args.constants),
    }
    before = told_before(args.json, told) if args.go_on else {}
    rows, tried, reasons = before.get("rows", []), before.get("tried", 0), set(before.get("reasons", []))
    layer, alive = None, True
    for row in rows:  # of the calls before
        if row["layer"] != layer:
            layer = row["layer"]
            print(f"\n{layer}\n{HEADER}")
        print(line(row))

    def write(done: bool) -> None:
        if args.json is None:
            return
        more = {"tried": tried, "done": done, "reasons": sorted(reasons), "rows": rows}
        command.write(args.json, json.dumps(told | more, indent=1))

    def told_hung(cell: dict, T: int) -> None:
        reasons.add(f"FAILED {cell['layer'].name}, {T} tokens: not done in {CELL_SECONDS} s")
        rows.append(failed(cell, T))
        write(done=False)

    for number, (cell, T, mask) in enumerate(cells(args), 1):
        if number <= tried or not alive:
            continue
        if cell["layer"].name != layer:
            layer = cell["layer"].name
            print(f"\n{layer}\n{HEADER}")
        tried = number
        with torch.inference_mode(), hung(CELL_SECONDS, partial(told_hung, cell, T)):
            row, alive = measured_cell(cell, T, mask, card, reasons)
        if row:
            print(line(row), flush=True)
            rows.append(row)
        write(done=False)
    write(done=alive)
    print("\nTimes in us, medians.", *sorted(reasons), sep="\n")
    sys.exit(3 if not alive else int(any(reason.startswith("FAILED") for reason in reasons)))


if __name__ == "__main__":
    main()
