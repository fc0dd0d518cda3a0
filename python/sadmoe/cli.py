"""The command line: `sadmoe demo | convert | evaluate | info`, thin over the API."""

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from sadmoe import ops
from sadmoe.batches import evaluating, run
from sadmoe.convert import ConvertConfig, convert_
from sadmoe.cost import cost
from sadmoe.dial import converted_layers, tau
from sadmoe.run_demo import SECONDS, run_demo
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.tables import format_table
from sadmoe.texts import load_model, paragraphs, tokenized

EPILOG = """\
examples:
  sadmoe demo                                          convert a real text encoder, see what it costs and keeps
  sadmoe convert ./my-bert ./my-moe --text corpus.txt  convert a transformers model of a local folder
  sadmoe evaluate ./my-moe --text held_out.txt         cost, time and fidelity at several tau
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done, 2: a wrong argument or file, 130: interrupted."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="sadmoe: %(message)s", level=logging.WARNING)
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        print("sadmoe: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError) as error:
        print(f"sadmoe: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sadmoe",
        description="Turns a pretrained dense transformer into a dynamic-k Mixture-of-Experts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_demo(commands)
    _add_convert(commands)
    _add_evaluate(commands)
    info = commands.add_parser("info", help="what was built and which kernels run here")
    info.set_defaults(command=lambda _: print(ops.build_info()))
    return parser


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="the whole method on a real model and real text, in about five minutes on two cores",
        description="Converts MiniLM-L6 (22.7 M parameters), trains it on paragraphs of Python's own "
        "documentation, prints fidelity, cost and time at several tau on held-out paragraphs, saves it, "
        "reloads it, and checks that both give the same bits. Needs: pip install 'sadmoe[demo]'. Uses no network.",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("sadmoe-demo"),
        help="folder for model, table and picture (default: %(default)s)",
    )
    command.add_argument("--seconds", type=float, default=SECONDS, help="of training (default: %(default)s)")
    _add_common(command)
    command.set_defaults(command=_demo)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="convert a transformers model of a local folder",
        description="Converts every FFN of MODEL and saves the result, which transformers loads after `import sadmoe`. "
        "Without --sparsify nothing is fine-tuned: models with GELU or SiLU then keep their quality to a budget of "
        "about 0.6, with it to far less.",
    )
    command.add_argument("model", type=Path, help="folder of a transformers model and its tokenizer")
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument(
        "--text",
        type=Path,
        required=True,
        help="text like what the model will see, paragraphs between blank lines",
    )
    command.add_argument(
        "--budget",
        type=float,
        default=0.5,
        help="FLOPs of the FFNs, a share of dense, for which tau is solved (default: %(default)s)",
    )
    command.add_argument("--tau", type=float, help="the threshold itself, instead of a budget")
    command.add_argument(
        "--expert-size", type=int, default=32, help="neurons in an expert (default: %(default)s)"
    )
    command.add_argument(
        "--sparsify",
        type=float,
        metavar="SECONDS",
        help="first swap the activation for ReLU and fine-tune that long by self-distillation",
    )
    command.add_argument("--seed", type=int, default=0)
    _add_text(command)
    _add_common(command)
    command.set_defaults(command=_convert)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="cost, time and fidelity of a converted model at several tau",
        description="Runs a converted model over TEXT at several tau. error: of the last hidden states or logits, "
        "|y - y0| / |y0| with y0 those at tau = 0, padding left out.",
    )
    command.add_argument("model", type=Path, help="folder that `sadmoe convert` or save_pretrained wrote")
    command.add_argument("--text", type=Path, required=True)
    command.add_argument(
        "--tau",
        type=float,
        nargs="+",
        default=[0.0, 0.01, 0.03, 0.1, 0.3, 1.0],
        help="(default: %(default)s)",
    )
    _add_text(command)
    _add_common(command)
    command.set_defaults(command=_evaluate)


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch-size", type=int, default=16, help="paragraphs in a batch (default: %(default)s)"
    )
    command.add_argument(
        "--max-length",
        type=int,
        default=128,
        help="tokens after which a paragraph is cut (default: %(default)s)",
    )


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    command.add_argument("--force", action="store_true", help="replace what a former run wrote")


def free(folder: Path, force: bool) -> None:
    """Makes sure that `folder` may be written: absent or empty, or --force. Never removes what is no model's folder."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{folder} is not empty: choose another folder, or replace it with --force")
    if not (folder / "config.json").exists() and not (folder / "demo.json").exists():
        raise FileExistsError(f"{folder} was not written by sadmoe, so --force does not replace it")
    shutil.rmtree(folder)


def _demo(arguments: argparse.Namespace) -> None:
    free(arguments.out, arguments.force)
    print(run_demo(arguments.out, seconds=arguments.seconds))


def _convert(arguments: argparse.Namespace) -> None:
    free(arguments.out, arguments.force)
    model, tokenizer = load_model(arguments.model)
    batches = _batches(arguments, tokenizer)
    if arguments.sparsify is not None:
        print(sparsify_(model, batches, SparsifyConfig(seconds=arguments.sparsify, seed=arguments.seed)))
    budget = None if arguments.tau is not None else arguments.budget
    config = ConvertConfig(
        expert_size=arguments.expert_size, budget=budget, tau=arguments.tau, seed=arguments.seed
    )
    print(convert_(model, batches, config))
    model.save_pretrained(arguments.out)  # type: ignore[operator]
    tokenizer.save_pretrained(arguments.out)
    print(
        f"\nsaved to {arguments.out}. Load it with\n\n    import sadmoe\n"
        f"    from transformers import {type(model).__name__}\n"
        f'    model = {type(model).__name__}.from_pretrained("{arguments.out}")'
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(arguments.model)
    converted_layers(model)
    batches = _batches(arguments, tokenizer)
    with tau(model, 0.0):
        dense, dense_seconds = _outputs(model, batches)
    rows = []
    for value in arguments.tau:
        with tau(model, value):
            outputs, seconds = _outputs(model, batches)
            report = cost(model, batches)
        error = (outputs - dense).norm() / dense.norm()
        rows.append(
            (
                f"{value:g}",
                f"{report.share:.1%}",
                f"{report.executed / report.dense:.1%}",
                f"{error:.4f}",
                f"{seconds * 1e3:.0f}",
                f"{dense_seconds / seconds:.2f}x",
            )
        )
    print(
        format_table(
            ("tau", "executed share", "FFN FLOPs of dense", "error", "ms", "faster than dense"), rows
        )
    )


def _batches(arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    texts = sorted(paragraphs(arguments.text), key=len)
    return tokenized(tokenizer, texts, batch_size=arguments.batch_size, max_length=arguments.max_length)


def _outputs(model: nn.Module, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, float]:
    """What the model says of every real token, [tokens, n], and the seconds of one pass (median of three)."""
    seconds = []
    with evaluating(model):
        for _ in range(3):
            started, found = time.perf_counter(), []
            for batch in batches:
                output = run(model, batch)
                found.append(output["logits"] if "logits" in output else output[0])
            seconds.append(time.perf_counter() - started)
    real = [
        y[batch["attention_mask"].bool()] if y.dim() == 3 else y
        for y, batch in zip(found, batches, strict=True)
    ]
    return torch.cat([y.float() for y in real]), median(seconds)
