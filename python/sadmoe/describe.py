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
from sadmoe.layer import DynamicKMoE, SharedExpert
from sadmoe.randomness import random_numbers_kept

RULES: dict[str, type] = {"dynamic_k": DynamicK, "top_k": TopK}
KEYS = {
    "experts",
    "expert_size",
    "router_width",
    "target_power",
    "shared",
    "int8",
    "rounded_router",
    "gate",
    "ffn",
}


def describe(layer: DynamicKMoE) -> dict[str, Any]:
    """A converted layer as what json can write: how it is cut, its gate, and the FFN it replaced."""
    rule = next((rule for rule, kind in RULES.items() if type(layer.gate) is kind), None)
    if rule is None:
        raise NotImplementedError(
            f"a gate of type {type(layer.gate).__name__} cannot be saved; these can: {', '.join(RULES)}"
        )
    of_router, of_scales = layer.router.v1.dtype, None if layer.scale_up is None else layer.scale_up.dtype
    return {
        "experts": layer.experts,
        "expert_size": layer.expert_size,
        "router_width": layer.router.v1.shape[0],
        "target_power": layer.router.target_power,
        "shared": None if layer.shared is None else _describe_shared(layer.shared),
        "int8": layer.is_int8,
        "rounded_router": layer.is_int8 and of_router == torch.bfloat16 != of_scales,
        "gate": {"rule": rule, **asdict(layer.gate)},  # type: ignore[call-overload]
        "ffn": spec(site_of(layer)),
    }


def _describe_shared(shared: SharedExpert) -> dict[str, Any]:
    return {"width": shared.width, "scales": shared.scales, "power": shared.power}


def describe_mlp(mlp: ProjectionMLP) -> dict[str, Any]:
    """An MLP in the place of a projection, not converted, as what json can write."""
    if mlp.act_name is None:
        raise NotImplementedError(
            f"an MLP in the place of a projection cannot be saved with an activation of type {type(mlp.act).__name__}; "
            "sadmoe.restore_ puts the projection back"
        )
    return {"projection": {"width": mlp.up.out_features, "act": mlp.act_name}}


def describe_all(model: nn.Module) -> dict[str, Any]:
    """Name -> description of everything in the model that a dense one does not have. Compiled parts have the names that
    they had before."""
    converted = {name: describe(layer) for name, layer in moe_layers(model).items()}
    return converted | {name: describe_mlp(mlp) for name, mlp in bare_mlps(model).items()}


def rebuild(
    model: nn.Module, name: str, description: Any, *, keep: bool = False, order: Tensor | None = None
) -> None:
    """Cuts the FFN `name` of a dense model as `describe` said, the router untrained. Or puts an untrained MLP where the
    projection `name` is, cut as well where `describe` said so.

    keep: hold on to that projection, for `restore_`.   order: the neuron of each slot, int64 [f]; None: as they come.
    Raises ValueError where the description is damaged or of another model.
    """
    if isinstance(description, Mapping) and set(description) == {"projection"}:
        return _rebuild_mlp(model, name, description["projection"], keep)
    if not isinstance(description, Mapping) or set(description) != KEYS:
        raise ValueError(f"{name}: its description must have {', '.join(sorted(KEYS))}")
    experts, size, width = (description[key] for key in ("experts", "expert_size", "router_width"))
    if not all(isinstance(n, int) and n > 0 for n in (experts, size, width)):
        raise ValueError(
            f"{name}: experts, expert_size and router_width must be positive, got {experts}, {size}, {width}"
        )
    power = description["target_power"]
    if not isinstance(power, int | float) or not 0 < power <= 2:
        raise ValueError(f"{name}: target_power must be in (0, 2], got {power!r}")
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
    layer.shared = _shared(name, description["shared"], layer)
    swap_in(model, site, layer)
    if description["int8"]:
        layer.to_int8_(rounded_router=bool(description["rounded_router"]))


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
        swap_activations_(model, sites, act, told=False)


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
    mlp.requires_grad_(next(linear.parameters()).requires_grad)
    stand_in(model, name, mlp, keep=keep)


def _shared(name: str, description: Any, layer: DynamicKMoE) -> SharedExpert | None:
    if description is None:
        return None
    try:
        width = description["width"]
        scales = tuple((float(tau), float(scale)) for tau, scale in description["scales"])
        power = float(
            description.get("power", layer.router.target_power)
        )  # which it was, where none was written
        ascending = scales[0] == (0, 0) and sorted(scales) == list(scales)
        if not (ascending and isinstance(width, int) and width > 0 and 0 < power <= 2):
            raise ValueError(
                "it must have a positive width, scales by ascending tau from (0, 0) on, and a power in (0, 2]"
            )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: unknown shared expert {description!r}: {error}") from error
    d, d_out, like = layer.w_up.shape[2], layer.w_down.shape[2], layer.w_up
    shared = SharedExpert(d, width, d_out, like.device, like.dtype, scales, power)
    return shared.requires_grad_(layer.trains("w_down"))


def _gate(name: str, description: Any) -> Gate:
    try:
        arguments = dict(description)
        return RULES[arguments.pop("rule")](**arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: unknown gate {description!r}: {error}") from error
