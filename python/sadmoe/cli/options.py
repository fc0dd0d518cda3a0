"""Arguments that several commands of the command line share."""

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import run, to_device
from sadmoe.bench import random_batch
from sadmoe.data import Data, load_data, positions_of
from sadmoe.hf import check_registered
from sadmoe.modules import device_of, evaluating, is_out_of_memory
from sadmoe.texts import load_model

BATCH_SIZE = 16
MAX_LENGTH = 128


def _number(
    kind: type[int] | type[float], allowed: Callable[[float], bool], told: str
) -> Callable[[str], Any]:
    """For argparse: a number for which `allowed` holds, as the message tells."""

    def read(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not allowed(number):
            raise argparse.ArgumentTypeError(f"must be a {told}, got {text!r}")
        return number

    return read


positive = _number(int, lambda n: n > 0, "whole number above 0")
seed = _number(int, lambda n: 0 <= n < 2**63, "whole number from 0 to 2^63 - 1")  # what torch takes
not_negative = _number(float, lambda n: 0 <= n < math.inf, "number of at least 0")
positive_number = _number(float, lambda n: 0 < n < math.inf, "number above 0")
zero_to_one = _number(float, lambda n: 0 <= n <= 1, "number from 0 to 1")


def add_model(command: argparse.ArgumentParser, *, dense: bool = False) -> None:
    """Which converted model, or which dense one."""
    what = (
        "of a transformers model, and of its tokenizer or image processor"
        if dense
        else "that `sadmoe convert` or save_pretrained wrote"
    )
    command.add_argument("--model", type=Path, required=True, help=f"folder {what}")
    command.add_argument(
        "--device", default="cpu", help="where it runs: cpu, cuda, cuda:1, ... (default: %(default)s)"
    )


def add_data(command: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """What the model is run on, and in what batches. default: what that is where nothing is given."""
    command.add_argument(
        "--data",
        type=Path,
        required=default is None,
        help="what the model is for: a text, in paragraphs between blank lines, or lines if there are none; of an "
        "encoder-decoder lines of source, tab and target; of an image model a folder of images; of any model a Python "
        "file that sets `batches`" + (f" (default: {default})" if default else ""),
    )
    command.add_argument("--batch-size", type=positive, help=f"samples in a batch (default: {BATCH_SIZE})")
    command.add_argument(
        "--max-length", type=positive, help=f"tokens after which a text is cut (default: {MAX_LENGTH})"
    )


def add_common(command: argparse.ArgumentParser, *, writes: bool = True) -> None:
    """What every command has that runs a model."""
    command.add_argument(
        "--threads", type=positive, help="CPU threads for torch (default: torch's own choice)"
    )
    if writes:
        command.add_argument("--force", action="store_true", help="replace what a former run wrote")


def device_named(name: str) -> torch.device:
    """Raises ValueError where there is none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # of a device that torch lacks
            raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError(f"--device {name}: nothing is computed there: give cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()}, numbered from 0")
    return device


def check_data(arguments: argparse.Namespace) -> None:
    """Raises FileNotFoundError where --data is not there, ValueError where sizes are given that it does not take."""
    data = getattr(arguments, "data", None)
    if data is None:
        return
    if not data.exists():
        raise FileNotFoundError(f"--data: there is no file or folder {data}")
    if data.suffix == ".py" and (arguments.batch_size or arguments.max_length):
        flag = "--batch-size" if arguments.batch_size else "--max-length"
        raise ValueError(f"{flag}: the batches of {data} are as it makes them: leave it out")
    if data.is_dir() and arguments.max_length:
        raise ValueError(f"--max-length is of texts, and {data} is a folder, as of images: leave it out")


def loaded(arguments: argparse.Namespace, folder: Path) -> nn.Module:
    """The transformers model of that folder, on --device. What else the command reads is looked for first."""
    check_data(arguments)
    device = device_named(arguments.device)
    model = load_model(folder)
    check_registered()
    try:
        return model.to(device)
    except RuntimeError as error:  # no memory there
        raise ValueError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    """batch_size and max_length, those that were not given as they are by default."""
    return {
        "batch_size": arguments.batch_size or BATCH_SIZE,
        "max_length": arguments.max_length or MAX_LENGTH,
    }


def data_of(arguments: argparse.Namespace, model: nn.Module, *, whole: bool = False) -> Data:
    """What --data holds, for the model of --model, which is tried on the first and the last batch, of texts the longest
    ones, and of a Python file on all.   whole: images are read to their ends, before something long begins."""
    sizes = sizes_of(arguments)
    if arguments.max_length is None:
        sizes["max_length"] = min(sizes["max_length"], positions_of(model) or sizes["max_length"])
    data = load_data(model, arguments.model, arguments.data, **sizes, whole=whole)
    tried = sorted({0, len(data.batches) - 1})
    if data.kind == "python":
        tried = list(range(len(data.batches)))
    with evaluating(model):
        for i in tqdm(tried, "trying the batches", disable=len(tried) <= 2):
            _try(model, data.batches[i], f"batch {i} of {arguments.data}")
    return data


def random_input(arguments: argparse.Namespace, model: nn.Module) -> dict[str, Tensor]:
    """A batch for where no --data is given."""
    sizes = sizes_of(arguments)
    batch = random_batch(model, sizes["batch_size"], sizes["max_length"])
    if arguments.max_length and "input_ids" not in batch:
        raise ValueError(
            f"--max-length is of texts, and this {type(model).__name__} takes images: leave it out"
        )
    with evaluating(model):
        _try(model, batch, "random input: give it some that it takes")
    return batch


def _try(model: nn.Module, batch: Any, name: str) -> None:
    try:
        run(model, to_device(batch, device_of(model)))
    except Exception as error:  # whatever a model raises
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"--data: this {type(model).__name__} does not run on {name}: {type(error).__name__}: {error}. A Python "
            "file as --data gives it whatever it is called with"
        ) from error


def say(text: object) -> None:
    """Prints what is told between steps, of which none is lost where nobody reads it any more, or a disk is full."""
    try:
        print(text, flush=True)  # or the next progress bar would, which takes no closed pipe
    except OSError as error:
        let_go_of_stdout()
        if not isinstance(error, BrokenPipeError):
            logging.getLogger(__name__).warning("what is printed from here on is lost: %s", error)


def let_go_of_stdout() -> None:
    """What is printed, and was and could not be written, goes nowhere: Python would try again on the way out."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
