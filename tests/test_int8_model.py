"""Models whose experts are int8: smaller, saved and loaded, widened again, and what must refuse them."""

import copy
import itertools
from functools import partial

import pytest
import sadmoe
import torch
from converted import converted, random_layer, random_rows
from sadmoe import ops, reference
from sadmoe.gates import DynamicK
from sadmoe.measure_costs import calibrate_costs
from sadmoe.ops.compiled import OPS
from tiny_models import TINY

CLOSE = {"rtol": 1e-3, "atol": 3e-4}


@pytest.fixture
def model():
    model = converted("bert").eval()
    sadmoe.hf.describe_to_transformers(model)
    sadmoe.set_tau(model, 0.2)
    return model


def test_a_model_gets_smaller_and_stays_what_it_was(model):
    batch = TINY["bert"].batch()
    rounded_routers = copy.deepcopy(model)
    for layer in sadmoe.moe_layers(rounded_routers).values():
        layer.router.bfloat16()  # else a token that is all but at the threshold may run another expert
    with torch.no_grad():
        wanted = rounded_routers(**batch)[0]
        report = sadmoe.quantize_experts_(model)
        ours = model(**batch)[0]
    assert all(layer.router.v1.dtype == torch.bfloat16 for layer in sadmoe.moe_layers(model).values())
    floats = sadmoe.moe_layers(rounded_routers)
    weights = {
        name: [w for w in (old.w_up, old.w_gate, old.w_down) if w is not None] for name, old in floats.items()
    }
    assert report.bytes_before == sum(4 * w.numel() for each in weights.values() for w in each)
    assert report.bytes_after < 0.35 * report.bytes_before
    assert report.errors.keys() == floats.keys()
    for name, layer in sadmoe.moe_layers(model).items():
        old = floats[name]
        up = layer.w_up * layer.scale_up[..., None] - old.w_up
        down = layer.w_down * layer.scale_down[..., None] - old.w_down / layer.scale_out
        size = old.w_up.square().sum() + (old.w_down / layer.scale_out).square().sum()
        by_hand = ((up.square().sum() + down.square().sum()) / size).sqrt().item()
        assert report.errors[name] == pytest.approx(by_hand, rel=1e-3)
        assert 0 < by_hand < 0.02
    assert "MiB of experts" in str(report)
    assert 0 < (ours - wanted).norm() / wanted.norm() < 0.02
    with torch.no_grad():
        sadmoe.dequantize_experts_(model)
        torch.testing.assert_close(model(**batch)[0], ours, **CLOSE)


def saved_and_loaded(model, folder) -> tuple:
    """By sadmoe.save, and by save_pretrained into folder / "hub"."""
    sadmoe.save(model, folder / "one.safetensors")
    one = TINY["bert"].model().eval()
    sadmoe.load(one, folder / "one.safetensors")
    model.save_pretrained(folder / "hub")
    return one, type(model).from_pretrained(folder / "hub").eval()


def test_it_is_saved_and_loaded_bit_for_bit(model, tmp_path):
    batch = TINY["bert"].batch()
    sadmoe.quantize_experts_(model)
    with torch.no_grad():
        wanted = model(**batch)[0]
    for loaded in (*saved_and_loaded(model, tmp_path), copy.deepcopy(model)):
        layer = next(iter(sadmoe.moe_layers(loaded).values()))
        assert layer.w_up.dtype == torch.int8
        assert not layer.w_up.requires_grad
        assert layer.router.v1.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(loaded(**batch)[0], wanted)


def test_it_is_loaded_in_another_dtype(model, tmp_path):
    batch = TINY["bert"].batch()
    sadmoe.quantize_experts_(model)
    model.save_pretrained(tmp_path)
    low = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(low(**batch)[0], model.bfloat16()(**batch)[0])


def test_the_dense_model_comes_back_rounded(model):
    batch = TINY["bert"].batch()
    sadmoe.quantize_experts_(model)
    sadmoe.set_tau(model, 0.0)
    with torch.no_grad():
        wanted = model(**batch)[0]
        sadmoe.restore_(model)
        torch.testing.assert_close(model(**batch)[0], wanted, **CLOSE)


@pytest.mark.by_torch
def test_it_compiles_whole(model):
    batch = TINY["bert"].batch()
    sadmoe.quantize_experts_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0])


def test_widened_again_it_trains_as_before(model):
    layers = sadmoe.moe_layers(model)
    first, *_ = layers.values()
    first.w_down.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    sadmoe.quantize_experts_(model)
    assert not first.w_up.requires_grad
    sadmoe.dequantize_experts_(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    old = first.w_up.detach().clone()
    config = sadmoe.FinetuneConfig(steps=1, tau=None)
    sadmoe.finetune_(model, [TINY["bert"].batch()], config, teacher=TINY["bert"].model(), progress=False)
    assert not torch.equal(first.w_up, old)
    sadmoe.quantize_experts_(model)
    sadmoe.restore_(model)
    assert {
        p.requires_grad for name, p in model.named_parameters() if "intermediate.dense.weight" in name
    } == {True}


def test_layers_that_were_done_are_left_alone(model):
    first, *others = sadmoe.moe_layers(model).values()
    first.to_int8_()
    kept = first.w_up
    report = sadmoe.quantize_experts_(model)
    assert len(report.errors) == len(others)
    assert first.w_up is kept
    for undone, again in ((first.to_int8_, "int8 already"), (random_layer().to_float_, "not int8")):
        with pytest.raises(ValueError, match=again):
            undone()


def test_there_is_nothing_to_calibrate(model, tmp_path):
    sadmoe.quantize_experts_(model)
    with pytest.raises(ValueError, match="always run by the op"):
        calibrate_costs(model, tmp_path / "costs.json")


def test_at_tau_0_no_router_is_asked_nor_counted(model, monkeypatch):
    sadmoe.set_tau(model, 0.0)
    sadmoe.quantize_experts_(model)
    batch, widened = TINY["bert"].batch(), copy.deepcopy(model)
    report = sadmoe.cost(model, [batch])
    assert report.executed == report.dense
    sadmoe.dequantize_experts_(widened)
    with torch.no_grad():
        wanted = widened(**batch)[0]
        monkeypatch.delattr(ops, "router_scores")
        monkeypatch.delattr(ops, "dynamic_k_moe_int8")
        torch.testing.assert_close(model(**batch)[0], wanted, **CLOSE)


def test_what_cannot_be_says_so(model, tmp_path):
    batches = [TINY["bert"].batch()]
    with pytest.raises(ValueError, match=r"the experts of .* are not int8, see quantize_experts_"):
        sadmoe.dequantize_experts_(model)
    sadmoe.quantize_experts_(model)
    with pytest.raises(ValueError, match="are int8 already"):
        sadmoe.quantize_experts_(model)
    config = sadmoe.FinetuneConfig(steps=1)
    for train in (sadmoe.finetune_, sadmoe.finetune_layers_):
        with pytest.raises(ValueError, match="are int8 and cannot be trained: dequantize_experts_"):
            train(model, batches, config, teacher=TINY["bert"].model())
    with pytest.raises(ValueError, match="are int8 and cannot be trained: dequantize_experts_"):
        sadmoe.RouterLoss(model)
    with pytest.raises(ValueError, match="an adapter leaves the base's weights as they are"):
        sadmoe.save_adapter(model, tmp_path / "adapter.safetensors")


def test_a_router_that_was_cast_in_between_stays_so():
    layer = random_layer().bfloat16()
    layer.to_int8_()
    layer.float()
    layer.to_float_()
    assert layer.w_up.dtype == layer.router.v1.dtype == torch.float32
    layer.to_int8_()
    layer.bfloat16()
    layer.to_float_()
    assert layer.w_up.dtype == layer.router.v1.dtype == torch.bfloat16


@pytest.mark.by_torch
def test_autocast_to_float16_keeps_the_scales():
    layer, x = random_layer(gate=DynamicK(0.3)), random_rows(20)
    with torch.no_grad():
        layer.w_up *= 1e-6  # scales that float16 would make 0
        layer.b_up.zero_()
    layer.to_int8_()
    mask, weights = layer.mask(x), list(layer.int8_weights())
    halved = [w.half() if i in (4, 8) else w for i, w in enumerate(weights)]  # b_up and b_out
    for op in (ops.sparse_experts_int8, partial(OPS.sparse_experts_int8, act="relu")):
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            found = op(x * 1e3, mask, *weights)
        wanted = ops.sparse_experts_int8(x.half() * 1e3, mask, *halved)
        assert (wanted - layer.b_out.half()).abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("back", [False, True])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(back, monkeypatch):
    model = converted("llama")
    if back:
        sadmoe.quantize_experts_(model)
    before = {name: (p, p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())}
    calls = itertools.count()

    def fails(work):
        def run(*args, **kw):
            if next(calls) == 4:  # in the second layer
                raise MemoryError
            return work(*args, **kw)

        return run

    place = (reference, "dequantized") if back else (sadmoe.layer.experts, "to_int8")
    monkeypatch.setattr(*place, fails(getattr(*place)))
    with pytest.raises(MemoryError):
        (sadmoe.dequantize_experts_ if back else sadmoe.quantize_experts_)(model)
    after = {name: (p, p.dtype) for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert before.keys() == after.keys()
    assert all(after[name][0] is p and p.dtype == dtype for name, (p, dtype) in before.items())
    assert {layer.is_int8 for layer in sadmoe.moe_layers(model).values()} == {back}
