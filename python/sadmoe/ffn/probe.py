"""Proof by running: a module does, on a random probe, what the formula of an FFN says its parts do."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from sadmoe.ffn.activations import is_bare
from sadmoe.ffn.dense import DenseFFN
from sadmoe.ffn.linears import linear_shape
from sadmoe.ffn.lookup import lookup, put
from sadmoe.ffn.quiet import quiet
from sadmoe.ffn.sites import FFNSite, Parts, site_of_parts
from sadmoe.ffn.surgery import passthrough, put_back, take_apart
from sadmoe.hooks import hooks_on
from sadmoe.modules import floats_in, is_out_of_memory
from sadmoe.undo import snapshot

Call = Callable[[nn.Module, Parts, Tensor], Any]
TOLERANCE = 1e-5  # of the FFN's share in the output; float64 noise is 1e-13, gelu against gelu_tanh 1e-4
PROBE_ROWS = 8


class Unsupported(Exception):
    """Why something that looks like an FFN cannot be converted."""


class NotRun(Unsupported):
    """No call that was tried could tell: it takes more than hidden states, or other shapes of them.

    idle: whether the block ran in the last of them, without the FFN.
    """

    def __init__(self, why: str, idle: bool):
        super().__init__(why)
        self.idle = idle


class _Unseen(Exception):
    """A call ran, and says nothing of the FFN."""


class _Idle(_Unseen):
    """For the FFN did not run in it."""


@dataclass(frozen=True)
class _Event:
    """A call seen during the probe, on rows of that width: of the module at `path`, or of a dropout with probability
    p. plain: as nn.Dropout's."""

    width: float
    path: str | None = None
    p: float = 0.0
    plain: bool = True


_PLAIN_DROPOUTS = (F.dropout, torch.dropout)  # each takes (input, p)
_DROPOUTS = (
    *_PLAIN_DROPOUTS,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)


class _DropoutLog(TorchFunctionMode):
    """Notes each dropout, called by a module or as a function."""

    def __init__(self, events: list[_Event]):
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS:
            p = args[1] if len(args) > 1 else (kwargs or {}).get("p", 0.5)
            self.events.append(_Event(_width(args), p=p, plain=func in _PLAIN_DROPOUTS))
        return func(*args, **(kwargs or {}))


def _width(args: tuple[Any, ...]) -> float:
    """Of the rows of a call's first argument; inf where that is none."""
    return args[0].shape[-1] if args and isinstance(args[0], Tensor) and args[0].dim() else math.inf


class _Scene(nn.Module):
    """One way to call a block, as a module, so that its weights can be exchanged for float64 ones. It gives all
    floating-point tensors that the block returns."""

    def __init__(self, block: nn.Module, parts: Parts, call: Call, beside: tuple[str, ...]):
        super().__init__()
        self.block, self.parts, self.call, self.beside = block, parts, call, beside
        self.training = False

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.call(self.block, self.parts, x)
        if self.parts.at == "" and not isinstance(y, Tensor):
            raise Unsupported(f"it returns a {type(y).__name__}, where a MoE layer returns a tensor")
        found = list(floats_in(y))
        if not found:
            raise _Unseen(f"it returned a {type(y).__name__} without a tensor of floating-point numbers")
        return found


class _StandIn(nn.Module):
    """A function in the place of a module."""

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def verify(
    block: nn.Module,
    name: str,
    parts: Parts,
    adapter: str,
    acts: tuple[str, ...],
    calls: tuple[Call, ...],
    *,
    beside: tuple[str, ...] = (),
) -> FFNSite:
    """The site, if `block` computes the same when `DenseFFN`'s formula takes the place of the parts.

    name: path of the block.   acts: the activations it may have; the one that fits best is the site's.
    calls: ways to call the block, tried in order.   beside: linear layers that may share the activation, which goes: so
    they must run in such a call as well. Raises NotRun where all of them raise an error, or show nothing.
    The model is left as it was, and no random state is used. Raises Unsupported with the reason.
    """
    sites = [site_of_parts(block, name, parts, adapter, act) for act in acts]
    if any(p.is_meta for p in block.parameters()):
        raise Unsupported("its weights are on the meta device, so it cannot be run; load them first")
    errors: list[Exception] = []
    dense = sites[0].dense()
    for dtype in (torch.float64, torch.float32):  # float32 for devices and modules that insist on it
        for call in calls:
            try:
                exact = dense.to(dtype)
                denses = [replace(exact, act=act) for act in acts]
                x = _probe_input(denses[0], dtype)
                with quiet(block):
                    return _best(sites, denses, _Scene(block, parts, call, beside), x)
            except Unsupported:
                raise
            except Exception as raised:  # whatever a foreign forward raises becomes the reason
                errors.append(raised)
    if lacking := next(filter(is_out_of_memory, errors), None):
        raise lacking
    error, idle = errors[0], isinstance(errors[-1], _Idle)
    first_line = str(error).strip().split("\n")[0]
    if isinstance(error, _Unseen):
        raise NotRun(f"run on a probe [1, {PROBE_ROWS}, {dense.d}], {first_line}", idle)
    between = _of_neurons(block, dense.f)
    raise NotRun(
        (f"{between} works on its {dense.f} neurons, which only an activation may; " if between else "")
        + f"run on a probe [1, {PROBE_ROWS}, {dense.d}] it raised {type(error).__name__}: {first_line}",
        idle,
    )


def _of_neurons(block: nn.Module, f: int) -> str | None:
    """A module that is no linear layer and has a weight for every neuron: a norm, or a convolution."""
    for name, child in block.named_modules():
        held = {size for p in child.parameters(recurse=False) for size in p.shape}
        if f in held and linear_shape(child) is None:
            return f"{name} ({type(child).__name__})"
    return None


def _best(sites: list[FFNSite], denses: list[DenseFFN], scene: _Scene, x: Tensor) -> FFNSite:
    events: list[_Event] = []
    y = _run(scene, x, events)
    if scene.parts.up not in [e.path for e in events]:
        raise _Idle(f"its {scene.parts.up} does not run")
    if idle := [path for path in scene.beside if path not in [e.path for e in events]]:
        raise _Unseen(
            f"its {scene.parts.activation} may be that of {', '.join(idle)} too, which does not run then"
        )
    without_ffn: list[_Event] = []  # the calls around it
    outputs = [_run_with(scene, dense, x, without_ffn if i == 0 else None) for i, dense in enumerate(denses)]
    bias = denses[0].b_out  # what no weight has a part in
    nothing = x.new_zeros(denses[0].d_out) if bias is None else bias
    without = _run_with(scene, lambda rows: nothing.repeat(*rows.shape[:-1], 1), x)
    for ours, theirs in zip_longest(outputs[0], y):
        if ours is None or theirs is None or ours.shape != theirs.shape:
            made, wanted = ("nothing" if one is None else list(one.shape) for one in (ours, theirs))
            raise Unsupported(f"its output is {wanted} where that of the FFN would make {made}")
    if not any(one.isfinite().any() for one in y):
        raise Unsupported("nothing that it returns is finite")
    share = _distance(y, without)
    errors = [_distance(y, o) if _finite_alike(y, o) else math.inf for o in outputs]
    best = min(range(len(sites)), key=errors.__getitem__)
    if share == errors[best] == 0 and scene.parts.at and denses[0].w_down.any():
        raise _Unseen(f"nothing that it returned depends on its {scene.parts.down}")
    if not errors[best] <= TOLERANCE * share:
        if scene.parts.at == "" and any(_adds_input(y, o, x) for o in outputs):
            raise Unsupported(
                "it adds its input to what its FFN makes of it: put the FFN in a module of its own, or make its "
                "activation a module of this one (nn.ReLU())"
            )
        tried = ", ".join(site.act for site in sites)
        raise Unsupported(
            "it does not compute down(act(up(x))) or its gated form: off by "
            f"{errors[best] / share if share else 1:.1e} of its output with act = {tried}"
        )
    if share == 0 and (len(sites) > 1 or scene.parts.gate):
        what = "gate" if scene.parts.gate else "activation"
        raise Unsupported(f"its output weights are all zero, so its {what} cannot be told")
    site = sites[best]
    if share > 0 and _is_unused(scene, x, y):
        site.parts = replace(site.parts, activation=None)  # forward calls a function, which cannot be swapped
    neurons = denses[best].f
    hidden, site.dropout, site.keeps_dropout = _dropouts(
        site.parts, scene.block, events, without_ffn, neurons
    )
    if hidden:
        site.parts = replace(site.parts, removed=site.parts.removed + hidden)
    return site


def _adds_input(y: list[Tensor], of_ffn: list[Tensor], x: Tensor) -> bool:
    """Whether y is what the FFN makes of x, and x."""
    if len(y) != 1 or len(of_ffn) != 1 or not y[0].shape == of_ffn[0].shape == x.shape:
        return False
    return _distance(y, [of_ffn[0] + x]) <= TOLERANCE * _distance(y, [x])


def _is_unused(scene: _Scene, x: Tensor, y: list[Tensor]) -> bool:
    """Whether the block gives the same without the activation module that it has."""
    path = scene.parts.activation
    if path is None or path in scene.parts.removed:
        return False
    old = lookup(scene.block, path)[2]
    put(scene.block, path, nn.Identity() if isinstance(old, nn.Module) else passthrough)
    try:
        return _distance(_run(scene, x), y) == 0
    except Exception:  # of a call that takes more than the activation's input
        return False
    finally:
        put(scene.block, path, old)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest |a - b| where both are finite."""

    def of(x: Tensor, y: Tensor) -> float:
        apart = (x - y).abs()
        finite = apart.isfinite()
        return apart[finite].amax().item() if finite.any() else 0.0

    return max(map(of, a, b))


def _finite_alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.isfinite(), y.isfinite()) for x, y in zip(a, b, strict=True))


def _dropouts(
    parts: Parts, block: nn.Module, events: list[_Event], without_ffn: list[_Event], neurons: int
) -> tuple[tuple[str, ...], float, bool]:
    """The dropouts that act on hidden activations only, by path of module or attribute, the probability on the output,
    and whether a call of dropout between the linear layers stays, as no attribute alone holds its probability.

    events, without_ffn: the calls in the block, and those with a stand-in for the FFN.   neurons: of the FFN, the width
    of its hidden activations; what is narrower in between belongs to something beside it.

    Where the block stays, its dropouts stay too, but for the hidden ones, which would act on the output in
    place of the hidden activations. Where the block goes, a MoE layer keeps its output dropout, and hidden
    dropout is lost.
    """
    paths = [e.path for e in events]
    start, end = min(paths.index(p) for p in (parts.up, parts.gate) if p), paths.index(parts.down)
    before, after = events[:start], events[end:]
    if parts.at == "":
        if any(e.p > 0 for e in before):
            raise Unsupported("it has a dropout on its input, which a MoE layer does not")
        if any(e.p > 0 and not e.plain for e in after):
            raise Unsupported(
                "it has another dropout on its output than nn.Dropout, which a MoE layer does not"
            )
        ps = [e.p for e in after if e.p > 0]
        return (), ps[0] if len(ps) == 1 else 1.0 - math.prod(1.0 - p for p in ps), False
    between = [e for e in events[start:end] if e.width >= neurons]
    outside = [*before, *(e for e in events[start:end] if e.width < neurons), *after]
    inside = {e.path for e in between} - {e.path for e in outside}
    staying = [p for p in inside if p is not None and not p.startswith(f"{parts.at}.")]
    hidden = [p for p in staying if _is_dropout(block.get_submodule(p))]
    called = {e.p for e in between if e.path is None and e.p > 0} - {block.get_submodule(p).p for p in hidden}
    elsewhere = {e.p for e in outside}
    left = Counter(e.p for e in without_ffn if e.path is None)  # others went with what the layer replaces
    left -= Counter(e.p for e in outside if e.path is None)
    functions = called & left.keys()
    attributes = _probabilities(block, functions, elsewhere)
    stays = bool(functions - {getattr(block, name) for name in attributes})
    return tuple(sorted([*hidden, *attributes])), 0.0, stays


def _is_dropout(module: nn.Module) -> bool:
    """Whether it is one of torch's dropouts, or another class's with a probability p and no more, as fairseq's."""
    named = "drop" in type(module).__name__.lower() and isinstance(getattr(module, "p", None), float | int)
    return isinstance(module, _DropoutNd) or (named and is_bare(module))


def _probabilities(block: nn.Module, functions: set[float], elsewhere: set[float]) -> list[str]:
    """Attributes of the block that hold the probabilities of calls of F.dropout: BART's activation_dropout.

    Where there are several of one value, or what is elsewhere has it too, that which is named after the activation.
    """
    found = []
    for p in functions:
        names = [n for n, v in vars(block).items() if isinstance(v, float) and v == p and "drop" in n.lower()]
        named = [n for n in names if "act" in n.lower()]
        names = named if named or p in elsewhere else names
        found += names if len(names) == 1 else []
    return found


def _probe_input(dense: DenseFFN, dtype: torch.dtype) -> Tensor:
    """[1, rows, d], scaled so that pre-activations spread by 0.5 to 8 and reach every bend of an act."""
    weight = dense.first
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(PROBE_ROWS, dense.d, generator=generator, dtype=torch.float64, device="cpu")
    x = x.to(weight.device, dtype)
    spread = (x @ weight.t()).std().item()
    scale = torch.logspace(-1, 3, PROBE_ROWS, base=2, dtype=dtype, device=weight.device)
    return (x * scale.unsqueeze(1) / (spread or 1.0)).unsqueeze(0)


def _run(scene: _Scene, x: Tensor, events: list[_Event] | None = None) -> list[Tensor]:
    """The output of the scene with its floating-point weights and buffers in x's dtype. What modules keep of a call,
    such as a table of positions, is forgotten: part of it lies in buffers, which are copies here."""
    put_back = snapshot(scene)
    try:
        return _called(scene, x, events)
    finally:
        put_back()


def _called(scene: _Scene, x: Tensor, events: list[_Event] | None) -> list[Tensor]:
    tensors = {**dict(scene.named_parameters()), **dict(scene.named_buffers())}
    cast = {n: t.detach().to(x.dtype) for n, t in tensors.items() if t.is_floating_point()}
    if events is None:
        return torch.func.functional_call(scene, cast, x)
    parts = scene.parts
    seen = (
        module.register_forward_pre_hook(lambda _, args, path=path: events.append(_Event(_width(args), path)))
        for path, module in scene.block.named_modules()
        if path in (parts.up, parts.gate, parts.down, *scene.beside) or _is_dropout(module)
    )
    with hooks_on(seen), _DropoutLog(events):
        return torch.func.functional_call(scene, cast, x)


def _run_with(
    scene: _Scene, ffn: Callable[[Tensor], Tensor], x: Tensor, events: list[_Event] | None = None
) -> list[Tensor]:
    """The output of the scene with `ffn` in the place of its FFN."""
    if scene.parts.at == "":
        return [ffn(x)]
    removed = take_apart(scene.block, scene.parts, _StandIn(ffn))
    try:
        return _run(scene, x, events)
    finally:
        put_back(scene.block, removed)
