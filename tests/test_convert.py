import json
import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import count

import pytest
import sadmoe
import sadmoe.convert.build as build
import sadmoe.convert.recipe as recipe
import torch
from sadmoe.convert import ConvertConfig, convert_, restore_
from sadmoe.cost import cost
from sadmoe.dial import tau
from sadmoe.ffn import FFNNotFoundError, find_ffns, moe_layers
from sadmoe.inputs import collect_inputs
from sadmoe.masks import record_masks
from sadmoe.partition import partition, slots
from sadmoe.routers import RouterConfig
from sadmoe.undo import after_surgery, surgery
from tiny_models import TINY, UserFFN, call
from torch import Tensor, nn

ROUTER = RouterConfig(width=8, steps=30)
CONFIG = ConvertConfig(expert_size=5, router=ROUTER)


def model_and_batches(name: str = "user glu") -> tuple[nn.Module, list]:
    return TINY[name].model(), [TINY[name].batch()]


def convert(model: nn.Module, batches: list, **changes):
    config = {"expert_size": 5, "router": ROUTER} | changes
    return convert_(model, batches, ConvertConfig(**config), progress=False)


def fingerprint(model: nn.Module) -> list:
    """Every object that hangs in the model, its attributes and hooks, and the bits of its tensors."""
    found: list = []
    for name, module in model.named_modules():
        tables = {
            k: {key: id(v) for key, v in t.items()} for k, t in module.__dict__.items() if isinstance(t, dict)
        }
        plain = {k: id(v) for k, v in module.__dict__.items() if k not in tables}
        found.append((name, id(module), module.training, tables, plain))
    found += [(k, v.detach().clone().view(torch.uint8).tolist()) for k, v in model.state_dict().items()]
    return [*found, [(p.requires_grad, p.grad is None) for p in model.parameters()]]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5 v1.1", "vit", "albert", "user glu", "torch encoder"])
def test_at_tau_zero_the_converted_model_is_the_dense_one(name):
    model, batches = model_and_batches(name)
    before = call(model, batches[0])
    report = convert(model, batches)
    assert list(moe_layers(model)) == list(TINY[name].names) == [row.name for row in report.layers]
    # the same sums in another order: a few units in the last place, grown by two layers
    torch.testing.assert_close(call(model, batches[0]), before, rtol=1e-4, atol=1e-5)


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


def test_the_same_seed_gives_the_same_bits_whatever_the_global_one():
    states = []
    for seed in (1, 2):
        model, batches = model_and_batches()
        torch.manual_seed(seed)
        convert(model, batches, budget=0.9)
        states.append((model.state_dict(), [layer.gate for layer in moe_layers(model).values()]))
    (first, gates), (second, other_gates) = states
    assert gates == other_gates
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("cluster", ["weights", "activity"])
def test_experts_are_the_partition_of_what_the_config_names(cluster):
    model, batches = model_and_batches("user glu")
    sites, rows = find_ffns(model), {}
    inputs = collect_inputs(model, sites, batches, max_tokens=100, seed=3)
    for site in sites:
        dense, x = site.dense(), build._some(inputs[site.name], seed=3)
        assert dense.w_gate is not None
        linear = nn.functional.linear
        h = nn.functional.silu(linear(x, dense.w_gate, dense.b_gate)) * linear(x, dense.w_up, dense.b_up)
        fires = h.abs() > 0.01 * h.abs().amax(-1, keepdim=True)
        found = dense.w_gate if cluster == "weights" else fires.T.float()
        rows[site.name] = found.detach().clone()
    convert(model, batches, cluster=cluster, seed=3)
    for name, layer in moe_layers(model).items():
        assert torch.equal(
            layer.permutation, slots(partition(rows[name], layer.experts, seed=3), layer.experts)
        )


def test_another_seed_gives_another_partition():
    model, batches = model_and_batches()
    convert(model, batches)
    again, _ = model_and_batches()
    convert(again, batches, seed=1)
    layers = zip(moe_layers(model).values(), moe_layers(again).values(), strict=True)
    assert any(not torch.equal(a.permutation, b.permutation) for a, b in layers)


def test_the_users_random_numbers_are_not_touched():
    model, batches = model_and_batches()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(model, batches, budget=0.9)
    assert torch.equal(torch.rand(3), expected)


def test_routers_are_fitted_on_what_the_dense_model_computes(monkeypatch):
    model, batches = model_and_batches("bert")
    clean = collect_inputs(model, find_ffns(model), batches, max_tokens=100)
    seen: list[Tensor] = []
    fit = build.fit_router_
    monkeypatch.setattr(
        build, "fit_router_", lambda layer, x, *a, **k: seen.append(x.clone()) or fit(layer, x, *a, **k)
    )
    convert(model, batches, tau=1.0)
    assert [x.tolist() for x in seen] == [x.tolist() for x in clean.values()]


def test_inputs_that_do_not_fit_together_come_in_passes_and_give_the_same_layers():
    states, passes = [], []
    for max_bytes in (2**30, 1):
        model, batches = model_and_batches("bert")
        runs: list[int] = []
        model.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        convert(model, batches, max_bytes=max_bytes)
        passes.append(len(runs))
        states.append(model.state_dict())
    assert passes[1] == passes[0] + 1, "of two layers each had its own"
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("skip", [True, False])
def test_padding_counts_as_tokens_where_it_is_not_skipped(skip):
    model, batches = model_and_batches("bert")
    mask = batches[0]["attention_mask"]
    assert int(mask.sum()) < mask.numel()
    report = convert(model, batches, skip_padding=skip)
    assert report.tokens == (int(mask.sum()) if skip else mask.numel())


def test_partitions_begin_as_often_as_asked(monkeypatch):
    given = []

    def noted(rows, experts, **settings):
        given.append(settings)
        return partition(rows, experts, **settings)

    partition = build.partition
    monkeypatch.setattr(build, "partition", noted)
    convert(*model_and_batches(), restarts=3, seed=5)
    assert [(one["restarts"], one["seed"]) for one in given] == [(3, 5)] * 2


def test_a_budget_is_met_and_reported():
    model, batches = model_and_batches("bert")
    report = convert(model, batches, budget=0.8)
    measured = cost(model, batches)
    assert 0 < report.tau <= 1
    assert measured.executed <= 0.8 * measured.dense
    assert {layer.gate.tau for layer in moe_layers(model).values()} == {report.tau}
    assert report.budget == 0.8


def test_without_a_budget_tau_is_the_one_given():
    model, batches = model_and_batches()
    report = convert(model, batches, tau=0.25)
    assert report.tau == 0.25
    assert {layer.gate.tau for layer in moe_layers(model).values()} == {0.25}


def test_the_report_says_what_each_layer_does():
    model, batches = model_and_batches()
    site_inputs = collect_inputs(model, find_ffns(model), batches, max_tokens=100)
    dense = {site.name: site.dense() for site in find_ffns(model)}
    kept = {name: ffn(site_inputs[name]) for name, ffn in dense.items()}
    report = convert(model, batches, tau=0.5)
    for row in report.layers:
        layer, x, y = moe_layers(model)[row.name], site_inputs[row.name], kept[row.name]
        assert (row.d, row.f, row.experts, row.expert_size, row.act, row.gated) == (
            24,
            60,
            12,
            5,
            "silu",
            True,
        )
        assert row.share == pytest.approx(layer.mask(x).float().mean().item())
        assert row.error == pytest.approx(((layer(x) - y).norm() / y.norm()).item(), rel=1e-4)
        assert 0 < row.share < 1
        assert 0 < row.error < 2
    assert report.tokens == len(site_inputs["0.inner"]) == 14
    assert list(report.seconds) == ["find", "inputs", "partition", "routers", "judge"]


def test_the_report_prints_as_an_aligned_table():
    model, batches = model_and_batches()
    lines = str(convert(model, batches, budget=0.9)).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "12 x 5" in lines[1]
    assert "silu GLU" in lines[1]
    assert lines[-2].startswith("all, worst error")
    assert "90.0% of the dense FLOPs" in lines[-1]


def test_the_report_is_json_also_where_a_router_has_no_r2():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight.data.zero_()  # all norms equal: nothing for a router to explain
    report = convert(model, [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))], expert_size=2)
    assert math.isnan(report.layers[0].r2)
    assert "nan" in str(report)
    data = json.loads(report.to_json())
    assert data["layers"][0]["r2"] is None
    assert data["layers"][0]["name"] == "0"
    assert {"tau", "budget", "tokens", "seconds", "share", "error"} <= data.keys()


def test_averages_of_the_report_are_weighted_by_weights():
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, f), nn.ReLU(), nn.Linear(f, 8)) for f in (16, 48)),
    )
    report = convert(
        model, [torch.randn(64, 8, generator=torch.Generator().manual_seed(0))], expert_size=4, tau=0.5
    )
    small, large = report.layers
    assert report.share == pytest.approx((small.share + 3 * large.share) / 4)
    assert report.r2 == pytest.approx((small.r2 + 3 * large.r2) / 4)
    assert report.error == max(small.error, large.error)


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


@pytest.mark.parametrize("cluster", ["weights", "activity"])
def test_neurons_are_looked_at_on_tokens_of_all_batches(monkeypatch, cluster):
    monkeypatch.setattr(build, "LOOKED_AT", 40)
    seen, activity = [], build._activity
    monkeypatch.setattr(build, "_activity", lambda dense, some: seen.append(some) or activity(dense, some))
    model = TINY["user glu"].model()
    near, far = (torch.full((1, 200, 24), value) for value in (0.0, 100.0))
    inputs = []
    first = find_ffns(model)[0].first
    hook = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    built = []
    real = recipe._judge
    monkeypatch.setattr(recipe, "_judge", lambda one: built.append(one.sample) or real(one))
    convert(model, [near, far], cluster=cluster)
    hook.remove()
    of_near, of_far = inputs[:2]
    for some in (seen[0] if seen else built[0], built[0]):
        assert len(some) == 40
        counts = [
            sum(bool((row == rows.flatten(0, -2)).all(-1).any()) for row in some)
            for rows in (of_near, of_far)
        ]
        assert min(counts) > 10
    assert len(seen) == (2 if cluster == "activity" else 0)


def test_a_filter_leaves_the_others_dense():
    model, batches = model_and_batches("t5")
    convert(model, batches, filter=lambda name: name.startswith("encoder."))
    assert list(moe_layers(model)) == [TINY["t5"].names[0]]


def test_experts_may_be_counted_instead_of_sized():
    model, batches = model_and_batches()
    assert [row.expert_size for row in convert(model, batches, expert_size=None, experts=6).layers] == [
        10,
        10,
    ]


def test_the_default_expert_has_32_neurons():
    assert ConvertConfig().experts_of(3072) == 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_keep_the_models_dtype(dtype):
    model, batches = model_and_batches()
    convert(model.to(dtype), [batches[0].to(dtype)], tau=0.1)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_training_and_frozen_flags_stay():
    model, batches = model_and_batches()
    model[0].train()
    model[1].requires_grad_(False)
    convert(model, batches, budget=0.9)
    first, second = moe_layers(model).values()
    assert (first.training, second.training) == (True, False)
    assert first.w_up.requires_grad
    assert not second.w_up.requires_grad


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


def test_there_is_nothing_to_restore_in_a_dense_model():
    with pytest.raises(ValueError, match="nothing to restore: no FFN of this Sequential is converted"):
        restore_(TINY["user glu"].model())


def raising(error: type[BaseException], after: int, original: Callable) -> Callable:
    """The original for the first calls, then an error once it has done its work."""
    calls = count()

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) >= after:
            raise error("injected")
        return result

    return wrapped


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
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
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


class Caller(nn.Module):
    """Calls its FFN as the function says."""

    def __init__(self, call: Callable):
        super().__init__()
        self.mlp, self.call = Named(), call

    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(self.mlp, x)


class Named(UserFFN):
    """An FFN whose input has another name, and that takes more than it needs."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states) * scale


def rows() -> Tensor:
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("goal", [{"tau": 0.0}, {"budget": 0.9}])
def test_an_ffn_may_be_called_by_keyword(goal):
    model = Caller(lambda mlp, x: mlp(hidden_states=x)).eval()
    before = model(rows())
    convert(model, [rows()], **goal)
    with tau(model, 0.0):
        torch.testing.assert_close(model(rows()), before, rtol=1e-4, atol=1e-5)
    assert record(model)["mlp"].tokens == 18


def record(model: nn.Module) -> dict:
    with record_masks(model) as seen:
        model(rows())
    return seen.layers


def test_an_ffn_that_is_called_as_no_layer_can_be_leaves_the_model_as_it_was():
    model = Caller(lambda mlp, x: mlp(x, 2.0)).eval()
    before = fingerprint(model)
    with pytest.raises(NotImplementedError, match=r"does not run with MoE layers.*TypeError.*filter="):
        convert(model, [rows()])
    assert fingerprint(model) == before


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


def test_inference_mode_around_it_changes_nothing():
    model, batches = model_and_batches()
    with torch.inference_mode():
        convert(model, batches)
    twin, _ = model_and_batches()
    convert(twin, batches)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("step", [sadmoe.quantize_experts_, restore_, "dequantize", "load", "load_adapter"])
def test_what_is_made_in_inference_mode_can_be_trained_later(step, tmp_path):
    model, batches = model_and_batches()
    convert(model, batches)
    if step == "dequantize":
        sadmoe.quantize_experts_(model)
        step = sadmoe.dequantize_experts_
    elif isinstance(step, str):
        save, load = (
            (sadmoe.save, sadmoe.load) if step == "load" else (sadmoe.save_adapter, sadmoe.load_adapter)
        )
        save(model, tmp_path / "saved")
        model, _ = model_and_batches()
        step = partial(load, path=tmp_path / "saved")
    with torch.inference_mode():
        step(model)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


def test_hooks_that_will_not_run_are_warned_of():
    tiny = TINY["llama"]
    model, other = tiny.model(), tiny.model()
    config = ConvertConfig(expert_size=6, router=RouterConfig(steps=1))
    mlp = model.get_submodule(find_ffns(model)[0].name)
    handle = mlp.register_forward_hook(lambda module, args, output: output * 0)
    mlp.down_proj.register_forward_pre_hook(lambda module, args: None)
    name = find_ffns(model)[0].name
    with pytest.warns(UserWarning, match=rf"^{name}, {name}.down_proj: their hooks will not run"):
        convert_(model, [tiny.batch()], config, progress=False)
    restore_(model)
    assert list(mlp._forward_hooks.values())
    handle.remove()
    other.register_forward_hook(lambda *_: None)  # of what stays
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_(other, [tiny.batch()], config, progress=False)
