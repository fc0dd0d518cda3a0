import copy
import dataclasses
import json
import math
import warnings
from functools import partial

import pytest
import sadmoe
import sadmoe.convert.build as build
import sadmoe.convert.recipe as recipe
import torch
from conversions import Caller, convert, model_and_batches, record, rows
from sadmoe import reference
from sadmoe.convert import ConvertConfig, convert_, restore_
from sadmoe.convert.report import LayerReport
from sadmoe.cost import cost
from sadmoe.dial import tau
from sadmoe.ffn import find_ffns, moe_layers
from sadmoe.partition import partition, slots
from sadmoe.routers import RouterConfig
from sites import collected, first_modules
from tiny_models import TINY, UserFFN, call
from torch import Tensor, nn
from torch.utils.data import DataLoader


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5 v1.1", "vit", "albert", "user glu", "torch encoder"])
def test_at_tau_zero_the_converted_model_is_the_dense_one(name):
    model, batches = model_and_batches(name)
    before = call(model, batches[0])
    report = convert(model, batches)
    assert list(moe_layers(model)) == list(TINY[name].names) == [row.name for row in report.layers]
    # the same sums in another order: a few units in the last place, grown by two layers
    torch.testing.assert_close(call(model, batches[0]), before, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("name", ["user glu", "bert", "user module"])
@pytest.mark.parametrize("cluster", ["weights", "activity"])
def test_experts_are_the_partition_of_what_the_config_names(cluster, name):
    model, batches = model_and_batches(name)
    sites, rows = find_ffns(model), {}
    inputs = collected(model, first_modules(model), batches, max_tokens=100, seed=3)
    for site in sites:
        dense, x = site.dense(), build._sampled(inputs[site.name], seed=3)
        act, up = reference.ACTIVATIONS[dense.act], nn.functional.linear(x, dense.w_up, dense.b_up)
        gated = dense.w_gate is not None
        assert gated == (name == "user glu")
        h = act(nn.functional.linear(x, dense.w_gate, dense.b_gate)) * up if gated else act(up)
        fires = (h.abs() > 0.01 * h.abs().amax(-1, keepdim=True)).float()
        adds = h.abs() * dense.w_down.norm(dim=1)
        adds = (adds / adds.square().mean(-1, keepdim=True).sqrt()).sqrt()
        activity = fires if dense.act in ("relu", "relu2") else adds
        found = activity.T if cluster == "activity" else dense.w_gate if gated else dense.w_up
        rows[site.name] = found.detach().clone()
    convert(model, batches, cluster=cluster, seed=3)
    for name, layer in moe_layers(model).items():
        assert torch.equal(
            layer.permutation, slots(partition(rows[name], layer.experts, seed=3), layer.experts)
        )


def test_outputs_that_overflow_are_no_small_error():
    model = nn.Sequential(UserFFN()).half().eval()
    with torch.no_grad():
        model[0].contract.weight.fill_(300.0)
    batch = torch.full((8, 24), 60.0, dtype=torch.float16)
    assert model(batch).isinf().any()
    assert convert(model, [batch]).error == math.inf


def test_another_seed_gives_another_partition():
    model, batches = model_and_batches()
    convert(model, batches)
    again, _ = model_and_batches()
    convert(again, batches, seed=1)
    layers = zip(moe_layers(model).values(), moe_layers(again).values(), strict=True)
    assert any(not torch.equal(a.permutation, b.permutation) for a, b in layers)


def test_no_more_tokens_than_asked_for_make_a_router():
    model, batches = model_and_batches()
    assert convert(model, batches, max_tokens=7).tokens == 7


def test_the_users_random_numbers_are_not_touched_and_a_loader_shuffles_by_the_seed():
    rows = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))

    def taken(user: int, seed: int) -> list[int]:
        """The rows in the order in which they were asked for."""
        model, order = TINY["user glu"].model(), []
        loader = DataLoader(range(16), shuffle=True, collate_fn=lambda i: order.append(i[0]) or rows[i])
        torch.manual_seed(user)
        expected = torch.rand(3)
        for step in (convert, sadmoe.fit_routers_):
            torch.manual_seed(user)
            if step is convert:
                convert(model, loader, seed=seed, max_tokens=8)
            else:
                step(model, loader, RouterConfig(width=8, steps=3, seed=seed), max_tokens=8)
            assert torch.equal(torch.rand(3), expected)
        return order

    assert taken(user=5, seed=0) == taken(user=6, seed=0) != taken(user=5, seed=1)


def test_routers_are_fitted_on_what_the_dense_model_computes(monkeypatch):
    model, batches = model_and_batches("bert")
    clean = collected(model, first_modules(model), batches, max_tokens=100)
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


def test_partitions_are_drawn_by_the_seed(monkeypatch):
    given = []

    def noted(rows, experts, **settings):
        given.append(settings)
        return partition(rows, experts, **settings)

    partition = build.partition
    monkeypatch.setattr(build, "partition", noted)
    convert(*model_and_batches(), seed=5)
    assert [one["seed"] for one in given] == [5] * 2


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
    site_inputs = collected(model, first_modules(model), batches, max_tokens=100)
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
    (total,) = (i for i, line in enumerate(lines) if line.startswith("all, worst error"))
    assert len({len(line) for line in lines[: total + 1]}) == 1
    assert "12 x 5" in lines[1]
    assert "silu GLU" in lines[1]
    assert "90.0% of the converted layers' dense FLOPs" in lines[total + 1]


def test_routers_that_are_worse_than_a_mean_are_told():
    model, batches = model_and_batches()
    report = convert(model, batches)
    bad, good = (dataclasses.replace(report.layers[0], r2=r2) for r2 in (-0.1, 0.9))
    assert "R² below 0" not in str(dataclasses.replace(report, layers=(good, good)))
    told = str(dataclasses.replace(report, layers=(good, bad))).splitlines()[-1]
    assert told.startswith("the routers of 1 of 2 layers predict worse than a mean would")


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


def test_weights_of_a_layer_are_those_of_its_matrices():
    row = LayerReport(
        "a", d=8, f=20, d_out=24, experts=5, expert_size=4, act="relu", gated=True, r2=0, share=1, error=0
    )
    assert row.weights == 2 * 20 * 8 + 20 * 24
    assert dataclasses.replace(row, gated=False).weights == 20 * 8 + 20 * 24


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


@pytest.mark.parametrize("goal", [{"tau": 0.0}, {"budget": 0.9}])
def test_an_ffn_may_be_called_by_keyword(goal):
    model = Caller(lambda mlp, x: mlp(hidden_states=x)).eval()
    before = model(rows())
    convert(model, [rows()], **goal)
    with tau(model, 0.0):
        torch.testing.assert_close(model(rows()), before, rtol=1e-4, atol=1e-5)
    assert record(model)["mlp"].tokens == 18


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
    model.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=rf"^{name}: their hooks are gone with the converted layers"):
        restore_(model)
    assert list(mlp._forward_hooks.values())
    handle.remove()
    other.register_forward_hook(lambda *_: None)  # of what stays
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_(other, [tiny.batch()], config, progress=False)


def test_a_way_back_that_fails_leaves_no_weights_and_modes_beside_the_layers():
    model, batch = TINY["gpt2"].model().eval(), TINY["gpt2"].batch()
    dense = copy.deepcopy(model)
    convert_(model, [batch], ConvertConfig(expert_size=4, router=RouterConfig(steps=1)), progress=False)
    model.train()
    last = list(moe_layers(model).values())[-1]
    permutation = last.permutation.clone()
    last.permutation.zero_()
    with pytest.raises(ValueError, match="permutation"):
        restore_(model)
    first = next(iter(moe_layers(model).values()))
    kept = [p for old in sadmoe.ffn.site_of(first).linears.values() for p in old.parameters()]
    assert kept
    assert all(p.is_meta for p in kept)
    last.permutation.copy_(permutation)
    model.eval()
    restore_(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(call(model, batch), call(dense, batch))
