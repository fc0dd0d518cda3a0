"""The routers' regression in a loop of one's own."""

import pytest
import sadmoe
import torch
from converted import converted, random_layer, random_rows
from sadmoe import moe_layers
from tiny_models import TINY, call, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")


def rows_seen(model, batch) -> dict[str, torch.Tensor]:
    """What enters each layer, padding included."""
    seen, handles = {}, []
    for name, layer in sadmoe.moe_layers(model).items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].detach().flatten(0, -2)})
            )
        )
    with torch.no_grad():
        call(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def test_a_mask_alone_is_no_batch():
    model, batch = converted("bert"), tokens()
    with sadmoe.RouterLoss(model) as routers, torch.no_grad():
        call(model, batch)
        with pytest.raises(
            TypeError, match=r'batch is a bool tensor.*: give it as the "attention_mask" of a dict'
        ):
            routers(torch.ones(2, 7, dtype=torch.bool))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_it_is_what_the_routers_leave_unexplained_on_real_tokens(power):
    model, batch = converted("bert"), tokens()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 5:] = 0
    real = batch["attention_mask"].bool().flatten()
    expected = []
    for name, rows in rows_seen(model, batch).items():
        layer = sadmoe.moe_layers(model)[name]
        targets = layer.expert_norms(rows[real]).double() ** power
        errors = layer.router(rows[real]).double() - targets
        expected.append(errors.square().sum() / (targets - targets.mean()).square().sum())
    with sadmoe.RouterLoss(model, target_power=power) as routers:
        call(model, batch)
        found = routers(batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-4, atol=0)
        call(model, batch)
        assert routers() != found, "padding counts where no batch says what it is"


def test_without_a_power_each_router_keeps_its_own():
    model, batch = converted("bert"), TINY["bert"].batch()
    layers = moe_layers(model).values()
    for layer in layers:
        layer.router.target_power = 0.5
    losses = []
    for settings in ({}, {"target_power": 0.5}, {"target_power": torch.tensor(1.0)}):
        with torch.no_grad(), sadmoe.RouterLoss(model, **settings) as loss:
            model(**batch)
            losses.append(loss(batch).item())
        assert {layer.router.target_power for layer in layers} == {0.5}, "it was measured alone"
    assert losses[0] == losses[1] != losses[2]
    with sadmoe.RouterLoss(model, target_power=torch.tensor(1.0)) as loss:
        model(**batch)
        loss(batch).backward()
    assert [type(layer.router.target_power) for layer in layers] == [float] * 2
    assert {layer.router.target_power for layer in layers} == {1.0}, "they are trained for it"


def test_its_gradient_reaches_the_routers_alone():
    model = converted("bert").train()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    with sadmoe.RouterLoss(model) as routers:
        call(model, tokens())
        routers().backward()
        assert all(v.grad is not None and v.grad.any() for v in routers.weights)
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name in asked if ".router." in name}
    assert asked == {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_loop_with_it_fits_the_routers():
    model, batch = converted("bert"), TINY["bert"].batch()
    with sadmoe.RouterLoss(model) as routers, sadmoe.tau(model, 0.0), torch.no_grad():
        optimizer, losses = torch.optim.AdamW(routers.weights, lr=1e-2), []
        for _ in range(60):
            call(model, batch)
            with torch.enable_grad():
                loss = routers(batch)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_passes_are_gathered_and_those_forgotten_do_not_count():
    model, (one, two) = converted("bert"), (tokens(), tokens() | {"input_ids": tokens()["input_ids"].flip(0)})
    with sadmoe.RouterLoss(model) as routers:
        call(model, one)
        alone = routers()
        call(model, two)
        routers.forget()
        call(model, one)
        assert torch.equal(routers(), alone)
        call(model, one)
        call(model, one)
        torch.testing.assert_close(routers(), alone, rtol=1e-5, atol=0)  # twice the same


def test_a_pass_that_checkpointing_runs_again_counts_once():
    model = converted("bert")
    (layer, *_) = sadmoe.moe_layers(model).values()
    x = torch.randn(7, layer.shape.d, requires_grad=True)
    with sadmoe.RouterLoss(layer) as routers:
        y = checkpoint(layer, x, use_reentrant=False)
        once = routers()
        y.sum().backward()
        with pytest.raises(RuntimeError, match="has seen no forward pass"):
            routers()
        layer(x)
        assert torch.equal(routers(), once)


@pytest.mark.parametrize("inside", [False, True])
def test_of_what_autocast_gave_it_is_computed_without(inside):
    (layer, *_) = sadmoe.moe_layers(converted("bert")).values()
    rows = torch.randn(40, layer.shape.d, generator=torch.Generator().manual_seed(1)).bfloat16()
    with sadmoe.RouterLoss(layer) as routers:
        layer(rows.float())
        plain = routers()
        with torch.autocast("cpu", torch.bfloat16):
            layer(rows)
            mixed = routers() if inside else None
        mixed = routers() if mixed is None else mixed  # as a hook outside, where what was kept is bfloat16
        mixed.backward()
    assert torch.equal(mixed, plain)


def test_layers_whose_norms_are_all_equal_are_left_out():
    model = converted("bert")
    first, second = sadmoe.moe_layers(model).values()
    with sadmoe.RouterLoss(model) as routers, torch.no_grad():
        call(model, tokens())
        first.w_down.zero_()  # silent
        both = routers()
        with sadmoe.RouterLoss(second) as alone:
            call(model, tokens())
            expected = alone()
        call(model, tokens())
        torch.testing.assert_close(routers(), expected, rtol=1e-5, atol=0)
        assert both.isfinite()
        second.w_down.zero_()
        call(model, tokens())
        with torch.enable_grad():
            loss = routers()
        assert loss == 0
        loss.backward()
        assert all(v.grad is None or not v.grad.any() for v in routers.weights)


def test_what_cannot_be_is_named():
    model = converted("bert")
    with pytest.raises(ValueError, match=r"target_power must be in \(0, 2\], got 0"):
        sadmoe.RouterLoss(model, target_power=0.0)
    with pytest.raises(ValueError, match="has no converted layer"):
        sadmoe.RouterLoss(TINY["bert"].model())
    with pytest.raises(ValueError, match="model: is compiled"):
        sadmoe.RouterLoss(torch.compile(model))
    with pytest.raises(RuntimeError, match="enter RouterLoss before the model runs"):
        sadmoe.RouterLoss(model)()
    with sadmoe.RouterLoss(model) as routers:
        with pytest.raises(RuntimeError, match="has seen no forward pass"):
            routers()
        with pytest.raises(RuntimeError, match="entered already"):
            routers.__enter__()


def test_an_entry_that_fails_leaves_no_hook_and_no_flag():
    model = converted("bert")
    for v in (routers := sadmoe.RouterLoss(model)).weights:
        v.requires_grad_(False)
    with torch.inference_mode():
        routers.weights.append(torch.zeros(1))  # which can never ask for a gradient
    with pytest.raises(RuntimeError, match="inference tensor"), routers:
        pass
    del routers.weights[-1]
    assert not any(v.requires_grad for v in routers.weights)
    assert not any(layer._forward_pre_hooks for layer in sadmoe.moe_layers(model).values())
    with routers:
        assert all(v.requires_grad for v in routers.weights)


def test_routers_that_no_pass_reached_predict_what_they_did():
    model, batch = converted("t5"), TINY["t5"].batch()
    with sadmoe.RouterLoss(model, target_power=0.5) as routers:
        model.encoder(input_ids=batch["input_ids"])
        routers()
    powers = {name.split(".")[0]: m.router.target_power for name, m in moe_layers(model).items()}
    assert powers == {"encoder": 0.5, "decoder": 1.0}


def test_what_entered_a_layer_is_kept_though_the_model_writes_over_it():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = random_layer()

        def forward(self, x):
            y = 1 * x
            y += self.ffn(y)
            return y

    model, rows = InPlace(), random_rows(40)
    with sadmoe.RouterLoss(model) as in_place, torch.no_grad():
        model(rows)
        found = in_place()
    with sadmoe.RouterLoss(model.ffn) as alone, torch.no_grad():
        model.ffn(rows)
        assert torch.equal(found, alone())
