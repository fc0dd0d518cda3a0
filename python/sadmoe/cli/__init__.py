"""The command line: `sadmoe demo | survey | convert | evaluate | report | bench | info`, thin over the API."""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

from sadmoe import ops
from sadmoe.cli.bench import add_bench
from sadmoe.cli.convert import add_convert, is_begun
from sadmoe.cli.evaluate import add_evaluate, add_report
from sadmoe.cli.options import (
    add_common,
    add_data,
    add_model,
    data_of,
    let_go_of_stdout,
    loaded,
    positive_number,
    random_input,
)
from sadmoe.demo.recipe import SECONDS, run_demo
from sadmoe.modules import is_out_of_memory
from sadmoe.outputs import check_folder
from sadmoe.survey import survey

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
        return saved
    if getattr(arguments, "calibrate", False):
        return "the shapes that were measured are kept"
    checkpoint = getattr(arguments, "checkpoint", None)
    if checkpoint is not None and is_begun(checkpoint):
        return f"the same command goes on from the last save in {checkpoint}"
    return "nothing was saved"


class _Parser(argparse.ArgumentParser):
    """Without the usage before an error, whose dozen lines would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    add_evaluate(commands)
    add_report(commands)
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
