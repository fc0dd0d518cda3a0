"""FFNs converted and put back, what enters them, and all that must be as it was after it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sadmoe.ffn import (
    FFNSite,
    find_ffns,
    layer_from_dense,
    moe_layers,
    swap_in,
    swap_out,
)
from sadmoe.inputs import stream_inputs
from torch import Tensor, nn


def first_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The module of every FFN that its input enters, by the FFN's name."""
    return {site.name: site.first for site in find_ffns(model)}


def collected(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Any, **kw: Any
) -> dict[str, Tensor]:
    return dict(stream_inputs(model, modules, batches, **kw))


def slots_of(site: FFNSite) -> Tensor:
    return torch.randperm(site.dense().f, generator=torch.Generator().manual_seed(3))


def convert(model: nn.Module, experts: int = 4, **kw: Any) -> list[FFNSite]:
    """Every FFN becomes a layer of random experts at tau = 0, so it computes what the FFN did."""
    sites = find_ffns(model, **kw)
    layers = [layer_from_dense(site.dense(), slots_of(site), experts, router_width=8) for site in sites]
    for site, layer in zip(sites, layers, strict=True):
        swap_in(model, site, layer)
    return sites


def restore(model: nn.Module) -> nn.Module:
    for name in moe_layers(model):
        swap_out(model, name)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """All that has to survive: tensors, which of them train, modes, and which module object is where."""
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {name: (id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)},
    }


def assert_same_state(a: dict[str, Any], b: dict[str, Any], *, modules: bool = True) -> None:
    assert list(a["tensors"]) == list(b["tensors"])
    for name, t in a["tensors"].items():
        assert t.dtype == b["tensors"][name].dtype
        assert t.is_meta or torch.equal(t, b["tensors"][name]), name
    assert a["trainable"] == b["trainable"]
    assert not modules or a["modules"] == b["modules"]


def assert_close(y: Tensor, expected: Tensor) -> None:
    """float32 rounding: the order of the sums differs, over f <= 72 neurons and two layers."""
    assert (y - expected).abs().max() <= 3e-6 * expected.abs().max()


class Reasons(nn.Module):
    """A model around one module, for which find_ffns must give a reason."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


def reason(inner: nn.Module) -> str:
    """Why the FFN in `inner` is not converted; the model must be untouched by the attempt."""
    model = Reasons(inner)
    before = state(model)
    with pytest.raises(NotImplementedError) as error:
        find_ffns(model)
    assert_same_state(before, state(model))
    assert "inner" in str(error.value)
    assert type(inner).__name__ in str(error.value)
    return str(error.value)
