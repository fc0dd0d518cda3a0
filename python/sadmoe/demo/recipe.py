"""`sadmoe demo`: the whole method on a real model and real text, as one table."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe import budget
from sadmoe.calibrate import calibrate_
from sadmoe.convert import ConvertConfig, convert_
from sadmoe.demo import (
    embeddings,
    long_topics,
    minilm,
    pooled,
    recombined,
    split,
    topics,
)
from sadmoe.demo.rows import CONVERTED, Way, controls, picture, sweep, table
from sadmoe.finetune import finetune_
from sadmoe.int8 import quantize_experts_
from sadmoe.layerwise import finetune_layers_
from sadmoe.mixed import fast_training
from sadmoe.outputs import place_for, replaced
from sadmoe.report import matplotlib_pyplot
from sadmoe.routers import RouterConfig, fit_routers_
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.tables import to_json
from sadmoe.texts import tokenized
from sadmoe.timing import Clock

SECONDS = 198.0  # of training, two thirds of the whole demo on two cores
EXPERT_SIZE = 8  # neurons: larger experts run faster at the same share, but hold more that do not count
SPARSIFY = SparsifyConfig(seconds=0.34 * SECONDS, alpha=0.3)  # neurons of the dense model
LAYERS = replace(budget.LAYERS, seconds=0.19 * SECONDS)  # whole experts, each layer on its own
ROUTED = replace(budget.ROUTED, seconds=0.47 * SECONDS)  # the whole model, by the routers, as in use
EMBEDDING = 10.0  # weight of the embedding's error, 1 - cosine, beside the hidden states'
ROUTER_WIDTH = 96
ROUTERS = replace(budget.ROUTERS, width=ROUTER_WIDTH)
ROUTED_TOKENS = 60_000  # all of the text
UNTRAINED = RouterConfig(width=ROUTER_WIDTH, steps=1)  # routers are trained after the experts
FROZEN = ("embeddings", "attention.self", "attention.output.dense", "pooler")  # of BERT
CLUSTERED = 6  # every sixth batch is enough to see which neurons fire together
TAUS = (0.1, 0.3)
BUDGET = 0.408  # FLOPs of the FFNs, router included, for which the saved model's tau is solved


def run_demo(out: Path, *, seconds: float = SECONDS, force: bool = False) -> str:
    """Runs the demo, writes model, table and picture to `out`, and returns what to print.

    seconds: of training.   force: replace what an earlier demo wrote there; what somebody else wrote there meanwhile
    stays, and a folder beside it is taken.   Raises ImportError where the demo's extras are not installed.
    """
    matplotlib_pyplot()
    clock = Clock()
    with clock("controls"):
        dense, tokenizer = minilm()
        train, held_out = split(topics())
        train += long_topics()
        tests = tokenized(tokenizer, by_length(tokenizer, held_out), batch_size=32)
        rows, wanted = controls(dense, tests)
    model, solved, told = converted(dense, tokenizer, train, seconds, clock)
    with clock("table"):
        rounded = copy.deepcopy(model)
        quantize_experts_(rounded)
        ways = [Way(CONVERTED, model, value) for value in sorted({0.0, *TAUS, solved})]
        ways.append(Way("converted, experts in int8", rounded, solved))
        rows += sweep(dense, ways, tests, wanted)

    out = place_for(out, force)
    text = "\n\n".join(
        (
            f"MiniLM-L6, {len(train)} paragraphs to train on, {len(held_out)} held out, "
            f"{torch.get_num_threads()} threads\n{clock}",
            told,
            table(rows),
            f"saved with tau = {solved:.4f}, for {BUDGET:.1%} of the FFNs' FLOPs, in {out / 'model'}; reloaded, "
            "it gives the same bits:\n\n    import sadmoe\n    from transformers import AutoModel\n"
            f'    model = AutoModel.from_pretrained("{out / "model"}")',
        )
    )
    with replaced(out) as new:
        check_reload(model, tokenizer, new / "model", tests[:2])
        (new / "demo.json").write_text(to_json([asdict(row) for row in rows]))
        (new / "demo.txt").write_text(text + "\n", encoding="utf-8")
        picture(rows, new / "demo.png")
    return text


def converted(
    dense: nn.Module, tokenizer: Any, texts: Sequence[str], seconds: float, clock: Clock
) -> tuple[nn.Module, float, str]:
    """The recipe: a copy of `dense` made sparse, converted, and taught to do with few experts; the tau that is set;
    and what to tell of it.

    seconds: of training, split as the configurations above split SECONDS.
    """
    with clock("texts"):
        batches, more = (
            tokenized(tokenizer, by_length(tokenizer, some), batch_size=24)
            for some in (texts, [*texts, *recombined(texts, len(texts))])
        )

    model = copy.deepcopy(dense)
    train_ffns_(model)
    with clock("sparsify"), fast_training(model, dense):
        sparsified = sparsify_(model, more, scaled(SPARSIFY, seconds))
    teacher = copy.deepcopy(model)
    config = ConvertConfig(expert_size=EXPERT_SIZE, router=UNTRAINED, max_tokens=8192)
    with clock("convert"):
        convert_(model, batches[::CLUSTERED], config)
    with clock("layers"), fast_training(model, teacher):
        finetune_layers_(model, batches, scaled(LAYERS, seconds), teacher=teacher, batch_tokens=768)
    with clock("routers"), fast_training(model):
        fits = fit_routers_(model, batches, ROUTERS, max_tokens=ROUTED_TOKENS, progress=True)
    with clock("calibrate"):
        calibrate_(model, batches[::8], budget=BUDGET, progress=True)
    with clock("routed"), fast_training(model, dense):
        finetune_(model, more, scaled(ROUTED, seconds), teacher=dense, output_loss=embedding_error)
    with clock("calibrate"):
        solved = calibrate_(model, batches[::4], budget=BUDGET, progress=True).tau
    r2 = " ".join(f"{fit.r2:.2f}" for fit in fits.values())
    return (
        model,
        solved,
        f"made sparse: {sparsified.zero_before:.0%} -> {sparsified.zero:.0%} of the activations are exactly 0\n"
        f"router R² by layer: {r2}",
    )


def scaled(config: Any, seconds: float) -> Any:
    """A step's configuration in a recipe of so many seconds of training, not SECONDS."""
    return replace(config, seconds=config.seconds * seconds / SECONDS)


def embedding_error(output: Any, wanted: Any, batch: Any) -> Tensor:
    """1 - cosine of a text's embeddings, the mean over the texts, times EMBEDDING."""
    ours, theirs = (pooled(o.last_hidden_state.float(), batch["attention_mask"]) for o in (output, wanted))
    return EMBEDDING * (1 - (ours * theirs).sum(-1)).mean()


def by_length(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """The texts, those of fewest tokens first, so that a batch has little padding."""
    return sorted(texts, key=lambda text: len(tokenizer(text)["input_ids"]))


def train_ffns_(model: nn.Module) -> None:
    """Freezes all but FFNs and norms: in a pair of runs, training attention as well took longer and gained nothing."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in FROZEN):
            parameter.requires_grad_(False)


def check_reload(model: nn.Module, tokenizer: Any, folder: Path, tests: Sequence[Any]) -> None:
    """Saves, loads as a stranger would, and compares bit for bit."""
    from transformers import AutoModel

    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    if not torch.equal(embeddings(again, tests), embeddings(model, tests)):
        raise RuntimeError(f"the model reloaded from {folder} does not give the bits of the one saved")
