"""The shared expert that makes up for what experts that are skipped would have added."""

import copy

import pytest
import sadmoe
import torch
from converted import converted
from sadmoe.dial import converted_layers, set_tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.layer import SharedExpert
from sites import collected
from states import same, state
from tiny_models import TINY, call
from torch import nn

D = 24


def batches(family: str = "bert", count: int = 30) -> list:
    generator = torch.Generator().manual_seed(1)
    batch = TINY[family].batch()
    shape = batch["input_ids"].shape
    ids = (torch.randint(3, 50, shape, generator=generator) for _ in range(count))
    return [batch | {"input_ids": one} for one in ids]


def skipping(family: str = "bert", tau: float = 0.5) -> nn.Module:
    """A model of experts that are skipped though they matter."""
    model = TINY[family].model()
    for layer in model.encoder.layer if family == "bert" else ():
        layer.intermediate.intermediate_act_fn = nn.GELU()
    config = sadmoe.ConvertConfig(expert_size=10, router=sadmoe.RouterConfig(steps=50, width=8))
    sadmoe.convert_(model, batches(family, 6), config, progress=False)
    set_tau(model, tau)
    return model


def compensated(family: str = "bert", **kw) -> tuple[nn.Module, dict[str, float]]:
    model = skipping(family)
    return model, sadmoe.compensate_(model, batches(family), progress=False, **{"rank": 4, **kw})


def entering(model: nn.Module, family: str = "bert") -> dict[str, torch.Tensor]:
    """Tokens that it was not fitted to, at the gates as they stand."""
    return collected(model, converted_layers(model), batches(family, 60)[30:], max_tokens=10_000)


def missing(layer: sadmoe.DynamicKMoE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return (layer.dense(x) - layer(x)).square().sum().item()


def without(layer: sadmoe.DynamicKMoE) -> sadmoe.DynamicKMoE:
    layer = copy.deepcopy(layer)
    layer.shared = None
    return layer


def test_less_is_missing_on_other_tokens_by_about_what_is_returned():
    model, gone = compensated()
    assert list(gone) == list(converted_layers(model))
    for name, x in entering(model).items():
        layer = model.get_submodule(name)
        left = missing(layer, x) / missing(without(layer), x)
        assert left < 0.9
        assert 1 - left == pytest.approx(gone[name], abs=0.15)


@pytest.mark.parametrize("gate", [DynamicK(0.5, true_norms=True), TopK(2)], ids=str)
def test_by_any_gate(gate):
    model = skipping()
    for layer in converted_layers(model).values():
        layer.gate = gate
    sadmoe.compensate_(model, batches(), rank=4, progress=False)
    for name, x in entering(model).items():
        layer = model.get_submodule(name)
        assert missing(layer, x) < 0.9 * missing(without(layer), x)
        layer.gate = DynamicK(0.0)
        assert missing(layer, x) == 0.0


def test_a_rank_as_large_as_a_row_is_the_regression_by_least_squares():
    model, _ = compensated(rank=100)
    name, x = next(iter(entering(model).items()))
    layer = model.get_submodule(name)
    assert layer.shared.width == 2 * D
    with torch.no_grad():
        y = layer.dense(x) - without(layer)(x)
        ones = torch.ones(len(x), 1)
        best = (
            (y - torch.cat([x, ones], 1) @ torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution)
            .square()
            .sum()
        )
    assert best <= missing(layer, x) <= 1.1 * best


def test_a_larger_rank_leaves_no_more():
    layers = [next(iter(converted_layers(compensated(rank=rank)[0]).values())) for rank in (1, 4, 16)]
    x = next(iter(entering(skipping()).values()))
    left = [missing(layer, x) for layer in layers]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("family", ["bert", "llama"])  # llama: a GLU without biases
def test_at_tau_0_it_is_the_dense_model_and_restore_gives_that_back(family):
    dense, (model, _), batch = TINY[family].model(), compensated(family), batches(family)[0]
    plain = skipping(family)
    with torch.no_grad(), sadmoe.tau(model, 0.0), sadmoe.tau(plain, 0.0):
        assert torch.equal(call(model, batch), call(plain, batch))
    sadmoe.restore_(model)
    sadmoe.restore_(plain)
    assert same(state(model), state(plain))
    assert same(state(model), state(dense))


def test_a_smaller_tau_adds_as_much_as_is_missing_there():
    model, _ = compensated(rank=8)
    for name, x in entering(model).items():
        layer = model.get_submodule(name)
        scales = [layer.shared.scale(DynamicK(tau), 1.0) for tau in (0.0, 0.1, 0.2, 0.35, 0.5, 0.9)]
        assert scales[0] == 0.0
        assert scales[-2:] == [1.0, 1.0]
        assert 0 < scales[2] < 0.9
        for tau in (0.125, 0.2, 0.25, 0.375, 0.45):
            layer.gate = DynamicK(tau)
            assert missing(layer, x) < 1.02 * missing(without(layer), x), tau
        middle = layer.shared.scale(DynamicK(0.1875), 1.0)
        assert middle == pytest.approx(sum(layer.shared.scale(DynamicK(t), 1.0) for t in (0.125, 0.25)) / 2)


def test_once_more_replaces_it():
    model, first = compensated()
    before = state(model)
    assert sadmoe.compensate_(model, batches(), rank=4, progress=False) == first
    assert same(state(model), before)


def test_it_is_saved_by_every_way(tmp_path):
    model, batch = compensated()[0], batches()[0]
    with torch.no_grad():
        wanted = call(model, batch)
    sadmoe.save(model, tmp_path / "model.safetensors")
    sadmoe.save_adapter(model, tmp_path / "adapter.safetensors")
    again, adapted = TINY["bert"].model(), copy.deepcopy(model)
    sadmoe.load(again, tmp_path / "model.safetensors")
    sadmoe.restore_(adapted)
    sadmoe.load_adapter(adapted, tmp_path / "adapter.safetensors")
    for loaded in (again, adapted, copy.deepcopy(model)):
        for name, layer in converted_layers(model).items():
            assert loaded.get_submodule(name).shared.scales == layer.shared.scales
        with torch.no_grad():
            assert torch.equal(call(loaded, batch), wanted)


def test_transformers_loads_it(tmp_path):
    pytest.importorskip("transformers")
    model, batch = compensated()[0], batches()[0]
    with torch.no_grad():
        wanted = call(model, batch)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(call(type(model).from_pretrained(tmp_path).eval(), batch), wanted)


@pytest.mark.parametrize(
    "change", [sadmoe.quantize_experts_, lambda model: model.train()], ids=["int8", "dropout"]
)
def test_experts_in_int8_and_models_in_training_are_made_up_for_too(change):
    model = skipping()
    for layer in converted_layers(model).values():
        layer.dropout = nn.Dropout(0.5)
    change(model)
    sadmoe.compensate_(model, batches(), rank=4, progress=False)
    for name, x in entering(model.eval()).items():
        layer = model.get_submodule(name)
        assert missing(layer, x) < 0.9 * missing(without(layer), x)


def test_under_autocast_it_is_fitted_in_the_weights_own_type():
    model, inside = skipping(), skipping()
    sadmoe.compensate_(model, batches(), progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        sadmoe.compensate_(inside, batches(), progress=False)
    first, second = (next(iter(converted_layers(m).values())) for m in (model, inside))
    x = next(iter(entering(model).values()))
    assert missing(second, x) == pytest.approx(missing(first, x), rel=0.05)


def test_it_costs_what_it_computes():
    model, batch = compensated()[0], batches()[0]
    plain = skipping()
    first, second = (sadmoe.cost(m, shares=0.5).layers[0] for m in (plain, model))
    assert second.executed - first.executed == second.router - first.router == 8 * 2 * D + 2 * D
    with sadmoe.tau(model, 0.0):
        assert sadmoe.cost(model, [batch]).layers_of_dense == 1.0


def test_a_token_does_not_depend_on_its_neighbours():
    layer = next(iter(converted_layers(compensated()[0]).values()))
    x = torch.randn(70, D)
    with torch.no_grad():
        assert torch.equal(torch.cat([layer(x[:1]), layer(x[1:40]), layer(x[40:])]), layer(x))


@pytest.mark.by_torch
def test_it_is_compiled_and_exported():
    layer, x = next(iter(converted_layers(compensated()[0]).values())), torch.randn(20, D)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("T")},)).module()
        assert torch.equal(exported(x[:7]), layer(x[:7]))


def test_it_is_trained_with_the_experts():
    model = compensated()[0]
    before = state(model)
    config = sadmoe.FinetuneConfig(steps=2, tau=None)
    sadmoe.finetune_(model, batches(count=2), config, teacher=TINY["bert"].model(), progress=False)
    after = state(model)
    assert all(not torch.equal(after[key], value) for key, value in before.items() if ".shared.w" in key)


def test_layers_that_run_all_experts_get_none():
    model = skipping()
    (first, layer), (second, _) = converted_layers(model).items()
    layer.gate = DynamicK(0.0)
    assert list(sadmoe.compensate_(model, batches(), progress=False)) == [second]
    assert model.get_submodule(first).shared is None


def test_where_nothing_helps_there_is_none():
    model = skipping()
    for layer in converted_layers(model).values():
        with torch.no_grad():
            layer.w_down.zero_()
    assert set(sadmoe.compensate_(model, batches(), progress=False).values()) == {0.0}
    assert all(layer.shared is None for layer in converted_layers(model).values())


def test_tokens_of_padding_alone_are_an_error():
    padding = [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in batches()]
    with pytest.raises(ValueError, match=r"encoder\.layer\.0.*: compensation needs at least 2 tokens"):
        sadmoe.compensate_(skipping(), padding, progress=False)


def test_what_fails_leaves_the_model_as_it_was():
    model, _ = compensated()
    with torch.no_grad():
        *_, (name, last) = converted_layers(model).items()
        last.w_down[0, 0, 0] = torch.inf
    before, gates = state(model), [layer.gate for layer in converted_layers(model).values()]
    with pytest.raises(ValueError, match=f"{name}: not every output is finite"):
        sadmoe.compensate_(model, batches(), progress=False)
    assert same(state(model), before)
    assert [layer.gate for layer in converted_layers(model).values()] == gates


def test_random_numbers_and_modes_stay():
    model = skipping().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    shuffled = torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=True)
    sadmoe.compensate_(model, shuffled, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in model.modules() if not isinstance(m, SharedExpert))


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="every expert runs, so nothing is to be made up for: set_tau or calib"
    ):
        sadmoe.compensate_(converted("bert"), [TINY["bert"].batch()])
    with pytest.raises(ValueError, match="convert it first"):
        sadmoe.compensate_(TINY["bert"].model(), batches())
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        sadmoe.compensate_(skipping(), batches(), rank=0)
    with pytest.raises(TypeError, match=r"rank must be an integer, got 8.0"):
        sadmoe.compensate_(skipping(), batches(), rank=8.0)


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"scales": [[0.5, 0.0]]}, {"scales": [[0, 0], [0.5, 1], [0.2, 1]]}]
)
def test_a_damaged_description_is_refused(wrong):
    model, _ = compensated()
    described = sadmoe.describe.describe_all(model)
    name, description = next(iter(described.items()))
    description["shared"] |= wrong
    with pytest.raises(ValueError, match=f"{name}: unknown shared expert"):
        sadmoe.describe.rebuild(TINY["bert"].model(), name, description)


def test_layers_that_the_filter_refuses_stay_as_they_are():
    model = skipping()
    first, second = converted_layers(model)
    assert list(sadmoe.compensate_(model, batches(), filter=second.__eq__, progress=False)) == [second]
    assert model.get_submodule(first).shared is None


def test_a_gate_on_true_norms_gets_as_much_as_the_router_s_that_it_equals():
    model = skipping()
    for layer in converted_layers(model).values():
        layer.router.target_power = 0.5
    sadmoe.compensate_(model, batches(), progress=False)
    layer = next(layer for layer in converted_layers(model).values() if layer.shared is not None)
    for tau in (0.1, 0.3, 0.45):
        by_router, by_norms = DynamicK(tau), DynamicK(tau**2, true_norms=True)
        assert 0 < layer.shared.scale(by_router, 0.5) == pytest.approx(layer.shared.scale(by_norms, 0.5))


def test_routers_that_are_fitted_to_another_power_leave_it_what_it_was(tmp_path):
    model, _ = compensated()
    was = {name: layer.shared.scale(DynamicK(0.25), 1.0) for name, layer in converted_layers(model).items()}
    config = sadmoe.RouterConfig(steps=2, target_power=0.5)
    sadmoe.fit_routers_(model, batches(count=6), config, progress=False)
    sadmoe.save(model, tmp_path / "model.safetensors")
    loaded = TINY["bert"].model()
    sadmoe.load(loaded, tmp_path / "model.safetensors")
    for name, scale in was.items():
        for layer in (model.get_submodule(name), loaded.get_submodule(name)):
            assert 0 < scale < 1
            assert layer.shared.scale(DynamicK(0.5), 0.5) == pytest.approx(scale)  # 0.25 of norms
            assert layer.shared.scale(DynamicK(0.25, true_norms=True), 0.5) == pytest.approx(scale)


def test_a_file_without_its_power_has_the_router_s():
    model, _ = compensated()
    for layer in converted_layers(model).values():
        layer.router.target_power = layer.shared.power = 0.5
    described = sadmoe.describe.describe_all(model)
    name, description = next(iter(described.items()))
    del description["shared"]["power"]
    again = TINY["bert"].model()
    sadmoe.describe.rebuild(again, name, description)
    assert again.get_submodule(name).shared.power == 0.5


def test_loaded_into_a_frozen_model_it_is_frozen(tmp_path):
    model, _ = compensated()
    sadmoe.save(model, tmp_path / "model.safetensors")
    for trained in (False, True):
        again = TINY["bert"].model().requires_grad_(trained)
        sadmoe.load(again, tmp_path / "model.safetensors")
        for layer in converted_layers(again).values():
            assert {p.requires_grad for p in layer.shared.parameters()} == {trained}


def test_it_is_in_the_mode_of_its_layer():
    model = skipping().eval()
    sadmoe.compensate_(model, batches(), progress=False)
    assert not any(module.training for module in model.modules())
