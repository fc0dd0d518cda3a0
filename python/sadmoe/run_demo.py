"""`sadmoe demo`: the whole method on a real model and real text, as one table."""

import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.batches import evaluating, run
from sadmoe.calibrate import calibrate_
from sadmoe.convert import ConvertConfig, convert_
from sadmoe.cost import cost
from sadmoe.demo import Fidelity, embeddings, fidelity, minilm, split, topics
from sadmoe.dial import converted_layers, set_tau, tau
from sadmoe.ffn import FFNSite, find_ffns
from sadmoe.finetune import FinetuneConfig, finetune_
from sadmoe.report import Series, plot_curves
from sadmoe.routers import RouterConfig, fit_routers_
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.tables import format_table
from sadmoe.texts import tokenized

SECONDS = 170.0  # of fine-tuning, so that the whole demo takes about five minutes on two cores
SPARSE = (
    0.4  # of them for sparsity of neurons, before the conversion; the others for that of experts, after it
)
EXPERT_SIZE = 16  # 32 runs faster at the same share, but more of its experts have a neuron that is needed
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)  # FLOPs of the FFNs, shares of dense, router included
UNTRAINED = RouterConfig(steps=1)  # of the conversion: routers are trained after the experts


@dataclass(frozen=True)
class Row:
    """One way to run the model. share: executed. flops: whole model over dense. Seconds of the held-out texts."""

    name: str
    tau: float | None
    share: float | None
    flops: float | None
    fidelity: Fidelity
    ffn_seconds: float | None = None
    seconds: float | None = None


def run_demo(out: Path, *, seconds: float = SECONDS, progress: bool = True) -> str:
    """Runs the demo, writes model, table and picture into `out`, and returns what to print.

    seconds: of fine-tuning.   Raises ImportError where the demo's extras are not installed.
    """
    started = time.perf_counter()
    dense, tokenizer = minilm()
    train, held_out = split(topics())
    batches = tokenized(tokenizer, sorted(train, key=len), batch_size=24)
    tests = tokenized(tokenizer, sorted(held_out, key=len), batch_size=32)
    wanted = embeddings(dense, tests)
    rows = controls(dense, tests, wanted)

    model = copy.deepcopy(dense)
    freeze_embeddings_(model)
    sparsify_(model, batches, SparsifyConfig(seconds=SPARSE * seconds), progress=progress)
    rows.append(
        Row("sparse neurons, not converted", None, None, None, fidelity(embeddings(model, tests), wanted))
    )
    config = ConvertConfig(expert_size=EXPERT_SIZE, cluster="activity", router=UNTRAINED)
    convert_(model, batches, config, progress=progress)
    tuned = finetune_(
        model, batches, FinetuneConfig(seconds=(1 - SPARSE) * seconds), teacher=dense, progress=progress
    )
    fits = fit_routers_(model, batches, progress=progress)
    rows += sweep(dense, model, batches[::4], tests, wanted)

    best = max(
        (row for row in rows if row.tau and row.share and row.share <= 0.35), key=lambda row: row.share or 0
    )
    set_tau(model, best.tau or 0.0)
    check_reload(model, tokenizer, out / "model", tests[:2])
    text = "\n\n".join(
        (
            f"MiniLM-L6, {len(train)} paragraphs to train on, {len(held_out)} held out, "
            f"{torch.get_num_threads()} threads, {time.perf_counter() - started:.0f} s in all",
            str(tuned),
            "router R², by layer: " + " ".join(f"{fit.r2:.2f}" for fit in fits.values()),
            table(rows),
            f"saved with tau = {best.tau:.4g} to {out / 'model'}, and reloaded: the same bits. Load it with\n\n"
            "    import sadmoe\n    from transformers import AutoModel\n"
            f'    model = AutoModel.from_pretrained("{out / "model"}")\n',
        )
    )
    (out / "demo.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    (out / "demo.txt").write_text(text)
    picture(rows, out / "demo.png")
    return text


def freeze_embeddings_(model: nn.Module) -> None:
    """What stands before the first block and after the last is left as it is."""
    for name, parameter in model.named_parameters():
        if "embeddings" in name or "pooler" in name:
            parameter.requires_grad_(False)


def controls(dense: nn.Module, tests: Sequence[Any], wanted: Tensor) -> list[Row]:
    """The dense model, and three that show whether the metric notices the FFNs: off, half static, half by an oracle."""
    sites = find_ffns(dense)
    rows = [Row("dense", None, 1.0, 1.0, fidelity(wanted, wanted), *times(dense, sites, tests))]
    average = contributions(dense, sites, tests)
    for name, keep in (
        ("dense, best half of the neurons of each token", lambda c, site: top_half(c)),
        ("dense, the same half for all tokens", lambda c, site: top_half(average[site.name]).expand_as(c)),
        ("dense, FFN off", lambda c, site: torch.zeros_like(c, dtype=torch.bool)),
    ):
        with masked(sites, keep):
            rows.append(Row(name, None, None, None, fidelity(embeddings(dense, tests), wanted)))
    return rows


def top_half(contribution: Tensor) -> Tensor:
    """bool [..., f]: the half of the neurons of largest contribution."""
    half = contribution.topk(contribution.shape[-1] // 2, dim=-1).indices
    return torch.zeros_like(contribution, dtype=torch.bool).scatter_(-1, half, True)


@contextmanager
def masked(sites: Sequence[FFNSite], keep: Callable[[Tensor, FFNSite], Tensor]) -> Any:
    """Inside, only the neurons of keep(contributions [..., f], site) reach the down projection.

    A neuron's contribution is |a_j| |w_down,j|, the norm of what it adds to the output.
    """

    def hook(site: FFNSite) -> Any:
        norms = site.dense().w_down.norm(dim=1)
        return lambda module, args: (args[0] * keep(args[0].abs() * norms, site), *args[1:])

    handles = [site.down.register_forward_pre_hook(hook(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contributions(dense: nn.Module, sites: Sequence[FFNSite], tests: Sequence[Any]) -> dict[str, Tensor]:
    """Mean contribution of each neuron, [f], by site."""
    sums: dict[str, Tensor] = {}

    def add(contribution: Tensor, site: FFNSite) -> Tensor:
        mean = contribution.flatten(0, -2).mean(0)
        sums[site.name] = sums.get(site.name, torch.zeros_like(mean)) + mean
        return torch.ones_like(contribution, dtype=torch.bool)

    with masked(sites, add):
        embeddings(dense, tests)
    return sums


def sweep(dense: nn.Module, model: nn.Module, batches: Any, tests: Any, wanted: Tensor) -> list[Row]:
    """The converted model at tau = 0 and at the tau of each budget, and beside it the rule on the true norms."""
    taus = [0.0] + [calibrate_(model, batches, budget=budget).tau for budget in BUDGETS]
    rows = []
    for value in taus:
        with tau(model, value):
            report = cost(model, tests)
            flops = (
                1.0
                if value == 0
                else (report.executed + (report.rest or 0)) / (report.dense + (report.rest or 0))
            )
            embedded = embeddings(model, tests)
            ours = times(model, converted_layers(model).values(), tests)
        rows.append(Row("converted", value, report.share, flops, fidelity(embedded, wanted), *ours))
    return rows


def times(model: nn.Module, ffns: Any, tests: Sequence[Any], repeats: int = 3) -> tuple[float, float]:
    """Seconds of all FFNs and of the whole model on the held-out texts: medians of some passes."""
    ends = [(ffn.first, ffn.down) if isinstance(ffn, FFNSite) else (ffn, ffn) for ffn in ffns]
    clock = {"start": 0.0, "sum": 0.0}
    handles = [
        first.register_forward_pre_hook(lambda *_: clock.update(start=time.perf_counter()))
        for first, _ in ends
    ] + [
        last.register_forward_hook(
            lambda *_: clock.update(sum=clock["sum"] + time.perf_counter() - clock["start"])
        )
        for _, last in ends
    ]
    parts, wholes = [], []
    try:
        with evaluating(model):
            for _ in range(repeats):
                clock["sum"], started = 0.0, time.perf_counter()
                for batch in tests:
                    run(model, batch)
                wholes.append(time.perf_counter() - started)
                parts.append(clock["sum"])
    finally:
        for handle in handles:
            handle.remove()
    return median(parts), median(wholes)


def check_reload(model: nn.Module, tokenizer: Any, folder: Path, tests: Sequence[Any]) -> None:
    """Saves, loads as a stranger would, and compares bit for bit."""
    from transformers import AutoModel

    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    if not torch.equal(embeddings(again, tests), embeddings(model, tests)):
        raise RuntimeError(f"the model reloaded from {folder} does not give the bits of the one saved")


def table(rows: Sequence[Row]) -> str:
    """The rows with their gains over the first, the dense model."""
    dense = rows[0]

    def gain(ours: float | None, theirs: float | None) -> str:
        return "" if ours is None or theirs is None else f"{theirs / ours:.2f}x"

    header = ("", "tau", "executed", "FLOPs", "cosine", "Spearman", "FFN ms", "faster", "model ms", "faster")
    return format_table(
        header,
        [
            (
                row.name,
                "" if row.tau is None else f"{row.tau:.4f}",
                "" if row.share is None else f"{row.share:.1%}",
                "" if row.flops is None else f"{row.flops:.1%}",
                f"{row.fidelity.cosine:.3f}",
                f"{row.fidelity.spearman:.3f}",
                "" if row.ffn_seconds is None else f"{row.ffn_seconds * 1e3:.0f}",
                gain(row.ffn_seconds, dense.ffn_seconds),
                "" if row.seconds is None else f"{row.seconds * 1e3:.0f}",
                gain(row.seconds, dense.seconds),
            )
            for row in rows
        ],
    )


def picture(rows: Sequence[Row], path: Path) -> None:
    """Fidelity against cost, and against wall time, of the converted model, beside the dense one."""
    ours = sorted((row for row in rows if row.tau is not None), key=lambda row: row.flops or 0)
    dense = rows[0]
    labels = [f"{row.share:.0%}" for row in ours]
    cosine = [row.fidelity.cosine for row in ours]
    speed = sorted(ours, key=lambda row: (dense.seconds or 1) / (row.seconds or 1))
    plot_curves(
        path,
        [
            (
                "cost (labels: executed share of the experts)",
                "FLOPs of the whole model, share of dense",
                "cosine to the dense model's embeddings",
                [
                    Series("converted", [row.flops or 0 for row in ours], cosine, labels),
                    Series("dense", [1], [1], line=False),
                ],
            ),
            (
                "wall time on this machine",
                "whole model, times faster than dense",
                "cosine to the dense model's embeddings",
                [
                    Series(
                        "converted",
                        [(dense.seconds or 1) / (row.seconds or 1) for row in speed],
                        [row.fidelity.cosine for row in speed],
                    ),
                    Series("dense", [1], [1], line=False),
                ],
            ),
        ],
        "MiniLM-L6 on held-out paragraphs of Python's documentation",
    )
