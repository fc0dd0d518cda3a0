"""Parts of a model converted one after the other."""

import pytest
import sadmoe.convert.build as build
import sadmoe.convert.recipe as recipe
import torch
from conversions import convert, fingerprint, model_and_batches, raising
from sadmoe.convert import restore_
from sadmoe.cost import cost
from sadmoe.ffn import moe_layers
from sadmoe.gates import TopK
from sadmoe.routers import RouterConfig
from sadmoe.saving import load, save
from tiny_models import TINY, call


def test_parts_are_converted_one_after_the_other_each_with_its_own_budget():
    whole, batches = model_and_batches()
    convert(whole, batches, expert_size=10)
    model, _ = model_and_batches()
    convert(model, batches, filter="0.inner".__eq__, budget=0.6)
    first = moe_layers(model)["0.inner"]
    gate, bits = first.gate, {key: value.clone() for key, value in first.state_dict().items()}
    report = convert(model, batches, expert_size=10, budget=0.9)
    second = moe_layers(model)["1.inner"]
    assert [row.name for row in report.layers] == ["1.inner"]
    assert moe_layers(model)["0.inner"] is first
    assert first.gate is gate
    assert all(torch.equal(value, bits[key]) for key, value in first.state_dict().items())
    executed = {row.name: row.executed / row.dense for row in cost(model, batches).layers}
    assert executed["0.inner"] <= 0.6
    assert 0.6 < executed["1.inner"] <= 0.9
    # what entered it was what the dense model computes, but for the order of sums
    alone = moe_layers(whole)["1.inner"]
    assert torch.equal(second.permutation, alone.permutation)
    torch.testing.assert_close(second.router.state_dict(), alone.router.state_dict(), rtol=0, atol=1e-3)
    before = TINY["user glu"].model().state_dict()
    restore_(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parts_that_differ_in_all_they_may_are_converted_saved_and_loaded(tmp_path):
    """The encoder in int8 under a static gate; then the decoder, other experts and routers, from batches of its own."""
    name, (model, batches) = "t5", model_and_batches("t5")
    encoder, decoder = TINY[name].names
    convert(model, batches, filter=encoder.__eq__, tau=0.3)
    moe_layers(model)[encoder].to_int8_()
    moe_layers(model)[encoder].gate = TopK(4)
    convert(
        model, batches, filter=decoder.__eq__, expert_size=10, router=RouterConfig(width=4, steps=5), tau=0.5
    )
    wanted = call(model, batches[0])
    assert moe_layers(model)[encoder].gate == TopK(4)
    save(model, tmp_path / "m.safetensors")
    again = TINY[name].model()
    load(again, tmp_path / "m.safetensors")
    assert torch.equal(call(again, batches[0]), wanted)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(call(type(model).from_pretrained(tmp_path / "m"), batches[0]), wanted)


@pytest.mark.parametrize("stage", ["stream_inputs", "fit_router_", "swap_in", "calibrate_", "_judge"])
def test_a_failure_in_a_later_part_leaves_those_before_as_they_were(monkeypatch, stage):
    model, batches = model_and_batches()
    convert(model, batches, filter="0.inner".__eq__, tau=0.3)
    before = fingerprint(model)
    module = build if hasattr(build, stage) else recipe
    monkeypatch.setattr(module, stage, raising(RuntimeError, 0, getattr(module, stage)))
    with pytest.raises(RuntimeError, match="injected"):
        convert(model, batches, budget=0.9)
    assert fingerprint(model) == before
