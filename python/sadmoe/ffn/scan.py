"""Finding the FFNs of a model."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import nn

from sadmoe.batches import Batches, check_batches, run
from sadmoe.checks import Filter, check_filter
from sadmoe.ffn.adapters import ADAPTERS, Proposal
from sadmoe.ffn.linears import linear_shape, why_not_plain
from sadmoe.ffn.lookup import join
from sadmoe.ffn.probe import Call, NotRun, Unsupported, verify
from sadmoe.ffn.recorded import record_calls
from sadmoe.ffn.sites import NO_PARENT, FFNSite, Parts
from sadmoe.ffn.surgery import moe_layers
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import check_model, plain_name
from sadmoe.tables import shortened

logger = logging.getLogger(__name__)
EXPERTS = re.compile("expert|moe", re.IGNORECASE)  # in the name or the type of a module
# How a class is named that is an attention: not a decoder, a block or an MLP that has a word of it in its name.
ATTENTION = re.compile(r"(attention|attn)(output|module|pool[a-z]*|v?\d+)?$", re.IGNORECASE)
# How a class is named that is an FFN.
FFN = re.compile(r"mlp|ffn|feed_?forward|geglu|swiglu", re.IGNORECASE)
PAIR = "d -> f and f -> d, f > d, with an activation alone between them"
TRIED_BATCHES = 8  # until one of them runs a block that a probe cannot run


class FFNNotFoundError(ValueError):
    """The model has no FFN that sadmoe knows how to find."""


@dataclass(frozen=True)
class Skipped:
    """A module that looks like an FFN and is not converted: its path, its type, and why."""

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({self.kind}): {self.reason}"


def find_ffns(
    model: nn.Module,
    filter: Filter | None = None,
    *,
    batches: Batches | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
) -> list[FFNSite]:
    """Every FFN of the model, in order, found by structure and proved by running it on a random probe.

    filter: takes the name of a site (the module path where the MoE layer would go), False leaves it alone.
    batches: what the model is called with. A block around an FFN that a probe cannot run, as it takes more than hidden
    states, is run as the model runs it on the first of them that reaches it, of eight. Where that cannot be, an FFN in
    two modules is proved by these alone, and a warning says so; another is not found.
    loss: (model, batch) -> anything, where the model is not called with a batch as it is, but by this.
    The model is left as it was. Modules that look like an FFN and cannot be converted are logged as a
    warning. Raises FFNNotFoundError (a ValueError) where nothing looks like an FFN, NotImplementedError where
    all that does cannot be converted; both list what was seen.
    """
    found = _all_of(model, filter, batches, loss)
    sites, skipped = found.sites, found.skipped
    if found.by_halves:
        logger.warning(
            "%d FFNs are proved by their two modules alone, as no call of the block around could be made%s; compare "
            "the converted model at tau = 0 with the dense one: %s",
            len(found.by_halves),
            " (give find_ffns batches)" if batches is None else " again",
            ", ".join(shortened(found.by_halves, 4)),
        )
    if kept := [site.name for site in sites if site.keeps_dropout]:
        logger.warning(
            "%d FFNs call F.dropout between their linear layers with a probability that no attribute alone holds: "
            "converted, it acts on the output in training; set it to 0, or make it an nn.Dropout: %s",
            len(kept),
            ", ".join(shortened(kept, 4)),
        )
    if sites:
        if filter is None:
            skipped = skipped + overlooked(model, sites, skipped)
        if skipped:
            what = "1 FFN is" if len(skipped) == 1 else f"{len(skipped)} FFNs are"
            logger.warning("%s not converted:\n%s", what, _listing(list(map(str, skipped))))
        return sites
    if skipped:
        raise NotImplementedError(
            f"no FFN of this {type(model).__name__} can be converted:\n{_listing(list(map(str, skipped)))}"
        )
    raise FFNNotFoundError(_nothing_found(model, filter))


def scan_ffns(model: nn.Module, *, batches: Batches | None = None) -> tuple[list[FFNSite], list[Skipped]]:
    """`find_ffns` without errors and warnings: the sites, and what only looks like one, with the reason."""
    found = _all_of(model, None, batches)
    return found.sites, found.skipped


def _all_of(
    model: nn.Module,
    filter: Filter | None,
    batches: Batches | None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
) -> "_Found":
    check_model(model)
    check_filter(filter)
    if batches is not None:
        check_batches(batches)
    found = _scan(model, filter, {}, None)
    if not found.unsure or batches is None:
        return found
    calls: dict[str, Call] = {}
    ran: set[str] = set()
    left = found.unsure
    for batch in islice(batches, TRIED_BATCHES):  # one may reach what another does not
        recorded, run_now = record_calls(model, left, batch, run if loss is None else loss)
        calls |= recorded
        ran |= run_now
        left = [name for name in left if name not in calls]
        if not left and not found.sharing:
            break
    return _scan(model, filter, calls, ran)


@dataclass
class _Found:
    """What a scan found.

    by_halves: names of the sites that were proved by running their two modules alone.
    unsure: the modules of which another call would tell more.   sharing: of these, those with several FFNs that may
    share an activation.
    """

    sites: list[FFNSite] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    by_halves: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    sharing: list[str] = field(default_factory=list)


def _scan(
    model: nn.Module,
    filter: Filter | None,
    calls: Mapping[str, Call],
    ran: Collection[str] | None,
) -> _Found:
    """Looks at every module, at some with another way to call them, by name. ran: linear layers that run, if known."""
    uses, all_ = Uses(model), _Found()
    done: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, DynamicKMoE) or any(name == d or name.startswith(f"{d}.") for d in done):
            continue
        found = _look_at(module, name, uses, filter, calls.get(name), ran)
        done |= {join(site.block, site.parts.at) for site in found.sites}
        for one in fields(_Found):
            getattr(all_, one.name).extend(getattr(found, one.name))
    return all_


def _as_linear(module: nn.Module) -> str | None:
    """The shape of a linear layer, or of a convolution that computes one, in words."""
    if (shape := linear_shape(module)) is not None:
        return f"{shape[0]} -> {shape[1]}"
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups > 1:
        return None
    pointwise = set(module.kernel_size) == set(module.stride) == {1}
    return (
        f"{module.in_channels} -> {module.out_channels} (a convolution, which is not read)"
        if pointwise
        else None
    )


def overlooked(model: nn.Module, sites: list[FFNSite], skipped: list[Skipped]) -> list[Skipped]:
    """What is named as an FFN and has two linear layers or more, or convolutions of width 1, of which no adapter makes
    anything; the outermost."""
    used = {id(linear) for site in sites for linear in site.linears.values()}
    told = [one.name for one in skipped]
    found: list[Skipped] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not name or not FFN.search(kind) or EXPERTS.search(f"{name} {kind}"):
            continue
        if any(f"{name}.".startswith(f"{t}.") or f"{t}.".startswith(f"{name}.") for t in told):
            continue
        linears = {n: m for n, m in module.named_modules() if _as_linear(m) is not None}
        shapes = [f"{n} {_as_linear(m)}" for n, m in linears.items()]
        if len(linears) > 1 and not used & {id(m) for m in linears.values()}:
            reason = f"none of its linear layers, {', '.join(shortened(shapes, 4))}, are seen as {PAIR}"
            found.append(Skipped(name, kind, reason))
            told.append(name)
    return found


def _look_at(
    module: nn.Module,
    name: str,
    uses: "Uses",
    filter: Filter | None,
    recorded: Call | None,
    ran: Collection[str] | None,
) -> _Found:
    """The FFNs in one module, and what of its other linear layers only looks like one."""
    sites: list[FFNSite] = []
    refused: list[tuple[Parts, Unsupported]] = []
    by_halves: list[str] = []
    sharing = False

    def wanted(proposal: Proposal) -> bool:
        return filter is None or filter(plain_name(join(name, proposal.parts.at)))

    proposals = {adapter: list(propose(module)) for adapter, propose in ADAPTERS.items()}
    if not any(map(wanted, chain(*proposals.values()))):
        return _Found()
    for adapter, several in proposals.items():
        for proposal in several:
            if any(_overlap(proposal.parts, site.parts) for site in sites):
                continue
            try:
                uses.check(module, name, proposal)
                beside = _beside(proposal, several)
                sharing = sharing or bool(beside)
                running = tuple(up for up in beside if ran is None or join(name, up) in ran)
                site, whole = _proved(module, name, adapter, proposal, recorded, running)
                sites.append(site)
                if wanted(proposal) and not whole:
                    by_halves.append(site.name)
            except Unsupported as reason:
                if proposal.likely and wanted(proposal):
                    refused.append((proposal.parts, reason))
        if sites:
            break
    reasons = [why for parts, why in refused if not any(_overlap(parts, site.parts) for site in sites)]
    kind, told = type(module).__name__, "; ".join(dict.fromkeys(map(str, reasons)))
    told = "" if ATTENTION.search(kind) else told  # whose queries may be wider than the model
    return _Found(
        # What the filter leaves alone is looked at too, lest its linear layers be paired with another's.
        [site for site in sites if filter is None or filter(site.name)],
        [Skipped(name, kind, told)] if told else [],
        by_halves,
        [name] if (unsure := bool(by_halves) or any(isinstance(why, NotRun) for why in reasons)) else [],
        [name] if unsure and sharing else [],
    )


def _overlap(a: Parts, b: Parts) -> bool:
    """Whether they have a linear layer in common."""
    return bool({a.up, a.gate, a.down} & {b.up, b.gate, b.down} - {None})


def _beside(proposal: Proposal, several: list[Proposal]) -> dict[str, None]:
    """The first linear layers of the other FFNs that the activation of this one may be of as well."""
    parts = proposal.parts
    others = (p.parts for p in several if not _overlap(p.parts, parts))
    return dict.fromkeys(
        p.up for p in others if p.activation is not None and p.activation == parts.activation
    )


def _proved(
    module: nn.Module,
    name: str,
    adapter: str,
    proposal: Proposal,
    recorded: Call | None,
    beside: tuple[str, ...],
) -> tuple[FFNSite, bool]:
    """The site, and whether it was proved by the whole module: else by its halves alone. Raises Unsupported."""
    again = (recorded,) if recorded and proposal.parts.at else ()
    prove = partial(verify, module, name, proposal.parts, adapter, proposal.acts, beside=beside)
    try:
        return prove((*proposal.calls, *again)), True
    except NotRun as reason:
        if not proposal.halves or (again and reason.idle):  # nor does the model run it
            raise
    return prove(proposal.halves), False


@dataclass
class Uses:
    """Who else holds a parameter or a module, which decides whether it can be taken away."""

    model: nn.Module
    owners: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    parents: dict[int, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            for key, p in module.named_parameters(recurse=False):
                self.owners[id(p)].append(join(name, key))
            for child in module.children():
                self.parents[id(child)][id(module)] = name

    def check(self, block: nn.Module, name: str, proposal: Proposal) -> None:
        """Raises Unsupported where a proposal is refused, or its linear layers are: see `check_linears`."""
        parts = proposal.parts
        if proposal.refusal is not None:
            raise Unsupported(proposal.refusal)
        if name == "" and parts.at == "":
            raise Unsupported(NO_PARENT)
        self.check_linears(block, name, dict.fromkeys(p for p in (parts.up, parts.gate, parts.down) if p))

    def check_linears(self, block: nn.Module, name: str, paths: Iterable[str]) -> None:
        """Raises Unsupported where linear layers, by path in the block, cannot be read, or are used elsewhere too."""
        if isinstance(block, torch.jit.ScriptModule):
            raise Unsupported("it is scripted; convert the module that torch.jit.script was given")
        if "experts" in name.split("."):
            raise Unsupported("it is an expert of a mixture of experts already")
        dtypes = set()
        for path in paths:
            linear = block.get_submodule(path)
            reason = why_not_plain(linear)
            if reason is not None:
                raise Unsupported(f"{path} {reason}")
            for part in accumulate(path.split("."), join):  # and the modules between
                owner, child = block.get_submodule(part.rpartition(".")[0]), block.get_submodule(part)
                if sum(each is child for each in owner._modules.values()) > 1:
                    raise Unsupported(f"{part} has several places in its module")
                others = [n for i, n in self.parents[id(child)].items() if i != id(owner)]
                if others:
                    raise Unsupported(f"{part} is a child of {', '.join(others)} too")
            for key, p in linear.named_parameters(recurse=False):
                dtypes.add((p.dtype, p.device))
                tied = [owner for owner in self.owners[id(p)] if owner != join(name, path, key)]
                if tied:
                    raise Unsupported(f"{path}.{key} is tied with {', '.join(tied)}")
        if len(dtypes) > 1:
            kinds = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in dtypes))
            raise Unsupported(
                f"its weights are of several kinds ({kinds}); cast or move them to one, such as "
                "bfloat16: some models keep layers in float32 where they are loaded in float16"
            )


def _nothing_found(model: nn.Module, filter: Filter | None) -> str:
    head = f"no FFN found in this {type(model).__name__}"
    if converted := [name for name in moe_layers(model) if filter is None or filter(name)]:
        return f"{head}: {len(converted)} FFNs are converted already; to convert them anew, restore_(model) first"
    if filter is not None:
        sites, _ = scan_ffns(model)
        if sites:
            return f"{head}: the filter (--only) refused all there are:\n{_listing([s.name for s in sites])}"
    linears = [
        f"{name} ({type(m).__name__}): {shape[0]} -> {shape[1]}"
        for name, m in model.named_modules()
        if (shape := linear_shape(m)) is not None
    ]
    stacked = [
        f"{name} ({type(m).__name__}): {key} {list(p.shape)}, a mixture of experts already"
        for name, m in model.named_modules()
        for key, p in m.named_parameters(recurse=False)
        if p.dim() == 3 and min(p.shape) > 1 and EXPERTS.search(f"{name} {type(m).__name__}")
    ]
    seen = stacked + linears
    if not seen:
        return f"{head}: it has no linear layers; convolutions, also of width 1, are not read"
    advice = (
        "model.set_experts_implementation('sadmoe') may run its experts by sadmoe's kernels. "
        if stacked
        else ""
    )
    return f"{head}: none of its modules is seen to hold {PAIR}. {advice}Seen:\n{_listing(seen)}"


def _listing(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in shortened(lines, 12))
