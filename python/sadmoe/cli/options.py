"""Arguments that several commands of the command line share."""

import argparse
import math
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from sadmoe.batches import run, to_device
from sadmoe.data import Data, load_data
from sadmoe.modules import device_of, evaluating
from sadmoe.texts import load_model


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


def not_negative(text: str) -> float:
    """A number of at least 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return number


def positive_number(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


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
    command.add_argument(
        "--batch-size", type=positive, default=16, help="samples in a batch (default: %(default)s)"
    )
    command.add_argument(
        "--max-length",
        type=positive,
        default=128,
        help="tokens after which a text is cut (default: %(default)s)",
    )


def add_common(command: argparse.ArgumentParser, *, writes: bool = True) -> None:
    """What every command has."""
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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()}, numbered from 0")
    return device


def check_data(arguments: argparse.Namespace) -> None:
    """Raises FileNotFoundError where --data is not there."""
    data = getattr(arguments, "data", None)
    if data is not None and not data.exists():
        raise FileNotFoundError(f"--data: there is no file or folder {data}")


def loaded(arguments: argparse.Namespace, folder: Path) -> nn.Module:
    """The transformers model of that folder, on --device. What else the command reads is looked for first."""
    check_data(arguments)
    device = device_named(arguments.device)
    model = load_model(folder)
    try:
        return model.to(device)
    except RuntimeError as error:  # no memory there, or no such device here
        raise ValueError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error


def data_of(arguments: argparse.Namespace, model: nn.Module) -> Data:
    """What --data holds, for the model of --model, which batches of a Python file are tried on."""
    data = load_data(
        model,
        arguments.model,
        arguments.data,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    if data.kind == "python":
        try:
            with evaluating(model):
                run(model, to_device(data.batches[0], device_of(model)))
        except Exception as error:  # whatever a model raises
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"--data: this {type(model).__name__} does not run on the first of the batches of {arguments.data}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return data


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is of a lack of memory; torch's on the CPU has no class of its own."""
    allocator = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return allocator or isinstance(error, MemoryError | torch.OutOfMemoryError)


def say(text: object) -> None:
    """Prints what is told between steps, of which none is lost where nobody reads it any more."""
    with suppress(BrokenPipeError):
        print(text)
