"""`sadmoe evaluate` and `sadmoe report`: a converted model run over data at several tau."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sadmoe.cli.options import add_common, add_data, add_model, data_of, loaded, zero_to_one
from sadmoe.dial import converted_layers, gates_of
from sadmoe.evaluate import evaluate, table
from sadmoe.ffn import moe_layers
from sadmoe.files import replacing
from sadmoe.gates import DynamicK
from sadmoe.model_report import heats_of, report_page
from sadmoe.outputs import check_files, files_for
from sadmoe.paths import dtype_name
from sadmoe.report import write_page
from sadmoe.tables import to_json

TAUS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # to evaluate at


def add_evaluate(commands: Any) -> None:
    """Adds `sadmoe evaluate`."""
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


def add_report(commands: Any) -> None:
    """Adds `sadmoe report`."""
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
    print(table(points))  # first, should nothing be writable any more
    page, numbers = files_for((page, numbers), arguments.force)
    with replacing(numbers) as beside:
        beside.write_text(to_json([asdict(point) for point in points]))
    with replacing(page) as beside:
        write_page(beside, made)
    arguments.saved = f"{page} and {numbers} are written"
    if page != arguments.out:
        print(
            f"\n{arguments.out} was written by somebody else meanwhile, so the report is in a file beside it"
        )
    print(f"\n{page}, and the numbers in {numbers}")


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
