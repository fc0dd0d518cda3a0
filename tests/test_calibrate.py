import numpy
import pytest
import torch
import torch.nn.functional as F
from converted import converted
from sadmoe.calibrate import calibrate_
from sadmoe.calibrate_layers import calibrate_layers_
from sadmoe.cost import cost
from sadmoe.dial import converted_layers, set_tau, tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.routers import RouterConfig, fit_routers_
from text_losses import distance, drift, text_batches
from tiny_models import TINY, call
from torch import nn
from torch.utils.data import DataLoader


@pytest.fixture(scope="module")
def fitted():
    """A tiny converted encoder whose routers are narrow and know their experts, and its batches."""
    model, batches = converted("bert", experts=12, router_width=4), text_batches()
    fit_routers_(model, batches, RouterConfig(width=4, steps=300, lr=0.02))
    return model, batches


@pytest.fixture
def model(fitted):
    for layer in converted_layers(fitted[0]).values():
        layer.gate = TopK(3)
    return fitted[0]


@pytest.fixture
def batches(fitted):
    return fitted[1]


def gates(model):
    return [layer.gate for layer in converted_layers(model).values()]


@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
def test_a_budget_is_met_closely_by_the_smallest_tau(model, batches, budget):
    found = calibrate_(model, batches, budget=budget)
    assert gates(model) == [DynamicK(found.tau)] * 2
    report = cost(model, batches)
    assert found.cost.layers_of_dense == report.executed / report.dense
    assert found.share == report.share
    assert found.evaluations <= 8  # of 11 that bisection would take
    assert found.cost.layers_of_dense <= budget
    assert found.loss is found.loss_at_zero is None
    with tau(
        model, found.tau / 1.02
    ):  # a step of the search below it, the budget is passed or nearly used up
        below = cost(model, batches)
    assert below.executed / below.dense > budget - 0.012


def test_a_budget_of_one_is_the_dense_model(model, batches):
    found = calibrate_(model, batches, budget=1.0)
    assert (found.tau, found.cost.layers_of_dense, found.share, found.evaluations) == (0.0, 1.0, 1.0, 1)


def test_the_cost_falls_as_tau_grows(model, batches):
    ratios = []
    for value in (1e-6, 1e-3, 0.03, 0.1, 0.3, 0.6, 1.0):
        with tau(model, value):
            report = cost(model, batches)
        ratios.append(report.executed / report.dense)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1 > ratios[-1]  # router and combine come on top of all experts


def test_a_loss_given_with_a_budget_is_measured(model, batches):
    found = calibrate_(model, batches, budget=0.6, loss=distance)
    assert found.loss_at_zero == pytest.approx(1.0)
    with torch.no_grad():
        expected = sum(distance(model, batch).item() for batch in batches) / len(batches)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.loss > 1
    assert str(found).startswith(f"tau {found.tau:.4g}: {found.share:.1%} of the experts, ")
    assert f"; loss {found.loss:.4g}, at tau = 0 1; " in str(found)
    set_tau(model, 0.5)
    assert found.tau == calibrate_(model, batches, budget=0.6).tau  # the loss ran the dense model too


def test_a_loss_increase_is_used_up_by_the_largest_tau(model, batches):
    with tau(model, 0.3), torch.no_grad():
        increase = sum(drift(model, batch).item() for batch in batches) / len(batches)
    assert increase > 0
    found = calibrate_(model, batches, max_loss_increase=increase, loss=distance)
    assert gates(model) == [DynamicK(found.tau)] * 2
    assert found.evaluations <= 12
    assert found.loss <= found.loss_at_zero * (1 + increase)
    with tau(model, found.tau * 1.02), torch.no_grad():  # a step of the search further, it is passed
        beyond = sum(drift(model, batch).item() for batch in batches) / len(batches)
    assert beyond > increase * 0.999
    assert found.share < 1


def test_more_allowance_gives_a_larger_tau(model, batches):
    taus = [
        calibrate_(model, batches, max_loss_increase=x, loss=distance).tau for x in (0.0, 1e-3, 1e-2, 1.0)
    ]
    assert taus == sorted(taus)
    assert taus[0] < taus[-1]


def test_no_allowance_at_all_leaves_the_dense_model(model, batches):
    def worse_when_sparse(model, batch):
        call(model, batch)
        return torch.tensor(1.0 if gates(model)[0].tau == 0 else 2.0)

    found = calibrate_(model, batches, max_loss_increase=0.5, loss=worse_when_sparse)
    assert (found.tau, found.loss, found.loss_at_zero) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("goal", [{"budget": 1}, {"max_loss_increase": 0.0}])
def test_tokens_count_once_where_the_loss_runs_the_dense_model_too(model, batches, goal):
    found = calibrate_(model, batches, loss=distance, **goal)
    assert found.tau == 0.0
    with tau(model, 0.0):
        assert [one.tokens for one in found.cost.layers] == [
            one.tokens for one in cost(model, batches).layers
        ]


@pytest.mark.parametrize("goal", [{"budget": 0.7}, {"max_loss_increase": 0.1}])
def test_a_loss_may_take_of_a_batch_what_the_model_does_not(model, batches, goal):
    def loss(model, batch):
        inputs, wanted = batch
        return 1 + F.mse_loss(call(model, inputs), wanted)

    with torch.no_grad(), tau(model, 0.0):
        labelled = [(batch, call(model, batch)) for batch in batches]
    found = calibrate_(model, labelled, loss=loss, **goal)
    assert found.loss_at_zero == pytest.approx(1.0)
    assert found.loss > 1.0
    if "budget" in goal:
        assert found.tau == calibrate_(model, batches, **goal).tau


def test_the_model_s_own_loss_is_the_default():
    model = converted("bert classifier")
    batch = TINY["bert classifier"].batch() | {"labels": torch.tensor([0, 1])}
    with torch.no_grad():
        expected = model(**batch).loss.item()
    found = calibrate_(model, [batch], max_loss_increase=0.1)
    assert found.loss_at_zero == pytest.approx(expected)
    assert found.loss <= 1.1 * expected


def test_a_filter_calibrates_its_layers_alone(model, batches):
    first, second = converted_layers(model)
    others = converted_layers(model)[first].gate
    found = calibrate_(model, batches, budget=0.5, filter=second.__eq__)
    assert [row.name for row in found.cost.layers] == [second]
    assert 0.45 < found.cost.layers_of_dense <= 0.5
    assert converted_layers(model)[first].gate is others
    assert converted_layers(model)[second].gate == DynamicK(found.tau)
    row = cost(model, batches).layers[1]
    assert row.executed / row.dense == pytest.approx(found.cost.layers_of_dense)


def test_an_oracle_is_calibrated_as_an_oracle(model, batches):
    for layer in converted_layers(model).values():
        layer.gate = DynamicK(0.1, true_norms=True)
    found = calibrate_(model, batches, budget=0.7)
    assert gates(model) == [DynamicK(found.tau, true_norms=True)] * 2
    assert found.cost.layers_of_dense == pytest.approx(0.7, abs=0.02)


def test_padding_does_not_sway_the_budget(model, batches):
    longer = [{key: F.pad(value, (0, 30)) for key, value in batch.items()} for batch in batches]
    plain, padded = calibrate_(model, batches, budget=0.6), calibrate_(model, longer, budget=0.6)
    assert padded.share == pytest.approx(plain.share, abs=1e-3)
    assert padded.tau == pytest.approx(plain.tau, rel=0.02)


def test_the_model_comes_back_in_its_mode_without_hooks(model, batches):
    model.train()
    calibrate_(model, batches[:1], budget=0.6)
    assert model.training
    layers = converted_layers(model).values()
    assert not any(layer._forward_pre_hooks or layer.norms_hooks for layer in layers)
    model.eval()


def test_a_budget_below_one_expert_states_the_floor_and_changes_nothing(model, batches):
    report = cost(model, batches)
    floor = report.floor / report.dense
    with pytest.raises(
        ValueError, match=f"budget 0.01 is below what one expert .* {floor:.4f} of the dense FLOPs"
    ):
        calibrate_(model, batches, budget=0.01)
    assert gates(model) == [TopK(3)] * 2


def test_routers_that_tell_no_expert_from_another_cannot_meet_a_budget(batches):
    model = converted("bert")
    for layer in converted_layers(model).values():
        nn.init.ones_(layer.router.v2)
    before = gates(model)
    with pytest.raises(
        ValueError, match=r"budget 0.8 cannot be met: even tau = 1 executes .* see fit_routers_"
    ):
        calibrate_(model, batches, budget=0.8)
    assert gates(model) == before


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_that_nothing_can_be_relative_to_is_refused(model, batches, loss):
    def constant(model, batch):
        call(model, batch)
        return torch.tensor(loss)

    with pytest.raises(
        ValueError, match=f"must be positive and finite, got {loss}: pass another loss, or a budget"
    ):
        calibrate_(model, batches, max_loss_increase=0.1, loss=constant)
    assert gates(model) == [TopK(3)] * 2


def test_a_loss_of_numpy_is_a_number(model, batches):
    def constant(model, batch):
        call(model, batch)
        return numpy.float32(1.0)

    assert calibrate_(model, batches, max_loss_increase=0.1, loss=constant).loss == 1.0


@pytest.mark.parametrize(("loss", "got"), [(None, "NoneType"), (torch.ones(3), r"a tensor \[3\]")])
def test_a_loss_that_is_no_number_is_refused(model, batches, loss, got):
    with pytest.raises(TypeError, match=f"loss must return a number for each batch, got {got}"):
        calibrate_(model, batches, max_loss_increase=0.1, loss=lambda model, batch: loss)


def test_an_error_in_the_loss_leaves_the_gates(model, batches):
    def broken(model, batch):
        raise KeyError

    with pytest.raises(KeyError):
        calibrate_(model, batches, max_loss_increase=0.1, loss=broken)
    assert gates(model) == [TopK(3)] * 2


def test_a_model_without_a_loss_needs_one(model, batches):
    with pytest.raises(ValueError, match=r"returned a Base.* without a loss: put labels .* or pass loss="):
        calibrate_(model, batches, max_loss_increase=0.1)


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({}, "a budget or a max_loss_increase, exactly one of them"),
        ({"budget": 0.5, "max_loss_increase": 0.1}, "a budget or a max_loss_increase"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\], .* got 0.0"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\], .* got 1.5"),
        ({"budget": float("nan")}, r"budget must be in \(0, 1\], .* got nan"),
        ({"max_loss_increase": -0.1}, "max_loss_increase must not be negative, got -0.1"),
    ],
)
def test_goals_that_make_no_sense_are_refused(model, batches, kw, text):
    with pytest.raises(ValueError, match=text):
        calibrate_(model, batches, **kw)


def test_a_dense_model_and_a_one_shot_iterator_are_refused(model, batches):
    with pytest.raises(ValueError, match="no converted layer"):
        calibrate_(TINY["bert"].model(), batches, budget=0.5)
    with pytest.raises(TypeError, match="one-shot iterator"):
        calibrate_(model, iter(batches), budget=0.5)


@pytest.mark.parametrize("search", [calibrate_, calibrate_layers_])
def test_every_pass_is_over_the_same_data_whatever_was_drawn_before(model, batches, search):
    """Of a loader that shuffles, and leaves some out."""
    rows = [
        {key: t[i] for key, t in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]
    loader = DataLoader(rows, batch_size=5, shuffle=True, drop_last=True)
    assert len(rows) % 5
    found, passes = [], []

    def loss(model, batch):
        if passes:
            passes[-1].append(batch["input_ids"].sum().item())
        return distance(model, batch)

    class Counted:
        def __iter__(self):
            passes.append([])
            return iter(loader)

    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(search(model, Counted(), budget=0.7, loss=loss))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    assert len({tuple(dict.fromkeys(one)) for one in passes if one}) == 1


def test_batches_that_are_used_up_while_tau_is_searched_are_told_as_such(model, batches):
    class Twice:
        left = 2

        def __iter__(self):
            self.left -= 1
            return iter(batches if self.left >= 0 else [])

    with pytest.raises(ValueError, match="batches gave nothing when they were gone through again"):
        calibrate_(model, Twice(), budget=0.5)
