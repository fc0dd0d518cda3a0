"""What skipped experts would have added on average, in the output bias."""

import copy

import pytest
import sadmoe
import torch
from converted import converted
from sadmoe.dial import converted_layers, set_tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.inputs import Place, collect_inputs
from states import same, state
from tiny_models import TINY, call
from torch import nn


def gelu_bert(tau: float = 0.4) -> nn.Module:
    model = TINY["bert"].model()
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()
    config = sadmoe.ConvertConfig(experts=6, router=sadmoe.RouterConfig(steps=50, width=8))
    sadmoe.convert_(model, batches(), config, progress=False)
    set_tau(model, tau)
    return model


def batches() -> list:
    generator = torch.Generator().manual_seed(1)
    shape = TINY["bert"].batch()["input_ids"].shape
    ids = (torch.randint(3, 50, shape, generator=generator) for _ in range(6))
    return [TINY["bert"].batch() | {"input_ids": one} for one in ids]


def entering(model: nn.Module, skip_padding: bool = True) -> dict[str, torch.Tensor]:
    """All tokens that enter each layer at the gates as they stand."""
    sites = [Place(name, layer) for name, layer in converted_layers(model).items()]
    return collect_inputs(model, sites, batches(), max_tokens=10_000, skip_padding=skip_padding)


@pytest.mark.parametrize("skip_padding", [True, False])
@pytest.mark.parametrize("gate", [DynamicK(0.4), DynamicK(0.4, true_norms=True), TopK(2)], ids=str)
def test_the_mean_of_what_is_missing_is_0_in_every_layer_afterwards(gate, skip_padding):
    model = gelu_bert()
    for layer in converted_layers(model).values():
        layer.gate = gate
    before = copy.deepcopy(model)
    taken = sadmoe.correct_bias_(model, batches(), skip_padding=skip_padding, progress=False)
    assert list(taken) == list(converted_layers(model))
    inputs = entering(model, skip_padding)
    for name, old in converted_layers(before).items():
        layer, x = model.get_submodule(name), inputs[name]
        with torch.no_grad():
            wrong, now = (old.dense(x) - one(x) for one in (old, layer))
        torch.testing.assert_close(now.mean(0), torch.zeros(now.shape[1]), atol=2e-6, rtol=0)
        share = wrong.mean(0).square().sum() / wrong.square().sum(1).mean()
        assert taken[name] == pytest.approx(share.item(), rel=1e-3)
        assert 0 < taken[name] < 1
        others = (key for key in old.state_dict() if key != "b_out")
        assert all(
            torch.equal(old.get_parameter(k), layer.get_parameter(k)) for k in others if "perm" not in k
        )


def test_the_model_is_nearer_to_the_dense_one():
    model, batch = gelu_bert(0.5), batches()[0]
    with torch.no_grad(), sadmoe.tau(model, 0.0):
        wanted = call(model, batch)
    with torch.no_grad():
        before = (call(model, batch) - wanted).norm()
    sadmoe.correct_bias_(model, batches()[1:], progress=False)
    with torch.no_grad():
        assert (call(model, batch) - wanted).norm() < 0.95 * before


def test_it_is_saved_and_stays_in_the_restored_model(tmp_path):
    model = gelu_bert()
    sadmoe.correct_bias_(model, batches(), progress=False)
    bias = {name: layer.b_out.clone() for name, layer in converted_layers(model).items()}
    sadmoe.save(model, tmp_path / "model.safetensors")
    again = TINY["bert"].model()
    sadmoe.load(again, tmp_path / "model.safetensors")
    assert all(torch.equal(again.get_submodule(name).b_out, b) for name, b in bias.items())
    sadmoe.restore_(model)
    for block, b in zip(model.encoder.layer, bias.values(), strict=True):
        assert torch.equal(block.output.dense.bias, b)


@pytest.mark.parametrize(
    "change", [sadmoe.quantize_experts_, lambda model: model.train()], ids=["int8", "dropout"]
)
def test_experts_in_int8_and_models_in_training_are_corrected_too(change):
    model = gelu_bert()
    for layer in converted_layers(model).values():
        layer.dropout = nn.Dropout(0.5)
    change(model)
    before = copy.deepcopy(model.eval())
    sadmoe.correct_bias_(model, batches(), progress=False)
    inputs = entering(model)
    for name, old in converted_layers(before).items():
        with torch.no_grad():
            missing = (old.dense(inputs[name]) - model.get_submodule(name)(inputs[name])).mean(0)
        torch.testing.assert_close(missing, torch.zeros_like(missing), atol=2e-6, rtol=0)


def test_under_autocast_it_is_done_in_the_weights_own_type():
    model, inside = gelu_bert(), gelu_bert()
    sadmoe.correct_bias_(model, batches(), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        sadmoe.correct_bias_(inside, batches(), progress=False)
    for name, layer in converted_layers(model).items():
        torch.testing.assert_close(inside.get_submodule(name).b_out, layer.b_out, atol=1e-2, rtol=0)


def test_layers_that_run_all_experts_are_left_alone():
    model = gelu_bert()
    (_, layer), (second, _) = converted_layers(model).items()
    layer.gate, before = DynamicK(0.0), layer.b_out.clone()
    assert list(sadmoe.correct_bias_(model, batches(), progress=False)) == [second]
    assert torch.equal(layer.b_out, before)


def test_gradients_stay():
    model = gelu_bert()
    biases = [layer.b_out for layer in converted_layers(model).values()]
    for bias in biases:
        bias.grad = torch.ones_like(bias)
    sadmoe.correct_bias_(model, batches(), progress=False)
    assert all((bias.grad == 1).all() for bias in biases)


def test_batches_of_padding_alone_are_an_error():
    padding = [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches()]
    with pytest.raises(
        ValueError, match=r"encoder\.layer\.0.*: no token of these batches reaches it, padding left out"
    ):
        sadmoe.correct_bias_(gelu_bert(), padding, progress=False)


def test_layers_without_a_bias_are_left_as_they_are_and_told(caplog):
    model = gelu_bert()
    first, *_ = converted_layers(model).items()
    first[1].b_out = None
    assert first[0] not in sadmoe.correct_bias_(model, batches(), progress=False)
    assert f"not corrected, for they have no output bias: {first[0]}" in caplog.text
    for layer in converted_layers(model).values():
        layer.b_out = None
    with pytest.raises(NotImplementedError, match="no FFN of this BertModel has an output bias to correct"):
        sadmoe.correct_bias_(model, batches(), progress=False)


def test_what_fails_leaves_the_model_as_it_was():
    model = gelu_bert()
    with torch.no_grad():
        *_, (name, last) = converted_layers(model).items()
        last.w_down[0, 0, 0] = torch.inf
    before = state(model)
    with pytest.raises(ValueError, match=f"{name}: not every output is finite"):
        sadmoe.correct_bias_(model, batches(), progress=False)
    assert same(state(model), before)


def test_random_numbers_and_modes_stay():
    model = gelu_bert().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sadmoe.correct_bias_(
        model, torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=True), progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_where_every_expert_runs_there_is_nothing_to_correct():
    with pytest.raises(
        ValueError, match="every expert runs, so nothing is to be corrected: set_tau or calib"
    ):
        sadmoe.correct_bias_(converted("bert"), [TINY["bert"].batch()])
    with pytest.raises(ValueError, match="convert it first"):
        sadmoe.correct_bias_(TINY["bert"].model(), batches())
