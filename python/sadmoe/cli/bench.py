"""`sadmoe bench`: a converted model timed beside dense, and the measurements by which its layers choose."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sadmoe.bench import compare, table
from sadmoe.cli.options import (
    add_common,
    add_data,
    add_model,
    data_of,
    device_named,
    loaded,
    not_negative,
    random_input,
    zero_to_one,
)
from sadmoe.dial import converted_layers, set_batch_invariant
from sadmoe.ffn import moe_layers
from sadmoe.files import replacing
from sadmoe.measure_costs import TOKENS, calibrate_costs, costs_table, key_of
from sadmoe.measured import Costs, Key, cache_file, read
from sadmoe.outputs import check_files, files_for
from sadmoe.packed import pack_experts_
from sadmoe.paths import dtype_name, use_costs
from sadmoe.tables import to_json
from sadmoe.timing import machine


def add_bench(commands: Any) -> None:
    """The command and its arguments."""
    command = commands.add_parser(
        "bench",
        help="time a converted model and its layers beside dense; or measure where its layers are better off dense",
        description="Times every layer of MODEL on its own input, and the whole model, beside dense ones: all take "
        "turns, medians and the distance of the quartiles. With --calibrate instead measures, for each shape of layer, "
        "what the sparse op costs beside dense products at several numbers of tokens and executed shares, and keeps it "
        "in a file that later loads on this machine decide by. In float32 only layers with batch_invariant=False "
        "decide, and at tau = 0 those that are left as they are; in bfloat16 and float16 these always do.",
    )
    add_model(command)
    command.add_argument(
        "--tau",
        type=zero_to_one,
        nargs="*",
        default=[],
        help="further tau to time, beside the one that the model was saved with",
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype to run in (default: as the model was saved)",
    )
    command.add_argument(
        "--batch-invariant",
        choices=["yes", "no"],
        help="never take the dense path, or wherever it is faster (default: as layers do by themselves)",
    )
    command.add_argument(
        "--packed", action="store_true", help="with the experts as sadmoe.pack_experts_ lays them out"
    )
    command.add_argument(
        "--seconds",
        type=not_negative,
        default=0.6,
        help="for each variant of each row (default: %(default)s)",
    )
    command.add_argument("--json", type=Path, help="file to write the numbers to as well")
    command.add_argument("--calibrate", action="store_true", help="measure, and keep it for later loads")
    command.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="tokens of a call, to --calibrate at; other calls go by the nearest (default: "
        f"{' '.join(map(str, TOKENS))})",
    )
    command.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder of the measurements, read and written (default: sadmoe in your cache folder, where loads look)",
    )
    add_data(command, default="random tokens or images")
    add_common(command)
    command.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.calibrate:
        of_calls = {
            "--tau": arguments.tau,
            "--batch-invariant": arguments.batch_invariant,
            "--data": arguments.data,
            "--batch-size": arguments.batch_size,
            "--max-length": arguments.max_length,
            "--packed": arguments.packed,
            "--json": arguments.json,
        }
        if given := [flag for flag, value in of_calls.items() if value]:
            raise ValueError(
                f"--calibrate measures layers at shares of its own: leave out {', '.join(given)}"
            )
    elif arguments.tokens:
        raise ValueError(
            "--tokens are those to --calibrate at; other calls take --batch-size and --max-length"
        )
    device_named(arguments.device)
    if arguments.json:
        reads = [path for path in (arguments.model, arguments.data) if path is not None]
        check_files((arguments.json,), arguments.force, reads=reads)
    model = loaded(arguments, arguments.model)
    model = model.to(getattr(torch, arguments.dtype)) if arguments.dtype else model
    if arguments.calibrate:
        return _calibrate(arguments, model)
    if arguments.cache:
        if not cache_file(arguments.cache).exists():
            raise FileNotFoundError(
                f"--cache {arguments.cache}: no such file; with --calibrate, sadmoe bench measures and writes it"
            )
        _use(read(cache_file(arguments.cache)), model, arguments.cache)
    if arguments.batch_invariant:
        set_batch_invariant(model, arguments.batch_invariant == "yes")
    packed = pack_experts_(model) if arguments.packed else ()
    if arguments.packed and not packed:
        raise ValueError(
            "--packed: no layer gains by it: it takes AVX-512 without AMX, the CPU, and experts of a multiple "
            "of 32 neurons, up to 256, that are not int8"
        )
    if arguments.data:
        batch = data_of(arguments, model).batches[0]
    else:
        batch = random_input(arguments, model)
    rows = compare(model, batch, arguments.tau, arguments.seconds, progress=True)
    told = f", {len(packed)} of {len(moe_layers(model))} layers packed" if packed else ""
    told += "" if arguments.data else "; random input, which may run other shares of the experts than --data"
    print(
        f"{machine()}, {dtype_name(next(model.parameters()).dtype)}, {arguments.device}{told}\n\n{table(rows)}"
    )
    if not arguments.json:
        return
    numbers = {"machine": machine(), "packed": packed, "rows": [asdict(row) for row in rows]}
    (path,) = files_for((arguments.json,), arguments.force)
    with replacing(path) as beside:
        beside.write_text(to_json(numbers))
    if path != arguments.json:
        print(f"\n{arguments.json} was written by somebody else meanwhile, so the numbers are in {path}")


def _use(costs: dict[Key, Costs], model: nn.Module, cache: Path) -> None:
    """Layers choose by these. Raises ValueError where none is of a layer of the model that does."""
    layers = [layer for layer in converted_layers(model).values() if not layer.is_int8]
    if layers and not any(key_of(layer) in costs for layer in layers):
        raise ValueError(
            f"--cache {cache}: it has no measurement of this model's layers, dtype and device; measure them with "
            "--calibrate"
        )
    use_costs(costs.values())


def _calibrate(arguments: argparse.Namespace, model: Any) -> None:
    path = cache_file(arguments.cache)
    found = calibrate_costs(
        model,
        path,
        tokens=arguments.tokens or TOKENS,
        seconds=arguments.seconds,
        force=arguments.force,
        progress=True,
    )
    print(f"{machine()}, {arguments.device}. Cost: the sparse op over dense products, at an executed share.")
    for costs in found:
        layer = costs.layer
        shape = f"d {layer.d}, {layer.experts} experts of {layer.expert_size}{', GLU' if layer.gated else ''}"
        print(f"\n{shape}, {costs.dtype}\n{costs_table(costs)}")
    reader = (
        f"sadmoe bench --cache {arguments.cache} decides"
        if arguments.cache
        else "layers of these shapes decide"
    )
    told = ", in float32 where batch_invariant=False and at tau = 0" if _is_float32(found) else ""
    print(f"\nwrote {path}: {reader} by it on this machine{told}")


def _is_float32(costs: Sequence[Costs]) -> bool:
    return any(one.dtype == "float32" for one in costs)
