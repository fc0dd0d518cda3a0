"""Find the FFNs, check all, build all, swap all last."""

import math
import warnings
from contextlib import ExitStack, nullcontext
from itertools import islice

import torch
from torch import nn

from sadmoe import ops
from sadmoe.batches import Batches, check_batches, check_runs
from sadmoe.calibrate import calibrate_
from sadmoe.checks import check_config
from sadmoe.convert.build import Built, build_all
from sadmoe.convert.config import ConvertConfig
from sadmoe.convert.report import ConversionReport, LayerReport
from sadmoe.cost import layer_cost
from sadmoe.dial import tau
from sadmoe.ffn import (
    FFNSite,
    bare_mlps,
    check_originals,
    find_ffns,
    hooked,
    layer_from_dense,
    moe_layers,
    projection_mlps,
    put_back_projections,
    swap_in,
    swap_out,
    with_hooks,
)
from sadmoe.ffn.linears import strip_
from sadmoe.gates import DynamicK
from sadmoe.inputs import count_rows
from sadmoe.layer import SharedExpert
from sadmoe.modules import check_model, evaluating, refuse_compiled, refuse_distributed
from sadmoe.randomness import seeded
from sadmoe.routers import WIDTH
from sadmoe.tables import shortened
from sadmoe.timing import Clock
from sadmoe.training.resume import Checkpoint, check_checkpoint
from sadmoe.undo import surgery
from sadmoe.weights import check_own_weights


def convert_(
    model: nn.Module,
    batches: Batches,
    config: ConvertConfig | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Turns the FFNs of a model into dynamic-k mixtures of experts, in place (arXiv 2310.04361, section 3).

    All is checked, then built beside the model from what the dense model computes, then swapped in: whatever fails,
    Ctrl-C included, leaves the model as it was. It takes the memory of the FFNs twice until it returns. The same model,
    batches and config give the same layers, bit for bit.
    FFNs that were converted before keep their layers and gates, and run at tau = 0 while others are built: so parts of
    a model can be converted one after the other, with batches and a budget of their own.

    batches: a list or a DataLoader of what the model is called with; no labels needed.   checkpoint: where to resume
    from after a kill: layers that were built are loaded, see `Checkpoint`.   progress: show bars.
    Raises ValueError or TypeError where model or batches do not fit, or no tau meets the budget, FFNNotFoundError where
    there is no FFN, NotImplementedError where none of them can be converted, or the model does not run with what took
    their place.
    """
    config = ConvertConfig() if config is None else check_config(config, ConvertConfig)
    clock = Clock()
    check_model(model)
    with surgery(model), seeded(model, config.seed):  # a DataLoader may draw a number, and an order
        with clock("find"):
            check_batches(batches)
            check_checkpoint(checkpoint)
            sites = checked_sites(model, batches, config)
            if hooks := [name for site in sites for name in hooked(model, site)]:
                warnings.warn(
                    f"{', '.join(shortened(hooks, 5))}: their hooks will not run while a converted layer is in their "
                    "place; if they change what is computed, even tau = 0 is another model. Remove them, or "
                    "restore_(model)",
                    stacklevel=2,
                )
        with tau(model, 0.0) if moe_layers(model) else nullcontext():
            built = build_all(model, sites, batches, config, clock, checkpoint, progress)
        for one in built:
            swap_in(model, one.site, one.layer)
        check_runs(model, batches, "MoE layers in the place of its FFNs", "ConvertConfig")
        if config.budget is not None:
            with clock("calibrate"):
                calibrate_(
                    model,
                    batches,
                    budget=config.budget,
                    filter={site.name for site in sites}.__contains__,
                    skip_padding=config.skip_padding,
                    progress=progress,
                )
        with clock("judge"), evaluating(model):
            rows = tuple(_judge(one) for one in built)
    gate = built[0].layer.gate
    assert isinstance(gate, DynamicK)
    return ConversionReport(rows, gate.tau, config.budget, max(one.tokens for one in built), clock.seconds)


def restore_(model: nn.Module, *, projections: bool = True) -> None:
    """Puts the dense FFNs back, in place: bit for bit as they were, unless they were trained or cast since.

    projections: also put the original projections of attention where `replace_projections_` put MLPs, bit for bit;
    False leaves the MLPs. Raises ValueError, with the model as it was, where nothing is converted or replaced, or the
    original projections are not known.
    """
    names = list(moe_layers(model))
    refuse_distributed(model)
    check_own_weights(model, {**moe_layers(model), **(bare_mlps(model) if projections else {})})
    if not names and not (projections and projection_mlps(model)):
        raise ValueError(f"nothing to restore: no FFN of this {type(model).__name__} is converted")
    if projections:
        check_originals(model)
    if hooks := with_hooks(model, moe_layers(model).values()):
        warnings.warn(
            f"{', '.join(shortened(hooks, 5))}: their hooks are gone with the converted layers", stacklevel=2
        )
    with surgery(model), ExitStack() as failed:
        for name in names:
            for linear in swap_out(model, name):  # back beside their layer they have no weights again
                failed.callback(strip_, linear)
        if projections:
            put_back_projections(model)
        failed.pop_all()


def checked_sites(
    model: nn.Module, batches: Batches, config: ConvertConfig, *, rank: int = 0
) -> list[FFNSite]:
    """The FFNs to convert, each of which can be cut. Raises what `convert_` raises where one cannot, or the budget is
    below the floor: nothing is run for it but probes, and a few batches, where a block needs more than hidden states
    (`find_ffns`), or the budget lies between the floors of FFNs.
    rank: of shared experts, which the budget is to pay for as well."""
    refuse_compiled(model)
    refuse_distributed(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model has no weights yet, {name} is on the meta device: load them first")
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.isnan().any():
            raise ValueError(f"model is broken: {name} has NaN")
    sites = find_ffns(model, config.filter, batches=batches)
    wrong = []
    for site in sites:
        dense = site.dense()
        try:
            config.of(site.adapter).experts_of(dense.f)
        except ValueError as error:
            wrong.append(f"{site.name}: {error}")
        if dense.w_up.dtype not in ops.DTYPES:
            wrong.append(f"{site.name}: its weights are {dense.w_up.dtype}; cast them to one of {ops.DTYPES}")
    if wrong:
        raise ValueError("nothing was converted, because of\n" + "\n".join(wrong))
    if config.budget is not None and config.budget < 1:  # 1 is tau = 0, which is dense
        _check_budget(model, sites, batches, config, config.budget, rank)
    return sites


def _check_budget(
    model: nn.Module,
    sites: list[FFNSite],
    batches: Batches,
    config: ConvertConfig,
    budget: float,
    rank: int,
) -> None:
    """Refuses what no tau can meet before routers are trained for it, by the closed forms of the cost."""
    costs = []
    for site in sites:
        dense, own = site.dense(), config.of(site.adapter)
        order = torch.empty(dense.f, dtype=torch.int64, device="meta")
        layer = layer_from_dense(dense.to("meta"), order, own.experts_of(dense.f), own.router.width or WIDTH)
        layer.shared = SharedExpert(dense.d, 2 * rank, dense.d_out, torch.device("meta")) if rank else None
        costs.append(layer_cost(layer, share=1.0))
    floors = [cost.floor / cost.dense for cost in costs]
    floor = min(floors)
    if floor <= budget < max(floors):  # projections and FFNs, say: by how much of the FLOPs each has
        firsts = [site.first for site in sites]
        rows = count_rows(model, firsts, islice(batches, 1))
        if len(set(rows.values())) > 1:  # as of an encoder-decoder: another batch may have others
            rows = count_rows(model, firsts, batches)
        found = [(rows[first], cost) for first, cost in zip(firsts, costs, strict=True)]
        if any(rows.values()):
            floor = sum(n * cost.floor for n, cost in found) / sum(n * cost.dense for n, cost in found)
    if budget < floor:
        shared, lower = (f", and a shared one of rank {rank},", ", a lower rank") if rank else ("", "")
        raise ValueError(
            f"budget {budget} cannot be met: router and one expert{shared} cost {floor:.3f} of the dense FLOPs "
            f"or more; raise it, or take a narrower router (RouterConfig(width=...), --router-width){lower} or smaller "
            "experts"
        )


def _judge(one: Built) -> LayerReport:
    """The row of a layer at its present tau."""
    layer, dense = one.layer, one.dense
    wanted = dense(one.sample).float()
    missed, norm = (layer(one.sample).float() - wanted).norm(), wanted.norm()
    return LayerReport(
        name=one.site.name,
        d=dense.d,
        f=dense.f,
        d_out=dense.d_out,
        experts=layer.experts,
        expert_size=layer.expert_size,
        act=layer.act,
        gated=dense.gated,
        r2=one.r2,
        share=layer.mask(one.sample).float().mean().item(),
        error=0.0 if missed == 0 else (missed / norm).nan_to_num(math.inf, math.inf).item(),
    )
