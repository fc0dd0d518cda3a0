"""Whole models, dense beside converted, at fixed executed shares: MiniLM, SmolLM2 and DINOv2, where their packages are.

    python bench/models.py [--models minilm smollm2 vit] [--shares 0.25 0.5] [--packed] [--int8] [--bf16]
                           [--threads 1] [--json FILE]

It is time that is measured, not quality: the models are converted without fine-tuning, with routers trained for a few
steps, and every layer's tau is solved for the share on the scores of its own inputs. So the outputs are of no use, and
the masks less clustered and less skewed than those of a fine-tuned model. --packed, --int8: beside it with experts
packed, in int8. --bf16: beside it dense and converted in bfloat16, as times faster than dense in float32, too. The
executed share printed is that of the timed inputs; that of a decode is of its prompt. Models take turns.
bench/recipes/fetch.sh brings the packages.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import command
import torch
from layer_problem import ROUTER_WIDTH, taus_at
from recipes import sources
from recipes.workload import in_bf16
from sadmoe import ConvertConfig, convert_, pack_experts_, quantize_experts_, set_tau
from sadmoe.demo import minilm, topics
from sadmoe.masks import record_masks
from sadmoe.routers import RouterConfig
from sadmoe.texts import tokenized
from sadmoe.timing import machine, measure
from torch import Tensor, nn

ROUTER_STEPS = 20
NEW_TOKENS = 32

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, the batches that it is converted with, and what is timed: by name, a batch and how it is called."""

    model: nn.Module
    batches: list[Batch]
    calls: dict[str, tuple[Batch, Callable[[nn.Module, Batch], object]]]


def forward(model: nn.Module, batch: Batch) -> object:
    return model(**batch)


def decode(model: nn.Module, batch: Batch) -> object:
    """One token after another, T = 1 in every layer but for the prompt."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(**batch, **settings, pad_token_id=0)


def text_encoder() -> Workload:
    model, tokenizer = minilm()
    batches = tokenized(tokenizer, topics()[:96])
    one = {name: t[:1] for name, t in batches[0].items()}
    return Workload(model.eval(), batches, {"batch of 16": (batches[0], forward), "one text": (one, forward)})


def language_model() -> Workload:
    model, tokenizer = sources.smollm2()
    batches = tokenized(tokenizer, topics()[:32], batch_size=4)
    prompt = {name: t[:1, :8] for name, t in batches[0].items()}
    whole = {name: t[:1] for name, t in batches[0].items()}
    calls = {"one text": (whole, forward), f"decode of {NEW_TOKENS} tokens": (prompt, decode)}
    return Workload(model, batches, calls)


def image_model() -> Workload:
    model = sources.vit_small().eval()
    g = torch.Generator().manual_seed(0)
    batches = [{"pixel_values": torch.randn(8, 3, 224, 224, generator=g)} for _ in range(4)]
    one = {"pixel_values": batches[0]["pixel_values"][:1]}
    return Workload(model, batches, {"batch of 8": (batches[0], forward), "one image": (one, forward)})


MODELS = {"minilm": text_encoder, "smollm2": language_model, "vit": image_model}


def converted(workload: Workload) -> nn.Module:
    """A converted copy, its experts as large as by default."""
    model = copy.deepcopy(workload.model)
    router = RouterConfig(width=ROUTER_WIDTH, steps=ROUTER_STEPS)
    convert_(model, workload.batches, ConvertConfig(router=router, max_tokens=2048))
    return model


def executed(model: nn.Module, batch: Batch) -> float:
    with record_masks(model, skip_padding=False) as record:
        forward(model, batch)
    return record.share


def timed(
    workload: Workload, dense: dict[str, nn.Module], models: dict[str, nn.Module], shares: list[float]
) -> list[dict]:
    """A row for every call and share, with a column for each of the dense models, and of the converted ones, all of
    which are one and the same."""
    rows, model = [], next(iter(models.values()))
    for name, (batch, call) in workload.calls.items():
        taus = {share: taus_at(model, batch, share) for share in shares}

        def at(
            name: str, share: float, taus: dict = taus, call: Callable = call, batch: Batch = batch
        ) -> object:
            set_tau(models[name], taus[share])  # in microseconds
            return call(models[name], batch)

        variants = {f"{name} {s}": partial(at, name, s) for name in models for s in shares}
        times = measure({name: partial(call, one, batch) for name, one in dense.items()} | variants)
        for share in shares:
            set_tau(model, taus[share])
            columns = {name: times[name] for name in dense}
            columns |= {name: times[f"{name} {share}"] for name in models}
            rows.append(
                {
                    "call": name,
                    "wanted": share,
                    "share": executed(model, batch),
                    "seconds": {name: time.median for name, time in columns.items()},
                    "spread": {name: time.spread for name, time in columns.items()},
                    "speedup": {
                        n: times["dense"].median / t.median for n, t in columns.items() if n != "dense"
                    },
                }
            )
    return rows


def line(row: dict) -> str:
    cells = "".join(
        f"{time * 1e3:11.2f} ±{row['spread'][name]:4.0%}" for name, time in row["seconds"].items()
    )
    gains = "".join(f"  {name} {gain:.2f}x" for name, gain in row["speedup"].items())
    return f"{row['model']:8} {row['call']:20} {row['share']:6.1%}{cells}{gains}"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    command.check_writable(parser, args.json)
    torch.set_num_threads(args.threads)
    title = machine()
    columns = ["dense"] + ["dense bf16"] * args.bf16 + ["sadmoe"] + ["packed"] * args.packed
    columns += ["int8"] * args.int8 + ["sadmoe bf16"] * args.bf16
    print(
        f"# {title}, float32\n{'model':8} {'call':20}  share{''.join(f'{name:>17}' for name in columns)}  faster"
    )
    rows = []
    for name in args.models:
        try:
            workload = MODELS[name]()
        except (ImportError, SystemExit) as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
            continue
        dense, models = {"dense": workload.model}, {"sadmoe": converted(workload)}
        if args.packed:
            models["packed"] = copy.deepcopy(models["sadmoe"])
            if not pack_experts_(models["packed"]):
                parser.error("argument --packed: no layer gains by it on this processor; leave it out")
        if args.int8:
            models["int8"] = copy.deepcopy(models["sadmoe"])
            quantize_experts_(models["int8"])
        if args.bf16:
            dense["dense bf16"], models["sadmoe bf16"] = in_bf16(workload.model), in_bf16(models["sadmoe"])
        with torch.inference_mode():
            for row in timed(workload, dense, models, args.shares):
                rows.append({"model": name} | row)
                print(line(rows[-1]), flush=True)
    print("Times in ms: median and distance of the quartiles.")
    if not rows:
        raise SystemExit("no model could be loaded: bench/recipes/fetch.sh brings them")
    if args.json:
        command.write_json(args.json, machine=title, rows=rows)


if __name__ == "__main__":
    main()
