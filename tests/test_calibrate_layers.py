"""A tau for each layer, all for one budget."""

import copy
import math

import pytest
import sadmoe
import torch
from converted import converted
from sadmoe import calibrate_, calibrate_layers_
from sadmoe.cost import cost
from sadmoe.dial import converted_layers
from sadmoe.gates import DynamicK, TopK
from sadmoe.routers import RouterConfig, fit_routers_
from text_losses import distance, drift, text_batches
from tiny_models import TINY
from torch import nn

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lopsided() -> nn.Module:
    """Of its two layers the first hardly matters to the output."""
    model = converted("bert", experts=12, router_width=4)
    fit_routers_(model, text_batches(), RouterConfig(width=4, steps=300, lr=0.02))
    first = next(iter(converted_layers(model).values()))
    with torch.no_grad():
        first.w_down.mul_(1e-3)
    return model


@pytest.fixture
def model(lopsided: nn.Module) -> nn.Module:
    for layer in converted_layers(lopsided).values():
        layer.gate = TopK(3)
    return lopsided


def taus_of(model: nn.Module) -> dict[str, float]:
    return {name: layer.gate.tau for name, layer in converted_layers(model).items()}


def gates(model: nn.Module) -> list[object]:
    return [layer.gate for layer in converted_layers(model).values()]


def mean_drift(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(drift(model, batch).item() for batch in text_batches()) / len(text_batches())


@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
def test_a_layer_that_hardly_matters_runs_fewer_experts_and_the_model_loses_less(model, budget):
    found = calibrate_layers_(model, text_batches(), budget=budget)
    assert taus_of(model) == found.taus
    report, jointly = cost(model, text_batches()), mean_drift(model)
    assert report.layers[0].share < report.layers[1].share
    assert found.cost.layers_of_dense == report.executed / report.dense <= budget
    assert (found.share, found.cost.executed) == (report.share, report.executed)
    one = calibrate_(model, text_batches(), budget=budget)
    assert found.one.tau == one.tau
    assert jointly < 0.8 * mean_drift(model)
    assert found.loss < found.one.loss


def test_where_nothing_loses_less_it_is_the_one_tau(model):
    """A loss that any other tau makes worse."""

    def prefers_one(model, batch):
        distance(model, batch)
        return torch.tensor(1.0 if len(set(taus_of(model).values())) == 1 else 2.0)

    found = calibrate_layers_(model, text_batches(), budget=0.6, loss=prefers_one)
    assert set(found.taus.values()) == {found.one.tau}
    assert (found.loss, found.cost.layers_of_dense, found.cost) == (
        1.0,
        found.one.cost.layers_of_dense,
        found.one.cost,
    )
    assert gates(model) == [DynamicK(found.one.tau)] * 2
    *rows, last = str(found).splitlines()
    assert [row.split()[-1] for row in rows] == ["tau", *[f"{found.one.tau:.4g}"] * 2]
    assert last.endswith("; loss 1, by one tau 1")


def test_a_loss_of_one_s_own_decides(model):
    """The layer that the output does not feel is all that this one feels."""
    first = next(iter(converted_layers(model)))

    def of_the_first_layer(model, batch):
        distance(model, batch)
        return torch.tensor(1.0 + taus_of(model)[first])

    found = calibrate_layers_(model, text_batches(), budget=0.8, loss=of_the_first_layer)
    assert found.cost.layers[0].share > found.cost.layers[1].share


def test_a_loss_may_take_of_a_batch_what_the_model_does_not(model):
    labelled = [(batch, 1.0) for batch in text_batches()]
    found = calibrate_layers_(
        model, labelled, budget=0.6, loss=lambda model, batch: distance(model, batch[0])
    )
    alone = calibrate_layers_(model, text_batches(), budget=0.6, loss=distance)
    assert (found.taus, found.cost.layers_of_dense) == (alone.taus, alone.cost.layers_of_dense)


def test_a_budget_of_one_is_the_dense_model(model):
    found = calibrate_layers_(model, text_batches(), budget=1.0)
    assert set(found.taus.values()) == {0.0}
    assert (found.cost.layers_of_dense, found.loss) == (1.0, 0.0)


def test_layers_that_the_filter_refuses_keep_their_gates_and_cost_nothing(model):
    _, second = converted_layers(model)
    found = calibrate_layers_(model, text_batches(), budget=0.7, filter=lambda name: name == second)
    assert list(found.taus) == [second]
    assert gates(model) == [TopK(3), DynamicK(found.taus[second])]
    assert [layer.name for layer in found.cost.layers] == [second]
    alone = cost(model, text_batches()).layers[1]
    assert found.cost.layers_of_dense == pytest.approx(alone.executed / alone.dense)
    assert found.cost.layers_of_dense <= 0.7


def test_a_batch_of_padding_alone_loses_nothing(model):
    empty = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.zeros(2, 8)}
    found = calibrate_layers_(model, [*text_batches(), empty], budget=0.7)
    alone = calibrate_layers_(model, text_batches(), budget=0.7)
    assert found.taus == pytest.approx(alone.taus)
    assert found.loss == pytest.approx(0.75 * alone.loss)


def test_oracles_stay_oracles(model):
    for layer in converted_layers(model).values():
        layer.gate = DynamicK(0.1, true_norms=True)
    found = calibrate_layers_(model, text_batches(), budget=0.7)
    assert gates(model) == [DynamicK(tau, true_norms=True) for tau in found.taus.values()]


def test_the_taus_are_saved_with_the_model(model, tmp_path):
    found = calibrate_layers_(model, text_batches(), budget=0.6)
    sadmoe.save(model, tmp_path / "model.safetensors")
    fresh = TINY["bert"].model()
    sadmoe.load(fresh, tmp_path / "model.safetensors")
    assert taus_of(fresh) == found.taus


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"budget": 0.0}, r"budget must be in \(0, 1\], .* got 0.0"),
        ({"budget": 0.01}, "budget 0.01 is below what one expert"),
        (
            {"budget": 1.0, "loss": lambda model, batch: distance(model, batch) * math.nan},
            "loss must be finite .* nan",
        ),
        (
            {"budget": 0.6, "loss": lambda model, batch: distance(model, batch) * math.nan},
            "loss must be finite .* nan",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_the_gates_stay(model, kw, text):
    with pytest.raises(ValueError, match=text):
        calibrate_layers_(model, text_batches(), **kw)
    assert gates(model) == [TopK(3)] * 2


def test_an_error_midway_leaves_the_gates(model):
    calls = []

    def breaks_later(model, batch):
        calls.append(distance(model, batch))
        if len(calls) == 8:
            raise KeyError
        return calls[-1]

    with pytest.raises(KeyError):
        calibrate_layers_(model, text_batches(), budget=0.6, loss=breaks_later)
    assert gates(model) == [TopK(3)] * 2


def test_a_dense_model_and_a_one_shot_iterator_are_refused(model):
    with pytest.raises(ValueError, match="no converted layer"):
        calibrate_layers_(TINY["bert"].model(), text_batches(), budget=0.5)
    with pytest.raises(TypeError, match="one-shot iterator"):
        calibrate_layers_(model, iter(text_batches()), budget=0.5)


def test_taus_by_name_are_set_all_or_none(model):
    names = list(converted_layers(model))
    with pytest.raises(ValueError, match=f"tau must name each converted layer .*; missing: {names[1]}"):
        sadmoe.set_tau(model, {names[0]: 0.1})
    with pytest.raises(ValueError, match="no other; unknown: other"):
        sadmoe.set_tau(model, {**dict.fromkeys(names, 0.1), "other": 0.1})
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\]"):
        sadmoe.set_tau(model, {names[0]: 0.1, names[1]: 1.1})
    assert gates(model) == [TopK(3)] * 2
    with sadmoe.tau(model, {names[0]: 0.1, names[1]: 0.2}):
        assert list(taus_of(model).values()) == [0.1, 0.2]
    assert gates(model) == [TopK(3)] * 2


def test_what_is_compiled_is_not_compiled_for_every_tau(model):
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="eager")  # which would refuse the ninth
    found = calibrate_layers_(compiled, text_batches(), budget=0.7)
    assert found.taus == calibrate_layers_(model, text_batches(), budget=0.7).taus
