"""Putting a MoE layer where an FFN was, and the FFN back where the layer is."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.ffn.dense import TENSORS, DenseFFN, dense_from_layer
from sadmoe.ffn.linears import fill_, strip_
from sadmoe.ffn.lookup import lookup, put
from sadmoe.ffn.sites import NO_PARENT, FFNSite, Parts, block_path, output_dropout
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import WRAPPERS, check_model, plain_name, unwrapped

FAST_PATH = "activation_relu_or_gelu"  # of nn.TransformerEncoderLayer: 0 keeps it from reading linear1.weight
_KEY = "replaced"  # in the layer's __dict__: deepcopy takes it along, state_dict and modules() do not see it


@dataclass
class _Replaced:
    """What a layer took the place of: enough to put it back, without its weights.

    removed: what was at each path of the block.   training: mode of the FFN when it went.   nested: the
    original use_nested_tensor of the nn.TransformerEncoder around it, None where there is none.
    """

    site: FFNSite
    removed: dict[str, Any]
    training: bool
    nested: bool | None


def passthrough(x: Tensor) -> Tensor:
    """In the place of an activation function that the MoE layer has already applied."""
    return x


def take_apart(block: nn.Module, parts: Parts, layer: nn.Module) -> dict[str, Any]:
    """Puts `layer` at parts.at and passthroughs at parts.removed; returns what was there, for `put_back`."""
    removed = {path: lookup(block, path)[2] for path in (parts.at, *parts.removed)}
    for path, old in removed.items():
        if path == parts.at:
            new: Any = layer
        elif isinstance(old, nn.Module):
            new = nn.Identity().train(old.training)
        elif isinstance(old, int | float):
            new = type(old)(0)  # of FAST_PATH, or of a dropout that is called as a function
        else:
            new = passthrough
        put(block, path, new)
    return removed


def put_back(block: nn.Module, removed: dict[str, Any]) -> None:
    """Puts each module or attribute of `removed` at its path."""
    for path, old in removed.items():
        put(block, path, old)


def swap_in(model: nn.Module, site: FFNSite, layer: DynamicKMoE) -> None:
    """Puts `layer` where the FFN is; the FFN's own modules leave the model and give up their weights.

    They are kept beside the layer on the meta device, hooks and all, so that `swap_out` can put them back:
    also in a deep copy of the model. Everything is checked before anything is changed. Raises ValueError
    where the layer is not of the FFN's shape, or the site is not (or no longer) in the model.
    """
    _check_fits(site, layer)
    block = _block_of(model, site)
    encoder = _encoder_around(model, block)
    nested = (
        None
        if encoder is None
        else next((r.nested for r in _converted_in(encoder)), encoder.use_nested_tensor)
    )
    training = site.up.training
    if site.parts.at == "":
        removed: dict[str, Any] = {"": block}
        _replace_everywhere(model, block, layer)
    else:
        removed = take_apart(block, site.parts, layer)
    if encoder is not None:
        encoder.use_nested_tensor = False
    for linear in set(site.linears.values()):
        strip_(linear)
    layer.train(training)
    layer.__dict__[_KEY] = _Replaced(site, removed, training, nested)


def swap_out(model: nn.Module, name: str) -> set[nn.Module]:
    """Puts the FFN's own modules back where the layer `name` is, with the layer's weights in dense order.

    Bit for bit what `swap_in` took, if the layer was not trained or cast since; else as trained or cast.
    dtype, device, requires_grad and training mode are the layer's. Returns the linear layers that have weights again.
    """
    layer = moe_layers(model).get(name)
    if layer is None:
        raise ValueError(
            f"{name!r} is no MoE layer of this model; these are: {', '.join(moe_layers(model)) or 'none'}"
        )
    if not name:
        raise ValueError(
            "this is the MoE layer itself, and nothing here holds it: give the model that it is part of"
        )
    replaced = _replaced(layer, name)
    site, removed = replaced.site, replaced.removed
    _fill(site, dense_from_layer(layer))
    if layer.training != replaced.training:
        for old in removed.values():
            if isinstance(old, nn.Module):
                old.train(layer.training)
        replaced.training = layer.training  # so that, if this is undone, the next way back sets it again
    filled = set(site.linears.values())
    if site.parts.at == "":
        if layer.dropout is not None and (dropout := output_dropout(removed[""], site.parts)):
            dropout.p = layer.dropout.p
        _replace_everywhere(model, layer, removed[""])
        return filled
    block = unwrapped(model.get_submodule(block_path(name, site.parts)))
    encoder = _encoder_around(model, block)
    put_back(block, removed)
    if encoder is not None and replaced.nested is not None and not _converted_in(encoder):
        encoder.use_nested_tensor = replaced.nested
    return filled


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(model: nn.Module, site: FFNSite) -> list[str]:
    """Of the modules that leave the model with the FFN, and so no longer run, those that have hooks."""
    block = _block_of(model, site)
    at = (
        [lookup(block, path)[2] for path in (site.parts.at, *site.parts.removed)]
        if site.parts.at
        else [block]
    )
    return with_hooks(model, at)


def with_hooks(model: nn.Module, parts: Iterable[Any]) -> list[str]:
    """Of those modules and all inside them, by name in the model, the ones that have hooks."""
    inside = {id(m) for part in parts if isinstance(part, nn.Module) for m in part.modules()}
    return [
        name
        for name, m in model.named_modules()
        if id(m) in inside and any(getattr(m, table) for table in HOOKS)
    ]


def moe_layers(model: nn.Module) -> dict[str, DynamicKMoE]:
    """The converted layers of the model, by name, in its order. Parts that were compiled do not change the names.
    Raises TypeError where it is no module."""
    check_model(model)
    return {plain_name(name): m for name, m in model.named_modules() if isinstance(m, DynamicKMoE)}


def replaced_module(layer: nn.Module) -> Any:
    """The module whose place a MoE layer took whole; None where it took that of parts, or is none."""
    replaced = layer.__dict__.get(_KEY)
    return replaced.removed.get("") if isinstance(replaced, _Replaced) else None


def site_of(layer: DynamicKMoE, name: str | None = None) -> FFNSite:
    """The site that `swap_in` put the layer at; its `spec` is what a checkpoint needs. Else ValueError.

    name: of the layer in a model that has the one converted as a part, whose paths the site then has.
    """
    site = _replaced(layer, "the layer" if name is None else name).site
    return site if name is None else replace(site, block=block_path(name, site.parts))


def _replaced(layer: DynamicKMoE, name: str) -> _Replaced:
    if _KEY not in layer.__dict__:
        raise ValueError(
            f"{name}: convert_ or load did not put it there, so the dense module it replaces is not known"
        )
    return layer.__dict__[_KEY]


def _check_fits(site: FFNSite, layer: DynamicKMoE) -> None:
    dense, permutation = site.dense(), layer.permutation
    shapes: dict[str, list[int] | None] = {}
    for name in TENSORS:
        weight = getattr(layer, name)
        shapes[name] = (
            None if weight is None else list(weight.shape if name == "b_out" else weight.flatten(0, 1).shape)
        )
    expected = dict.fromkeys(TENSORS) | {name: list(t.shape) for name, t in dense.tensors.items()}
    if shapes != expected or layer.act != site.act or len(permutation) != dense.f:
        raise ValueError(
            f"{site.name}: the layer does not fit: the FFN is {site.act} {expected}, "
            f"the layer {layer.act} {shapes}"
        )


def _block_of(model: nn.Module, site: FFNSite) -> nn.Module:
    try:
        block = unwrapped(model.get_submodule(site.block))
        if (
            block.get_submodule(site.parts.up) is site.up
            and block.get_submodule(site.parts.down) is site.down
        ):
            if site.name == "":
                raise ValueError(NO_PARENT)
            return block
    except AttributeError:
        pass
    raise ValueError(
        f"{site.name}: the site is not in this model, or was converted since; find_ffns(model) again"
    )


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """A module that several parents share is replaced in all of them; if it was compiled, with its wrapper, which would
    go on to run what it was made of."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and name not in WRAPPERS and unwrapped(child) is old:
                parent._modules[name] = new


def _fill(site: FFNSite, dense: DenseFFN) -> None:
    def trainable(role: str) -> tuple[bool, bool]:
        return f"w_{role}" in dense.trainable, ("b_out" if role == "down" else f"b_{role}") in dense.trainable

    fill_(site.down, dense.w_down.t(), dense.b_out, trainable("down"))
    if site.parts.gate_half is None:
        fill_(site.up, dense.w_up, dense.b_up, trainable("up"))
        if site.gate is not None and dense.w_gate is not None:
            fill_(site.gate, dense.w_gate, dense.b_gate, trainable("gate"))
        return
    roles = ("gate", "up") if site.parts.gate_half == "first" else ("up", "gate")
    weights = [getattr(dense, f"w_{role}") for role in roles]
    biases = [getattr(dense, f"b_{role}") for role in roles]
    either = tuple(any(flags) for flags in zip(*map(trainable, roles), strict=True))
    fill_(
        site.up, torch.cat(weights), None if biases[0] is None else torch.cat(biases), (either[0], either[1])
    )


def _encoder_around(model: nn.Module, block: nn.Module) -> nn.TransformerEncoder | None:
    """The nn.TransformerEncoder whose layer the block is: its nested-tensor path reads linear1.weight."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            unwrapped(layer) is block for layer in module.layers
        ):
            return module
    return None


def _converted_in(encoder: nn.TransformerEncoder) -> list[_Replaced]:
    layers = [m for block in encoder.layers for m in block.children() if isinstance(m, DynamicKMoE)]
    return [m.__dict__[_KEY] for m in layers if _KEY in m.__dict__]
