"""One layer as a problem, and ways to run it: sadmoe, dense torch, a loop over experts, transformers' grouped_mm."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sadmoe import DynamicKMoE, ops, reference
from torch import Tensor

ROUTER_WIDTH = 128
COMPARED = 256  # tokens, at the most


@dataclass(frozen=True)
class LayerShape:
    """A layer: plain with ReLU, or a GLU with SiLU."""

    d: int
    f: int
    s: int
    gated: bool = False

    @property
    def experts(self) -> int:
        return self.f // self.s

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def act(self) -> str:
        return "silu" if self.gated else "relu"


def tau_of_share(scores: Tensor, share: float) -> float:
    """The tau at which the executed share is the wanted one, to half a percent."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if ops.dynamic_k_select(scores, middle).float().mean() > share else (low, middle)
        )
    return high


def problem(
    layer: LayerShape, T: int, share: float, dtype: torch.dtype, router_width: int = ROUTER_WIDTH
) -> SimpleNamespace:
    """Weights, tokens, and the mask of a random router at the tau that gives the share."""
    g = torch.Generator().manual_seed(T)
    E, s, d, r = layer.experts, layer.s, layer.d, router_width

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    p = SimpleNamespace(E=E, act=layer.act, x=normal(T, d, scale=1), v1=normal(r, d, scale=d**-0.5))
    p.v2 = normal(E, r, scale=r**-0.5)
    p.w_up, p.w_down = normal(E, s, d, scale=d**-0.5), normal(E, s, d, scale=layer.f**-0.5)
    p.b_up, p.b_out = normal(E, s, scale=0.1), normal(d, scale=0.1)
    p.w_gate, p.b_gate = (
        (normal(E, s, d, scale=d**-0.5), normal(E, s, scale=0.1)) if layer.gated else (None, None)
    )
    if share == 1:
        p.tau = 0.0
    else:
        p.tau = tau_of_share(ops.router_scores(normal(4096, d, scale=1), p.v1, p.v2), share)
    p.mask, p.routed = ops.dynamic_k_select(ops.router_scores(p.x, p.v1, p.v2), p.tau), True
    return p


def with_mask(p: SimpleNamespace, mask: Tensor) -> SimpleNamespace:
    """The same problem with a mask that is not its router's."""
    return SimpleNamespace(**{**vars(p), "mask": mask, "routed": False})


def copied(p: SimpleNamespace) -> SimpleNamespace:
    """The same problem in memory of its own."""
    return SimpleNamespace(**{name: v.clone() if isinstance(v, Tensor) else v for name, v in vars(p).items()})


def experts(p: SimpleNamespace) -> tuple[Tensor | None, ...]:
    return p.w_up, p.w_down, p.b_up, p.w_gate, p.b_gate, p.b_out


def sadmoe(p: SimpleNamespace) -> Callable[[], Tensor]:
    """The fused op; with a mask that is not the router's, the three ops one after another: the same work, not fused."""
    return _by_ops(p, ops.dynamic_k_moe, ops.sparse_experts, experts(p))


def int8(p: SimpleNamespace) -> Callable[[], Tensor]:
    """The same with the experts' weights rounded to int8."""
    names = ("w_up", "w_down", "b_up", "w_gate", "b_gate", "b_out")
    layer = DynamicKMoE(
        p.x.shape[1], p.E, p.w_up.shape[1], p.act, gated=p.w_gate is not None, dtype=p.x.dtype,
        bias=tuple(name for name in names if name.startswith("b") and getattr(p, name) is not None),
    )  # fmt: skip
    for name in names:
        if getattr(p, name) is not None:
            getattr(layer, name).data.copy_(getattr(p, name))
    layer.to_int8_()
    return _by_ops(p, ops.dynamic_k_moe_int8, ops.sparse_experts_int8, layer.int8_weights())


def _by_ops(p: SimpleNamespace, fused: Callable, given: Callable, weights: tuple) -> Callable[[], Tensor]:
    if p.routed:
        return lambda: fused(p.x, p.v1, p.v2, *weights, tau=p.tau, act=p.act)

    def run() -> Tensor:
        ops.dynamic_k_select(ops.router_scores(p.x, p.v1, p.v2), p.tau)
        return given(p.x, p.mask, *weights, act=p.act)

    return run


def dense(p: SimpleNamespace) -> Callable[[], Tensor]:
    act = reference.ACTIVATIONS[p.act]
    w_up, b_up = p.w_up.flatten(0, 1), p.b_up.flatten()
    w_down = p.w_down.flatten(0, 1).T.contiguous()
    if p.w_gate is None:
        return lambda: F.linear(act(F.linear(p.x, w_up, b_up)), w_down, p.b_out)
    w_gate, b_gate = p.w_gate.flatten(0, 1), p.b_gate.flatten()
    return lambda: F.linear(act(F.linear(p.x, w_gate, b_gate)) * F.linear(p.x, w_up, b_up), w_down, p.b_out)


def loop(p: SimpleNamespace) -> Callable[[], Tensor]:
    """Only the experts that some token chose, rows gathered and added back by index."""
    act = reference.ACTIVATIONS[p.act]
    w_up = p.w_up.transpose(1, 2).contiguous()
    w_gate = None if p.w_gate is None else p.w_gate.transpose(1, 2).contiguous()

    def run() -> Tensor:
        y = p.b_out.expand_as(p.x).clone()
        for e in p.mask.any(0).nonzero().flatten().tolist():
            rows = p.mask[:, e].nonzero().flatten()
            x = p.x[rows]
            hidden = torch.addmm(p.b_up[e], x, w_up[e])
            hidden = act(hidden) if w_gate is None else act(torch.addmm(p.b_gate[e], x, w_gate[e])) * hidden
            y.index_add_(0, rows, hidden @ p.w_down[e])
        return y

    return run


def grouped_mm(p: SimpleNamespace) -> Callable[[], Tensor]:
    """transformers' experts on torch._grouped_mm: k of the busiest token, absent pairs as sentinels that it skips."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    k = int(p.mask.sum(1).max())
    index = torch.where(p.mask, torch.arange(p.E), p.E).sort(dim=1).values[:, :k]
    weights = (index < p.E).to(p.x.dtype)
    act = reference.ACTIVATIONS[p.act]

    def gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return act(gate) * up

    layer = SimpleNamespace(
        num_experts=p.E, has_gate=p.w_gate is not None, has_bias=True, is_transposed=False,
        has_post_expert_norm=False, _is_expert_parallel=True, act_fn=act, _apply_gate=gate,
        up_proj=p.w_up, up_proj_bias=p.b_up,
        down_proj=p.w_down.transpose(1, 2).contiguous(), down_proj_bias=torch.zeros(p.E, p.x.shape[1], dtype=p.x.dtype),
    )  # fmt: skip
    if p.w_gate is not None:
        layer.gate_up_proj, layer.gate_up_proj_bias = (
            torch.cat([p.w_gate, p.w_up], 1),
            torch.cat([p.b_gate, p.b_up], 1),
        )
    return lambda: grouped_mm_experts_forward(layer, p.x, index, weights) + p.b_out


def checked(p: SimpleNamespace, variants: dict[str, Callable[[], Tensor]]) -> None:
    """What runs sparsely must compute the same thing, else a time means nothing. Of many tokens some are compared."""
    rows = torch.arange(0, len(p.x), -(-len(p.x) // COMPARED))
    args = [None if t is None else t.double() for t in experts(p)]
    truth = reference.sparse_experts(p.x[rows].double(), p.mask[rows], *args, act=p.act)
    for name, run in variants.items():
        error = ((run()[rows].double() - truth).norm() / truth.norm()).item()
        allowed = 0.02 if name == "int8" else 20 * torch.finfo(p.x.dtype).eps
        if name != "dense" and not error <= allowed:
            raise SystemExit(f"{name} is wrong: relative error {error:.2g}")
