"""The table of adapters: each looks at the structure of one module, and proposes what FFN may be in it.

Nothing here runs a module's forward or knows a model class: a proposal is proved or refused by
`probe.verify`. What counts as an FFN's shape: linear layers d -> f (-> or 2f, where gate and up are one) and
f -> d with f > d. That keeps out attention projections, poolers, heads and bottlenecks.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from torch import Tensor, nn

from sadmoe import reference
from sadmoe.ffn.activations import PASSES, activation_attributes, activation_children, is_bare
from sadmoe.ffn.linears import linear_shape
from sadmoe.ffn.lookup import join
from sadmoe.ffn.probe import Call
from sadmoe.ffn.projection import ProjectionMLP
from sadmoe.ffn.sites import Parts
from sadmoe.ffn.surgery import FAST_PATH

ALL_ACTS = tuple(reference.ACTIVATIONS)


@dataclass(frozen=True)
class Proposal:
    """An FFN that a module may hold, the activations it may have, and the ways to call the module.

    likely: its first linear layer comes first among the children. Only then is it worth a word if it is
    refused: the other way round, every bottleneck f -> d -> f looks like an FFN.   refusal: why it cannot be
    converted, where structure alone tells.   halves: ways to call what holds the FFN without the module, which prove
    less: what the module does between them is not seen.
    """

    parts: Parts
    acts: tuple[str, ...]
    calls: tuple[Call, ...]
    likely: bool
    refusal: str | None = None
    halves: tuple[Call, ...] = ()


Adapter = Callable[[nn.Module], Iterator[Proposal]]


def projection(module: nn.Module) -> Iterator[Proposal]:
    """The MLP that stands for a projection of attention, whatever its widths: the MoE layer takes its place."""
    if isinstance(module, ProjectionMLP):
        parts, name = Parts("", "up", "down", activation="act"), module.act_name
        refusal = None if name else _unknown(module, ["act"])
        yield Proposal(parts, (name,) if name else (), (_call_once,), True, refusal)


def whole_plain(module: nn.Module) -> Iterator[Proposal]:
    """A module that is linear, activation, linear: the MoE layer takes its place (GPT-2, ViT, T5, timm)."""
    linears = _all_linears(module)
    if len(linears) == 2:
        yield from _whole(module, linears, [Parts("", up, down) for up, down in _pairs(linears)])


def whole_gated(module: nn.Module) -> Iterator[Proposal]:
    """A module that is down(act(gate(x)) * up(x)): the MoE layer takes its place (Llama, Gemma, T5 v1.1)."""
    linears = _all_linears(module)
    if len(linears) == 3:
        parts = [
            Parts("", up, down, gate)
            for gate, up, down in permutations(linears)
            if linears[gate] == linears[up] and _is_pair(linears[up], linears[down])
        ]
        yield from _whole(module, linears, parts)


def whole_fused(module: nn.Module) -> Iterator[Proposal]:
    """The gated module with gate and up in one linear layer, in either order (timm, Phi-3, ModernBERT)."""
    linears = _all_linears(module)
    if len(linears) == 2:
        parts = [
            Parts("", up, down, up, half)
            for up, down in permutations(linears)
            if linears[up][1] % 2 == 0 and _is_pair((linears[up][0], linears[up][1] // 2), linears[down])
            for half in ("first", "second")
        ]
        yield from _whole(module, linears, parts)


def in_block(module: nn.Module) -> Iterator[Proposal]:
    """A plain FFN among the children of a larger module (OPT, nn.TransformerEncoderLayer, ALBERT).

    The MoE layer takes the place of the first linear layer; activation and second become passthroughs. So the
    activation has to be a module or an attribute of the larger one.
    """
    linears = _linears(module)
    calls = (_call_once, _call_without_mask, _call_twice)
    fast_path = (FAST_PATH,) if FAST_PATH in module.__dict__ else ()
    for up, down in _pairs(linears):
        likely = _in_order(linears, up, down)
        children = activation_children(module)
        known = {n: a for n, a in children.items() if a is not None} | activation_attributes(module)
        for name, act in known.items():
            parts = Parts(up, up, down, activation=name, removed=(name, down, *fast_path))
            yield Proposal(parts, (act,), calls, likely)
        # Of a module that is all FFN the adapters before have told.
        told = len(linears) == 2 and _only_ffn_children(module)
        if not known and (children or len(linears) == 2) and not told:
            others = [n for n, child in module.named_children() if linear_shape(child) is None]
            named = _named_as_activations(module, others)
            refusal = _unknown(module, named) if named else _out_of_reach(up, down)
            yield Proposal(Parts(up, up, down), (), calls, likely, refusal)


def in_pair(module: nn.Module) -> Iterator[Proposal]:
    """An FFN over two children: linear and activation in one; linear, norm, residual in the other (BERT).

    Where the first holds more (a norm, in pre-norm RoBERTa), the MoE layer takes the place of its linear layer alone.
    """
    inner = {name: _linears(child) for name, child in module.named_children()}
    one = {name: next(iter(linears.items())) for name, linears in inner.items() if len(linears) == 1}
    for (a, (up, up_shape)), (b, (down, down_shape)) in permutations(one.items(), 2):
        if not _is_pair(up_shape, down_shape):
            continue
        first, likely = module.get_submodule(a), _in_order(one, a, b)
        name, acts, refusal = _activation(first)
        activation = None if name is None else f"{a}.{name}"
        if not _only_ffn_children(first):
            if activation is not None:
                removed = (activation, f"{b}.{down}")
                parts = Parts(f"{a}.{up}", f"{a}.{up}", f"{b}.{down}", activation=activation, removed=removed)
                yield Proposal(parts, acts, (_call_once,), likely)
        else:
            parts = Parts(a, f"{a}.{up}", f"{b}.{down}", activation=activation, removed=(f"{b}.{down}",))
            halves = (_call_pair_with_residual, _call_pair)
            yield Proposal(parts, acts, (_call_once,), likely, refusal, halves)


ADAPTERS: dict[str, Adapter] = {
    adapter.__name__: adapter
    for adapter in (projection, whole_plain, whole_gated, whole_fused, in_block, in_pair)
}


def _call_once(block: nn.Module, parts: Parts, x: Tensor) -> Any:
    return block(x)


def _call_without_mask(block: nn.Module, parts: Parts, x: Tensor) -> Any:
    return block(x, None)


def _call_twice(block: nn.Module, parts: Parts, x: Tensor) -> Any:
    return block(x, x)


def _call_pair(block: nn.Module, parts: Parts, x: Tensor) -> Any:
    return block.get_submodule(parts.down.rpartition(".")[0])(block.get_submodule(parts.at)(x))


def _call_pair_with_residual(block: nn.Module, parts: Parts, x: Tensor) -> Any:
    return block.get_submodule(parts.down.rpartition(".")[0])(block.get_submodule(parts.at)(x), x)


def _whole(
    module: nn.Module, linears: dict[str, tuple[int, int]], proposals: list[Parts]
) -> Iterator[Proposal]:
    name, acts, refusal = _activation(module) if proposals else (None, (), None)
    for p in proposals:
        likely = p.gate not in (None, p.up) or _in_order(linears, p.up, p.down)
        # Of a module around others, what is inside may be an FFN, and is then told of.
        likely = likely and not any("." in path for path in linears)
        yield Proposal(replace(p, activation=name), acts, (_call_once,), likely, refusal)


def _activation(module: nn.Module) -> tuple[str | None, tuple[str, ...], str | None]:
    """Of a module that is all FFN: where its activation is, what it may be, or why it is refused."""
    holders = {path: m for path, m in module.named_modules() if not path or linear_shape(m) is None}
    children = {join(p, n): act for p, m in holders.items() for n, act in activation_children(m).items()}
    attributes = {join(p, n): act for p, m in holders.items() for n, act in activation_attributes(m).items()}
    known = {n: a for n, a in children.items() if a is not None} or attributes
    if not known and (named := _named_as_activations(module, children)):
        return None, (), _unknown(module, named)
    others = ", ".join(f"{n} ({type(module.get_submodule(n)).__name__})" for n in children if n not in known)
    refusal = f"{others} in it may do in training what a MoE layer would not" if others else None
    if len(known) == 1:
        name, act = next(iter(known.items()))
        return name, (act,), refusal
    return None, ALL_ACTS, refusal


def _unknown(module: nn.Module, children: Iterable[str]) -> str:
    kinds = ", ".join(f"{n} ({type(module.get_submodule(n)).__name__})" for n in children)
    return f"its activation, {kinds}, is none of {', '.join(ALL_ACTS)}"


def _named_as_activations(module: nn.Module, paths: Iterable[str]) -> list[str]:
    """Those of the paths at which is what is named as an activation, which may have weights: PReLU, xIELU, Mish."""
    kinds = {path: type(module.get_submodule(path)) for path in paths}
    kinds = {
        path: kind for path, kind in kinds.items() if kind is not nn.MultiheadAttention
    }  # a file with activations
    named = re.compile("act|elu|swish|mish|sigmoid|tanh|soft|nonlin", re.IGNORECASE)
    return [
        path
        for path, kind in kinds.items()
        if named.search(f"{path} {kind.__name__}") or kind.__module__ == "torch.nn.modules.activation"
    ]


def _out_of_reach(up: str, down: str) -> str:
    return (
        f"{up} and {down} have the shapes of an FFN, but its activation is none of {', '.join(ALL_ACTS)}, or is no "
        "module and no attribute of this one: then put the FFN in a module of its own"
    )


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    shapes = {name: linear_shape(child) for name, child in module.named_children()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _all_linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Those of a module that is all FFN, by path: it holds no more than them, dropouts, identities and at most one bare
    other, itself or in modules and lists of them (diffusers' FeedForward). Else {}. What is all in one module of its
    own is for that one to tell."""
    if _only_ffn_children(module):
        return _linears(module)
    found = _linears_below(module)
    tops = {path.partition(".")[0] for path in found}
    lists = all(isinstance(module.get_submodule(top), (nn.ModuleList, nn.ModuleDict)) for top in tops)
    return found if len(tops) > 1 or lists else {}


def _linears_below(module: nn.Module) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    others = 0
    waiting = [("", module)]
    while waiting:
        path, holder = waiting.pop(0)
        if holder._parameters or holder._buffers:
            return {}
        for name, child in holder.named_children():
            shape = linear_shape(child)
            if shape is not None:
                found[join(path, name)] = shape
            elif next(child.children(), None) is not None:
                waiting.append((join(path, name), child))
            elif not isinstance(child, PASSES):
                others += 1
                waiting.append((join(path, name), child))
        if len(found) > 3 or others > 1:
            return {}
    return found


def _in_order(names: Iterable[str], first: str, second: str) -> bool:
    order = list(names)
    return order.index(first) < order.index(second)


def _is_pair(up: tuple[int, int], down: tuple[int, int]) -> bool:
    return up == (down[1], down[0]) and up[1] > up[0] > 0


def _pairs(linears: dict[str, tuple[int, int]]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in permutations(linears, 2) if _is_pair(linears[a], linears[b])]


def _only_ffn_children(module: nn.Module) -> bool:
    """Whether a module holds linear layers, dropouts, identities, at most one bare other, no own weights."""
    others = [m for m in module.children() if linear_shape(m) is None and not isinstance(m, PASSES)]
    own = module._parameters or module._buffers
    return len(others) <= 1 and all(map(is_bare, others)) and not own
