"""Whether the weights of converted layers are their own, and all there."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sadmoe.ffn.dense import TENSORS
from sadmoe.layer import DynamicKMoE


def check_no_adapters(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a layer is inside an adapter, without which its weights are not those that run."""
    wrapped = {id(getattr(m, "base_layer", None)): type(m).__name__ for m in model.modules()}
    for name, layer in layers.items():
        if kind := wrapped.get(id(layer)):
            raise ValueError(
                f"{name} is inside a {kind}, which changes its weights at every call: merge the adapter "
                "first (peft: merge_and_unload), or take it off"
            )


def check_can_be_saved(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """The same, and where a layer is a copy beside another, as of peft's modules_to_save: of what is saved then no
    dense model could load it."""
    check_no_adapters(model, layers)
    found = set(map(id, layers.values()))
    for name, module in model.named_modules():
        of_module = getattr(module, "modules_to_save", None)
        if isinstance(of_module, nn.Module) and any(id(m) in found for m in of_module.modules()):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which holds copies of a converted layer: merge them first "
                "(peft: merge_and_unload)"
            )


def check_own_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where weights of a layer are not just its own: changed by an adapter around it, or sharded; or
    not there."""
    check_no_adapters(model, layers)
    for name, layer in layers.items():
        for key, p in layer.named_parameters():
            if p.is_meta:
                raise ValueError(
                    f"{name}.{key} has no values here (offloaded, or on the meta device): load the model whole first"
                )
            if type(p.data) is not Tensor:
                raise ValueError(
                    f"{name}.{key} is a {type(p.data).__name__}: gather the model's weights first"
                )


def check_parameters(layers: Mapping[str, DynamicKMoE]) -> None:
    """Raises ValueError where a weight of a layer is no parameter of it, but made of others at every access."""
    for name, layer in layers.items():
        _check_parameters(layer, TENSORS, name)
        check_router_parameters(layer, name)


def check_router_parameters(layer: DynamicKMoE, name: str) -> None:
    """The same of the router alone. name: of the layer."""
    _check_parameters(layer.router, ("v1", "v2"), f"{name}.router")


def _check_parameters(module: nn.Module, keys: Sequence[str], name: str) -> None:
    for key in keys:
        if key not in module._parameters:
            raise ValueError(
                f"{name}.{key} is made of other tensors at every access: make it a parameter first, by torch's "
                "prune.remove or remove_parametrizations; sharded weights, gather"
            )
