"""A converted model's layers as what JSON can write, and a dense model cut again as that says."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.ffn import (
    FFNSite,
    ProjectionMLP,
    activation_at,
    bare_mlps,
    empty_mlp,
    layer_from_dense,
    moe_layers,
    site_from_spec,
    site_of,
    spec,
    stand_in,
    swap_activations_,
    swap_in,
)
from sadmoe.ffn.linears import linear_shape
from sadmoe.gates import DynamicK, Gate, TopK
from sadmoe.layer import DynamicKMoE
from sadmoe.training.guards import random_numbers_kept

RULES: dict[str, type] = {"dynamic_k": DynamicK, "top_k": TopK}
# Keys of a layer in int8; files of older versions hold "int8" alone.
INT8 = {"int8", "column_scales", "rounded_router"}
POWER = "target_power"  # of a router, where it is not 1


def describe(layer: DynamicKMoE) -> dict[str, Any]:
    """A converted layer as what json can write: how it is cut, its gate, and the FFN it replaced."""
    rule = next((rule for rule, kind in RULES.items() if type(layer.gate) is kind), None)
    if rule is None:
        raise NotImplementedError(
            f"a gate of type {type(layer.gate).__name__} cannot be saved; these can: {', '.join(RULES)}"
        )
    return _describe_int8(layer) | {
        "experts": layer.experts,
        "expert_size": layer.expert_size,
        "router_width": layer.router.v1.shape[0],
        "gate": {"rule": rule, **asdict(layer.gate)},  # type: ignore[call-overload]
        "ffn": spec(site_of(layer)),
        **({} if layer.router.target_power == 1 else {POWER: layer.router.target_power}),
    }


def _describe_int8(layer: DynamicKMoE) -> dict[str, Any]:
    if layer.scale_up is None:
        return {}
    rounded = layer.router.v1.dtype == torch.bfloat16 and layer.scale_up.dtype != torch.bfloat16
    said = {"int8": True, "column_scales": layer.scale_out is not None, "rounded_router": rounded}
    return {key: True for key, holds in said.items() if holds}


def describe_mlp(mlp: ProjectionMLP) -> dict[str, Any]:
    """An MLP in the place of a projection, not converted, as what json can write."""
    return {"projection": {"width": mlp.up.out_features, "act": mlp.act_name}}


def describe_all(model: nn.Module) -> dict[str, Any]:
    """Name -> description of everything in the model that a dense one does not have. Compiled parts have the names that
    they had before."""
    converted = {name: describe(layer) for name, layer in moe_layers(model).items()}
    return converted | {name: describe_mlp(mlp) for name, mlp in bare_mlps(model).items()}


def rebuild(
    model: nn.Module, name: str, description: Any, *, keep: bool = False, order: Tensor | None = None
) -> None:
    """Cuts the FFN `name` of a dense model as `describe` said, the router untrained.

    order: the neuron of each slot, int64 [f]; None: as they come.

    Or puts an untrained MLP where the projection `name` is, cut as well where `describe` said so; keep: hold on to the
    projection, for `restore_`. Raises ValueError where the description is damaged or of another model.
    """
    if isinstance(description, Mapping) and set(description) == {"projection"}:
        return _rebuild_mlp(model, name, description["projection"], keep)
    keys = {"experts", "expert_size", "router_width", "gate", "ffn"}
    if not isinstance(description, Mapping) or set(description) - INT8 - {POWER} != keys:
        raise ValueError(f"{name}: its description must have {', '.join(sorted(keys))}")
    experts, size, width = (description[key] for key in ("experts", "expert_size", "router_width"))
    if not all(isinstance(n, int) and n > 0 for n in (experts, size, width)):
        raise ValueError(
            f"{name}: experts, expert_size and router_width must be positive, got {experts}, {size}, {width}"
        )
    power = description.get(POWER, 1.0)
    if not isinstance(power, int | float) or not 0 < power <= 2:
        raise ValueError(f"{name}: {POWER} must be in (0, 2], got {power!r}")
    ffn = description["ffn"]
    if isinstance(ffn, Mapping) and ffn.get("adapter") == "projection":
        _rebuild_mlp(model, name, {"width": experts * size, "act": ffn.get("act")}, keep)
    site = site_from_spec(model, name, ffn)
    dense = site.dense()
    if dense.f != experts * size:
        raise ValueError(f"{name}: has {dense.f} neurons in this model, {experts} x {size} in the one saved")
    order = torch.arange(dense.f, device=dense.w_up.device) if order is None else order
    with random_numbers_kept(dense.w_up):
        layer = layer_from_dense(dense, order, experts, width, _gate(name, description["gate"]))
    layer.router.target_power = float(power)
    swap_in(model, site, layer)
    if description.get("int8"):
        layer.to_int8_(**{key: bool(description.get(key)) for key in INT8 - {"int8"}})


def match_activations(model: nn.Module, descriptions: Mapping[str, Any]) -> None:
    """Gives a dense model the activations of the FFNs described, as `swap_activations_` does, so that `restore_` gives
    back what was converted: before `rebuild`. Raises ValueError where a description is of another model."""
    others: dict[str, list[FFNSite]] = {}
    for name, description in descriptions.items():
        ffn = description.get("ffn") if isinstance(description, Mapping) else None
        if not isinstance(ffn, Mapping) or ffn.get("adapter") == "projection":
            continue
        site = site_from_spec(model, name, dict(ffn))
        found = activation_at(model, site)
        if found not in (None, site.act):
            others.setdefault(site.act, []).append(replace(site, act=found))
    for act, sites in others.items():
        swap_activations_(model, sites, act)


def _rebuild_mlp(model: nn.Module, name: str, description: Any, keep: bool) -> None:
    try:
        linear = model.get_submodule(name)
        width, act = description["width"], description["act"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: is no projection of this {type(model).__name__}: {error}") from error
    if linear_shape(linear) is None or not (isinstance(width, int) and width > 0):
        raise ValueError(
            f"{name}: a projection is a linear layer and has a positive width, got a {type(linear).__name__}, {width}"
        )
    with random_numbers_kept(next(linear.parameters())):
        mlp = empty_mlp(linear, width, act)
    stand_in(model, name, mlp, keep=keep)


def _gate(name: str, description: Any) -> Gate:
    try:
        arguments = dict(description)
        return RULES[arguments.pop("rule")](**arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: unknown gate {description!r}: {error}") from error
