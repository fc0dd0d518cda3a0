"""The command line: `sadmoe demo | convert | evaluate | report | bench | info`, thin over the API."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sadmoe import ops
from sadmoe.bench_command import add_bench
from sadmoe.convert import ConvertConfig, convert_
from sadmoe.evaluate import evaluate, table
from sadmoe.int8 import quantize_experts_
from sadmoe.model_report import report_page
from sadmoe.options import add_common, add_text, batches_of
from sadmoe.outputs import check_files, check_folder, replaced
from sadmoe.report import write_page
from sadmoe.run_demo import SECONDS, run_demo
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.texts import load_model, paragraphs

BUDGET = 0.5  # of `sadmoe convert`
EPILOG = """\
examples:
  sadmoe demo                                          convert a real text encoder, see what it costs and keeps
  sadmoe convert ./my-bert ./my-moe --text corpus.txt  convert a transformers model of a local folder
  sadmoe evaluate ./my-moe --text held_out.txt         cost, time and fidelity at several tau
  sadmoe report ./my-moe --text held_out.txt           the same and more, as one HTML page
  sadmoe bench ./my-moe --tau 0.1 0.3                  its layers and all of it, timed beside dense
  sadmoe bench ./my-moe --calibrate                    measure where its layers are better off dense on this machine
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
    _add_report(commands)
    add_bench(commands)
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
    add_common(command)
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
        help=f"FLOPs of the FFNs, a share of dense, for which tau is solved (default, without --tau: {BUDGET})",
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
    command.add_argument(
        "--int8", action="store_true", help="round the experts' weights to int8, which decodes faster on CPUs"
    )
    command.add_argument("--seed", type=int, default=0)
    add_text(command)
    add_common(command)
    command.set_defaults(command=_convert)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="cost, time and fidelity of a converted model at several tau",
        description="Runs a converted model over TEXT at several tau. error: of the last hidden states or logits, "
        "|y - y0| / |y0| with y0 those at tau = 0, padding left out.",
    )
    _add_sweep(command)
    command.set_defaults(command=_evaluate)


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="one HTML page about a converted model: curve, experts per token and layer, table",
        description="Runs a converted model over TEXT at several tau, and writes one self-contained HTML file, with "
        "the numbers in a JSON file beside it: the curve of error against cost and time, a heat map of the experts "
        "that each token of a sentence runs in each layer, a histogram for each layer, and `sadmoe evaluate`'s table.",
    )
    command.add_argument(
        "--out", type=Path, default=Path("sadmoe-report.html"), help="file to write (default: %(default)s)"
    )
    command.add_argument("--sentence", help="of the heat map (default: the first paragraph of TEXT)")
    _add_sweep(command)
    command.set_defaults(command=_report)


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, help="folder that `sadmoe convert` or save_pretrained wrote")
    command.add_argument("--text", type=Path, required=True)
    command.add_argument(
        "--tau",
        type=float,
        nargs="+",
        default=[0.0, 0.01, 0.03, 0.1, 0.3, 1.0],
        help="(default: %(default)s)",
    )
    add_text(command)
    add_common(command)


def _demo(arguments: argparse.Namespace) -> None:
    check_folder(arguments.out, arguments.force)
    print(run_demo(arguments.out, seconds=arguments.seconds))


def _convert(arguments: argparse.Namespace) -> None:
    check_folder(arguments.out, arguments.force, reads=(arguments.model, arguments.text))
    budget = BUDGET if arguments.budget is None and arguments.tau is None else arguments.budget
    config = ConvertConfig(
        expert_size=arguments.expert_size, budget=budget, tau=arguments.tau, seed=arguments.seed
    )
    model, tokenizer = load_model(arguments.model)
    batches = batches_of(arguments, tokenizer)
    if arguments.sparsify is not None:
        print(sparsify_(model, batches, SparsifyConfig(seconds=arguments.sparsify, seed=arguments.seed)))
    print(convert_(model, batches, config))
    if arguments.int8:
        print(quantize_experts_(model))
    with replaced(arguments.out):
        model.save_pretrained(arguments.out)  # type: ignore[operator]
        tokenizer.save_pretrained(arguments.out)
    print(
        f"\nsaved to {arguments.out}. Load it with\n\n    import sadmoe\n"
        f"    from transformers import {type(model).__name__}\n"
        f'    model = {type(model).__name__}.from_pretrained("{arguments.out}")'
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(arguments.model)
    print(table(evaluate(model, batches_of(arguments, tokenizer), arguments.tau)))


def _report(arguments: argparse.Namespace) -> None:
    page, numbers = arguments.out, arguments.out.with_suffix(".json")
    if page == numbers:
        raise ValueError(f"--out names the page, and {numbers} is where its numbers go: give a name in .html")
    check_files((page, numbers), arguments.force)
    model, tokenizer = load_model(arguments.model)
    batches = batches_of(arguments, tokenizer)
    points = evaluate(model, batches, sorted(arguments.tau), progress=True)
    print(table(points))
    sentence = arguments.sentence or paragraphs(arguments.text)[0]
    write_page(page, report_page(model, tokenizer, points, batches, sentence))
    numbers.write_text(json.dumps([asdict(point) for point in points], indent=1))
    print(f"\n{page}, and the numbers in {numbers}")
