"""`sadmoe convert`: a transformers model of a local folder converted, with all that may be trained before and after."""

import argparse
import copy
import json
import shutil
import tempfile
import zlib
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from sadmoe.attention import ProjectionConfig, replace_projections_, scan_projections
from sadmoe.budget import BudgetReport, finetune_for_budget_
from sadmoe.calibrate import calibrate_
from sadmoe.checks import Filter
from sadmoe.cli.options import (
    add_common,
    add_data,
    add_model,
    check_data,
    data_of,
    device_named,
    loaded,
    positive,
    positive_number,
    say,
    seed,
    sizes_of,
)
from sadmoe.compensation import compensate_
from sadmoe.convert import ConvertConfig, checked_sites, convert_
from sadmoe.cost import cost
from sadmoe.data import Data, images_in
from sadmoe.dial import converted_layers
from sadmoe.ffn import check_swappable, empty_mlp, moe_layers, stand_in
from sadmoe.ffn.linears import shape_of
from sadmoe.files import replacing, told_of
from sadmoe.int8 import quantize_experts_
from sadmoe.mixed import fast_training
from sadmoe.outputs import check_folder, place_for, replaced
from sadmoe.paths import dtype_name
from sadmoe.reference import RECTIFIERS
from sadmoe.routers import WIDTH, RouterConfig
from sadmoe.sparsify import SparsifyConfig, sparsify_
from sadmoe.texts import around_transformer, processor_around
from sadmoe.training import Checkpoint

NOTE = "sadmoe-data.json"  # in --checkpoint: the data that its steps are made from
STEPS = ("projections", "sparsify", "convert", "finetune")  # each with a folder of its own in --checkpoint
BUDGET = 0.5  # where neither it nor tau is given
UNTRAINED = (
    "nothing was fine-tuned: a model with GELU loses quality below a budget of about 0.9, one with SiLU at any; "
    "`sadmoe evaluate` tells how much. --compensate 8 wins some of it back at once, --sparsify and --finetune more"
)
COMPENSATED = 64  # batches that shared experts are fitted to, at most
PROJECTION_ROUTER = 32  # width at most: an MLP of attention costs an eighth of an FFN


def add_convert(commands: Any) -> None:
    """Adds `sadmoe convert`."""
    command = commands.add_parser(
        "convert",
        help="convert a transformers model of a local folder",
        description="Converts every FFN of a model and saves the result, which transformers loads after "
        "`import sadmoe`. Without --sparsify and --finetune nothing is fine-tuned: a model with GELU then "
        "loses quality below a budget of about 0.9, one with SiLU at any.",
    )
    add_model(command, dense=True)
    add_data(command)
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument(
        "--budget",
        type=float,
        help=f"FLOPs of the FFNs, a share of dense, for which tau is solved (default, without --tau: {BUDGET})",
    )
    command.add_argument("--tau", type=float, help="the threshold itself, instead of a budget")
    command.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="convert only what has a name that fits one of these, such as '*language_model*' (sadmoe survey tells the "
        "names); training still moves all weights",
    )
    command.add_argument(
        "--expert-size", type=positive, default=32, help="neurons in an expert (default: %(default)s)"
    )
    command.add_argument(
        "--router-width",
        type=positive,
        default=WIDTH,
        help="hidden neurons of an FFN's router (default: %(default)s); narrow models want fewer",
    )
    command.add_argument(
        "--cluster",
        choices=["activity", "weights"],
        default="activity",
        help="neurons are put together by the tokens that they count for, or by the weights that they read with "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--target-power",
        type=positive_number,
        metavar="POWER",
        help="routers learn norms to the power of this, and tau compares those: 0.5 tells experts of few neurons apart "
        "better (default: 1; --finetune takes 0.5, and allows no other)",
    )
    command.add_argument(
        "--sparsify",
        type=positive_number,
        metavar="SECONDS",
        help="first swap the activation for ReLU and fine-tune that long by self-distillation",
    )
    command.add_argument(
        "--projections",
        type=positive,
        metavar="UPDATES",
        help="before that make MLPs of attention's projections, each trained for so many updates, to convert as well",
    )
    command.add_argument(
        "--finetune",
        type=positive_number,
        metavar="SECONDS",
        help="afterwards fine-tune that long to do with what --budget pays for, against the model of --model, without "
        "labels; best with --expert-size 8 to 32",
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="where the long steps save themselves: the same command goes on from there after a kill",
    )
    command.add_argument(
        "--compensate",
        type=positive,
        metavar="RANK",
        help="afterwards, where nothing is fine-tuned, have a small expert that always runs predict what skipped ones "
        "would have added: by so many numbers a token, such as 8; it fits the tau of --budget or --tau best",
    )
    command.add_argument(
        "--int8",
        action="store_true",
        help="round the experts' weights to int8, routers to 16 bits: a quarter of the bytes; faster with AVX-512, and "
        "with AVX2 for few tokens",
    )
    command.add_argument("--seed", type=seed, default=0, help="of all random choices (default: %(default)s)")
    add_common(command)
    command.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    _check(arguments)
    state = () if arguments.checkpoint is None else (arguments.checkpoint,)
    check_folder(arguments.out, arguments.force, reads=(arguments.model, arguments.data, *state))
    model = loaded(arguments, arguments.model)
    if moe_layers(model):
        raise ValueError(f"--model: that of {arguments.model} is converted already: give the dense model")
    dtype = next(model.parameters()).dtype
    if _trains(arguments) and dtype.itemsize == 2:
        say(
            f"the model is {dtype_name(dtype)}: trained and saved in float32; from_pretrained(dtype=...) rounds it"
        )
        model.float()
    data = data_of(arguments, model, whole=_trains(arguments))
    of_text = data.kind in ("text", "pairs")
    processor = processor_around(data.processor, arguments.model) if of_text else data.processor
    around = around_transformer(arguments.model)
    _check_saving(model, processor)
    _check_cuts(model, data, arguments)
    if arguments.checkpoint is not None:
        _note_or_check_data(arguments)
    dense = copy.deepcopy(model) if _compares_with_dense(arguments) else None
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # and what is tied to it, of which hidden states say nothing
            module.weight.requires_grad_(False)
    _prepare(model, dense, data, arguments)
    told: object
    if arguments.finetune:
        told = _convert_finetuned(model, dense, data, arguments)
    else:
        config = _conversion(arguments)
        told = convert_(model, data.batches, config, checkpoint=_checkpoint(arguments, "convert"))
    made_up_for = _compensated(model, data, arguments)
    rounded = quantize_experts_(model) if arguments.int8 else None
    out = place_for(arguments.out, arguments.force)
    with replaced(out) as new, told_of(out):
        model.save_pretrained(new)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(new)
        for part in around:  # of which the transformer knows nothing
            (new / part).parent.mkdir(parents=True, exist_ok=True)
            copy_to = shutil.copytree if (arguments.model / part).is_dir() else shutil.copyfile
            copy_to(arguments.model / part, new / part)
    arguments.saved = f"the model is saved in {out}"
    print(told)
    for more in (made_up_for, rounded):
        if more is not None:
            print(more)
    if out != arguments.out:
        print(
            f"\n{arguments.out} was filled by somebody else meanwhile, so the model is in a folder beside it"
        )
    print(
        f"\nsaved to {out}. Load it with\n\n    import sadmoe\n"
        f"    from transformers import {type(model).__name__}\n"
        f'    model = {type(model).__name__}.from_pretrained("{out}")'
    )
    if arguments.finetune:
        print(f"\n{cost(model, data.batches, progress=True)}")
    elif not arguments.sparsify and not arguments.compensate and _skips_dense_ones(model):
        print(f"\n{UNTRAINED}")


def _skips_dense_ones(model: nn.Module) -> bool:
    """Whether experts are skipped of an activation that is never 0."""
    layers = converted_layers(model).values()
    return any(layer.act not in RECTIFIERS and not layer.runs_all_experts for layer in layers)


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be before anything is loaded or trained."""
    _conversion(arguments)
    if arguments.finetune and arguments.tau is not None:
        raise ValueError("--finetune trains for a budget and solves tau for it: give --budget, not --tau")
    if arguments.finetune and arguments.target_power:
        raise ValueError(
            "--finetune trains the routers on roots of norms: leave --target-power out, or --finetune"
        )
    if arguments.compensate and (arguments.finetune or arguments.tau == 0):
        raise ValueError(
            "--compensate is for what skips experts and is not fine-tuned: leave it out, or give no --finetune, and "
            "--budget or a --tau above 0"
        )
    device_named(arguments.device)
    check_data(arguments)
    if arguments.checkpoint is not None and not (arguments.data.is_file() or arguments.data.is_dir()):
        raise ValueError(
            f"--checkpoint: what {arguments.data} gives is gone once it is read, and could not be told from other data "
            "later: give --data a file or a folder"
        )


def _conversion(arguments: argparse.Namespace) -> ConvertConfig:
    budget = BUDGET if arguments.budget is None and arguments.tau is None else arguments.budget
    router = RouterConfig(
        width=arguments.router_width, target_power=arguments.target_power, seed=arguments.seed
    )
    width = min(arguments.router_width, PROJECTION_ROUTER)
    return ConvertConfig(
        expert_size=arguments.expert_size,
        budget=budget,
        tau=arguments.tau,
        cluster=arguments.cluster,
        router=router,
        projection_router=replace(router, width=width) if arguments.projections else None,
        seed=arguments.seed,
        filter=_filter(arguments),
    )


def _filter(arguments: argparse.Namespace) -> Filter | None:
    """Of a name: whether --only takes it."""
    if arguments.only is None:
        return None
    return lambda name: any(fnmatchcase(name, pattern) for pattern in arguments.only)


def _trains(arguments: argparse.Namespace) -> bool:
    """Whether weights are trained, which 16 bits are too few for."""
    return bool(arguments.projections or arguments.sparsify or arguments.finetune)


def _compares_with_dense(arguments: argparse.Namespace) -> bool:
    """Whether a step compares with the dense model, of which the steps before it may have left little."""
    return bool(arguments.finetune or (arguments.projections and arguments.sparsify))


def _check_saving(model: nn.Module, processor: Any) -> None:
    """Raises ValueError where what goes beside the weights cannot be saved, before anything is trained."""
    parts: dict[str, Any] = {"config": model.config, "what makes its inputs": processor}
    if getattr(model, "can_generate", lambda: False)():
        parts["generation config"] = model.generation_config
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            try:
                if part is not None:
                    part.save_pretrained(folder)
            except Exception as error:  # whatever a library of the model's raises
                raise ValueError(
                    f"--model: the {name} of this {type(model).__name__} cannot be saved, so no converted model could "
                    f"be: {error}"
                ) from error


def _check_cuts(model: nn.Module, data: Data, arguments: argparse.Namespace) -> None:
    """Refuses what cannot be cut, or not for the budget, before anything is trained: projections as the MLPs that will
    be in their place."""
    trial = copy.deepcopy(model) if arguments.projections else model
    if arguments.projections:
        width_of = _projections(arguments).width_of
        for place in scan_projections(trial, _filter(arguments), batches=data.batches)[0]:
            width = width_of(*shape_of(place.linear))
            stand_in(trial, place.name, empty_mlp(place.linear, width), keep=False)
    sites = checked_sites(trial, data.batches, _conversion(arguments), rank=arguments.compensate or 0)
    if arguments.sparsify:
        check_swappable([site for site in sites if site.act not in RECTIFIERS], "relu")


def _projections(arguments: argparse.Namespace) -> ProjectionConfig:
    return ProjectionConfig(
        steps=arguments.projections,
        multiple=arguments.expert_size,
        seed=arguments.seed,
        filter=_filter(arguments),
    )


def _prepare(model: nn.Module, dense: nn.Module | None, data: Data, arguments: argparse.Namespace) -> None:
    """What is asked for before the conversion."""
    if arguments.projections:
        follow = _checkpoint(arguments, "projections")
        say(replace_projections_(model, data.batches, _projections(arguments), checkpoint=follow))
    if arguments.sparsify:
        sparsify = SparsifyConfig(seconds=arguments.sparsify, seed=arguments.seed)
        follow = _checkpoint(arguments, "sparsify")
        with fast_training(*(one for one in (model, dense) if one is not None)):
            say(
                sparsify_(
                    model, data.batches, sparsify, teacher=dense, filter=_filter(arguments), checkpoint=follow
                )
            )


def _compensated(model: nn.Module, data: Data, arguments: argparse.Namespace) -> str | None:
    """Does what --compensate asks for, and says what that was."""
    if not arguments.compensate:
        return None
    if all(layer.runs_all_experts for layer in converted_layers(model).values()):
        return "nothing was made up for: the budget pays for every expert"
    some = [data.batches[i] for i in range(0, len(data.batches), -(-len(data.batches) // COMPENSATED))]
    gone = compensate_(model, some, rank=arguments.compensate, seed=arguments.seed).values()
    told = (
        f"shared experts take {min(gone):.0%} to {max(gone):.0%} of the squared errors of layers away, "
        f"{median(gone):.0%} in the median"
    )
    budget = _conversion(arguments).budget
    if budget is None:
        return told
    found = calibrate_(model, data.batches, budget=budget, progress=True)  # which pays for them, too
    return (
        f"{told}. The table above is without them: with them tau is {found.tau:.4g}, and {found.share:.1%} of the "
        f"experts run, for {found.cost.layers_of_dense:.1%} of the FFNs' FLOPs"
    )


def _convert_finetuned(
    model: nn.Module, dense: nn.Module | None, data: Data, arguments: argparse.Namespace
) -> BudgetReport:
    """The conversion, and what --finetune asks for after it, which trains the routers."""
    assert dense is not None
    asked = _conversion(arguments)
    sparse = copy.deepcopy(model) if arguments.projections or arguments.sparsify else dense
    of_projections = asked.projection_router
    config = replace(
        asked,
        budget=None,
        tau=0.0,
        router=replace(asked.router, steps=1),
        projection_router=None if of_projections is None else replace(of_projections, steps=1),
    )
    convert_(model, data.batches, config, checkpoint=_checkpoint(arguments, "convert"))
    assert asked.budget is not None
    return finetune_for_budget_(
        model,
        data.batches,
        budget=asked.budget,
        seconds=arguments.finetune,
        dense=dense,
        sparse=sparse,
        seed=arguments.seed,
        checkpoint=_checkpoint(arguments, "finetune"),
    )


def _note_or_check_data(arguments: argparse.Namespace) -> None:
    """Notes in the folder which data its steps are made from. Raises ValueError where those that are there were made
    from others (the steps themselves check the rest), NotADirectoryError where it is a file."""
    if arguments.checkpoint.exists() and not arguments.checkpoint.is_dir():
        raise NotADirectoryError(f"--checkpoint: {arguments.checkpoint} is a file, and a folder is wanted")
    note = arguments.checkpoint / NOTE
    now = {name: str(size) for name, size in sizes_of(arguments).items()}
    now |= {"data": str(arguments.data.resolve()), "checksum": str(_checksum(arguments.data))}
    if not is_begun(arguments.checkpoint):
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as beside:  # a kill leaves no half of it
            beside.write_text(json.dumps(now))
        return
    saved = json.loads(note.read_text()) if note.exists() else {}
    moved = arguments.data.suffix != ".py"  # whose place matters, for what lies beside it
    if (saved | {"data": now["data"]} if moved else saved) != now:
        raise ValueError(
            f"--checkpoint: {arguments.checkpoint} is of another run, of {saved}, not {now}: give that data "
            "again, or an empty folder"
        )


def is_begun(checkpoint: Path) -> bool:
    """Whether a step has saved anything in that folder."""
    return any(any((checkpoint / step).rglob("*.safetensors")) for step in STEPS)


def _checksum(data: Path) -> int:
    """Of a file's bytes; of a folder, of the names and sizes of its images."""
    if not data.is_dir():
        return zlib.crc32(data.read_bytes())
    files = sorted((str(p.relative_to(data)), p.stat().st_size) for p in images_in(data))
    return zlib.crc32(json.dumps(files).encode())


def _checkpoint(arguments: argparse.Namespace, step: str) -> Checkpoint | None:
    return None if arguments.checkpoint is None else Checkpoint(arguments.checkpoint / step)
