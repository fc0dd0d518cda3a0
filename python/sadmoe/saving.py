"""One safetensors file that holds a converted model: its weights, and in the metadata how it was converted.

The metadata key "sadmoe" is JSON:
  format   version of all this
  layers   name -> what `describe.describe` says of the layer there
  aliases  name -> the stored name it shares its tensor with (tied weights are stored once)
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe import files
from sadmoe.describe import describe_all, match_activations, rebuild
from sadmoe.ffn import moe_layers
from sadmoe.modules import innermost, plain_name, refuse_distributed, unwrapped
from sadmoe.undo import surgery
from sadmoe.weights import check_can_be_saved, check_parameters

FORMAT = 1
KEY = "sadmoe"


class SavedModelError(ValueError):
    """A file that is not what it should be, or not of this model. The model is as it was."""


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a converted model, of whatever class, into one safetensors file. Never pickles.

    Written beside `path` and then renamed, so that `path` is never half a file. It holds every parameter and
    buffer, routers and gates with their tau; not the model's class, for which `load` takes a dense model. Of what
    torch.compile returned, and of torch's DataParallel and DistributedDataParallel, the model inside is saved.
    Raises ValueError where nothing is converted, a layer is inside an adapter, or its weights are pruned or
    parametrized, FileExistsError where path is there and overwrite is False, FileNotFoundError where its folder is not.
    """
    path = Path(path)
    model = innermost(model)
    layers = describe_all(model)
    if not layers:
        raise ValueError(f"nothing to save: no FFN of this {type(model).__name__} is converted, see convert_")
    check_can_be_saved(model, moe_layers(model))  # no dense model could be loaded from it,
    check_parameters(moe_layers(model))  # nor from this
    files.check_new(path, overwrite)
    tensors, aliases = _stored(_everything(model))
    files.write(path, tensors, KEY, {"format": FORMAT, "layers": layers, "aliases": aliases})


@torch.inference_mode(False)  # whose tensors can never be trained
def load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Makes a freshly built dense model the converted one that `save` wrote: the same outputs, bit for bit.

    model: of the class and sizes of the one saved; its own weights do not matter and may be on the meta
    device. It gets the file's weights as new parameters of the file's dtypes, each on the device of the one
    it replaces (the CPU for meta).
    With the model as it was, raises ValueError where it is converted already, and SavedModelError where the file is
    damaged, foreign, newer than this sadmoe, or of another model.
    """
    path = Path(path)
    refuse_distributed(model)
    model = innermost(model)
    if converted := describe_all(model):
        raise ValueError(
            f"{len(converted)} FFNs of this model are converted already: load takes a dense model"
        )
    header, tensors = _read(path)
    with surgery(model):
        try:
            match_activations(model, header["layers"])
            for name, description in header["layers"].items():
                rebuild(model, name, description)
        except ValueError as error:
            raise SavedModelError(f"{path} does not fit this {type(model).__name__}: {error}") from error
        _check_same(model, tensors, path)
        _fill(model, tensors)


def read_saved(path: Path, key: str, version: int, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header that is under `key`, and the tensors, of a file of that kind and version."""
    if not path.is_file():
        hint = (
            ": it is a directory; was it written by save_pretrained? then from_pretrained reads it"
            if path.is_dir()
            else ""
        )
        raise FileNotFoundError(f"no file {path}{hint}")
    try:
        tensors, header = files.read(path, key)
        found = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise SavedModelError(f"{path} is no {kind}, or is damaged: {error}") from error
    if found != version:
        raise SavedModelError(f"{path} has format {found}, this sadmoe reads {version}: update sadmoe")
    return header, tensors


def _everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each; also buffers that state_dict leaves out.

    Those are constants that a class computes when built, which it cannot do on the meta device.
    """
    tensors: dict[str, Tensor] = {}
    for named in (model.named_parameters, model.named_buffers):
        tensors |= {plain_name(name): tensor for name, tensor in named(remove_duplicate=False)}
    held = {id(tensor) for tensor in tensors.values()}
    if others := [key for key, value in model.state_dict(keep_vars=True).items() if id(value) not in held]:
        raise NotImplementedError(
            f"{others[0]} is extra state of a module, neither a parameter nor a buffer (a quantised layer has such), "
            "which cannot be kept: dequantise the layer, or save the model with torch.save"
        )
    return tensors


def _stored(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to write, each tensor once and on the CPU, and the other names of those that have several."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    pieces: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save")
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        place = (*storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        overlapping = storage in pieces  # safetensors refuses two views of one storage
        pieces.add(storage)
        stored[name] = (
            tensor.cpu().clone(memory_format=torch.contiguous_format)
            if overlapping
            else tensor.cpu().contiguous()
        )
    return stored, aliases


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors under all their names, checked as far as that goes without a model."""
    header, tensors = read_saved(path, KEY, FORMAT, "file of sadmoe.save")
    layers, aliases = (header.get(name, ()) for name in ("layers", "aliases"))
    if not layers or not all(isinstance(part, dict) for part in (layers, aliases)):
        raise SavedModelError(f"{path} is damaged: its metadata is incomplete")
    if not tensors.keys() >= set(aliases.values()):
        raise SavedModelError(f"{path} is damaged: its list of tensors is not what it holds")
    return header, tensors | {name: tensors[stored] for name, stored in aliases.items()}


def _check_same(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises SavedModelError unless names and shapes are those of the model; of buffers that state_dict leaves out, a
    forward may have changed the shape (tables of positions), or made them."""
    wanted, lasting = _everything(model), {plain_name(name) for name in model.state_dict()}
    made = {
        plain_name(f"{name}.{key}".lstrip("."))
        for name, module in model.named_modules(remove_duplicate=False)
        for key in module._non_persistent_buffers_set
    }
    only = {"file": tensors.keys() - wanted.keys() - made, "model": wanted.keys() - tensors.keys() - made}
    problems = [f"{name} is in the {side} only" for side, names in only.items() for name in sorted(names)]
    problems += [
        f"{name} is {list(tensors[name].shape)} in the file, {list(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape and name in lasting
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise SavedModelError(f"{path} is of another model: {'; '.join(problems[:4])}{more}")


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives every parameter and buffer its value from the file; names that shared a tensor share it again. Buffers that
    a forward makes are left to it where only one side has them."""
    made: dict[tuple[int, torch.device, bool], Tensor] = {}
    for name, old in _everything(model).items():
        if name not in tensors:
            if old.is_meta:
                raise SavedModelError(
                    f"{name} is not in the file, and has no value in this model: build it with weights"
                )
            continue
        owner, _, key = name.rpartition(".")
        value = tensors[name]
        device = torch.device("cpu") if old.is_meta else old.device
        trainable = isinstance(old, nn.Parameter)
        new = made.get((id(value), device, trainable))
        if new is None:
            new = value.to(device)
            new = nn.Parameter(new, old.requires_grad) if trainable else new
            made[(id(value), device, trainable)] = new
        module = unwrapped(model.get_submodule(owner))
        table: dict[str, Any] = module._parameters if trainable else module._buffers
        table[key] = new
