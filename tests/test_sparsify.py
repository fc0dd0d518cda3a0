"""The penalty, the measure and the loop of sparsity enforcement."""

import pytest
import torch
import torch.nn.functional as F
from sadmoe.ffn import find_ffns
from sadmoe.sparsify import SparsifyConfig, SparsityLoss, measure_sparsity, sparsify_, square_hoyer
from sadmoe.sparsify.objective import block_of, distill_hidden
from tiny_models import TINY, Residual, UserGLU, hidden
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, FF = 24, 60


class Plain(nn.Module):
    """An FFN with dropout whose activation is a module."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.expand, self.act, self.contract = nn.Linear(D, FF), act, nn.Linear(FF, D)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.contract(self.act(self.expand(x))))


def two_ffns(act: type[nn.Module] = nn.ReLU, make=Plain) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Residual(make(act()) if make is Plain else make()) for _ in range(2))
    return nn.Sequential(*blocks).eval()


def data(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 7, D, generator=generator) for _ in range(n)]


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- square Hoyer


@pytest.mark.parametrize("m", [1, 2, 17, 64])
def test_hoyer_of_m_equal_entries_is_m(m):
    a = torch.zeros(64)
    a[:m] = 0.3
    assert square_hoyer(a).item() == pytest.approx(m, rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**40])
def test_hoyer_does_not_see_the_scale(scale):
    a = torch.randn(5, 33)
    assert torch.equal(square_hoyer(a * scale), square_hoyer(a))


def test_hoyer_lies_between_one_and_n():
    h = square_hoyer(torch.randn(1000, 33).relu() + 1e-3 * torch.rand(1000, 33))
    assert (h >= 1).all()
    assert (h <= 33).all()


def test_hoyer_of_nothing_is_zero_with_a_zero_gradient():
    a = torch.zeros(3, 8, requires_grad=True)
    h = square_hoyer(a)
    h.sum().backward()
    assert h.tolist() == [0, 0, 0]
    assert torch.equal(a.grad, torch.zeros(3, 8))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-9, 1e18])
def test_hoyer_has_finite_gradients_at_every_scale(scale):
    a = (torch.rand(4, 50) * scale).requires_grad_()
    square_hoyer(a).sum().backward()
    assert a.grad.isfinite().all()


def test_hoyer_gradient_is_the_formulas():
    a = torch.rand(3, 9, dtype=torch.float64)
    a32 = a.float().requires_grad_()
    a.requires_grad_()
    square_hoyer(a32).sum().backward()
    (a.sum(-1).square() / a.square().sum(-1)).sum().backward()
    torch.testing.assert_close(a32.grad, a.grad.float(), rtol=1e-4, atol=1e-5)


def test_hoyer_of_half_precision_is_computed_in_float32():
    a = torch.full(
        (70000,), 3.0, dtype=torch.bfloat16
    )  # its sum of squares is far beyond bfloat16's integers
    assert square_hoyer(a).dtype == torch.float32
    assert square_hoyer(a).item() == pytest.approx(70000, rel=1e-4)


# ---------------------------------------------------------------- SparsityLoss


def expected(model: nn.Module, x: Tensor, act: str, penalty: str, displacement: float) -> Tensor:
    """The definition, written out for `two_ffns`."""
    means = []
    for block in model:
        inner = block.inner
        first = inner.c if isinstance(inner, UserGLU) else inner.expand
        z = first(block.norm(x))
        a = z.relu() if act == "relu" else (z - displacement).clamp(min=0)
        value = a.sum(-1).square() / a.square().sum(-1) if penalty == "hoyer" else a.abs().sum(-1)
        means.append((value / z.shape[-1]).mean())
        x = block(x)
    return torch.stack(means).mean()


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
@pytest.mark.parametrize(
    ("make", "act", "module"),
    [(Plain, "relu", nn.ReLU), (Plain, "gelu", nn.GELU), (UserGLU, "silu", nn.SiLU)],
)
def test_the_loss_is_its_definition(make, act, module, penalty):
    model = two_ffns(module, make)
    with SparsityLoss(model, penalty=penalty, displacement=-0.5) as sparsity:
        model(hidden())
        got = sparsity()
    torch.testing.assert_close(got, expected(model, hidden(), act, penalty, -0.5))


def test_every_neuron_equally_active_gives_one():
    model = two_ffns()
    for block in model:
        nn.init.zeros_(block.inner.expand.weight)
        nn.init.ones_(block.inner.expand.bias)
    with SparsityLoss(model) as sparsity:
        model(hidden())
        assert sparsity().item() == pytest.approx(1)


def test_gelu_that_is_pushed_below_the_displacement_costs_nothing():
    model = two_ffns(nn.GELU)
    for block in model:
        nn.init.zeros_(block.inner.expand.weight)
        nn.init.constant_(block.inner.expand.bias, -11.0)
    with SparsityLoss(model) as sparsity:
        model(hidden())
        assert sparsity().item() == 0


def test_padding_counts_nowhere():
    model = two_ffns()
    x = torch.cat([hidden(), 50 * torch.rand(2, 3, D)], dim=1)
    real = torch.ones(2, 10, dtype=torch.int64)
    real[:, 7:] = 0
    with SparsityLoss(model) as sparsity:
        model(hidden())
        short = sparsity()
        model(x)
        masked = sparsity(real)
        model(x)
        by_batch = sparsity({"attention_mask": real})
        model(x)
        everything = sparsity()
    torch.testing.assert_close(masked, short)
    assert torch.equal(masked, by_batch)
    assert not torch.allclose(masked, everything)


def test_a_decoder_answers_to_its_own_mask():
    tiny = TINY["t5"]
    model, batch = tiny.model(), tiny.batch()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, 4:] = 0
    with torch.no_grad(), SparsityLoss(model) as sparsity:
        model(**batch)
        whole = sparsity(batch)
        model(**batch)
        assert sparsity({**batch, "decoder_attention_mask": mask}) != whole


def test_it_forgets_each_pass():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        model(hidden())
        first = sparsity()
        model(2 * hidden() + 1)
        second = sparsity()
        model(hidden())
        assert torch.equal(sparsity(), first)
    assert not torch.equal(first, second)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_what_comes_before_and_not_what_comes_after():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        model(hidden())
        sparsity().backward()
    assert model[0].inner.contract.weight.grad.abs().sum() > 0
    assert model[1].inner.contract.weight.grad is None


def test_under_autocast_it_stays_in_float32():
    model = two_ffns()
    with SparsityLoss(model) as sparsity, torch.autocast("cpu", torch.bfloat16):
        model(hidden())
        value = sparsity()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected(model, hidden(), "relu", "hoyer", 0), rtol=0.02, atol=0)


class Checkpointed(nn.Module):
    """Runs its blocks under gradient checkpointing."""

    def __init__(self, blocks: nn.Module, reentrant: bool):
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_checkpointing_counts_a_pass_once():
    plain = two_ffns()
    model = Checkpointed(two_ffns(), reentrant=False)
    values, grads = [], []
    for m, blocks in ((plain, plain), (model, model.blocks)):
        with SparsityLoss(m) as sparsity:
            for _ in range(2):
                m.zero_grad()
                out = m(hidden())
                value = sparsity()
                (out.square().mean() + value).backward()
                values.append(value.item())
        grads.append(blocks[0].inner.expand.weight.grad)
    assert len(set(values)) == 1
    torch.testing.assert_close(*grads)


def test_a_pass_without_gradients_is_an_error_where_one_is_wanted():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        with torch.no_grad():
            model(hidden())
            assert sparsity() > 0
            model(hidden())
        with pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant"):
            sparsity()
        checkpointed = Checkpointed(model, reentrant=True)
        checkpointed(hidden().requires_grad_())
        with pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant"):
            sparsity()


def test_a_call_before_any_pass_says_what_to_do():
    sparsity = SparsityLoss(two_ffns())
    with pytest.raises(RuntimeError, match="enter SparsityLoss before"):
        sparsity()
    with sparsity:
        with pytest.raises(RuntimeError, match="run the model first"):
            sparsity()
        with pytest.raises(RuntimeError, match="entered already"), sparsity:
            pass


def test_wrong_arguments_of_the_loss_are_named():
    model = two_ffns()
    with pytest.raises(ValueError, match=r"penalty must be one of hoyer, l1, got 'l2'"):
        SparsityLoss(model, penalty="l2")
    with pytest.raises(ValueError, match="sites must hold at least one FFN"):
        SparsityLoss(model, [])
    with SparsityLoss(model) as sparsity:
        model(hidden())
        with pytest.raises(ValueError, match=r"one entry for each of the 14 tokens.*got \(2, 3\)"):
            sparsity(torch.ones(2, 3))


# ---------------------------------------------------------------- measure_sparsity


@pytest.mark.parametrize(("module", "act"), [(nn.ReLU, F.relu), (nn.GELU, F.gelu)])
def test_the_measure_reads_what_the_activation_gives(module, act):
    model = two_ffns(module)
    layers = measure_sparsity(model, data(2))
    a = torch.cat([act(model[0].inner.expand(model[0].norm(x))) for x in data(2)]).abs().flatten(0, 1)
    assert layers[0].f == FF
    assert layers[0].zero == pytest.approx((a == 0).double().mean().item())
    assert layers[0].small == pytest.approx((a < 0.01 * a.amax(-1, keepdim=True)).double().mean().item())


def test_the_measure_leaves_padding_out_and_the_model_alone():
    tiny = TINY["bert"]
    model, batch = tiny.model().train(), tiny.batch()
    masked = measure_sparsity(model, [batch])
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 7)}
    assert measure_sparsity(model, [other]) == masked
    assert model.training


def test_the_measure_names_ffns_that_never_run():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(two_ffns())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model = Half()
    with pytest.raises(ValueError, match=r"never reach blocks.1.inner"):
        measure_sparsity(model, data(1), find_ffns(model))


# ---------------------------------------------------------------- sparsify_


def short(**kw) -> SparsifyConfig:
    return SparsifyConfig(**({"steps": 6, "lr": 5e-3, "alpha": 1.0} | kw))


def run_sparsify(model: nn.Module, config: SparsifyConfig, batches=None, loss=None):
    batches = data() if batches is None else batches
    return sparsify_(model, batches, config, loss=loss, progress=False)


@pytest.mark.parametrize("objective", ["task", "distill_hidden", "distill_logits"])
@pytest.mark.parametrize("swap", [True, False])
def test_the_penalty_falls_and_the_report_says_so(objective, swap):
    model = two_ffns(nn.GELU)
    loss = mean_square if objective == "task" else None
    report = run_sparsify(
        model, short(steps=30, objective=objective, relu_swap=swap, displacement=-0.5), loss=loss
    )
    assert report.history[-1].penalty < 0.9 * report.history[0].penalty
    assert len(report.history) == 30
    assert measure_sparsity(model, data()) == report.after
    assert {site.act for site in find_ffns(model)} == {"relu" if swap else "gelu"}
    assert (report.zero > 0.3) == swap


def test_an_autocast_around_the_run_sees_every_update():
    """Autocast keeps its casts of the weights: with them, and without, the run must be the same."""
    runs = []
    for cache in (True, False):
        model = two_ffns(nn.GELU)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            run_sparsify(model, short())
        runs.append(state(model))
    assert same(*runs)


def test_training_without_the_penalty_brings_distillation_to_the_dense_model():
    model = two_ffns(nn.GELU)
    x = data(1)[0]
    dense = model(x)
    report = run_sparsify(model, short(steps=40, alpha=0.0, lr=1e-2), [x])
    assert report.history[-1].objective < 0.2 * report.history[0].objective
    assert (model(x) - dense).norm() < 0.3 * dense.norm()


def test_the_report_prints_one_row_for_each_ffn():
    report = run_sparsify(two_ffns(nn.GELU), short())
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["FFN", "neurons"]
    assert [line.split()[0] for line in lines[1:4]] == ["0.inner", "1.inner", "all"]
    assert f"{100 * report.zero:.1f} %" in lines[3]
    assert lines[4].startswith("6 updates in ")


def test_the_same_seed_gives_the_same_model_and_another_one_does_not():
    states = []
    for seed, noise in ((1, 0), (1, 1), (2, 0)):
        model = two_ffns().train()
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        run_sparsify(model, short(objective="task", seed=seed), loss=mean_square)  # with dropout
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(state(model))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_a_dataloader_works_as_a_list_does_and_leaves_the_random_state_alone():
    loader = torch.utils.data.DataLoader(torch.cat(data()), batch_size=4, shuffle=True)
    models, states = [two_ffns(), two_ffns()], []
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    for model in models:
        run_sparsify(model, short(), loader)
        states.append(state(model))
    assert same(*states)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_flags_and_frozen_weights_stay_and_gradients_go():
    model = two_ffns().train()
    model[0].norm.eval()
    model[0].norm.requires_grad_(False)
    frozen = model[0].norm.weight.clone()
    run_sparsify(model, short())
    assert model.training
    assert not model[0].norm.training
    assert torch.equal(model[0].norm.weight, frozen)
    assert not model[0].norm.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_a_failure_leaves_the_model_bit_for_bit_as_it_was(fail_at):
    model = two_ffns(nn.GELU)
    before, calls = state(model), []

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > fail_at:
            raise KeyboardInterrupt
        return mean_square(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run_sparsify(model, short(objective="task"), loss=fails)
    assert same(state(model), before)
    assert [site.act for site in find_ffns(model)] == ["gelu", "gelu"]
    assert not any(module._forward_hooks for module in model.modules())


def test_divergence_is_an_error_and_undone():
    model = two_ffns()
    before = state(model)
    calls = []

    def bad(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(None)
        return model(batch).square().sum() * (float("inf") if len(calls) == 3 else 1)

    with pytest.raises(FloatingPointError, match=r"diverged at update 2: objective inf.*lower lr or alpha"):
        run_sparsify(model, short(objective="task"), loss=bad)
    assert same(state(model), before)


def test_seconds_end_the_run():
    report = run_sparsify(two_ffns(), short(steps=None, seconds=0.2))
    assert report.history
    assert report.history[-1].lr < 0.3 * max(step.lr for step in report.history)
    assert report.seconds < 5


def test_it_reaches_every_kind_of_model_it_finds():
    for name in ("bert", "gpt2", "opt", "t5", "vit", "timm vit", "llama"):
        tiny = TINY[name]
        model = tiny.model()
        report = sparsify_(model, [tiny.batch()], short(steps=2, relu_swap=tiny.swappable), progress=False)
        assert [layer.name for layer in report.after] == list(tiny.names)
        assert report.history[0].objective > 0 or tiny.act == "relu", name


def test_the_blocks_that_are_compared_hold_the_residual():
    model = TINY["bert"].model()
    assert [block_of(model, site) for site in find_ffns(model)] == ["encoder.layer.0", "encoder.layer.1"]
    flat = nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D))
    assert block_of(flat, find_ffns(flat)[0]) == "2"


def test_hidden_distillation_is_a_relative_error_without_padding():
    tiny = TINY["bert"]
    model, dense, batch = tiny.model(), tiny.model(), tiny.batch()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias += 0.1
    got = distill_hidden(model, dense, find_ffns(model))(batch)
    real = batch["attention_mask"].bool()
    pairs = zip(
        *(m(**batch, output_hidden_states=True).hidden_states[1:] for m in (model, dense)), strict=True
    )
    want = [((h - t)[real].square().sum() / t[real].square().sum()) for h, t in pairs]
    torch.testing.assert_close(got, torch.stack(want).mean())


@pytest.mark.parametrize(("kept_bytes", "runs"), [(2**20, 1), (0, 3)])
def test_the_dense_model_runs_once_a_batch_where_its_states_are_kept(kept_bytes, runs):
    tiny = TINY["bert"]
    model, dense, batch = tiny.model(), tiny.model(), tiny.batch()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias += 0.1
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    objective = distill_hidden(model, dense, find_ffns(model), kept_bytes=kept_bytes)
    errors = [objective(batch, 7) for _ in range(3)]
    assert errors[0] == errors[1] == errors[2] > 0
    assert len(calls) == runs
    objective(batch, None)
    objective(batch, 8)
    assert len(calls) == runs + 2, "another batch, or one that is not known, is not the one kept"


@pytest.mark.parametrize("schedule", ["constant", "linear", "linear_warmup"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_are_safe_in_the_shortest_runs(schedule, steps):
    report = run_sparsify(two_ffns(), short(steps=steps, schedule=schedule))
    assert all(0 < step.alpha <= 1 and 0 < step.lr <= 5e-3 for step in report.history)


def test_schedules_are_the_papers():
    at = (0.0, 0.25, 0.5, 1.0)
    ramps = {"constant": [2, 2, 2, 2], "linear": [0, 0.5, 1, 2], "linear_warmup": [0, 1, 2, 2]}
    for schedule, want in ramps.items():
        config = SparsifyConfig(steps=1, alpha=2.0, schedule=schedule)
        assert [config.alpha_at(done) for done in at] == want
    config = SparsifyConfig(steps=1, lr=1.0, warmup=0.5)
    assert [config.lr_at(done) for done in at] == [0, 0.5, 1, 0]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({}, "give steps or seconds"),
        ({"steps": 1, "seconds": 1.0}, "give steps or seconds"),
        ({"steps": 0}, "steps must be greater than 0, got 0"),
        ({"seconds": -1.0}, "seconds must be greater than 0"),
        ({"steps": 1, "lr": 0.0}, "lr must be greater than 0"),
        ({"steps": 1, "grad_clip": 0.0}, "grad_clip must be greater than 0"),
        ({"steps": 1, "alpha": -1.0}, "alpha must be at least 0"),
        ({"steps": 1, "weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"steps": 1, "warmup": 1.0}, r"warmup must be a share of the run in \[0, 1\), got 1.0"),
        (
            {"steps": 1, "objective": "hidden"},
            "objective must be one of task, distill_hidden, distill_logits",
        ),
        ({"steps": 1, "penalty": "l0"}, "penalty must be one of hoyer, l1"),
        ({"steps": 1, "schedule": "cosine"}, "schedule must be one of constant, linear, linear_warmup"),
    ],
)
def test_wrong_configs_are_named(kw, message):
    with pytest.raises(ValueError, match=message):
        SparsifyConfig(**kw)


def test_wrong_calls_are_named():
    model = two_ffns()
    with pytest.raises(ValueError, match='loss is used by objective "task" alone'):
        run_sparsify(model, short(), loss=mean_square)
    with pytest.raises(ValueError, match='objective "task" needs a scalar loss, got NoneType'):
        run_sparsify(model, short(objective="task"))
    with pytest.raises(ValueError, match=r"scalar loss, got a tensor of shape \(4, 7, 24\)"):
        run_sparsify(model, short(objective="task"), loss=lambda model, batch: model(batch))
    with pytest.raises(TypeError, match="re-iterable"):
        run_sparsify(model, short(), iter(data()))
    bert = TINY["bert"]
    with pytest.raises(
        ValueError, match=r'"distill_logits" needs a model that returns a Tensor or .logits, got BaseM'
    ):
        run_sparsify(bert.model(), short(objective="distill_logits"), [bert.batch()])
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        run_sparsify(model.requires_grad_(False), short())
