"""Layers made of dense FFNs and back, their place in a model, and what files and configs say of it."""

from typing import Any

import pytest
import torch
from sadmoe import reference
from sadmoe.ffn import (
    DenseFFN,
    dense_from_layer,
    find_ffns,
    layer_from_dense,
    site_from_spec,
    site_of,
    spec,
    swap_in,
    swap_out,
)
from sadmoe.layer import DynamicKMoE
from sites import assert_close, assert_same_state, slots_of, state
from tiny_models import D, UserFFN
from torch import nn


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_layer_and_dense_are_inverse(act: str, gated: bool):
    g = torch.Generator().manual_seed(0)
    f, d, d_out = 30, 7, 5
    extra = {"w_gate": torch.randn(f, d, generator=g), "b_gate": torch.randn(f, generator=g)} if gated else {}
    dense = DenseFFN(
        act,
        w_up=torch.randn(f, d, generator=g),
        w_down=torch.randn(f, d_out, generator=g),
        b_out=torch.randn(d_out, generator=g),
        dropout=0.1,
        trainable=frozenset({"w_down"}),
        **extra,
    )
    layer = layer_from_dense(dense, torch.randperm(f, generator=g), 5, router_width=3)
    x = torch.randn(4, d, generator=g)
    assert_close(layer.eval()(x), dense(x))
    back = dense_from_layer(layer)
    for name in ("w_up", "w_down", "b_up", "w_gate", "b_gate", "b_out"):
        a, b = getattr(dense, name), getattr(back, name)
        assert (a is None and b is None) or torch.equal(a, b)
    assert (back.act, back.dropout, back.trainable) == (dense.act, dense.dropout, dense.trainable)
    assert torch.equal(layer.w_up.flatten(0, 1), dense.w_up[layer.permutation])


def test_dense_checks_its_shapes():
    w = torch.zeros(6, 4)
    with pytest.raises(
        ValueError, match=r"act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"
    ):
        DenseFFN("tanh", w, w)
    with pytest.raises(
        ValueError, match=r"w_up must be \[f, d\] and w_down \[f, d_out\], got \[6\] and \[6, 4\]"
    ):
        DenseFFN("relu", w[:, 0], w)
    with pytest.raises(ValueError, match=r"w_down must be \[6, 4\] beside w_up \[6, 4\], got \[5, 4\]"):
        DenseFFN("relu", w, w[1:])
    with pytest.raises(ValueError, match=r"b_up must be \[6\] beside w_up \[6, 4\], got \[4\]"):
        DenseFFN("relu", w, w, b_up=w[0])
    with pytest.raises(ValueError, match="b_gate needs w_gate, got b_gate alone"):
        DenseFFN("relu", w, w, b_gate=w[:, 0])


def test_layer_from_dense_checks_experts_and_slots():
    dense = DenseFFN("relu", torch.zeros(6, 4), torch.zeros(6, 4))
    with pytest.raises(
        ValueError, match=r"experts must divide the 6 neurons of the FFN, got 4; these do: 1, 2, 3, 6"
    ):
        layer_from_dense(dense, torch.arange(6), 4)
    with pytest.raises(ValueError, match=r"slots must be int64 \[6\], got torch.float32 \[6\]"):
        layer_from_dense(dense, torch.arange(6.0), 3)
    with pytest.raises(ValueError, match="slots must hold each of the neurons 0 to 5 once"):
        layer_from_dense(dense, torch.zeros(6, dtype=torch.int64), 3)


def test_swap_in_refuses_a_layer_of_another_shape_and_a_site_of_another_model():
    model = nn.Sequential(UserFFN(nn.ReLU()))
    before = state(model)
    (site,) = find_ffns(model)
    wrong = DynamicKMoE(D, 4, 15, "gelu", bias=("b_up",))
    with pytest.raises(ValueError, match=r"0: the layer does not fit: the FFN is relu .*the layer gelu"):
        swap_in(model, site, wrong)
    layer = layer_from_dense(site.dense(), slots_of(site), 4)
    with pytest.raises(ValueError, match=r"0: the site is not in this model, or was converted since"):
        swap_in(nn.Sequential(UserFFN(nn.ReLU())), site, layer)
    assert_same_state(before, state(model))
    swap_in(model, site, layer)
    with pytest.raises(ValueError, match="was converted since"):
        swap_in(model, site, layer)


def test_swap_out_knows_only_what_swap_in_put_there():
    model = nn.Sequential(DynamicKMoE(D, 4, 15, "relu"))
    with pytest.raises(ValueError, match=r"0: convert_ or load did not put it there"):
        swap_out(model, "0")
    with pytest.raises(ValueError, match=r"the layer: convert_ or load did not put it there"):
        site_of(model[0])
    with pytest.raises(ValueError, match=r"'x' is no MoE layer of this model; these are: 0"):
        swap_out(model, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "tanh"}, "act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"),
        ({"more": 1}, "spec must be a dict with act, activation, adapter, at, down"),
        ({"up": None}, "spec is damaged at up = None"),
        ({"removed": "expand"}, "spec is damaged at removed = 'expand'"),
        ({"gate_half": "third"}, "spec is damaged at gate_half = 'third'"),
        ({"adapter": 3}, "spec is damaged at adapter = 3"),
        ({"dropout": 2.0}, "spec is damaged at dropout = 2.0"),
        ({"at": "fc1"}, "the name must end with 'fc1'"),
        ({"up": "missing"}, "not in this Sequential, which is not the model saved"),
        ({"removed": ["missing"]}, "not in this Sequential, which is not the model saved"),
        ({"up": "drop"}, "up, drop, is no linear layer"),
        ({"gate": "contract"}, r"linear layers .* make no FFN"),
    ],
)
def test_a_damaged_or_foreign_spec_is_refused(change: dict[str, Any], message: str):
    model = nn.Sequential(UserFFN(nn.ReLU()))
    good = spec(find_ffns(model)[0])
    assert site_from_spec(model, "0", good).act == "relu"
    with pytest.raises(ValueError, match=message):
        site_from_spec(model, "0", good | change)
    with pytest.raises(ValueError, match="spec must be a dict"):
        site_from_spec(model, "0", [good])
