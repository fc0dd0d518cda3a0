"""The command line: `sadmoe demo | survey | convert | evaluate | report | bench | info`, thin over the API."""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from sadmoe import ops
from sadmoe.cli.bench import add_bench
from sadmoe.cli.convert import add_convert, is_begun
from sadmoe.cli.options import (
    add_common,
    add_data,
    add_model,
    data_of,
    let_go_of_stdout,
    loaded,
    positive_number,
    random_input,
    zero_to_one,
)
from sadmoe.demo.recipe import SECONDS, run_demo
from sadmoe.dial import converted_layers, gates_of
from sadmoe.evaluate import evaluate, table
from sadmoe.ffn import moe_layers
from sadmoe.files import replacing
from sadmoe.gates import DynamicK
from sadmoe.model_report import heats_of, report_page
from sadmoe.modules import is_out_of_memory
from sadmoe.outputs import check_files, check_folder
from sadmoe.paths import dtype_name
from sadmoe.report import write_page
from sadmoe.survey import survey
from sadmoe.tables import to_json

EPILOG = """\
examples:
  sadmoe demo                                            convert a real text encoder, see what it costs and keeps
  sadmoe survey --model bert --data text.txt             what a conversion could save, before anything is changed
  sadmoe convert --model bert --data text.txt --out moe  convert a transformers model of a local folder
  sadmoe convert --model vit --data photos --out moe     the same, of images
  sadmoe evaluate --model moe --data held_out.txt --dense bert
                                                         cost, time and error at several tau
  sadmoe report --model moe --data held_out.txt          the same and more, as one HTML page
  sadmoe bench --model moe --tau 0.1 0.3                 its layers and all of it, timed beside dense
  sadmoe bench --model moe --calibrate                   measure where its layers are better off dense on this machine
"""


TAUS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # to evaluate at


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done, 2: a wrong argument or file, 130: interrupted, 141: nobody reads what it prints,
    and nothing else was to be done."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="sadmoe: %(message)s", level=logging.WARNING, handlers=[_once()])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # No result is lost for a letter that a terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    try:
        arguments.command(arguments)
        _flush()
    except KeyboardInterrupt:
        print(f"sadmoe: interrupted; {_what_is_kept(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        let_go_of_stdout()
        return 141
    except (
        ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError, SafetensorError,
        torch.OutOfMemoryError,
    ) as error:  # fmt: skip
        with suppress(OSError):  # it may be of what was printed, and would come again on the way out
            _flush()
        print(f"sadmoe: error: {error}{_what_was_saved(arguments)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            if saved := _what_was_saved(arguments):
                print(f"sadmoe: error{saved}", file=sys.stderr)
            raise
        advice = "out of memory; try less of --data, or smaller batches"
        print(f"sadmoe: error: {advice}: {error}{_what_was_saved(arguments)}", file=sys.stderr)
        return 2
    return 0


def _flush() -> None:
    """Raises what keeps the output from being written, such as a full disk, while it can be told."""
    try:
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
    except OSError:
        let_go_of_stdout()
        raise


def _once() -> logging.Handler:
    """Says what is logged, but nothing twice: several steps may look for FFNs, and find the same to warn of."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = (message := record.getMessage()) in told
        told.add(message)
        return not known

    handler = logging.StreamHandler()
    handler.addFilter(is_new)
    return handler


def _what_was_saved(arguments: argparse.Namespace) -> str:
    """After an error: what came to its end before it."""
    return f"; {_what_is_kept(arguments)}" if getattr(arguments, "saved", None) else ""


def _what_is_kept(arguments: argparse.Namespace) -> str:
    """After an interruption or an error."""
    if saved := getattr(arguments, "saved", None):
        return f"the model is saved in {saved}"
    if getattr(arguments, "calibrate", False):
        return "the shapes that were measured are kept"
    checkpoint = getattr(arguments, "checkpoint", None)
    if checkpoint is not None and is_begun(checkpoint):
        return f"the same command goes on from the last save in {checkpoint}"
    return "nothing was saved"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sadmoe",
        description="Turns a pretrained dense transformer into a dynamic-k Mixture-of-Experts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sadmoe {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_demo(commands)
    _add_survey(commands)
    add_convert(commands)
    _add_evaluate(commands)
    _add_report(commands)
    add_bench(commands)
    info = commands.add_parser("info", help="what was built and which kernels run here")
    info.set_defaults(command=lambda _: print(ops.build_info()))
    return parser


def _version() -> str:
    try:
        return version("sadmoe")
    except PackageNotFoundError:
        return "of a folder, not installed"


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="the whole method on a real model and real text, in about five minutes on two cores",
        description="Converts MiniLM-L6 (22.7 M parameters), trains it on paragraphs of Python's own "
        "documentation, prints fidelity, cost and time at several tau on held-out paragraphs, saves it, "
        "reloads it, and checks that both give the same bits. Needs: pip install '.[demo]' in sadmoe's folder. Uses no "
        "network.",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("sadmoe-demo"),
        help="folder for model, table and picture (default: %(default)s)",
    )
    command.add_argument(
        "--seconds", type=positive_number, default=SECONDS, help="of training (default: %(default)s)"
    )
    add_common(command)
    command.set_defaults(command=_demo)


def _add_survey(commands: Any) -> None:
    command = commands.add_parser(
        "survey",
        help="what a conversion could save of a dense model, before anything is changed",
        description="Runs a dense transformers model over DATA: its FFNs, their share of its FLOPs, how sparse their "
        "activations are, and what cannot be converted, with the reason. Nothing is changed.",
    )
    add_model(command, dense=True)
    add_data(command, default="random tokens or images, of which the activations mean little")
    add_common(command, writes=False)
    command.set_defaults(command=_survey)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="cost, time and error of a converted model at several tau",
        description="Runs a converted model over DATA at several tau. error: of the last hidden states or logits, "
        "|y - y0| / |y0|, padding left out; y0 are those of the dense model that --dense names, or, without it, the "
        "model's own at tau = 0, which do not show what training changed.",
    )
    _add_sweep(command)
    add_common(command, writes=False)
    command.set_defaults(command=_evaluate)


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="one HTML page about a converted model: curve, experts per token and layer, table",
        description="Runs a converted model over DATA at several tau, and writes one self-contained HTML file, with "
        "the numbers in a JSON file beside it: the curve of error against cost and time, a heat map of the experts "
        "that each token of a sentence, or patch of an image, runs in each layer, a histogram for each layer, and "
        "`sadmoe evaluate`'s table.",
    )
    command.add_argument(
        "--out", type=Path, default=Path("sadmoe-report.html"), help="file to write (default: %(default)s)"
    )
    command.add_argument("--sentence", help="of the heat map (default: what comes first in DATA)")
    _add_sweep(command)
    add_common(command)
    command.set_defaults(command=_report)


def _add_sweep(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "--dense",
        type=Path,
        metavar="FOLDER",
        help="the model that it was converted from, for errors and times beside it (default: those at tau = 0)",
    )
    add_data(command)
    command.add_argument(
        "--tau",
        type=zero_to_one,
        nargs="+",
        help=f"tau to run at (default: {' '.join(f'{tau:g}' for tau in TAUS)} and as it was saved)",
    )


def _demo(arguments: argparse.Namespace) -> None:
    check_folder(arguments.out, arguments.force)
    print(run_demo(arguments.out, seconds=arguments.seconds, force=arguments.force))


def _survey(arguments: argparse.Namespace) -> None:
    model = loaded(arguments, arguments.model)
    if arguments.data:
        print(survey(model, data_of(arguments, model).batches, progress=True))
    else:
        print(survey(model, [random_input(arguments, model)]))
        print("of random input: how sparse the activations are, --data tells")


def _evaluate(arguments: argparse.Namespace) -> None:
    model, dense = _models(arguments)
    batches = data_of(arguments, model).batches
    print(table(evaluate(model, batches, _taus(arguments, model), dense=dense, progress=True)))


def _report(arguments: argparse.Namespace) -> None:
    check_files((arguments.out,), arguments.force)
    page, numbers = arguments.out, arguments.out.with_suffix(".json")
    if page == numbers:
        raise ValueError(f"--out names the page, and {numbers} is where its numbers go: give a name in .html")
    reads = [path for path in (arguments.model, arguments.dense, arguments.data) if path is not None]
    check_files((page, numbers), arguments.force, reads=reads)
    model, dense = _models(arguments)
    data = data_of(arguments, model)
    if arguments.sentence is not None and data.kind != "text":
        raise ValueError(f"--sentence: this {type(model).__name__} is not run on text alone; leave it out")
    heats = heats_of(model, data, arguments.sentence)  # first, as the sentence may be none
    points = evaluate(model, data.batches, _taus(arguments, model), dense=dense, progress=True)
    made = report_page(model, data, points, heats)
    with replacing(numbers) as beside:
        beside.write_text(to_json([asdict(point) for point in points]))
    with replacing(page) as beside:
        write_page(beside, made)
    print(f"{table(points)}\n\n{page}, and the numbers in {numbers}")


def _taus(arguments: argparse.Namespace, model: nn.Module) -> list[float | None]:
    """Those of --tau, or TAUS and the one that the model was saved with; None stands for gates that are no one tau."""
    if arguments.tau is not None:
        return sorted(arguments.tau)
    gates = set(gates_of(converted_layers(model)).values())
    saved = {gate.tau for gate in gates if isinstance(gate, DynamicK)} if len(gates) == 1 else set()
    return [*sorted({*TAUS, *saved}), *([] if saved else [None])]


def _models(arguments: argparse.Namespace) -> tuple[nn.Module, nn.Module | None]:
    """Those of --model and --dense."""
    dense = None if arguments.dense is None else loaded(arguments, arguments.dense)
    if dense is not None and moe_layers(dense):
        raise ValueError(
            f"--dense: {arguments.dense} holds a converted model, and the one it was made from is wanted"
        )
    model = loaded(arguments, arguments.model)
    if dense is not None and (other := _other_than(model, dense)) is not None:
        raise ValueError(
            f"--dense: {arguments.dense} is not what {arguments.model} was converted from: {other}"
        )
    dtypes = {m: next(m.parameters()).dtype for m in (model, dense) if m is not None}
    if dense is not None and dtypes[dense] != dtypes[model]:  # convert trains in float32, and saves so
        print(
            f"the dense model is {dtype_name(dtypes[dense])}: run in {dtype_name(dtypes[model])}, as the other"
        )
        dense.to(dtypes[model])
    return model, dense


def _other_than(model: nn.Module, dense: nn.Module) -> str | None:
    """In what the dense model cannot be the one that `model` was converted from, None where nothing says so."""
    if type(model) is not type(dense):
        return f"that is a {type(dense).__name__}, this a {type(model).__name__}"
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in dense.state_dict().items():
        if name in own and own[name] != tuple(tensor.shape):
            return f"{name} is {list(tensor.shape)} in that one, {list(own[name])} in this"
    ours, theirs = (_blocks(one) for one in (model, dense))
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            return f"{name} has {theirs[name]} blocks in that one, {ours[name]} in this"
    return None


def _blocks(model: nn.Module) -> dict[str, int]:
    """How many blocks each list of them has."""
    return {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
