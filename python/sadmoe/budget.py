"""Fine-tuning a converted model to do with the experts that a budget pays for: all steps after the conversion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sadmoe.batches import Batches, check_batches, length, to_device
from sadmoe.calibrate import Calibration, calibrate_, check_budget, check_reachable
from sadmoe.checks import check_config, check_number
from sadmoe.cost import cost
from sadmoe.dial import set_gates, set_tau, trainable_layers
from sadmoe.ffn import find_ffns, moe_layers, site_of
from sadmoe.finetune import FinetuneConfig, FinetuneReport, finetune_
from sadmoe.gates import DynamicK
from sadmoe.inputs import count_rows
from sadmoe.layer import DynamicKMoE
from sadmoe.layerwise import LayerFit, finetune_layers_
from sadmoe.mixed import fast_training
from sadmoe.modules import device_of, evaluating, refuse_compiled, refuse_distributed
from sadmoe.randomness import seeded
from sadmoe.routers import RouterConfig, RouterFit, fit_routers_
from sadmoe.training import Checkpoint
from sadmoe.training.guards import all_or_nothing
from sadmoe.training.objective import OutputLoss, check_output_loss, distill_hidden
from sadmoe.training.processes import refuse_group
from sadmoe.training.resume import Kept, check_checkpoint

# Each layer by itself, on true norms, then the whole model by its routers: in this part of the time that there is.
LAYERS_PART, LAYERS = 0.3, FinetuneConfig(seconds=1.0, tau=0.07, ramp=0.0, alpha=0.02, share=0.2, lr=1e-3)
ROUTED_PART, ROUTED = 0.7, FinetuneConfig(seconds=1.0, tau=None, lr=2e-4)
ROUTERS = RouterConfig(steps=500, target_power=0.5)  # roots of norms: small experts are told apart better
CALIBRATED = 8  # batches, at least where there are as many


@dataclass(frozen=True)
class BudgetReport:
    """What each step found: experts by layer, routers by layer, the whole model, and the tau that was set."""

    layers: list[LayerFit]
    routers: dict[str, RouterFit]
    whole: FinetuneReport
    calibration: Calibration

    def __str__(self) -> str:
        fits = "\n".join(f"{fit}, router R² {self.routers[fit.name].r2:.3f}" for fit in self.layers)
        found = self.calibration
        return (
            f"{fits}\nthe whole model: {self.whole}\n"
            f"tau {found.tau:.4f} executes {found.share:.1%} of the experts, {found.cost.layers_of_dense:.1%} of the "
            "layers' FLOPs"
        )


def finetune_for_budget_(
    model: nn.Module,
    batches: Batches,
    *,
    budget: float,
    seconds: float,
    dense: nn.Module,
    sparse: nn.Module | None = None,
    output_loss: OutputLoss | Literal["logits"] | None = None,
    router: RouterConfig = ROUTERS,
    max_tokens: int = 20_000,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> BudgetReport:
    """Fine-tunes a converted model in place to do with few experts, without labels, and sets the tau for the budget.

    `finetune_layers_` (each layer by true norms, 30 % of the seconds), `fit_routers_`, `calibrate_`, `finetune_` (the
    whole model by its routers, the rest), `calibrate_`: much as the demo does, in bfloat16 where that is faster.
    Experts of 8 to 32 neurons do best. Freeze what need not move.

    budget: executed FLOPs of the converted layers over their dense FLOPs, in (0, 1].   seconds: of training; routers
    and calibration come on top.   dense: the model that is to be matched.   sparse: a copy of the model
    from just before `convert_`, needed where `sparsify_` or `replace_projections_` had made it another than dense.
    output_loss: of the last step, see `finetune_`; "logits" for classifiers and language models.
    router: the training of the routers, which stay as wide as they are and take this seed.   max_tokens: inputs of each
    layer to train on.   seed: of the order of batches and tokens.   checkpoint: where to resume from after a kill, a
    folder for each step and budget, see `Checkpoint`.
    Raises what the steps raise, and RuntimeError in a process group, for it runs in one process; after any error the
    model is as it was, its gates too.
    """
    refuse_group("finetune_for_budget_")
    check_budget(budget)
    check_checkpoint(checkpoint)
    check_batches(batches)
    check_number("seconds", seconds)
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    sparse = dense if sparse is None else sparse
    for one, called in ((model, "model"), (dense, "dense"), (sparse, "sparse")):
        refuse_compiled(one, called)
    refuse_distributed(model)
    if moe_layers(dense):
        raise ValueError("dense must be the model from before convert_: got one with converted layers")
    layers = trainable_layers(model)
    router = replace(check_config(router, RouterConfig), seed=seed)
    some = _some_of(model, layers, batches, seed)
    check_reachable(budget, cost(model, some))  # of which layers run how often
    _check_last_step(model, layers, dense, output_loss, some[0])
    _check_sparse(sparse, layers, some)

    def at(step: str) -> Checkpoint | None:
        if checkpoint is None:
            return None
        folder = Path(checkpoint.folder) / f"{step} {float(budget)!r}"  # layers, too, are trained for it
        return replace(checkpoint, folder=folder)

    with all_or_nothing(model):
        set_gates(layers, dict.fromkeys(layers, DynamicK(0.0)))  # by the routers, whatever they were
        with fast_training(model, sparse):
            alone = finetune_layers_(
                model,
                batches,
                replace(LAYERS, seconds=seconds * LAYERS_PART, share=budget / 2, seed=seed),
                teacher=sparse,
                max_tokens=max_tokens,
                checkpoint=at("layers"),
                progress=progress,
            )
        fits = fit_routers_(
            model, batches, router, max_tokens=max_tokens, checkpoint=at("routers"), progress=progress
        )
        _set_first_tau(model, some, budget, at("whole"))
        with fast_training(model, dense):
            whole = finetune_(
                model,
                batches,
                replace(ROUTED, seconds=seconds * ROUTED_PART, seed=seed),
                teacher=dense,
                output_loss=output_loss,
                checkpoint=at("whole"),
                progress=progress,
            )
        last = calibrate_(model, some, budget=budget, progress=progress)
    return BudgetReport(alone, fits, whole, last)


def _some_of(model: nn.Module, layers: Mapping[str, DynamicKMoE], batches: Batches, seed: int) -> list[Any]:
    """Batches to calibrate on, from all over, and the first others that run a layer which these do not: the same ones
    when a killed run is taken up again."""
    count = length(batches)
    which = range(0, count or CALIBRATED, max(1, (count or 0) // CALIBRATED))
    with seeded(model, seed):
        if isinstance(batches, Sequence):  # whose others need not be read
            some = [batches[i] for i in which]
        else:
            some = list(islice(batches, which.start, which.stop, which.step))
    missed = {layer for layer, rows in count_rows(model, layers.values(), some).items() if not rows}
    with seeded(model, seed):
        for batch in batches if missed else ():
            if ran := {layer for layer, rows in count_rows(model, missed, [batch]).items() if rows}:
                some.append(batch)
                missed -= ran
            if not missed:
                break
    return some


def _check_last_step(
    model: nn.Module,
    layers: Mapping[str, DynamicKMoE],
    dense: nn.Module,
    output_loss: OutputLoss | Literal["logits"] | None,
    batch: Any,
) -> None:
    """Raises what `finetune_` would of its teacher and its output_loss, before the steps that come first."""
    check_output_loss(output_loss)
    objective = distill_hidden(
        model, dense, [site_of(layer, name) for name, layer in layers.items()], output_loss
    )
    with evaluating(model), evaluating(dense):
        objective(to_device(batch, device_of(model)), None)


def _set_first_tau(model: nn.Module, some: list[Any], budget: float, checkpoint: Checkpoint | None) -> None:
    """That of the budget, with which the whole model is fine-tuned. Found once: when a killed run is taken up again, a
    loader may draw others for `some`."""
    kept = Kept(checkpoint, "tau", {"budget": float(budget)})
    if found := kept.load():
        set_tau(model, found[1]["tau"])
    else:
        kept.save({}, {"tau": calibrate_(model, some, budget=budget).tau})


def _check_sparse(sparse: nn.Module, layers: Mapping[str, DynamicKMoE], batches: Sequence[Any]) -> None:
    """Raises ValueError where the layers compute with another activation than the FFNs that they are to match."""
    for site in find_ffns(sparse, batches=batches):
        layer = layers.get(site.name)
        if layer is not None and site.act != layer.act:
            raise ValueError(
                f"sparse must be a copy of the model from just before convert_, in which {site.name} had {layer.act}: "
                f"here it has {site.act}; give sparse=, what sparsify_ made of the dense model"
            )
