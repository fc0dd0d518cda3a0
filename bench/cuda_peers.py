"""One layer on a CUDA device, the same mask, every way to run it: dense torch, with a mask, grouped_mm, Triton, sadmoe.

    python bench/cuda_peers.py [--constants constants.json] [--tokens 1 8 ...] [--json FILE]

bf16, graphs of several calls; where tokens are few, each with weights of its own, as many as L2 does not hold (at most
64 sets, which small layers at small shares do not fill). sadmoe's time holds the router and the selection; the peers
are given the mask, and grouped_mm and Triton their index lists, for free. Columns: share of pairs executed; union of
the weights that some token needs; times in us; eta: what dense would take for the share (few tokens: the union) over
sadmoe's time; floor: the least the card could take over sadmoe's time; auto: time of the way that sadmoe.crossover
chooses over dense. A peer that fails is n/a, and why stands below.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from cuda_timing import captured, graph_seconds
from layer_problem import tau_of_share
from sadmoe import ops, reference
from sadmoe.crossover import CONSTANTS, Card, Layer, card_for, cards, choose
from torch import Tensor

SHAPES = [  # d, E, s, gated
    (768, 128, 24, False),
    (768, 48, 64, False),
    (768, 24, 128, False),
    (2048, 512, 32, True),
    (2048, 128, 128, True),
    (4096, 64, 172, True),
]
TOKENS = [1, 8, 64, 512, 8192]
SHARES = [0.05, 0.1, 0.25, 0.5]
ROUTER_WIDTH = 128
COLD = 200e6  # bytes that L2 does not hold
MOST_SETS = 64  # of weights, one a call of a graph


def problem(shape: tuple[int, int, int, bool], T: int, share: float) -> SimpleNamespace:
    """Weight sets to take turns, tokens, and the mask of a random router at the tau that gives the share."""
    d, E, s, gated = shape
    g = torch.Generator("cuda").manual_seed(T)

    def normal(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, generator=g, device="cuda") * scale).bfloat16()

    layer = Layer(d, d, E, s, ROUTER_WIDTH, gated)
    read = 2 * share * layer.neurons * layer.neuron_width
    sets = min(MOST_SETS, int(COLD / read) + 1) if T <= 64 else 1
    p = SimpleNamespace(layer=layer, T=T, x=normal(T, d, scale=1), v1=normal(ROUTER_WIDTH, d, scale=d**-0.5))
    p.v2 = normal(E, ROUTER_WIDTH, scale=ROUTER_WIDTH**-0.5)
    p.act = "silu" if gated else "relu"
    p.up = [normal(E, s, d, scale=d**-0.5) for _ in range(sets)]
    p.gate = [normal(E, s, d, scale=d**-0.5) for _ in range(sets)] if gated else [None] * sets
    p.down = [normal(E, s, d, scale=(E * s) ** -0.5) for _ in range(sets)]
    p.tau = tau_of_share(ops.router_scores(normal(4096, d, scale=1), p.v1, p.v2), share)
    p.mask = ops.dynamic_k_select(ops.router_scores(p.x, p.v1, p.v2), p.tau)
    expert, row = p.mask.T.nonzero(as_tuple=True)
    p.rows, counts = row.int(), torch.bincount(expert, minlength=E)
    p.ends, p.most = counts.cumsum(0).int(), int(counts.max())
    p.starts = torch.cat([p.ends.new_zeros(1), p.ends])
    return p


def hidden(p: SimpleNamespace, i: int) -> Tensor:
    up = F.linear(p.x, p.up[i].flatten(0, 1))
    return F.relu(up) if p.gate[i] is None else F.silu(F.linear(p.x, p.gate[i].flatten(0, 1))) * up


def sadmoe(p: SimpleNamespace, i: int) -> Tensor:
    w = (p.up[i], p.down[i], None, p.gate[i], None, None)
    return ops.dynamic_k_moe(p.x, p.v1, p.v2, *w, tau=p.tau, act=p.act)


def dense(p: SimpleNamespace, i: int) -> Tensor:
    return hidden(p, i) @ p.down[i].flatten(0, 1)


def masked(p: SimpleNamespace, i: int) -> Tensor:
    kept = hidden(p, i).unflatten(1, (p.layer.experts, -1)) * p.mask[..., None]
    return kept.flatten(1) @ p.down[i].flatten(0, 1)


def grouped_mm(p: SimpleNamespace, i: int) -> Tensor:
    x = p.x[p.rows]
    up = torch._grouped_mm(x, p.up[i].transpose(1, 2), offs=p.ends)
    if p.gate[i] is None:
        h = F.relu(up)
    else:
        h = F.silu(torch._grouped_mm(x, p.gate[i].transpose(1, 2), offs=p.ends)) * up
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
    for peer in peers:
        try:
            error = ((peer(p, 0).float() - truth).norm() / truth.norm()).item()
            if peer is not dense and not error < 0.02:
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
    times = {
        name: t.median for name, t in graph_seconds(calls, max(len(p.up), 8 if p.T <= 512 else 3)).items()
    }
    row = {"T": p.T, "share": share, "union": union, "seconds": times}
    if "dense" in times and "sadmoe" in times:
        ours, needed = times["sadmoe"], union if p.T <= 64 else share
        way = choose(p.layer, p.T, share, card)
        row |= {
            "eta": needed * times["dense"] / ours,
            "floor": floor(p, share, union, card) / ours,
            "way": way,
        }
        row["auto"] = (times["dense"] if way == "dense" else ours) / times["dense"]
    return row


def line(row: dict) -> str:
    names = ("dense", "masked", "grouped_mm", "triton", "sadmoe")
    cells = [f"{row['seconds'][n] * 1e6:11.1f}" if n in row["seconds"] else f"{'n/a':>11}" for n in names]
    tail = f"{row['eta']:6.2f} {row['floor']:6.2f} {row['auto']:6.2f} {row['way']}" if "eta" in row else ""
    return f"{row['T']:6d} {row['share']:6.1%} {row['union']:6.1%} {' '.join(cells)} {tail}"


def card_of(path: Path | None) -> Card:
    return next(iter(cards(path).values())) if path else card_for(torch.cuda.get_device_capability())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constants", type=Path, help=f"measured on this card; otherwise {CONSTANTS.name}")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    card = card_of(args.constants)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, bf16"
    print(f"# {machine}; not measured of the cost model: {', '.join(card.unmeasured) or 'nothing'}")
    rows, reasons = [], set()
    with torch.inference_mode():
        for shape in SHAPES:
            d, E, s, gated = shape
            print(f"\nd {d}, E {E}, s {s}{', GLU' if gated else ''}")
            print(
                "     T  share  union       dense      masked  grouped_mm      triton      sadmoe    eta  floor   auto"
            )
            for T in args.tokens:
                for share in SHARES:
                    row = measured(problem(shape, T, share), card, reasons)
                    rows.append({"d": d, "E": E, "s": s, "gated": gated} | row)
                    print(line(row), flush=True)
                    if args.json:
                        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print("\nTimes in us, medians.", *sorted(reasons), sep="\n")


if __name__ == "__main__":
    main()
