import copy
import math
from dataclasses import replace

import pytest
import sadmoe
import torch
from converted import converted, random_layer, random_rows
from sadmoe import routers
from sadmoe.dial import converted_layers, set_tau
from sadmoe.gates import DynamicK
from sadmoe.routers import RouterConfig, fit_router_, fit_routers_
from sadmoe.training import Checkpoint
from sites import collected
from states import state
from tiny_models import TINY
from torch import nn
from torch.nn.utils import prune

QUICK = RouterConfig(width=32, steps=200, batch_tokens=128, lr=0.01)


def layer_of(**kw):
    return random_layer(**{"router_width": 32, **kw})


def r2(layer, x):
    norms = layer.expert_norms(x)
    with torch.no_grad():
        return 1 - ((layer.router(x) - norms).square().sum() / (norms - norms.mean()).square().sum()).item()


@pytest.mark.parametrize("kw", [{}, {"gated": True, "act": "silu"}, {"act": "gelu"}, {"d_out": 10}])
def test_a_router_learns_the_norms_of_tokens_it_never_saw(kw):
    layer, rows = layer_of(**kw), random_rows(4000)
    before = r2(layer, random_rows(500, seed=7))
    fit = fit_router_(layer, rows, QUICK)
    assert before < 0
    assert r2(layer, random_rows(500, seed=7)) > 0.3
    assert fit.r2 == pytest.approx(r2(layer, random_rows(500, seed=7)), abs=0.05)
    assert (fit.tokens, fit.held_out) == (3600, 400)


def test_a_target_power_makes_small_norms_matter_more():
    layer, rows, new = layer_of(), random_rows(4000), random_rows(500, seed=7)
    with torch.no_grad():
        layer.w_down[0] *= 30  # one expert outshines the others
    norms = layer.expert_norms(new)
    errors = []
    for power in (1.0, 0.5):
        fit = fit_router_(layer, rows, RouterConfig(width=32, steps=200, lr=0.01, target_power=power))
        with torch.no_grad():
            scores = layer.router(new)
        targets = norms**power
        unexplained = (scores - targets).square().sum() / (targets - targets.mean()).square().sum()
        assert fit.r2 == pytest.approx(1 - unexplained.item(), abs=0.05)
        assert fit.captured > 0.25
        relative = (scores ** (1 / power) - norms)[:, 1:].square().sum() / norms[:, 1:].var(0).sum() / 500
        errors.append(relative.item())
    assert errors[1] < 0.8 * errors[0]


def test_routers_that_are_fitted_again_predict_what_they_did():
    """Else the same tau would run other experts."""
    model, batch = converted("bert"), TINY["bert"].batch()
    layers = list(converted_layers(model).values())
    roots, as_before = RouterConfig(width=16, steps=20, target_power=0.5), RouterConfig(width=16, steps=20)
    wanted = fit_routers_(model, [batch], roots)
    assert fit_routers_(model, [batch], as_before) == wanted
    assert [layer.router.target_power for layer in layers] == [0.5, 0.5]
    assert "target_power=0.5" in repr(layers[0].router)
    assert fit_routers_(model, [batch], replace(roots, target_power=1.0)) != wanted
    assert [layer.router.target_power for layer in layers] == [1.0, 1.0]
    before = layers[0].router.v1.clone()
    with torch.no_grad():
        layers[1].w_down[0] = torch.inf
    with pytest.raises(ValueError, match=r"^encoder\.layer\.1\.intermediate: .*output norm is finite"):
        fit_routers_(model, [batch], roots)
    assert [layer.router.target_power for layer in layers] == [1.0, 1.0]
    assert torch.equal(layers[0].router.v1, before)


def test_a_checkpoint_says_what_routers_predict(tmp_path):
    batch, config = TINY["bert"].batch(), RouterConfig(width=16, steps=20, target_power=0.5)
    for _ in range(2):
        model = converted("bert")
        fit_routers_(model, [batch], config, checkpoint=Checkpoint(tmp_path))
        assert {layer.router.target_power for layer in converted_layers(model).values()} == {0.5}


def test_enough_width_overfits_a_small_set():
    layer, rows = layer_of(router_width=256), random_rows(60)
    fit_router_(layer, rows, RouterConfig(width=256, steps=1500, batch_tokens=60, lr=0.01, weight_decay=0.0))
    held_out = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:6]
    trained = torch.ones(60, dtype=torch.bool)
    trained[held_out] = False
    assert r2(layer, rows[trained]) > 0.999
    assert r2(layer, rows[held_out]) < 0.99


def test_the_reported_numbers_are_those_of_the_held_out_tokens():
    layer, rows = layer_of(), random_rows(500)
    fit = fit_router_(layer, rows, QUICK)
    held_out = rows[torch.randperm(500, generator=torch.Generator().manual_seed(0))[:50]]
    norms = layer.expert_norms(held_out)
    with torch.no_grad():
        scores = layer.router(held_out)
    assert fit.r2 == pytest.approx(r2(layer, held_out), abs=1e-5)
    assert fit.loss == pytest.approx((scores - norms).square().mean().item(), rel=1e-4)
    ratios = scores / scores.amax(-1, keepdim=True)
    tau = ratios.flatten().sort(descending=True).values[round(0.25 * ratios.numel()) - 1].item()
    mask = DynamicK(tau * (1 - 1e-6)).mask(scores)
    assert mask.float().mean() == pytest.approx(0.25, abs=0.01)
    energy = norms.square()
    assert fit.captured == pytest.approx((energy[mask].sum() / energy.sum()).item(), abs=0.01)
    assert mask.float().mean() < fit.captured < fit.captured_oracle <= 1


def test_training_changes_the_router_and_nothing_else():
    layer = layer_of().train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    rows = random_rows(300)
    copy, state = rows.clone(), torch.get_rng_state()
    fit_router_(layer, rows, QUICK)
    changed = [name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["router.v1", "router.v2"]
    assert torch.equal(rows, copy)
    assert torch.equal(torch.get_rng_state(), state)
    routers = set(layer.router.parameters())
    assert all(p.grad is None and p.requires_grad == (p not in routers) for p in layer.parameters())
    assert layer.training


def test_fitting_all_routers_changes_them_alone():
    model, batch = converted("bert"), TINY["bert"].batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_routers_(model, [batch], RouterConfig(width=16, steps=2))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith((".router.v1", ".router.v2"))}


def test_the_seed_picks_the_tokens_of_all_routers_too(monkeypatch):
    model, batches, taken = converted("bert"), [TINY["bert"].batch()], []
    fit = routers.fit_router_
    monkeypatch.setattr(
        routers, "fit_router_", lambda layer, x, *a, **k: taken.append(x) or fit(layer, x, *a, **k)
    )
    for seed in (0, 0, 1):
        fit_routers_(model, batches, RouterConfig(width=16, steps=1, seed=seed), max_tokens=5)
    first, again, other = (taken[i * len(taken) // 3] for i in range(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scores_of_zero_run_every_expert_in_the_report_too():
    scores = torch.tensor([[4.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    norms = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    runs = routers.REPORTED_SHARE * scores.numel()
    assert runs == 2  # of the five that a tau near 1 runs
    assert routers._captured(scores, norms) == pytest.approx(2 / 5)


def test_a_fit_that_is_interrupted_leaves_the_router_as_it_was(monkeypatch):
    layer = layer_of()
    before = [v.clone() for v in layer.router.parameters()]

    def interrupted(*args, **settings):
        assert not torch.equal(layer.router.v1, before[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(routers, "_judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_router_(layer, random_rows(300), RouterConfig(width=32, steps=2))
    assert all(torch.equal(*pair) for pair in zip(layer.router.parameters(), before, strict=True))


def test_the_result_depends_on_layer_inputs_and_config_alone():
    fitted = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        layer = layer_of()
        nn.init.normal_(layer.router.v1)  # what the router was before does not matter
        fit = fit_router_(layer, random_rows(300), RouterConfig(width=32, steps=20, seed=seed))
        fitted.append((layer.router.v1.clone(), layer.router.v2.clone(), fit))
    assert torch.equal(fitted[0][0], fitted[1][0])
    assert torch.equal(fitted[0][1], fitted[1][1])
    assert fitted[0][2] == fitted[1][2]
    assert not torch.equal(fitted[0][0], fitted[2][0])


def test_the_rate_falls_along_a_cosine_and_gradients_are_clipped(monkeypatch):
    layer, rates, norms, step = layer_of(), [], [], torch.optim.AdamW.step
    with torch.no_grad():
        layer.w_down[0] *= 1e3  # whose gradients would be long

    def noted(optimizer, *args):
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
        norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    fit_router_(layer, random_rows(300), RouterConfig(width=32, steps=10, lr=0.1))
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    assert max(norms) == pytest.approx(1, rel=1e-3)


def test_the_scale_of_inputs_and_experts_does_not_matter():
    """Bit for bit, for powers of two: the rate of learning needs no tuning to the model."""
    plain, scaled = layer_of(), layer_of()
    with torch.no_grad():
        scaled.w_up.div_(2**10)
        scaled.w_down.mul_(2**6)
    fit = fit_router_(plain, random_rows(300), QUICK)
    same = fit_router_(scaled, random_rows(300) * 2**10, QUICK)
    assert torch.equal(scaled.router.v1 * 2**10, plain.router.v1)
    assert torch.equal(scaled.router.v2, plain.router.v2 * 2**6)
    assert same.r2 == fit.r2


def test_a_bfloat16_layer_is_trained_in_float32():
    layer = layer_of(dtype=torch.bfloat16)
    fit = fit_router_(layer, random_rows(4000).bfloat16(), QUICK)
    assert layer.router.v1.dtype == layer.router.v2.dtype == torch.bfloat16
    assert fit.r2 > 0.5


def test_scores_are_never_negative_and_silent_experts_have_no_norm():
    layer = layer_of()
    with torch.no_grad():
        layer.b_up[2] = -1e3
    rows = random_rows(2000)
    assert (layer.expert_norms(rows)[:, 2] == 0).all()
    fit_router_(layer, rows, QUICK)
    with torch.no_grad():
        scores = layer.router(rows)
    assert (scores >= 0).all()
    assert scores[:, 2].mean() < 0.1 * scores.mean()


def test_a_dead_layer_has_no_r2_and_breaks_nothing():
    layer = layer_of()
    with torch.no_grad():
        layer.w_down.zero_()
    fit = fit_router_(layer, random_rows(100), QUICK)
    assert math.isnan(fit.r2)
    assert (fit.captured, fit.captured_oracle) == (1.0, 1.0)
    assert all(p.isfinite().all() for p in layer.router.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_training_works_and_is_the_same_inside_other_contexts(context):
    layers = [layer_of(), layer_of()]
    rows = random_rows(200)
    config = RouterConfig(width=32, steps=10)
    fit_router_(layers[0], rows, config)
    with context():
        fit_router_(layers[1], rows, config)
    assert torch.equal(layers[0].router.v2, layers[1].router.v2)


def test_rows_of_another_dtype_are_those_of_the_weights():
    layers = [layer_of(), layer_of()]
    rows, config = random_rows(200).bfloat16(), RouterConfig(width=32, steps=10)
    for layer, some in zip(layers, (rows, rows.float()), strict=True):
        fit_router_(layer, some, config)
    assert torch.equal(layers[0].router.v1, layers[1].router.v1)


def test_chunks_of_targets_make_no_difference(monkeypatch):
    whole, parts = layer_of(), layer_of()
    config = RouterConfig(width=32, steps=10)
    fit_router_(whole, random_rows(200), config)
    monkeypatch.setattr(routers, "ACTIVATIONS", 40 * 7)
    fit_router_(parts, random_rows(200), config)
    torch.testing.assert_close(parts.router.v2, whole.router.v2)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            torch.ones(10, 7),
            r"inputs must be floating point \[n, 24\] with n >= 2, got torch.float32 \[10, 7\]",
        ),
        (torch.ones(2, 5, 24), r"got torch.float32 \[2, 5, 24\]"),
        (torch.ones(1, 24), r"n >= 2, got torch.float32 \[1, 24\]"),
        (torch.ones(9, 24, dtype=torch.int64), r"floating point .* got torch.int64"),
        (torch.full((9, 24), torch.nan), "not every expert's output norm is finite"),
        (torch.full((9, 24), torch.inf), "not every expert's output norm is finite"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(inputs, text):
    layer = layer_of()
    before = layer.router.v1.clone()
    with pytest.raises(ValueError, match=text):
        fit_router_(layer, inputs)
    assert torch.equal(layer.router.v1, before)


def test_a_width_that_the_router_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"config.width is 64, .* has width 32: leave it out, or build .* router_width=64"
    ):
        fit_router_(layer_of(), random_rows(9), RouterConfig(width=64))
    fit_router_(layer_of(), random_rows(9), RouterConfig(steps=1))  # without one it is the router's own


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"target_power": 0.0}, r"target_power must be in \(0, 2\], got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"lr": float("inf")}, "lr must be finite, got inf"),
    ],
)
def test_a_config_out_of_range_is_refused(kw, text):
    with pytest.raises(ValueError, match=text):
        RouterConfig(**kw)


def test_routers_of_a_model_keep_their_widths():
    model, batch = converted("bert", router_width=4), TINY["bert"].batch()
    first, last = converted_layers(model).values()
    last.router = type(last.router)(last.router.v1.shape[1], last.experts, 6)
    before = [layer.router.v1.clone() for layer in (first, last)]
    fit_routers_(model, [batch], RouterConfig(steps=2))
    assert [len(layer.router.v1) for layer in (first, last)] == [4, 6]
    assert not any(torch.equal(layer.router.v1, v1) for layer, v1 in zip((first, last), before, strict=True))


def test_the_routers_of_a_converted_model_are_fitted_at_tau_zero():
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, 1.0)
    layers = converted_layers(model)
    config = RouterConfig(width=16, steps=50)
    fits = fit_routers_(model, [batch], config)
    assert {layer.gate for layer in layers.values()} == {DynamicK(1.0)}
    assert list(fits) == list(layers)

    expected = converted("bert")
    for name, x in collected(expected, converted_layers(expected), [batch], max_tokens=100).items():
        assert fit_router_(converted_layers(expected)[name], x, config) == fits[name]
        assert torch.equal(converted_layers(expected)[name].router.v2, layers[name].router.v2)


def test_a_compiled_model_that_has_run_gives_the_routers_their_inputs():
    model, batch = converted("bert"), TINY["bert"].batch()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), sadmoe.tau(model, 0.0):
        compiled(**batch)
    config = RouterConfig(steps=2, width=16)
    fits = [sadmoe.fit_routers_(one, [batch], config) for one in (plain, compiled)]
    assert [list(fit) for fit in fits] == [list(sadmoe.moe_layers(plain))] * 2
    for one, other in zip(*(sadmoe.moe_layers(m).values() for m in (plain, model)), strict=True):
        assert torch.equal(one.router.v1, other.router.v1)


def test_a_dense_model_has_no_routers():
    with pytest.raises(ValueError, match="no converted layer"):
        fit_routers_(TINY["bert"].model(), [TINY["bert"].batch()])


def test_inputs_that_cannot_be_used_leave_every_router_as_it_was(tmp_path):
    """Also those that were fitted, or loaded, before the failure."""
    model, batch = converted("bert"), TINY["bert"].batch()
    last = list(converted_layers(model).values())[-1]
    with torch.no_grad():
        last.w_down[0, 0, 0] = torch.nan
    before = {name: layer.router.v2.clone() for name, layer in converted_layers(model).items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="not every expert's output norm is finite"):
            fit_routers_(model, [batch], RouterConfig(width=16, steps=2), checkpoint=Checkpoint(tmp_path))
        assert list(tmp_path.iterdir())
        for name, layer in converted_layers(model).items():
            assert torch.equal(layer.router.v2, before[name])


def test_routers_that_the_filter_refuses_stay_as_they_are():
    model, batch = converted("bert"), TINY["bert"].batch()
    before = state(model)
    _, second = converted_layers(model)
    fits = fit_routers_(model, [batch], RouterConfig(steps=2, target_power=0.5), filter=second.__eq__)
    assert list(fits) == [second]
    assert {name for name, value in state(model).items() if not torch.equal(value, before[name])} == {
        f"{second}.router.{part}" for part in ("v1", "v2")
    }
    powers = [layer.router.target_power for layer in converted_layers(model).values()]
    assert powers == [1.0, 0.5]


def test_nothing_is_trained_that_inputs_were_computed_by():
    layer, before = layer_of(), nn.Linear(24, 24)
    rows = before(random_rows(60))
    wanted, other = copy.deepcopy(layer), RouterConfig(width=32, steps=3)
    fit = fit_router_(layer, rows, other)
    assert fit == fit_router_(wanted, rows.detach(), other)
    assert before.weight.grad is None


def test_inputs_may_be_in_double_precision():
    layer, rows = layer_of(), random_rows(60)
    wanted, config = copy.deepcopy(layer), RouterConfig(width=32, steps=3)
    assert fit_router_(layer, rows.double(), config) == fit_router_(wanted, rows, config)


def test_routers_that_are_made_of_other_tensors_are_not_fitted():
    model = converted("bert")
    name, layer = next(iter(converted_layers(model).items()))
    prune.l1_unstructured(layer.router, "v1", 0.2)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name}.router.v1 is made of other tensors.*prune.remove"):
        fit_routers_(model, [TINY["bert"].batch()], RouterConfig(steps=2))
    with pytest.raises(ValueError, match=r"the layer.router.v1 is made of other tensors"):
        fit_router_(layer, random_rows(9))
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
