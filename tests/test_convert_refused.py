"""What convert_ refuses, and what it says then."""

import logging
import math
from collections.abc import Callable

import pytest
import sadmoe.convert.build as build
import torch
from conversions import convert, fingerprint, model_and_batches, rows
from sadmoe.attention import ProjectionConfig, replace_projections_
from sadmoe.convert import ConvertConfig, restore_
from sadmoe.cost import cost
from sadmoe.ffn import FFNNotFoundError, moe_layers
from sadmoe.routers import RouterConfig
from sites import assert_same_state, state
from tiny_models import TINY
from torch import Tensor, nn


def test_batches_that_end_for_good_are_an_error():
    class Once:
        def __init__(self, batches):
            self.left = iter(batches)

        def __iter__(self):
            return self.left

    model, batches = model_and_batches("user glu")
    with pytest.raises(ValueError, match="gave nothing when they were gone through again"):
        convert(model, Once(batches), tau=0.1)
    assert not moe_layers(model)


def test_a_compiled_model_is_refused():
    model, batches = model_and_batches()
    compiled = torch.compile(model, backend="eager")
    before = fingerprint(model)
    for refused in (lambda: convert(compiled, batches), lambda: convert(nn.Sequential(compiled), batches)):
        with pytest.raises(ValueError, match=r"is compiled.*compile afterwards"):
            refused()
    assert fingerprint(model) == before
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model: is compiled"):
        convert(model, batches)


def test_an_ffn_that_no_real_token_reaches_is_named():
    model, batches = model_and_batches("bert")
    batches[0]["attention_mask"] = torch.zeros_like(batches[0]["attention_mask"])
    with pytest.raises(
        ValueError, match=r"^encoder\.layer\.0\.intermediate: 0 tokens of these batches reach it, padding"
    ):
        convert(model, batches)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    model, batches = model_and_batches()
    with pytest.raises(
        ValueError, match=r"0\.inner: 60 neurons .* experts of 32; expert_size may be one of 1, 2, 3, 4, 5"
    ):
        convert(model, batches, expert_size=None)
    with pytest.raises(
        ValueError, match="60 neurons do not split into 7 experts; these do: 1, 2, 3, 4, 5, 6, 10"
    ):
        convert(model, batches, expert_size=None, experts=7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_size": 4, "experts": 4}, "give expert_size or experts, not both; got 4 and 4"),
        ({"budget": 0.5, "tau": 0.1}, "give tau, or budget to have it solved; got tau=0.1 and budget=0.5"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\], a share of the dense FLOPs, got 0.0"),
        ({"budget": 1.5}, "got 1.5"),
        ({"tau": 1.5}, r"tau must be in \[0, 1\]"),
        ({"expert_size": 0}, "expert_size must be at least 1, got 0"),
        ({"experts": -1}, "experts must be at least 1, got -1"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**fields)


def test_an_impossible_budget_is_refused_before_any_router_is_fitted(monkeypatch):
    model, batches = model_and_batches()
    monkeypatch.setattr(build, "fit_router_", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"budget 0\.05 cannot be met: router and one expert cost 0\.17"):
        convert(model, batches, budget=0.05)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_budget_between_the_floors_of_ffns_and_projections_is_refused_by_both_together(name, monkeypatch):
    model, batches = model_and_batches(name)
    if name == "t5":  # targets shorter than sources
        batches = [{**batch, "decoder_input_ids": batch["decoder_input_ids"][:, :2]} for batch in batches]
    replace_projections_(model, batches, ProjectionConfig(steps=1, multiple=4), progress=False)
    settings = {"expert_size": 4, "router": RouterConfig(width=2, steps=1)}
    settings["projection_router"] = RouterConfig(width=8, steps=1)
    convert(model, batches, budget=1.0, **settings)
    known = cost(model, batches)
    floor = known.floor / known.dense
    assert min(layer.floor / layer.dense for layer in known.layers) < floor - 0.02
    restore_(model, projections=False)
    before = state(model)

    class Fitted(Exception):
        """Stands for what comes after the check."""

    def fitted(*args, **settings):
        raise Fitted

    monkeypatch.setattr(build, "fit_router_", fitted)
    with pytest.raises(ValueError, match=rf"cannot be met: .* {floor:.3f} of"):
        convert(model, batches, budget=floor - 0.01, **settings)
    assert_same_state(state(model), before)
    with pytest.raises(Fitted):
        convert(model, batches, budget=floor + 0.01, **settings)


@pytest.mark.parametrize("name", ["user glu", "user module"])
def test_activations_that_overflow_are_said_of_their_ffn(name):
    model, batches = model_and_batches(name)
    with pytest.raises(ValueError, match=r"^\S+: not every (activation|expert's output norm) is finite"):
        convert(model, [batch * torch.inf for batch in batches], cluster="activity")


def test_a_budget_of_all_is_met_where_one_expert_costs_more():
    model, batches = model_and_batches()
    report = convert(model, batches, budget=1.0, router=RouterConfig(width=256, steps=2))
    assert report.tau == 0.0
    assert all(layer.runs_all_experts for layer in moe_layers(model).values())


def test_a_converted_model_is_not_converted_again():
    model, batches = model_and_batches()
    convert(model, batches)
    with pytest.raises(FFNNotFoundError, match=r"2 FFNs are converted already; .* restore_\(model\) first"):
        convert(model, batches)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = TINY["user glu"].build()
    with pytest.raises(ValueError, match=r"no weights yet, 0\.norm\.weight is on the meta device"):
        convert(model, [TINY["user glu"].batch()])


def test_a_model_with_nan_is_refused():
    model, batches = model_and_batches()
    model[1].inner.a.weight.data[3, 2] = math.nan
    with pytest.raises(ValueError, match=r"model is broken: 1\.inner\.a\.weight has NaN"):
        convert(model, batches)


def test_a_dtype_that_the_ops_do_not_take_is_refused():
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"1\.inner: its weights are torch\.float64; cast them to one of"):
        convert(model.double(), [batches[0].double()])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least one batch"),
        (iter([1]), TypeError, "one-shot iterator"),
        (torch.zeros(2, 3), TypeError, "wrap it in a list"),
    ],
)
def test_batches_that_are_none_are_refused(batches, error, message):
    with pytest.raises(error, match=message):
        convert(TINY["user glu"].model(), batches)


def test_what_is_no_model_or_has_no_ffn_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        convert({}, [1])
    with pytest.raises(FFNNotFoundError, match="no FFN found"):
        convert(nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)])


class Squared(nn.Module):
    """Two halves of an FFN, each by itself what it seems, and a step between them."""

    def __init__(self, step: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inter = nn.Sequential(nn.Linear(24, 60), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(60, 24), nn.Dropout())
        self.step = step

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.out(self.step(self.inter(x)) * mask)


class Masked(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x, torch.ones(1))
        return x


def test_a_block_that_does_more_than_its_halves_is_refused(caplog):
    """As the model calls it: a probe knows no mask, and its halves by themselves are an FFN."""
    model = Masked(Squared(lambda h: h), Squared(lambda h: h**2)).eval()
    wanted = model(rows())
    with caplog.at_level(logging.WARNING):
        convert(model, [rows()])
    assert list(moe_layers(model)) == ["0.inter"]
    assert "1 (Squared): it does not compute down(act(up(x)))" in caplog.text
    torch.testing.assert_close(model(rows()), wanted)
