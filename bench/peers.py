"""One layer, the same mask, every way to run it: sadmoe, a loop over experts, transformers' grouped_mm, dense torch.

    python bench/peers.py [--d 384 --f 1536 --s 32] [--share 0.25] [--threads 1] [--dtype float32] [--json FILE]

sadmoe's time holds the router and the selection; the peers are given the mask, and grouped_mm its index lists, for
free. Masks are those of a random router at the tau that gives the share.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sadmoe import ops, reference
from timing import machine, measure
from torch import Tensor

TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024, 4096]


def tau_of_share(scores: Tensor, share: float) -> float:
    """The tau at which the executed share is the wanted one, to half a percent."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if ops.dynamic_k_select(scores, middle).float().mean() > share else (low, middle)
        )
    return high


def problem(args: argparse.Namespace, T: int) -> SimpleNamespace:
    """Weights of a plain ReLU layer, tokens, and the mask of a router."""
    g = torch.Generator().manual_seed(T)
    E = args.f // args.s

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(args.dtype)

    p = SimpleNamespace(E=E, x=normal(T, args.d, scale=1), v1=normal(args.r, args.d, scale=args.d**-0.5))
    p.v2 = normal(E, args.r, scale=args.r**-0.5)
    p.w_up, p.w_down = (
        normal(E, args.s, args.d, scale=args.d**-0.5),
        normal(E, args.s, args.d, scale=args.f**-0.5),
    )
    p.b_up, p.b_out = normal(E, args.s, scale=0.1), normal(args.d, scale=0.1)
    p.tau = tau_of_share(ops.router_scores(normal(4096, args.d, scale=1), p.v1, p.v2), args.share)
    p.mask = ops.dynamic_k_select(ops.router_scores(p.x, p.v1, p.v2), p.tau)
    return p


def sadmoe(p: SimpleNamespace) -> Callable[[], Tensor]:
    return lambda: ops.dynamic_k_moe(
        p.x, p.v1, p.v2, p.w_up, p.w_down, p.b_up, None, None, p.b_out, tau=p.tau, act="relu"
    )


def dense(p: SimpleNamespace) -> Callable[[], Tensor]:
    w_up, b_up = p.w_up.flatten(0, 1), p.b_up.flatten()
    w_down = p.w_down.flatten(0, 1).T.contiguous()
    return lambda: F.linear(F.relu(F.linear(p.x, w_up, b_up)), w_down, p.b_out)


def loop(p: SimpleNamespace) -> Callable[[], Tensor]:
    """Only the experts that some token chose, rows gathered and added back by index."""
    w_up = p.w_up.transpose(1, 2).contiguous()

    def run() -> Tensor:
        y = p.b_out.expand_as(p.x).clone()
        for e in p.mask.any(0).nonzero().flatten().tolist():
            rows = p.mask[:, e].nonzero().flatten()
            hidden = F.relu(torch.addmm(p.b_up[e], p.x[rows], w_up[e]))
            y.index_add_(0, rows, hidden @ p.w_down[e])
        return y

    return run


def grouped_mm(p: SimpleNamespace) -> Callable[[], Tensor]:
    """transformers' experts on torch._grouped_mm: k of the busiest token, absent pairs as sentinels that it skips."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    k = int(p.mask.sum(1).max())
    index = torch.where(p.mask, torch.arange(p.E), p.E).sort(dim=1).values[:, :k]
    weights = (index < p.E).to(p.x.dtype)
    experts = SimpleNamespace(
        num_experts=p.E, has_gate=False, has_bias=True, is_transposed=False, has_post_expert_norm=False,
        _is_expert_parallel=True, act_fn=F.relu, up_proj=p.w_up, up_proj_bias=p.b_up,
        down_proj=p.w_down.transpose(1, 2).contiguous(), down_proj_bias=torch.zeros(p.E, p.x.shape[1], dtype=p.x.dtype),
    )  # fmt: skip
    return lambda: grouped_mm_experts_forward(experts, p.x, index, weights) + p.b_out


def checked(p: SimpleNamespace, variants: dict[str, Callable[[], Tensor]]) -> None:
    """Every sparse variant must compute the same thing, else its time means nothing."""
    args = [t.double() for t in (p.w_up, p.w_down, p.b_up)], p.b_out.double()
    truth = reference.sparse_experts(p.x.double(), p.mask, *args[0], None, None, args[1])
    for name, run in variants.items():
        error = ((run().double() - truth).norm() / truth.norm()).item()
        if name != "dense" and error > 20 * torch.finfo(p.x.dtype).eps:
            raise SystemExit(f"{name} is wrong: relative error {error:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"d": 384, "f": 1536, "s": 32, "r": 128, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    title = f"{machine()}, d={args.d} f={args.f} s={args.s} E={args.f // args.s} relu, {args.dtype}"
    print(f"# {title}")
    print(
        f"{'T':>5} {'share':>6}  {'dense':>13}  {'sadmoe':>13}  {'loop':>13}  {'grouped_mm':>13}   "
        "sadmoe is faster than"
    )
    rows = []
    with torch.inference_mode():
        for T in args.tokens:
            p = problem(args, T)
            variants = {"dense": dense(p), "sadmoe": sadmoe(p), "loop": loop(p), "grouped_mm": grouped_mm(p)}
            checked(p, variants)
            times = measure(variants)
            share = p.mask.float().mean().item()
            cells = "  ".join(f"{t.median * 1e3:7.3f} ±{t.spread:4.0%}" for t in times.values())
            gains = {
                name: times[name].median / times["sadmoe"].median for name in ("dense", "loop", "grouped_mm")
            }
            print(
                f"{T:5d} {share:6.1%}  {cells}   "
                + "  ".join(f"{name} {gain:.2f}x" for name, gain in gains.items())
            )
            rows.append(
                {"T": T, "share": share, "seconds": {n: t.median for n, t in times.items()}, "gains": gains}
            )
    print("Times in ms: median and distance of the quartiles.")
    if args.json:
        args.json.write_text(json.dumps({"machine": title, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
