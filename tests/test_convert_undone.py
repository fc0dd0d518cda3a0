"""What undoes a conversion: restore_, and every failure."""

from collections import OrderedDict
from itertools import count

import pytest
import sadmoe.convert.build as build
import sadmoe.convert.recipe as recipe
import torch
from conversions import Caller, convert, fingerprint, model_and_batches, raising, rows
from sadmoe.convert import restore_
from sadmoe.ffn import moe_layers
from sadmoe.undo import after_surgery, surgery
from tiny_models import TINY
from torch import nn


class Refusing(OrderedDict):
    """As the outputs of transformers, and diffusers' configs."""

    def update(self, *args, **kwargs):
        raise TypeError("cannot be updated")


def test_a_failure_leaves_mappings_that_refuse_to_be_changed():
    model, batches = model_and_batches("bert")
    kept = model.kept = Refusing()
    kept["seen"] = 1
    before = fingerprint(model)
    with pytest.raises(ValueError, match="expert_size"):
        convert(model, batches, expert_size=7)

    def fails():
        with surgery(model):
            model.kept = None
            raise NotImplementedError("ConvertConfig")

    with pytest.raises(NotImplementedError, match="ConvertConfig"):
        fails()
    assert model.kept is kept
    assert dict(kept) == {"seen": 1}
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["bert", "llama", "phi3", "torch encoder", "user glu"])
def test_restoring_gives_the_dense_model_back_bit_for_bit(name):
    model, batches = model_and_batches(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds, flags = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    convert(model, batches, tau=0.3)
    restore_(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [type(m) for m in model.modules()] == kinds
    assert [m.training for m in model.modules()] == flags


def test_what_was_restored_converts_again_to_the_same():
    model, batches = model_and_batches()
    convert(model, batches)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    restore_(model)
    convert(model, batches)
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())


def test_an_order_of_neurons_that_is_lost_is_no_dense_model():
    model, batches = model_and_batches()
    convert(model, batches)
    (layer, *_) = moe_layers(model).values()
    with torch.no_grad():  # as of AveragedModel(use_buffers=True), which rounds down
        layer.permutation.copy_(0.9 * layer.permutation.float() + 0.1 * layer.permutation.float() - 1e-3)
    with pytest.raises(ValueError, match="permutation, the order of the layer's neurons, is none"):
        restore_(model)
    assert len(moe_layers(model)) == 2


def test_there_is_nothing_to_restore_in_a_dense_model():
    with pytest.raises(ValueError, match="nothing to restore: no FFN of this Sequential is converted"):
        restore_(TINY["user glu"].model())


STAGES = [
    ("check_batches", 0),
    ("find_ffns", 0),
    ("stream_inputs", 0),
    ("partition", 1),
    ("layer_from_dense", 1),
    ("fit_router_", 1),
    ("swap_in", 0),
    ("swap_in", 1),
    ("calibrate_", 0),
    ("_judge", 1),
]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("stage", "after"), STAGES)
def test_a_failure_anywhere_leaves_the_model_exactly_as_it_was(monkeypatch, stage, after, error):
    model, batches = model_and_batches("bert classifier")
    model.train()
    model.bert.pooler.eval()
    handle = model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda *a: None)
    before, config = fingerprint(model), model.config.to_dict()
    module = build if hasattr(build, stage) else recipe
    monkeypatch.setattr(module, stage, raising(error, after, getattr(module, stage)))
    with pytest.raises(error, match="injected"):
        convert(model, batches, budget=0.9)
    assert fingerprint(model) == before
    assert model.config.to_dict() == config
    handle.remove()
    assert not model.bert.encoder.layer[0].intermediate.dense._forward_hooks


@pytest.mark.parametrize("at", range(4))
def test_a_failure_inside_the_models_forward_leaves_it_exactly_as_it_was(at):
    model, batches = model_and_batches()
    calls = count()

    def hook(module, args):
        if next(calls) == at:
            raise KeyboardInterrupt

    model.train()
    handle = model[1].norm.register_forward_pre_hook(hook)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        convert(model, batches * 2, budget=0.9)
    assert fingerprint(model) == before
    handle.remove()


def test_a_failure_of_who_is_told_undoes_the_conversion_and_tells_again():
    model, batches = model_and_batches()
    told: list[int] = []

    def listener(model: nn.Module) -> None:
        told.append(len(moe_layers(model)))
        if len(told) == 1:
            raise RuntimeError("injected")

    after_surgery.append(listener)
    before = fingerprint(model)
    try:
        with pytest.raises(RuntimeError, match="injected"):
            convert(model, batches)
    finally:
        after_surgery.remove(listener)
    assert told == [2, 0]
    assert fingerprint(model) == before


def test_a_failed_restoration_leaves_the_converted_model(monkeypatch):
    model, batches = model_and_batches()
    convert(model, batches)
    before = fingerprint(model)
    monkeypatch.setattr(recipe, "swap_out", raising(RuntimeError, 1, recipe.swap_out))
    with pytest.raises(RuntimeError, match="injected"):
        restore_(model)
    assert fingerprint(model) == before


def test_surgery_that_succeeds_stays():
    model = nn.Sequential(nn.Linear(2, 2))
    with surgery(model):
        model[0] = nn.Identity()
    assert isinstance(model[0], nn.Identity)


def test_an_ffn_that_is_called_as_no_layer_can_be_leaves_the_model_as_it_was():
    model = Caller(lambda mlp, x: mlp(x, 2.0)).eval()
    before = fingerprint(model)
    with pytest.raises(NotImplementedError, match=r"does not run with MoE layers.*TypeError.*filter="):
        convert(model, [rows()])
    assert fingerprint(model) == before


def test_a_layer_alone_cannot_be_restored():
    model, batches = model_and_batches("user glu")
    convert(model, batches, tau=0.3)
    (layer, *_) = moe_layers(model).values()
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"this is the MoE layer itself.*: give the model that it is part of"
    ):
        restore_(layer)
    assert fingerprint(model) == before
