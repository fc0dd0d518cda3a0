"""The whole method on one workload, and its curves beside those of other methods: what the scripts here share.

    projections of attention -> sparsify -> convert -> layers -> routers -> routed -> a sweep of every gate

Each training step and each curve is saved under OUT/state and not done again, so a killed run goes on when it is
started again. JSON, PNG and HTML are written anew after every curve.
"""

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from moefication import moefied
from pruning import pruned, trained
from results import Results
from run import Run
from sadmoe import (
    ConvertConfig,
    DynamicK,
    FinetuneConfig,
    ProjectionConfig,
    RouterConfig,
    SparsifyConfig,
    TopK,
    calibrate_,
    compensate_,
    convert_,
    finetune_,
    finetune_layers_,
    fit_routers_,
    moe_layers,
    replace_projections_,
    sparsify_,
)
from sadmoe.budget import LAYERS, ROUTED
from sadmoe.gates import Gate
from sadmoe.mixed import fast_training
from sadmoe.modules import mode
from sadmoe.training.loop import train
from sadmoe.training.objective import task
from sadmoe.training.resume import Kept
from torch import nn
from workload import Workload, controls, in_bf16

ROUTER, PROJECTION_ROUTER = 96, 32  # widths of the routers of FFNs, and of projections of attention
CALIBRATED = 4  # batches for the tau of the last stage
COMPENSATED, RANK = 10, 4  # batches that shared experts are fitted to, and their rank
HELD = 2**32  # bytes of inputs held together


def task_trained(model: nn.Module, batches: list[Any], loss: Any, lr: float, run: Run) -> nn.Module:
    """The dense model after training on its task: loss(model, batch) -> scalar."""
    model.to(run.device)
    config = SparsifyConfig(seconds=run.effort.task, alpha=0.0, lr=lr, weight_decay=0.05, seed=run.seed)
    with run.stage("task"), mode(model, train=True), fast_training(model):
        kept = Kept(run.checkpoint("task"), "training", {})
        train(model, batches, config, task(model, loss), progress=True, kept=kept)
    model.zero_grad(set_to_none=True)
    return model.eval()


class Recipe:
    """The steps on one workload, each on a copy of what the one before made."""

    def __init__(self, work: Workload, run: Run):
        self.work, self.effort, self.run = work, run.effort, run
        self.fitted = work.train[:: run.effort.stride]
        self.r2: dict[str, float] = {}
        self.after: dict[str, float] = {}  # the metric, by step
        self.share: dict[int, float] = {}  # of the experts that the budget lets run, by their size

    def sparse(self, sizes: Sequence[int]) -> nn.Module:
        """Dense still: projections are MLPs that split into experts of all sizes, activations ReLU and mostly zero;
        what the effort has no time for is as it was."""
        model, effort, run = copy.deepcopy(self.work.dense), self.effort, self.run
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # and what is tied to it: large, and fine as it is
                module.weight.requires_grad_(False)
        tokens, multiple = max(1000, effort.tokens // 2), math.lcm(*sizes)
        if effort.projections:
            projections = ProjectionConfig(
                steps=effort.projections, max_tokens=tokens, multiple=multiple, seed=run.seed
            )
            with run.stage("projections"):
                follow: dict[str, Any] = {"checkpoint": run.checkpoint("projections")}
                print(replace_projections_(model, self.fitted, projections, **follow))
            self.note("projections", model)
        if effort.sparsify:
            config = SparsifyConfig(seconds=effort.sparsify, alpha=0.3, seed=run.seed)
            with run.stage("sparsify"), fast_training(model, self.work.dense):
                follow = {"teacher": self.work.dense, "checkpoint": run.checkpoint("sparsify")}
                print(sparsify_(model, self.work.train, config, **follow))
            self.note("sparsify", model)
        return model

    def note(self, step: str, model: nn.Module) -> None:
        """What a step left of the metric, with every neuron on."""
        self.after[step] = self.work.value(model, self.work.tests)
        print(f"{self.work.metric_name} after {step}: {self.after[step]:.4f}")

    def converted(self, sparse: nn.Module, size: int) -> nn.Module:
        """The sparse model in experts of `size` neurons: each layer fine-tuned to do with few of them, and routers, and
        a tau for the budget."""
        model, effort, work, run, name = copy.deepcopy(sparse), self.effort, self.work, self.run, f"s{size}"
        untrained = ConvertConfig(
            expert_size=size, router=RouterConfig(width=ROUTER, steps=1),
            projection_router=RouterConfig(width=PROJECTION_ROUTER, steps=1), max_tokens=min(effort.tokens, 8192),
            seed=run.seed,
        )  # fmt: skip
        with run.stage(f"{name} convert"):
            convert_(
                model, self.fitted, untrained, checkpoint=run.checkpoint(f"{name} convert"), progress=False
            )
        layers = replace(LAYERS, seconds=effort.layers, share=effort.share, seed=run.seed)
        with run.stage(f"{name} layers"), fast_training(model, sparse):
            finetune_layers_(
                model, self.fitted, layers, teacher=sparse, max_tokens=effort.tokens, max_bytes=HELD,
                checkpoint=run.checkpoint(f"{name} layers"),
            )  # fmt: skip
        self.note(f"{name} layers", model)
        self.route(model, f"{name} routers")
        with run.stage(f"{name} calibrate"):
            some = work.train[:: max(1, len(work.train) // CALIBRATED)]
            found = calibrate_(model, some, budget=effort.budget)
            print(f"tau {found.tau:.4f}, {found.share:.1%} run, for {effort.budget:.0%} of the layers' FLOPs")
        self.share[size] = found.share
        return model

    def routed(self, converted: nn.Module, size: int) -> nn.Module:
        """The converted model, the whole of it fine-tuned under its dynamic k."""
        model = copy.deepcopy(converted)
        self.finetune(model, f"s{size} routed", replace(ROUTED, seconds=self.effort.routed))
        return model

    def static(self, converted: nn.Module, size: int) -> nn.Module:
        """The converted model, fine-tuned as `routed`, but as many experts for every token as run there on average."""
        model = top(copy.deepcopy(converted), self.share[size])
        self.finetune(model, f"s{size} static", replace(ROUTED, seconds=self.effort.routed))
        return model

    def finetune(self, model: nn.Module, step: str, config: FinetuneConfig) -> None:
        """One fine-tuning of the whole model against the dense one."""
        work, run = self.work, self.run
        config = replace(config, seed=run.seed)
        with run.stage(step), fast_training(model, work.dense):
            follow: dict[str, Any] = {"output_loss": work.output_loss, "checkpoint": run.checkpoint(step)}
            print(finetune_(model, work.train, config, teacher=work.dense, **follow))

    def route(self, model: nn.Module, step: str) -> None:
        """Fits the routers, and notes how well they predict."""
        config = RouterConfig(width=ROUTER, steps=self.effort.routers, target_power=0.5, seed=self.run.seed)
        with self.run.stage(step):
            follow: dict[str, Any] = {"checkpoint": self.run.checkpoint(step), "progress": True}
            of: dict[str, Any] = {"max_tokens": self.effort.tokens, "max_bytes": HELD}
            fits = fit_routers_(model, self.fitted, config, **of, **follow)
        known = [fit.r2 for fit in fits.values() if math.isfinite(fit.r2)]  # else all norms were equal
        self.r2[step.removesuffix(" routers")] = statistics.mean(known)

    def untrained(self, size: int) -> nn.Module:
        """The dense model's FFNs in experts, with nothing fine-tuned."""
        model = copy.deepcopy(self.work.dense)
        router = RouterConfig(width=ROUTER, steps=1)
        tokens = min(self.effort.tokens, 8192)
        config = ConvertConfig(expert_size=size, router=router, max_tokens=tokens, seed=self.run.seed)
        with self.run.stage("untrained convert"):
            checkpoint = self.run.checkpoint(f"untrained s{size} convert")
            convert_(model, self.fitted, config, checkpoint=checkpoint, progress=False)
        self.route(model, f"untrained s{size} routers")
        return model

    def moefied(self, sparse: nn.Module, size: int) -> nn.Module:
        """The sparse model by MoEfication."""
        effort, run = self.effort, self.run
        with run.stage(f"MoEfication s{size}"):
            checkpoint = run.checkpoint(f"MoEfication s{size}")
            return moefied(sparse, self.fitted, size, effort.routers, effort.tokens, checkpoint, run.seed)

    def pruned(self, sparse: nn.Module, share: float) -> nn.Module:
        """The sparse model with that share of its neurons, the same for every token, fine-tuned for as long as ours
        after `sparse`."""
        work, run, step = self.work, self.run, f"pruned to {100 * share:g}%"
        config = SparsifyConfig(seconds=self.effort.layers + self.effort.routed, alpha=0.0, seed=run.seed)
        kept = Kept(run.checkpoint(step), "training", {})
        with run.stage(step):
            model = pruned(sparse, self.fitted, share)
            return trained(model, work.dense, work.train, config, work.output_loss, kept)

    def tuned(self, moefied: nn.Module) -> nn.Module:
        """MoEfication's own calibration, for as long as ours trains after `sparse`, and by as many experts."""
        seconds, share = self.effort.layers + self.effort.routed, self.share[self.run.sizes[0]]
        self.finetune(top(moefied, share), "MoEfication tuned", replace(ROUTED, seconds=seconds))
        return moefied


def top(model: nn.Module, share: float) -> nn.Module:
    """The model, with that share of the experts for every token in every layer."""
    for layer in moe_layers(model).values():
        layer.gate = TopK(max(1, round(share * layer.experts)))
    return model


def run_recipe(work: Workload, run: Run) -> None:
    """All of it: JSON, PNG and HTML named after the run, under run.out."""
    recipe, effort, (ours, *others) = Recipe(work, run), run.effort, run.sizes
    with run.stage("controls"):
        dense = work.dense_values()
        facts = {
            "controls": controls(work, dense.tests),
            "after": recipe.after,
            "router_r2": recipe.r2,
            "effort": asdict(effort),
        }
    print(f"{work.title}: dense {work.metric_name} {dense.tests:.4f}; {facts['controls']}")
    dynamic: list[tuple[str, Gate]] = [(f"tau {t:g}", DynamicK(t)) for t in effort.taus]
    oracle: list[tuple[str, Gate]] = [(f"tau {t:g}", DynamicK(t, true_norms=True)) for t in effort.taus if t]
    results = Results(work, run, dense, facts)
    if run.untrained:
        return untrained_curves(recipe, results, dynamic)
    sparse = recipe.sparse(run.sizes)
    converted = recipe.converted(sparse, ours)
    shares = sorted({*effort.shares, round(recipe.share[ours], 3)}, reverse=True)
    static: list[tuple[str, Gate]] = [(f"top {s:.1%}", TopK(round(1000 * s))) for s in shares]
    model = recipe.routed(converted, ours)
    results.add(f"sadmoe, dynamic k, s = {ours}", model, dynamic, timed=True)
    if run.bf16:
        results.add("in bf16: dense", in_bf16(work.dense), [("every neuron", DynamicK(0.0))], timed=True)
        results.add(f"in bf16: dynamic k, s = {ours}", in_bf16(model), dynamic, timed=True)
    for share in effort.pruned:
        narrow, name = recipe.pruned(sparse, share), f"{100 * share:g}% of the neurons"
        gate: list[tuple[str, Gate]] = [(name, TopK(round(1000 * share)))]
        results.add(f"pruned, {name}", narrow, gate, timed=True)
        if run.bf16:
            results.add(f"in bf16: pruned, {name}", in_bf16(narrow), gate, timed=True)
    results.add("the same, static top-k", model, static, timed=True)
    results.add("the same, oracle gate", model, oracle)
    results.add("fine-tuned with static top-k", recipe.static(converted, ours), static, timed=True)
    del converted, model
    untrained = recipe.untrained(ours)
    results.add(f"no fine-tuning, FFNs only, s = {ours}", untrained, dynamic, timed=True)
    results.add("no fine-tuning, static top-k", untrained, static)
    results.add("no fine-tuning, oracle gate", untrained, oracle)
    for size in run.sizes:
        theirs = recipe.moefied(sparse, size)
        results.add(f"MoEfication, s = {size}", theirs, static, timed=True)
        if size == run.sizes[-1] and not effort.sparsify:  # else what it was given was fine-tuned
            results.add(f"MoEfication, fine-tuned, s = {size}", recipe.tuned(theirs), static, timed=True)
    for size in others:
        model = recipe.routed(recipe.converted(sparse, size), size)
        results.add(f"sadmoe, dynamic k, s = {size}", model, dynamic, timed=True)
    finish(results)


def untrained_curves(recipe: Recipe, results: Results, gates: Sequence[tuple[str, Gate]]) -> None:
    """Nothing fine-tuned but routers: the experts alone, and with a shared one in each layer, made for each tau."""
    size, some = recipe.run.sizes[0], recipe.fitted[:: max(1, len(recipe.fitted) // COMPENSATED)]
    name, model = f"no fine-tuning, FFNs only, s = {size}", recipe.untrained(size)
    results.add(name, model, gates, timed=True)

    def prepare(model: nn.Module) -> None:
        if not all(layer.runs_all_experts for layer in moe_layers(model).values()):
            compensate_(model, some, rank=RANK, progress=False)

    results.add(f"the same, shared experts of rank {RANK}", model, gates, timed=True, prepare=prepare)
    finish(results)


def finish(results: Results) -> None:
    """Says what was found, and where it is."""
    print(results.table())
    print("\n" + ", ".join(str(results.run.file(kind)) for kind in ("json", "png", "html")))
