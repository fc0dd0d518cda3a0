"""What else was tried beside the method, each against it: MiniLM's embeddings at equal executed shares.

    python bench/ablations.py [--model sadmoe-demo/model] [--shares 0.75 0.5 0.35] [--size 16] [--only WORD]
                              [--json FILE] [--png FILE]

Without --model, MiniLM as it comes (GELU), converted without any fine-tuning; the variants that change the partition
are of that only, those that go on with fine-tuning of a --model only, which has had it. Cosine of the sentence
embeddings to the dense model's on held-out paragraphs, read off each variant's curve over tau at the given executed
shares; nan where the curve does not reach that far.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import command
import numpy as np
import sadmoe
import torch
from layer_problem import taus_at
from router_losses import Weight, fit_by, near_threshold, plain, under_prediction
from sadmoe import (
    ConvertConfig,
    DynamicK,
    DynamicKMoE,
    FinetuneConfig,
    RouterConfig,
    RouterLoss,
    calibrate_layers_,
    compensate_,
    convert_,
    finetune_,
    fit_routers_,
    ops,
    reference,
)
from sadmoe.demo import embeddings, fidelity, minilm, split, topics
from sadmoe.demo.recipe import embedding_error
from sadmoe.demo.rows import embedded_with
from sadmoe.dial import converted_layers
from sadmoe.masks import record_masks
from sadmoe.mixed import fast_training
from sadmoe.modules import evaluating
from sadmoe.padding import real_rows
from sadmoe.report import Panel, Series, plot_curves
from sadmoe.tables import format_table
from sadmoe.texts import load_model, tokenized
from sadmoe.timing import machine
from torch import Tensor, nn
from tqdm import tqdm

STEPS, WIDTH, TOKENS = 500, 96, 8192
THRESHOLD = 0.2  # the tau near which errors of routers weigh more
SECONDS, BUDGET = 40.0, 0.45  # of further fine-tuning, and FLOPs of the layers meanwhile
GRID = np.linspace(0.05, 0.8, 8)  # of tau, and of the share where a variant sets that
Batches = list[dict[str, Tensor]]


def converted(
    dense: nn.Module, batches: Batches, size: int, cluster: str = "activity", power: float = 0.5
) -> nn.Module:
    model = copy.deepcopy(dense)
    router = RouterConfig(width=WIDTH, steps=STEPS, target_power=power)
    config = ConvertConfig(expert_size=size, cluster=cluster, router=router, max_tokens=TOKENS)
    convert_(model, batches, config, progress=False)
    return model


def refitted(model: nn.Module, batches: Batches) -> None:
    fit_routers_(model, batches, RouterConfig(width=WIDTH, steps=STEPS, target_power=0.5), max_tokens=TOKENS)


def weighted(weight: Weight) -> Callable[[nn.Module, Batches], None]:
    """Routers fitted anew, then refined with that weight."""
    config = RouterConfig(width=WIDTH, steps=STEPS, target_power=0.5)
    return lambda model, batches: fit_by(model, batches, config, TOKENS, weight, THRESHOLD)


def by_activation_norms(model: nn.Module, batches: Batches) -> None:
    """Experts count by the norm of their activations, not of their outputs."""

    def norms(layer: DynamicKMoE, x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer._hidden(x).unflatten(-1, (layer.experts, layer.expert_size)).norm(dim=-1)

    for layer in converted_layers(model).values():
        layer.expert_norms = lambda x, layer=layer: norms(layer, x)  # type: ignore[method-assign]
    refitted(model, batches)


def seen(
    model: nn.Module, name: str, layer: DynamicKMoE, batches: Batches, of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The mean over real tokens of of(x, y), of what enters and leaves a layer."""
    found: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda module, args, y: found.append(of(args[0].flatten(0, -2), y.flatten(0, -2)))
    )
    rows = []
    with hook, evaluating(model):
        for batch in batches:
            model(**batch)
            real = real_rows(model, name, batch, found[-1])
            rows.append(found[-1] if real is None else found[-1][real])
    return torch.cat(rows).mean(0)


def centred(model: nn.Module, batches: Batches, skipping: float = 0.0) -> None:
    """Every neuron gives its mean always, in b_out, and its experts only what it differs by; norms are of that.

    skipping: the tau at which the layers run while means are taken.
    """
    sadmoe.set_tau(model, skipping)
    for name, layer in converted_layers(model).items():
        mean = seen(model, name, layer, batches, lambda x, y, layer=layer: layer._hidden(x))
        layer.b_out.data += mean @ layer.w_down.flatten(0, 1)
        layer._hidden = partial(off_mean, layer._hidden, mean)  # type: ignore[method-assign]
        layer.keeps_hidden = True  # computed by `_hidden`, not by the op
    refitted(model, batches)


def off_mean(
    plain: Callable[[Tensor], Tensor], mean: Tensor, x: Tensor, choice: Any = None, tau: float = 0.0
) -> Tensor:
    """A layer's `_hidden`, of what its neurons differ by from their means."""
    hidden = plain(x) - mean
    if choice is None:
        return hidden
    mask = choice if choice.dtype == torch.bool else ops.dynamic_k_select(choice, tau)
    return reference.of_chosen(hidden, mask, mask.shape[-1])


Setting = Callable[[nn.Module, float], nn.Module]


def one_tau(model: nn.Module, value: float) -> nn.Module:
    sadmoe.set_tau(model, value)
    return model


def oracle(model: nn.Module, value: float) -> nn.Module:
    for layer in converted_layers(model).values():
        layer.gate = DynamicK(value**2, true_norms=True)  # the routers predict roots of norms
    return model


def equal_shares(batches: Batches) -> Setting:
    """A tau of its own for every layer: that at which it executes the share, the layers before at theirs."""

    def setting(model: nn.Module, share: float) -> nn.Module:
        sadmoe.set_tau(model, 0.0)
        with evaluating(model):
            taus_at(model, batches[len(batches) // 2], share)
        return model

    return setting


def jointly(batches: Batches, dense: nn.Module | None = None) -> Setting:
    """A tau of its own for every layer, all for one budget, which is that share of the way from one expert to all.
    dense: the model whose embeddings are held to; by default its own hidden states at tau = 0."""
    some = batches[:: max(1, len(batches) // 4)]

    def error(model: nn.Module, batch: Any) -> Tensor:
        return 1 - (embeddings(model, [batch]) * embeddings(dense, [batch])).sum(-1).mean()

    def setting(model: nn.Module, share: float) -> nn.Module:
        ends = sadmoe.cost(model, shares=1.0)
        budget = (ends.floor + share * (ends.dense - ends.floor)) / ends.dense
        calibrate_layers_(model, some, budget=budget, loss=None if dense is None else error)
        return model

    return setting


def further(model: nn.Module, batches: Batches, dense: nn.Module, routers: bool) -> None:
    """Fine-tuned for SECONDS more as its gates pick at BUDGET; routers: with their regression as a term of the loss."""
    sadmoe.calibrate_(model, batches[::4], budget=BUDGET)
    config = FinetuneConfig(seconds=SECONDS, tau=None, lr=1e-4)
    with RouterLoss(model, target_power=0.5) if routers else nullcontext() as term:

        def loss(output: object, wanted: object, batch: dict[str, Tensor]) -> Tensor:
            error = embedding_error(output, wanted, batch)
            return error if term is None else error + term(batch)

        with fast_training(model, dense):
            finetune_(model, batches, config, teacher=dense, output_loss=loss, progress=False)


def compensated(batches: Batches, rank: int) -> Setting:
    def setting(model: nn.Module, value: float) -> nn.Module:
        model = one_tau(copy.deepcopy(model), value)
        compensate_(model, batches, rank=rank, progress=False)
        return model

    return setting


def curve(model: nn.Module, setting: Setting, tests: Batches, wanted: Tensor) -> list[tuple[float, float]]:
    """(executed share, cosine) at each value of GRID."""
    points = []
    for value in GRID:
        one = setting(model, value)
        with record_masks(one) as record:
            embedded = torch.cat([embedded_with(record, one, batch) for batch in tests])
        points.append((record.share, fidelity(embedded, wanted).cosine))
    return points


def at(points: list[tuple[float, float]], share: float) -> float:
    x, y = zip(*sorted(points), strict=True)
    return float(np.interp(share, x, y, left=np.nan, right=np.nan))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--model", type=Path, help="a converted MiniLM, such as the demo writes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.35])
    parser.add_argument("--size", type=int, default=16, help="neurons in an expert (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="variants whose names hold one of these words"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path, help="the curves as a picture")
    args = parser.parse_args()
    command.check_writable(parser, args.json, args.png)
    dense, tokenizer = minilm()
    train, held_out = (sorted(texts, key=len) for texts in split(topics()))
    batches = tokenized(tokenizer, train, batch_size=24)[::4]
    tests = tokenized(tokenizer, held_out, batch_size=32)[::3]
    wanted = embeddings(dense, tests)
    build = partial(converted, dense, batches, args.size)
    base = load_model(args.model) if args.model else build()

    def changed(change: Callable[[nn.Module, Batches], None] | None = None) -> nn.Module:
        model = copy.deepcopy(base)
        if change is not None:
            change(model, batches)
        return model

    variants: dict[str, tuple[Callable[[], nn.Module], Setting]] = {
        "the method: one tau": (changed, one_tau),
        "a tau for each layer, of equal shares": (changed, equal_shares(batches)),
        "a shared expert, rank 4": (changed, compensated(batches, 4)),
        "a shared expert, rank 16": (changed, compensated(batches, 16)),
        "a shared expert, rank 64": (changed, compensated(batches, 64)),
        "a tau for each layer, jointly": (changed, jointly(batches)),
        "the same, held to the dense model": (changed, jointly(batches, dense)),
        "routers fitted anew": (lambda: changed(refitted), one_tau),
        "the same, and refined": (lambda: changed(weighted(plain)), one_tau),
        "refined, errors near tau weigh more": (lambda: changed(weighted(near_threshold)), one_tau),
        "refined, predictions too low weigh more": (lambda: changed(weighted(under_prediction)), one_tau),
        "true norms (the oracle)": (changed, oracle),
    }
    if args.model:
        variants |= {
            "experts fine-tuned further": (lambda: changed(partial(further, dense=dense, routers=False)), one_tau),
            "experts and routers fine-tuned further": (
                lambda: changed(partial(further, dense=dense, routers=True)), one_tau,
            ),
        }  # fmt: skip
    else:
        variants |= {
            "neurons clustered by weights": (lambda: build(cluster="weights"), one_tau),
            "routers predict norms": (lambda: build(power=1.0), one_tau),
            "routers predict fourth roots": (lambda: build(power=0.25), one_tau),
            "norms of activations": (lambda: changed(by_activation_norms), one_tau),
            "the same, and a shared expert, rank 16": (
                lambda: changed(by_activation_norms),
                compensated(batches, 16),
            ),
            "every neuron's mean in b_out": (lambda: changed(centred), one_tau),
            "the same, means taken at tau 0.3": (lambda: changed(partial(centred, skipping=0.3)), one_tau),
        }
    variants = {name: v for name, v in variants.items() if any(word in name for word in args.only)}
    rows, curves = [], {}
    for name, (model, setting) in tqdm(variants.items(), "variants"):
        curves[name] = curve(model(), setting, tests, wanted)
        rows.append((name, *(f"{at(curves[name], share):.4f}" for share in args.shares)))
        if args.json:
            command.write_json(args.json, machine=machine(), curves=curves)
    print(format_table(("cosine at an executed share of", *(f"{share:.0%}" for share in args.shares)), rows))
    if args.png:
        least = 0.5  # of the cosine: what is below is of no use, and takes the scale
        lines = [
            Series(name, *zip(*good, strict=True))
            for name, points in curves.items()
            if (good := [point for point in sorted(points) if point[1] > least])
        ]
        panel = Panel("", "executed share of the experts", "cosine", lines)
        plot_curves(args.png, [panel], "MiniLM-L6: variants")


if __name__ == "__main__":
    main()
