"""The whole method on one workload, and its curves beside those of other methods: what the scripts here share.

    projections of attention -> sparsify -> convert -> layers -> whole -> routers -> routed -> a sweep of every gate

Each step saves itself under OUT/state and is not done again, so a killed run goes on when it is started again.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moefication import moefied
from results import best, kept_table, page, pictures, working_tau
from sadmoe import (
    Checkpoint,
    ConvertConfig,
    DynamicK,
    FinetuneConfig,
    ProjectionConfig,
    RouterConfig,
    SparsifyConfig,
    TopK,
    calibrate_,
    convert_,
    finetune_,
    finetune_layers_,
    fit_routers_,
    moe_layers,
    replace_projections_,
    sparsify_,
)
from sadmoe.gates import Gate
from sadmoe.report import write_page
from sadmoe.run_demo import fast_training
from sadmoe.sparsify.guards import mode, seeded
from sadmoe.sparsify.objective import task
from sadmoe.sparsify.train import train
from sadmoe.tables import format_table
from torch import nn
from workload import Point, Workload, controls, sweep

sys.path.append(str(Path(__file__).parent.parent))
from sadmoe.timing import machine

TAUS = (0.0, 0.003, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)  # of the experts, for static top-k
ROUTER, PROJECTION_ROUTER = 96, 32  # widths of the routers of FFNs, and of projections of attention
BUDGET = 0.4  # FLOPs of the converted layers, for the tau at which the routed fine-tune runs


@dataclass(frozen=True)
class Effort:
    """How long a recipe takes. Seconds are of training."""

    task: float  # the dense model on its task
    projections: int  # updates of each MLP of attention
    sparsify: float
    layers: float
    whole: float
    routers: int  # updates of each router
    routed: float
    tokens: int  # of each layer, for routers and layers
    train: int  # samples
    tests: int  # samples
    timed: float  # seconds of timing at each point


TINY = Effort(1, 3, 1, 1, 1, 5, 0.5, 500, 64, 32, 0.05)  # to see that it runs
CPU = Effort(
    200, 600, 300, 150, 150, 800, 90, 20_000, 12_000, 2_000, 2
)  # two cores, meant for under 40 minutes
GPU = Effort(600, 3000, 1800, 900, 1200, 3000, 600, 200_000, 60_000, 10_000, 3)
EFFORTS = {"tiny": TINY, "cpu": CPU, "gpu": GPU}


def arguments(description: str) -> argparse.Namespace:
    """What every recipe's command line takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder that fetch.sh filled (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results"), help="folder for results (%(default)s)"
    )
    parser.add_argument(
        "--effort", choices=EFFORTS, default="cpu", help="tiny: to see that it runs, cpu: two cores, gpu"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[8, 32], help="neurons in an expert; the first is ours"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def task_trained(
    model: nn.Module, batches: list[Any], loss: Any, effort: Effort, lr: float, state: Path, device: str
) -> nn.Module:
    """The dense model after training on its task: loss(model, batch) -> scalar."""
    model.to(device)
    config = SparsifyConfig(seconds=effort.task, alpha=0.0, lr=lr, weight_decay=0.05)
    with mode(model, train=True), seeded(model, 0), fast(device):
        train(
            model, batches, config, task(model, loss), lambda batch: torch.zeros(()), True,
            checkpoint=Checkpoint(state / "task", every=30),
        )  # fmt: skip
    model.zero_grad(set_to_none=True)
    return model.eval()


@contextmanager
def fast(device: str) -> Iterator[None]:
    """Mixed precision where it is faster."""
    with fast_training() if device == "cpu" else torch.autocast("cuda", torch.bfloat16):
        yield


class Recipe:
    """The steps on one workload, each on a copy of what the one before made."""

    def __init__(self, work: Workload, effort: Effort, state: Path, device: str):
        self.work, self.effort, self.state, self.device = work, effort, state, device
        self.r2: dict[str, float] = {}

    def checkpoint(self, step: str) -> Checkpoint:
        return Checkpoint(self.state / step, every=30)

    def sparse(self, sizes: Sequence[int]) -> nn.Module:
        """Dense still: projections are MLPs that split into experts of all sizes, activations ReLU and mostly zero."""
        model, effort = copy.deepcopy(self.work.dense), self.effort
        tokens, multiple = max(1000, effort.tokens // 2), math.lcm(*sizes)
        projections = ProjectionConfig(steps=effort.projections, max_tokens=tokens, multiple=multiple)
        print(
            replace_projections_(
                model, self.work.train, projections, checkpoint=self.checkpoint("projections")
            )
        )
        config = SparsifyConfig(seconds=effort.sparsify, alpha=0.3)
        follow: dict[str, Any] = {"teacher": self.work.dense, "checkpoint": self.checkpoint("sparsify")}
        with fast(self.device):
            print(sparsify_(model, self.work.train, config, **follow))
        return model

    def converted(self, sparse: nn.Module, size: int) -> nn.Module:
        """The sparse model in experts of `size` neurons, fine-tuned to do with few of them."""
        model, effort, work, name = copy.deepcopy(sparse), self.effort, self.work, f"s{size}"
        untrained = ConvertConfig(
            expert_size=size, cluster="activity", router=RouterConfig(width=ROUTER, steps=1),
            projection_router=RouterConfig(width=PROJECTION_ROUTER, steps=1), max_tokens=min(effort.tokens, 8192),
        )  # fmt: skip
        convert_(model, work.train, untrained, progress=False)
        layers = FinetuneConfig(seconds=effort.layers, tau=0.07, ramp=0.0, alpha=0.02, share=0.2, lr=1e-3)
        whole = FinetuneConfig(seconds=effort.whole, tau=0.05, ramp=0.0, alpha=0.1, share=0.2, lr=5e-5)
        follow: dict[str, Any] = {"teacher": work.dense, "output_loss": work.output_loss}
        with fast(self.device):
            finetune_layers_(
                model, work.train, layers, teacher=sparse, max_tokens=effort.tokens, max_bytes=2**32,
                checkpoint=self.checkpoint(f"{name} layers"),
            )  # fmt: skip
            finetune_(model, work.train, whole, **follow, checkpoint=self.checkpoint(f"{name} whole"))
        self.route(model, f"{name} routers")
        calibrate_(model, work.train[:: max(1, len(work.train) // 20)], budget=BUDGET)
        routed = FinetuneConfig(seconds=effort.routed, tau=None, lr=5e-5)
        with fast(self.device):
            finetune_(model, work.train, routed, **follow, checkpoint=self.checkpoint(f"{name} routed"))
        return model

    def route(self, model: nn.Module, step: str, power: float = 0.5) -> None:
        """Fits the routers, and notes how well they predict."""
        config = RouterConfig(width=ROUTER, steps=self.effort.routers, target_power=power)
        fits = fit_routers_(
            model,
            self.work.train,
            config,
            max_tokens=self.effort.tokens,
            checkpoint=self.checkpoint(step),
            progress=True,
        )
        self.r2[step.removesuffix(" routers")] = statistics.mean(fit.r2 for fit in fits.values())

    def untrained(self, size: int) -> nn.Module:
        """The dense model's FFNs in experts, with nothing fine-tuned."""
        model = copy.deepcopy(self.work.dense)
        router = RouterConfig(width=ROUTER, steps=1)
        tokens = min(self.effort.tokens, 8192)
        config = ConvertConfig(expert_size=size, cluster="activity", router=router, max_tokens=tokens)
        convert_(model, self.work.train, config, progress=False)
        self.route(model, f"untrained s{size} routers")
        return model


def run_recipe(work: Workload, args: argparse.Namespace) -> None:
    """All of it: JSON, PNG and HTML named after the workload, under args.out."""
    effort, name = EFFORTS[args.effort], f"{work.name}-{args.effort}"
    recipe = Recipe(work, effort, args.out / "state" / name, args.device)
    dense = work.metric(work.dense, work.tests)
    found: dict[str, Any] = {"controls": controls(work, dense)}
    print(f"{work.title}: dense {work.metric_name} {dense:.4f}; {found['controls']}")
    dynamic = [(f"tau {t:g}", DynamicK(t)) for t in TAUS]
    oracle = [(f"tau {t:g}", DynamicK(t, true_norms=True)) for t in TAUS if t]
    static: list[tuple[str, Gate]] = [(f"top {s:.0%}", TopK(round(1000 * s))) for s in SHARES]
    curves: dict[str, list[Point]] = {}

    sparse, ours = recipe.sparse(args.sizes), args.sizes[0]
    model = recipe.converted(sparse, ours)
    curves[f"sadmoe, dynamic k, s = {ours}"] = sweep(work, model, dynamic, dense, effort.timed)
    curves["the same, static top-k"] = sweep(work, model, static, dense, 0)
    curves["the same, oracle gate"] = sweep(work, model, oracle, dense, 0)
    for size in args.sizes[1:]:
        curves[f"sadmoe, dynamic k, s = {size}"] = sweep(
            work, recipe.converted(sparse, size), dynamic, dense, effort.timed
        )
    curves[f"no fine-tuning, FFNs only, s = {ours}"] = sweep(
        work, recipe.untrained(ours), dynamic, dense, effort.timed
    )
    moe = moefied(sparse, work.train, args.sizes[-1], effort.routers, effort.tokens)
    curves[f"MoEfication, s = {args.sizes[-1]}"] = sweep(work, moe, static, dense, 0)

    found |= {"curves": {key: [asdict(point) for point in points] for key, points in curves.items()}}
    found |= {
        "machine": machine(),
        "title": work.title,
        "metric": work.metric_name,
        "dense": dense,
        "router_r2": recipe.r2,
    }
    found |= {"effort": asdict(effort), "kept": best(work, curves)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(found, indent=1))
    pictures(work, curves, dense, args.out / f"{name}.png")
    for layer in moe_layers(model).values():
        layer.gate = DynamicK(working_tau(curves))
    write_page(args.out / f"{name}.html", page(work, curves, found, model))
    print(format_table(*kept_table(found["kept"])))
    print(f"\n{args.out / name}.json, .png and .html")
