"""Fine-tuning of converted layers one at a time."""

import copy

import pytest
import torch
from sadmoe import layerwise
from sadmoe.convert import ConvertConfig, convert_
from sadmoe.dial import converted_layers
from sadmoe.ffn import find_ffns, swap_activations_
from sadmoe.finetune import FinetuneConfig
from sadmoe.gates import DynamicK
from sadmoe.layerwise import finetune_layers_
from sadmoe.routers import RouterConfig
from states import state
from tiny_models import TINY, D, Residual
from torch import Tensor, nn


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 60), nn.GELU(), nn.Linear(60, D))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 40, D, generator=generator) for _ in range(2)]


def pair(act: str | None = "relu") -> tuple[nn.Module, nn.Module]:
    """A dense model, and the same converted, its activations swapped."""
    torch.manual_seed(0)
    dense = nn.Sequential(Residual(ffn()), Residual(ffn())).eval()
    model = copy.deepcopy(dense)
    if act is not None:
        swap_activations_(model, find_ffns(model), act)
    config = ConvertConfig(expert_size=6, router=RouterConfig(steps=1, width=4), tau=0.2)
    convert_(model, data(), config, progress=False)
    return dense, model


def test_float16_inputs_of_large_norm_are_judged_in_float32():
    dense, model = pair()
    for one in (dense, model):
        for block in one.half():
            block.norm.weight.data.fill_(60)  # rows whose squared norms are beyond what float16 holds
    with pytest.warns(UserWarning, match="float16"):
        fits = finetune_layers_(
            model, [data()[0].half()], short(steps=1, lr=1e-6), teacher=dense, batch_tokens=64, progress=False
        )
    assert all(fit.error > 0 for fit in fits)


def test_a_teacher_of_another_dtype_will_do():
    dense, model = pair()
    wide = copy.deepcopy(model)
    fits = tune(dense, model, short(steps=3))
    teacher, batches = copy.deepcopy(dense).double(), [x.double() for x in data()]
    others = finetune_layers_(wide, batches, short(steps=3), teacher=teacher, batch_tokens=64, progress=False)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert [fit.error for fit in others] == pytest.approx([fit.error for fit in fits], rel=1e-3)


def test_a_frozen_layer_is_measured_alone():
    dense, model = pair()
    first, second = converted_layers(model).values()
    first.requires_grad_(False)
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in converted_layers(model).items()}
    fits = tune(dense, model, short(steps=3))
    assert [len(fit.history) for fit in fits] == [0, 3]
    assert fits[0].error > 0
    assert "0 updates" in str(fits[0])
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in before["0.inner"].items())
    assert not torch.equal(second.w_up, before["1.inner"]["w_up"])
    second.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of a converted layer requires a gradient"):
        tune(dense, model, short(steps=3))


def short(**kw) -> FinetuneConfig:
    return FinetuneConfig(**({"steps": 40, "lr": 5e-3} | kw))


def tune(dense: nn.Module, model: nn.Module, config: FinetuneConfig, **kw):
    return finetune_layers_(model, data(), config, teacher=dense, batch_tokens=64, progress=False, **kw)


def missed(dense: nn.Module, model: nn.Module, tau: float) -> tuple[float, float]:
    """The mean relative error of the first converted layer, and its executed share, on all its inputs."""
    x = dense[0].norm(data()[0]).flatten(0, 1)
    layer = converted_layers(model)["0.inner"]
    gate, layer.gate = layer.gate, DynamicK(tau, true_norms=True)
    with torch.no_grad():
        t, y = dense[0].inner(x), layer(x)
        share = layer.gate.mask(layer.expert_norms(x)).float().mean().item()
    layer.gate = gate
    scale = x.square().sum(-1) + t.square().sum(-1)
    return ((y - t).square().sum(-1) / scale).mean().item(), share


def test_each_layer_comes_closer_to_its_dense_ffn_while_it_skips_experts():
    dense, model = pair()
    before, _ = missed(dense, model, 0.2)
    fits = tune(dense, model, short(tau=0.2, alpha=0.0, steps=150))
    assert [fit.name for fit in fits] == ["0.inner", "1.inner"]
    after, share = missed(dense, model, 0.2)
    assert after < 0.7 * before
    assert after < fits[0].error < 1.5 * after  # of tokens that it was not trained on
    assert fits[0].share == pytest.approx(share, rel=0.05)
    assert all(0 < fit.share < 1 and len(fit.history) == 150 for fit in fits)


def test_the_penalty_lowers_the_executed_share():
    shares = []
    for alpha in (0.0, 1.0):
        dense, model = pair()
        shares.append(
            sum(fit.share for fit in tune(dense, model, short(tau=0.2, share=0.1, alpha=alpha, steps=120)))
        )
    assert shares[1] < 0.9 * shares[0]


def test_a_layer_that_is_already_right_stays_right():
    dense, model = pair(act=None)
    fits = tune(dense, model, short(tau=0.0, alpha=0.0, lr=1e-4))
    assert all(fit.error < 1e-4 and fit.share == 1 for fit in fits)


def test_only_experts_are_trained_and_gates_come_back():
    dense, model = pair()
    before, teacher = state(model), state(dense)
    tune(dense, model, short())
    for name, value in state(model).items():
        trained = any(part in name for part in ("w_up", "w_down", "b_up", "b_out"))
        assert torch.equal(value, before[name]) != trained, name
    assert all(torch.equal(value, teacher[name]) for name, value in state(dense).items())
    for layer in converted_layers(model).values():
        assert layer.gate == DynamicK(0.2)
        assert not layer.norms_hooks
        assert not layer.router.v1.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_layers_whatever_the_global_random_state():
    states = []
    for noise, seed in ((3, 0), (4, 0), (3, 1)):
        dense, model = pair()
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        tune(dense, model, short(steps=5, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_failure_in_a_later_layer_leaves_all_as_it_was():
    dense, model = pair()
    before, calls = state(model), []

    def fail(module: nn.Module, args: tuple[Tensor]) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = converted_layers(model)["1.inner"].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        tune(dense, model, short())
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert all(layer.gate == DynamicK(0.2) for layer in converted_layers(model).values())


def test_seconds_are_for_all_layers_together(monkeypatch):
    given = []

    def instead(layer, batches, config, *args, **kw):
        given.append(config.seconds)
        return []

    assert all(fit.history for fit in tune(*pair(), FinetuneConfig(seconds=0.1)))
    monkeypatch.setattr(layerwise, "train", instead)
    tune(*pair(), FinetuneConfig(seconds=0.4))
    assert given == pytest.approx([0.2, 0.2])


def test_a_token_of_zeros_breaks_nothing():
    dense, model = pair()
    with torch.no_grad():
        dense[0].norm.bias.zero_(), model[0].norm.bias.zero_()
        dense[0].inner[0].bias.zero_(), dense[0].inner[2].bias.zero_()
    batches = [batch.index_fill(1, torch.arange(3), 0.0) for batch in data()]
    fit, _ = finetune_layers_(model, batches, short(steps=2), teacher=dense, batch_tokens=64, progress=False)
    assert torch.tensor([fit.error, fit.history[-1].objective]).isfinite().all()


def test_padding_is_no_input():
    tiny = TINY["bert"]
    dense, model, batch = tiny.model(), tiny.model(), tiny.batch()
    convert_(model, [batch], ConvertConfig(expert_size=6, router=RouterConfig(steps=1)), progress=False)
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 7)}
    states = []
    for b in (batch, other):
        copied = copy.deepcopy(model)
        finetune_layers_(copied, [b], short(steps=3), teacher=dense, batch_tokens=4, progress=False)
        states.append(state(copied))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_layer_fit_prints_what_it_missed():
    dense, model = pair()
    fit = tune(dense, model, short(steps=3))[0]
    assert str(fit).startswith("0.inner: 3 updates in ")
    assert f"relative error {fit.error:.4f}" in str(fit)


def test_a_teacher_that_is_another_model_is_refused():
    dense, model = pair()
    with pytest.raises(ValueError, match=r"no FFN like 1.inner; it has 0.inner"):
        finetune_layers_(model, data(), short(), teacher=dense[:1], progress=False)


@pytest.mark.parametrize(
    ("kw", "message"), [({"batch_tokens": 0}, "batch_tokens"), ({"max_tokens": 1}, "max_tokens")]
)
def test_wrong_sizes_are_named(kw, message):
    dense, model = pair()
    with pytest.raises(ValueError, match=f"{message} must be at least"):
        finetune_layers_(model, data(), short(), teacher=dense, progress=False, **kw)


def test_a_single_token_is_too_little():
    dense, model = pair()
    with pytest.raises(ValueError, match=r"0\.inner needs at least 2 tokens, one to hold out, got 1"):
        finetune_layers_(model, [torch.randn(1, D)], short(), teacher=dense, progress=False)


def test_layers_need_a_threshold():
    dense, model = pair()
    with pytest.raises(ValueError, match=r"give config\.tau a threshold"):
        finetune_layers_(model, data(), short(tau=None), teacher=dense, progress=False)
