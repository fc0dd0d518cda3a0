"""What a conversion adds to a base checkpoint, in a file of its own: small, because the weights stay where they are.

Of an FFN it holds router, shared expert, permutation and gate with its tau; of a projection of attention, which the
base has as a linear layer, the whole MLP. The metadata key "sadmoe adapter" is JSON:
  format   version of all this
  layers   name -> what `describe.describe` says of the layer there
  base     name -> checksum of the dense weights it was made from, null where they are not known
  rest     name -> checksum of every other tensor of the model
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe import files
from sadmoe.describe import describe_all, rebuild
from sadmoe.ffn import (
    FFNSite,
    activation_at,
    bare_mlps,
    dense_from_layer,
    moe_layers,
    original_of,
    projection_mlps,
    scan_ffns,
    site_from_spec,
)
from sadmoe.ffn.dense import DenseFFN
from sadmoe.ffn.linears import bias_of, linear_shape, weight_rows
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import innermost, plain_name, refuse_distributed, unwrapped
from sadmoe.saving import SavedModelError, read_saved
from sadmoe.undo import surgery
from sadmoe.weights import check_own_weights, check_parameters

FORMAT = 1
KEY = "sadmoe adapter"
OF_A_LAYER = ("router.", "shared.", "permutation")


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes what the converted model has and its base has not into one safetensors file, for `load_adapter`.

    The base must be as it was converted: a model whose experts, or anything beside them, were trained since, or which
    was made sparse, is its own base and is saved whole (`save`, save_pretrained; of a
    sparse one, before `convert_`).
    Raises ValueError where nothing is converted, peft's adapters are in it or weights are pruned, FileExistsError where
    path is there and overwrite is False, FileNotFoundError where its folder is not.
    """
    path = Path(path)
    model = innermost(model)
    layers = describe_all(model)
    if not layers:
        raise ValueError(f"nothing to save: no FFN of this {type(model).__name__} is converted, see convert_")
    files.check_new(path, overwrite)
    if int8 := [name for name, layer in moe_layers(model).items() if layer.is_int8]:
        raise ValueError(
            f"{int8[0]} has its experts in int8, and an adapter leaves the base's weights as they are: save it before "
            "quantize_experts_, or the whole model"
        )
    if wrapped := [name for name, _ in model.named_modules() if name.endswith(".base_layer")]:
        raise ValueError(
            f"{wrapped[0].removesuffix('.base_layer')} is wrapped in an adapter, which its base has not: remove it, or "
            "merge it and save the whole model"
        )
    check_own_weights(model, {**moe_layers(model), **bare_mlps(model)})
    check_parameters(moe_layers(model))
    mlps = projection_mlps(model)
    tensors: dict[str, Tensor] = {}
    base: dict[str, int | None] = {}
    for name in layers:
        layer = unwrapped(model.get_submodule(name))
        own = layer.state_dict()
        if name in mlps:
            original = original_of(mlps[name])
            dtype = own[
                "w_up" if isinstance(layer, DynamicKMoE) else "up.weight"
            ].dtype  # cast since, as the base
            base[name] = None if original is None else _of_linear(original, dtype)
        else:
            assert isinstance(layer, DynamicKMoE)
            base[name] = _of_dense(dense_from_layer(layer))
            own = {key: value for key, value in own.items() if key.startswith(OF_A_LAYER)}
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    header = {"format": FORMAT, "layers": layers, "base": base, "rest": _rest(model, layers)}
    files.write(path, files.plain(tensors), KEY, header)


@torch.inference_mode(False)  # whose tensors can never be trained
def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Makes the base model the converted one that `save_adapter` was given: the same outputs, bit for bit.

    model: the dense base, its weights loaded. `restore_` gives it back, the projections of attention too.
    Raises SavedModelError, with the model as it was, where the file is damaged or foreign, or its base is another.
    """
    path = Path(path)
    refuse_distributed(model)
    model = innermost(model)
    if describe_all(model):
        raise ValueError("something in this model is converted already: load_adapter takes the dense base")
    header, tensors = _read(path)
    layers = header["layers"]
    _check_base(model, layers, header["base"], header["rest"], path)
    with surgery(model):
        for name, description in layers.items():
            own = {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            try:
                rebuild(model, name, description, keep=True, order=own.get("permutation"))
                layer = unwrapped(model.get_submodule(name))
                for key, tensor in own.items():
                    if key.startswith(("router.", "shared.")):  # of dtypes of their own
                        parameter = layer.get_parameter(key)
                        parameter.data = parameter.data.to(tensor.dtype)
                layer.load_state_dict(layer.state_dict() | own)
            except (ValueError, RuntimeError, AttributeError) as error:
                raise SavedModelError(f"{path} does not fit this {type(model).__name__}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, tensors = read_saved(path, KEY, FORMAT, "adapter that sadmoe wrote")
    layers, base, rest = (header.get(name, ()) for name in ("layers", "base", "rest"))
    if not all(isinstance(part, dict) for part in (layers, base, rest)) or layers.keys() != base.keys():
        raise SavedModelError(f"{path} is damaged: it does not know all of its base")
    return header, tensors


def _rest(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Checksums of all that is not converted, by name."""
    converted = [unwrapped(model.get_submodule(name)) for name in layers]
    inside = tuple(  # one that is shared has several names
        f"{plain_name(name)}."
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is layer for layer in converted)
    )
    return {
        name: files.checksum({name: tensor})
        for name, tensor in _with_bits(model).items()
        if not name.startswith(inside)
    }


def _with_bits(model: nn.Module) -> dict[str, Tensor]:
    """What its state_dict has, but for what has no bits of its own."""
    return {plain_name(name): t for name, t in model.state_dict().items() if files.has_bits(t)}


def _check_base(
    model: nn.Module, layers: Mapping[str, Any], base: Mapping[str, Any], rest: Mapping[str, int], path: Path
) -> None:
    """Raises SavedModelError unless what the layers were made from, and all beside them, is in the model, bit for
    bit."""
    ffns = _ffns(model, layers)
    modules = {plain_name(name): module for name, module in model.named_modules()}
    wrong = []
    for name, description in layers.items():
        if _is_projection(description):
            linear = modules.get(name)
            if linear is None or linear_shape(linear) is None:
                wrong.append(f"{name} is no linear layer here")
            elif base[name] not in (None, _of_linear(linear)):
                wrong.append(f"{name} has other weights")
        elif isinstance(site := ffns[name], str):
            wrong.append(f"{name} is no FFN here ({site})")
        elif site.act != description["ffn"]["act"]:
            wrong.append(f"{name} has {site.act}, not {description['ffn']['act']}")
        elif _of_dense(site.dense()) != base[name]:
            wrong.append(f"{name} has other weights, or other dtypes")
    named, own = {plain_name(name) for name in model.state_dict()}, _with_bits(model)
    wrong += [f"{name} is not here" for name in rest if name not in named]
    beside = {name: crc for name, crc in rest.items() if name in own}
    wrong += [f"{n} has other values" for n, crc in beside.items() if files.checksum({n: own[n]}) != crc]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SavedModelError(
            f"{path} was made on another base: {'; '.join(wrong[:3])}{more}. Load the base that was converted, in the "
            "dtype it had; a model that was trained after its conversion is saved whole"
        )


def _ffns(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, FFNSite | str]:
    """Those that a probe finds, and those that it cannot run but are where the adapter says, with its activation; of
    the others why they are none."""
    found: dict[str, FFNSite | str] = {site.name: site for site in scan_ffns(model)[0]}
    for name in layers.keys() - found.keys():
        try:
            site = site_from_spec(model, name, layers[name]["ffn"])
        except (ValueError, KeyError, TypeError) as error:
            found[name] = str(error)
            continue
        act = activation_at(model, site)
        found[name] = replace(site, act=act or site.act)
    return found


def _is_projection(description: Mapping[str, Any]) -> bool:
    return "projection" in description or description.get("ffn", {}).get("adapter") == "projection"


def _of_dense(dense: DenseFFN) -> int:
    return files.checksum(dense.tensors)


def _of_linear(linear: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Checksum of its weights; in that dtype, where one is given."""
    tensors = {"weight": weight_rows(linear), "bias": bias_of(linear)}
    return files.checksum({name: t.to(dtype or t.dtype) for name, t in tensors.items() if t is not None})
