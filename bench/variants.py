"""Ways to run one layer: sadmoe, dense torch, a loop over experts, transformers' two, torch's own grouped product."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from layer_problem import kept
from sadmoe import DynamicK, DynamicKMoE, ops, reference
from torch import Tensor

COMPARED = 64  # tokens, at the most


def transposed(p: SimpleNamespace, name: str) -> Tensor:
    """Of each expert, in memory of its own."""
    return kept(p, f"{name} transposed", lambda: getattr(p, name).transpose(1, 2).contiguous())


def gate_and_up(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The weights and biases that transformers holds in one, of a GLU."""
    w = kept(p, "w_gate and w_up", lambda: torch.cat([p.w_gate, p.w_up], 1))
    return w, kept(p, "b_gate and b_up", lambda: torch.cat([p.b_gate, p.b_up], 1))


def experts(p: SimpleNamespace) -> tuple[Tensor | None, ...]:
    return p.w_up, p.w_down, p.b_up, p.w_gate, p.b_gate, p.b_out


def sadmoe(p: SimpleNamespace) -> Callable[[], Tensor]:
    """The fused op; with a mask that is not the router's, the three ops one after another: the same work, not fused."""
    return _by_ops(p, ops.dynamic_k_moe, ops.sparse_experts, experts(p), (p.v1, p.v2))


def packed(p: SimpleNamespace) -> Callable[[], Tensor]:
    """The same with w_up and w_gate as `pack_experts_` lays them out."""
    layer = kept(p, "packed", lambda: layer_of(p))
    layer.pack_()
    weights = [None if weight is None else weight.detach() for weight in layer.expert_weights()]
    return _by_ops(p, ops.dynamic_k_moe, ops.sparse_experts, tuple(weights), (p.v1, p.v2))


def layer_of(w: SimpleNamespace) -> DynamicKMoE:
    """The layer with a copy of these weights, free to run every expert by torch's products where that is faster."""
    E, s, d = w.w_up.shape
    biases = tuple(name for name in ("b_up", "b_gate", "b_out") if getattr(w, name) is not None)
    layer = DynamicKMoE(
        d, E, s, w.act, router_width=len(w.v1), gated=w.w_gate is not None, bias=biases,
        batch_invariant=False, dtype=w.w_up.dtype,
    )  # fmt: skip
    for name in ("w_up", "w_down", "w_gate", *biases):
        if getattr(w, name) is not None:
            getattr(layer, name).data.copy_(getattr(w, name))
    layer.router.v1.data.copy_(w.v1)
    layer.router.v2.data.copy_(w.v2)
    return layer


def as_layer(p: SimpleNamespace) -> Callable[[], Tensor]:
    """`layer_of`, called as a model calls it. Its mask is its router's."""
    made, x = kept(p, "layer", lambda: layer_of(p)), p.x

    def run() -> Tensor:
        if made.gate is not gate:
            made.gate = gate
        return made(x)

    gate = DynamicK(p.tau)
    return run


def int8(p: SimpleNamespace) -> Callable[[], Tensor]:
    """The op with the experts' weights rounded to int8, and the router's to 16 bits."""
    layer = _rounded(p)
    return _by_ops(
        p, ops.dynamic_k_moe_int8, ops.sparse_experts_int8, layer.int8_weights(), layer.router.weights()
    )


def _rounded(p: SimpleNamespace) -> DynamicKMoE:
    def made() -> DynamicKMoE:
        layer = layer_of(p)
        layer.to_int8_()
        return layer

    return kept(p, "int8", made)


def _by_ops(
    p: SimpleNamespace, fused: Callable, given: Callable, weights: tuple, router: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    if p.routed:
        return lambda: fused(p.x, *router, *weights, tau=p.tau, act=p.act)

    def run() -> Tensor:
        ops.dynamic_k_select(ops.router_scores(p.x, *router), p.tau)
        return given(p.x, p.mask, *weights, act=p.act)

    return run


def dense(p: SimpleNamespace) -> Callable[[], Tensor]:
    act = reference.ACTIVATIONS[p.act]
    w_up, b_up = p.w_up.flatten(0, 1), p.b_up.flatten()
    w_down = kept(p, "w_down", lambda: p.w_down.flatten(0, 1).T.contiguous())
    if p.w_gate is None:
        return lambda: F.linear(act(F.linear(p.x, w_up, b_up)), w_down, p.b_out)
    w_gate, b_gate = p.w_gate.flatten(0, 1), p.b_gate.flatten()
    return lambda: F.linear(act(F.linear(p.x, w_gate, b_gate)) * F.linear(p.x, w_up, b_up), w_down, p.b_out)


def loop(p: SimpleNamespace) -> Callable[[], Tensor]:
    """Only the experts that some token chose, rows gathered and added back by index."""
    act = reference.ACTIVATIONS[p.act]
    w_up = transposed(p, "w_up")
    w_gate = None if p.w_gate is None else transposed(p, "w_gate")

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


def index_lists(p: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The mask as transformers takes it: indices and weights [T, k], k the busiest token's, E where one has fewer."""
    k = int(p.mask.sum(1).max())
    index = torch.where(p.mask, torch.arange(p.E), p.E).sort(dim=1).values[:, :k]
    return index, (index < p.E).to(p.x.dtype)


def eager(p: SimpleNamespace) -> Callable[[], Tensor]:
    """transformers' eager experts: what its classes do, written out, for none of them has this layer's biases."""
    act, (index, chosen) = reference.ACTIVATIONS[p.act], index_lists(p)
    w_up, b_up = (p.w_up, p.b_up) if p.w_gate is None else gate_and_up(p)
    w_down = transposed(p, "w_down")

    def run() -> Tensor:
        y = torch.zeros_like(p.x)
        hits = F.one_hot(index, p.E + 1).permute(2, 1, 0)
        for e in torch.greater(hits.sum((-1, -2)), 0).nonzero().flatten().tolist():
            if e == p.E:
                continue
            place, rows = torch.where(hits[e])
            hidden = F.linear(p.x[rows], w_up[e], b_up[e])
            if p.w_gate is None:
                hidden = act(hidden)
            else:
                gate, up = hidden.chunk(2, -1)
                hidden = act(gate) * up
            y.index_add_(0, rows, F.linear(hidden, w_down[e]) * chosen[rows, place, None])
        return y + p.b_out

    return run


def torch_grouped_mm(p: SimpleNamespace) -> Callable[[], Tensor]:
    """torch._grouped_mm and no more: the pairs that run, expert by expert, gathered, and added back by index."""
    act = reference.ACTIVATIONS[p.act]
    expert, rows = p.mask.T.nonzero(as_tuple=True)
    ends = p.mask.sum(0).cumsum(0).to(torch.int32)
    w_up = p.w_up.transpose(1, 2)
    w_gate = None if p.w_gate is None else p.w_gate.transpose(1, 2)

    def run() -> Tensor:
        x = p.x[rows]
        hidden = torch._grouped_mm(x, w_up, ends).add_(p.b_up[expert])
        if w_gate is None:
            hidden = act(hidden)
        else:
            hidden.mul_(act(torch._grouped_mm(x, w_gate, ends).add_(p.b_gate[expert])))
        return p.b_out.expand_as(p.x).clone().index_add_(0, rows, torch._grouped_mm(hidden, p.w_down, ends))

    return run


def grouped_mm(p: SimpleNamespace) -> Callable[[], Tensor]:
    """transformers' experts on torch._grouped_mm, which skips the sentinels of absent pairs.

    It has biases for both products or for none, so a down_proj_bias of zeros is added as well.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    act, (index, chosen) = reference.ACTIVATIONS[p.act], index_lists(p)

    def gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return act(gate) * up

    layer = SimpleNamespace(
        num_experts=p.E, has_gate=p.w_gate is not None, has_bias=True, is_transposed=False,
        has_post_expert_norm=False, _is_expert_parallel=True, act_fn=act, _apply_gate=gate,
        up_proj=p.w_up, up_proj_bias=p.b_up,
        down_proj=transposed(p, "w_down"), down_proj_bias=torch.zeros(p.E, p.x.shape[1], dtype=p.x.dtype),
    )  # fmt: skip
    if p.w_gate is not None:
        layer.gate_up_proj, layer.gate_up_proj_bias = gate_and_up(p)
    return lambda: grouped_mm_experts_forward(layer, p.x, index, chosen) + p.b_out


def largest(name: str, p: SimpleNamespace) -> int:
    """Bytes of the largest tensor that a peer makes on the way; it holds up to four such ones."""
    T, d = p.x.shape
    k, row = int(p.mask.sum(1).max()), d * p.x.dtype.itemsize
    counts = {
        "eager": T * k * (p.E + 1) * 8,
        "grouped_mm": T * k * row,
        "torch_grouped_mm": int(p.mask.sum()) * row,
    }
    return counts.get(name, 0)


class Kept:
    """A call, and what it returned last."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call

    def __call__(self) -> None:
        self.result = self.call()


def own_mask(p: SimpleNamespace, rows: Tensor) -> Tensor:
    """The mask that int8 runs: its rounded router decides otherwise where a score is all but tau times the largest."""
    if not p.routed:
        return p.mask[rows]
    return ops.dynamic_k_select(ops.router_scores(p.x[rows], *_rounded(p).router.weights()), p.tau)


def checked(p: SimpleNamespace, results: dict[str, Tensor]) -> None:
    """What runs sparsely must compute the same thing, else a time means nothing. Of many tokens some are compared."""
    rows = torch.arange(0, len(p.x), -(-len(p.x) // COMPARED))
    names = ("w_up", "w_down", "b_up", "w_gate", "b_gate", "b_out")
    args = [
        None if getattr(p, name) is None else kept(p, f"{name} double", getattr(p, name).double)
        for name in names
    ]

    def truth_of(mask: Tensor) -> Tensor:
        return reference.sparse_experts(p.x[rows].double(), mask, *args, act=p.act)

    given = truth_of(p.mask[rows])
    for name, y in results.items():
        truth = truth_of(own_mask(p, rows)) if name == "int8" else given
        error = ((y[rows].double() - truth).norm() / truth.norm()).item()
        if p.x.dtype == torch.float32:
            allowed = 0.02 if name == "int8" else 2e-6
        else:  # peers also add experts up in 16 bits
            allowed = 0.1 if name in ("loop", "eager", "grouped_mm", "torch_grouped_mm") else 0.02
        if name != "dense" and not error <= allowed:
            raise SystemExit(f"{name} is wrong: relative error {error:.2g}")
