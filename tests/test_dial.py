import pytest
import sadmoe
import torch
from converted import converted
from sadmoe.convert import restore_
from sadmoe.dial import converted_layers, set_batch_invariant, set_tau, tau
from sadmoe.ffn import moe_layers
from sadmoe.ffn.projection import empty_mlp, stand_in
from sadmoe.gates import DynamicK, TopK
from sadmoe.weights import check_own_weights
from tiny_models import TINY, call
from torch import nn


def gates(model):
    return [layer.gate for layer in converted_layers(model).values()]


def test_one_number_turns_every_layer():
    model = converted("bert")
    set_tau(model, 0.25)
    assert gates(model) == [DynamicK(0.25)] * 2


def test_the_oracle_stays_an_oracle_and_top_k_becomes_dynamic():
    model = converted("bert")
    first, second = converted_layers(model).values()
    first.gate, second.gate = DynamicK(0.1, true_norms=True), TopK(2)
    set_tau(model, 0.5)
    assert gates(model) == [DynamicK(0.5, true_norms=True), DynamicK(0.5)]


class Learned(nn.Module):
    """A gate of the user's own that has weights."""

    true_norms = False

    def __init__(self):
        super().__init__()
        self.least = nn.Parameter(torch.tensor(0.5))

    def mask(self, scores):
        return scores >= self.least


def test_a_gate_may_be_a_module_and_gives_way_to_one_that_is_none():
    model, batch = converted("bert"), TINY["bert"].batch()
    _, last = converted_layers(model).values()
    last.gate = learned = Learned()
    assert learned.least in set(last.parameters())
    call(model, batch)
    with tau(model, 0.5):
        assert gates(model) == [DynamicK(0.5)] * 2
    assert gates(model)[1] is learned
    set_tau(model, 0.25)
    assert gates(model) == [DynamicK(0.25)] * 2
    assert learned.least not in set(last.parameters())


def test_the_context_gives_every_gate_back_also_nested_and_after_an_error():
    model = converted("bert")
    first, _ = converted_layers(model).values()
    first.gate = TopK(2)
    before = gates(model)
    with tau(model, 0.5):
        with tau(model, 0.25):
            assert gates(model) == [DynamicK(0.25)] * 2
        assert gates(model) == [DynamicK(0.5)] * 2
    assert gates(model) == before
    with pytest.raises(KeyError), tau(model, 0.5):
        raise KeyError
    assert gates(model) == before


def test_tau_changes_the_next_call():
    model, batch = converted("bert"), TINY["bert"].batch()
    with torch.no_grad():
        dense = call(model, batch)
        with tau(model, 1.0):
            sparse = call(model, batch)
        assert not torch.equal(dense, sparse)
        assert torch.equal(dense, call(model, batch))


def test_compiled_parts_keep_their_layers_names():
    model = converted("user glu")
    taus = {name: 0.1 * (i + 1) for i, name in enumerate(converted_layers(model))}
    whole = torch.compile(model, backend="eager")
    set_tau(whole, taus)
    assert [layer.gate.tau for layer in converted_layers(model).values()] == list(taus.values())
    model[0] = torch.compile(model[0], backend="eager")
    assert converted_layers(model).keys() == taus.keys()
    first = next(iter(taus))
    set_tau(model, 0.9, filter=lambda name: name == first)
    assert [layer.gate.tau for layer in converted_layers(model).values()] == [0.9, 0.2]


@pytest.mark.parametrize(
    ("kind", "part"),
    [("bert", ""), ("bert", "encoder.layer.0"), ("gpt2", "transformer.h.0"), ("gpt2", "transformer.h.0.mlp")],
)
def test_compiled_parts_are_restored(kind, part):
    model, dense, batch = converted(kind), TINY[kind].model(), TINY[kind].batch()
    set_tau(model, 0.9)
    compiled = torch.compile(model.get_submodule(part), backend="eager")
    whole = model if part else compiled
    if part:
        model.set_submodule(part, compiled)
    with torch.no_grad():
        wanted, sparse = call(dense, batch), call(whole, batch)
        assert not torch.allclose(sparse, wanted)
        restore_(whole)
        assert not moe_layers(model)
        torch.testing.assert_close(call(whole, batch), wanted)


def test_compiled_mlps_of_projections_give_way_to_the_projections():
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    with torch.no_grad():
        wanted = call(model, batch)
        name = "encoder.layer.0.attention.self.query"
        stand_in(model, name, empty_mlp(model.get_submodule(name), 8))
        model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
        assert not torch.allclose(call(model, batch), wanted)
        restore_(model)
        assert torch.equal(call(model, batch), wanted)


def test_weights_that_are_elsewhere_are_named():
    model = converted("user glu")
    (name, layer), *_ = converted_layers(model).items()
    layer.w_up = nn.Parameter(layer.w_up.to("meta"))
    with pytest.raises(ValueError, match=rf"{name}\.w_up has no values here"):
        check_own_weights(model, converted_layers(model))


def test_a_filter_turns_its_layers_alone():
    model = converted("bert")
    first, second = converted_layers(model)
    set_tau(model, 0.5, filter=second.__eq__)
    taus = [layer.gate.tau for layer in converted_layers(model).values()]
    assert taus == [0.0, 0.5]
    with tau(model, {first: 0.1}, filter=first.__eq__):
        assert converted_layers(model)[second].gate.tau == 0.5
        assert converted_layers(model)[first].gate.tau == 0.1
    assert [layer.gate.tau for layer in converted_layers(model).values()] == taus
    with tau(model, 0.2, filter=first.__eq__):
        set_tau(model, 0.7, filter=second.__eq__)
    assert [layer.gate.tau for layer in converted_layers(model).values()] == [0.0, 0.7]
    with pytest.raises(TypeError, match="filter must be a function of a name, or None, got 'encoder'"):
        set_tau(model, 0.5, filter="encoder")
    with pytest.raises(ValueError, match=f"filter refused all 2 converted layers: {first}, {second}"):
        set_tau(model, 0.5, filter=lambda name: False)


def test_a_sharded_model_is_refused():
    class Shard(torch.Tensor):
        pass

    model = converted("bert")
    layer = next(iter(converted_layers(model).values()))
    layer.w_up = nn.Parameter(layer.w_up.data.as_subclass(Shard))
    for change in (restore_, sadmoe.quantize_experts_, sadmoe.pack_experts_):
        with pytest.raises(ValueError, match=r"w_up is a Shard: gather the model's weights first"):
            change(model)


def test_a_tau_out_of_range_changes_nothing():
    model = converted("bert")
    set_tau(model, 0.5)
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\].*got 1.5"):
        set_tau(model, 1.5)
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"), tau(model, -0.1):
        pass
    for tau_of_another_kind in ("0.1", True, None):
        with pytest.raises(
            TypeError, match=rf"tau must be a number in \[0, 1\], got {tau_of_another_kind!r}"
        ):
            set_tau(model, tau_of_another_kind)
    assert gates(model) == [DynamicK(0.5)] * 2


def test_a_model_that_was_not_converted_is_refused():
    with pytest.raises(ValueError, match="Linear has no converted layer: convert it first"):
        set_tau(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="no converted layer"), tau(nn.Linear(2, 2), 0.5):
        pass


def test_batch_invariance_is_not_saved_with_the_model(tmp_path):
    model = converted("bert")
    set_batch_invariant(model, False)
    sadmoe.save(model, tmp_path / "model")
    again = TINY["bert"].model()
    sadmoe.load(again, tmp_path / "model")
    assert {layer.batch_invariant for layer in converted_layers(again).values()} == {None}


@pytest.mark.parametrize("value", ["no", 1, 0.0])
def test_batch_invariance_is_a_bool_or_none(value):
    model = converted("bert")
    with pytest.raises(TypeError, match=f"value must be True, False or None, got {value!r}"):
        set_batch_invariant(model, value)
    assert {layer.batch_invariant for layer in converted_layers(model).values()} == {None}
