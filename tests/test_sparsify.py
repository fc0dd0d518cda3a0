"""The loop of sparsity enforcement."""

import random
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from itertools import islice

import numpy
import pytest
import torch
from clock import Clock
from sadmoe import survey
from sadmoe.ffn import find_ffns
from sadmoe.ffn.activations import ACTIVATION_MODULES
from sadmoe.sparsify import SparsifyConfig, measure_sparsity, sparsify_
from sadmoe.training.loop import _endless
from states import same, state
from tiny_models import TINY, call, tokens
from torch import Tensor, nn
from two_ffns import FF, D, data, mean_square, run_sparsify, short, two_ffns


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
    if swap:
        free = two_ffns(nn.GELU)
        without = run_sparsify(free, short(steps=30, objective=objective, alpha=0.0), loss=loss)
        assert report.zero > without.zero + 0.05
    else:
        assert report.zero < 0.3


@pytest.mark.parametrize("swap", [True, False])
def test_the_square_of_relu_stays_and_is_made_sparse(swap):
    model = two_ffns(ACTIVATION_MODULES["relu2"])
    report = run_sparsify(model, short(steps=30, relu_swap=swap))
    assert {site.act for site in find_ffns(model)} == {"relu2"}
    assert report.history[-1].penalty < 0.9 * report.history[0].penalty


class Once(torch.utils.data.IterableDataset):
    """Says that it can be gone through again, and cannot."""

    def __init__(self):
        self.left = iter(data() * 4)

    def __iter__(self):
        return self.left


def test_a_loss_may_take_of_a_batch_what_the_model_does_not():
    model = two_ffns(nn.ReLU)
    labelled = [(x, torch.zeros_like(x)) for x in data()]
    config = SparsifyConfig(steps=3, objective="task", lr=1e-3)
    report = sparsify_(
        model, labelled, config, loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        progress=False,
    )  # fmt: skip
    assert report.history[-1].objective < report.history[0].objective


def test_a_loss_runs_a_model_whose_blocks_a_probe_cannot():
    """DeBERTa's output layer takes more than hidden states: the model is run to see what."""
    sizes = {"hidden_size": 24, "intermediate_size": 60, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers = pytest.importorskip("transformers")
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(vocab_size=50, **sizes))
    batches = [(tokens(), torch.zeros(24))]
    config = SparsifyConfig(steps=1, objective="task")
    report = sparsify_(
        model, batches, config, progress=False,
        loss=lambda model, batch: (model(**batch[0]).last_hidden_state[:, 0] - batch[1]).square().mean(),
    )  # fmt: skip
    assert len(report.after) == 1


def test_batches_that_end_for_good_are_an_error():
    batches = torch.utils.data.DataLoader(Once(), batch_size=None)
    with pytest.raises(ValueError, match="gave nothing when they were gone through again"):
        run_sparsify(two_ffns(), short(steps=50, objective="task"), batches, loss=mean_square)


def test_nor_are_they_taken_for_ffns_that_are_never_reached():
    batches = torch.utils.data.DataLoader(Once(), batch_size=None)
    with pytest.raises(ValueError, match="gave nothing when they were gone through again"):
        survey(two_ffns(), batches)


class Drawn(Sequence):
    """Batches that are drawn anew each time they are asked for."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.rand(3)


def test_batches_are_known_by_index_only_where_they_come_again_as_they_were():
    def indices(batches):
        return {read()[0] for read in islice(_endless(batches, 0), 4)}

    assert indices(data()) == indices(tuple(data())) == set(range(len(data())))
    assert indices(Drawn()) == {None}


def test_the_search_for_ffns_moves_no_random_state_either(monkeypatch):
    def drawing(*args, **settings):
        torch.rand(1)  # as a DataLoader does for each pass
        return find_ffns(*args, **settings)

    monkeypatch.setattr("sadmoe.sparsify.run.find_ffns", drawing)
    model, before = two_ffns(), torch.get_rng_state()
    run_sparsify(model, short(steps=1))
    assert torch.equal(torch.get_rng_state(), before)


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


class Noisy(torch.utils.data.Dataset):
    """Of samples that NumPy and Python make noise for."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int):
        rows = torch.cat(data(2))[i]
        return rows + numpy.random.rand() + random.random()


def test_numpy_s_and_python_s_random_numbers_are_seeded_and_left_alone_too():
    loader, states = torch.utils.data.DataLoader(Noisy(), batch_size=2), []
    for noise in (1, 2):
        random.seed(noise)
        numpy.random.seed(noise)
        before = random.getstate(), numpy.random.get_state()[1].tolist()

        def loss(model, batch):
            return mean_square(model, batch) * (1 + numpy.random.rand() + random.random())

        model = two_ffns()
        run_sparsify(model, short(objective="task"), loader, loss=loss)
        assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before
        states.append(state(model))
    assert same(*states)


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("objective", ["task", "distill_hidden"])
def test_new_activations_have_the_flags_of_the_old_ones(training, objective):
    model = two_ffns(nn.GELU).train(training)
    run_sparsify(model, short(objective=objective), loss=mean_square if objective == "task" else None)
    assert {site.act for site in find_ffns(model)} == {"relu"}
    assert {module.training for module in model.modules()} == {training}


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


@dataclass(frozen=True)
class Frozen:
    hidden_act: str = "gelu"


class Stubborn(Frozen):
    model_type = "stubborn"


def test_a_config_of_the_user_s_own_is_left_alone():
    model = two_ffns(nn.GELU)
    model.config = Frozen()
    run_sparsify(model, short())
    assert model.config == Frozen()
    assert {site.act for site in find_ffns(model)} == {"relu"}


def test_a_config_that_cannot_follow_leaves_the_activations():
    model = two_ffns(nn.GELU)
    model.config, before = Stubborn(), state(model)
    config = model.config
    with pytest.raises(FrozenInstanceError):
        run_sparsify(model, short())
    assert {site.act for site in find_ffns(model)} == {"gelu"}
    assert model.config is config
    assert same(state(model), before)


def test_divergence_is_an_error_and_undone():
    model = two_ffns()
    before = state(model)
    calls = []

    def bad(model: nn.Module, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # else it runs the model to measure it
            calls.append(None)
        return model(batch).square().sum() * (float("inf") if len(calls) == 3 else 1)

    with pytest.raises(FloatingPointError, match=r"diverged at update 2: objective inf.*lower lr or alpha"):
        run_sparsify(model, short(objective="task"), loss=bad)
    assert same(state(model), before)


def test_a_gradient_that_is_not_finite_is_an_error_and_undone():
    model = two_ffns()
    before = state(model)

    def bad(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * 0).sum().sqrt()  # 0, of infinite slope

    with pytest.raises(
        FloatingPointError, match=r"diverged at update 0: objective 0.0, but a gradient of norm nan"
    ):
        run_sparsify(model, short(objective="task", steps=1), loss=bad)
    assert same(state(model), before)


def test_devices_that_the_model_is_not_on_are_not_seeded(monkeypatch):
    model = two_ffns()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every device was seeded"))
    run_sparsify(model, short(steps=1))


def test_seconds_end_the_run(monkeypatch):
    monkeypatch.setattr("sadmoe.training.loop.time", Clock(1.0))
    report = run_sparsify(two_ffns(), short(steps=None, seconds=20.0, warmup=0.0))
    assert 5 < len(report.history) < 20
    rates = [step.lr for step in report.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.3 * rates[0]


@pytest.mark.parametrize(("scale", "clipped"), [(1e4, True), (1e-6, False)])
def test_long_gradients_are_clipped(monkeypatch, scale, clipped):
    norms, step = [], torch.optim.AdamW.step

    def noted(optimizer, *args):
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = short(steps=3, objective="task", alpha=0.0, grad_clip=0.5)
    run_sparsify(two_ffns(), config, loss=lambda model, batch: scale * mean_square(model, batch))
    assert all(norm == pytest.approx(0.5, rel=1e-3) if clipped else 0 < norm < 0.4 for norm in norms)


def test_it_reaches_every_kind_of_model_it_finds():
    for name in ("bert", "gpt2", "opt", "t5", "vit", "timm vit", "llama"):
        tiny = TINY[name]
        model = tiny.model()
        report = sparsify_(model, [tiny.batch()], short(steps=2, relu_swap=tiny.swappable), progress=False)
        assert [layer.name for layer in report.after] == list(tiny.names)
        assert report.history[0].objective > 0 or tiny.act == "relu", name


def test_complex_parameters_are_trained_too():
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D // 2 + 1, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=D)

    model = nn.Sequential(*two_ffns(), Filter())
    before = model[2].weight.detach().clone()
    run_sparsify(model, short(objective="task"), loss=mean_square)
    assert not torch.equal(model[2].weight, before)


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
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seconds": float("inf")}, "seconds must be finite, got inf"),
        ({"seconds": -1.0}, "seconds must be above 0"),
        ({"steps": 1, "lr": 0.0}, "lr must be above 0"),
        ({"steps": 1, "grad_clip": 0.0}, "grad_clip must be above 0"),
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
    with pytest.raises(
        ValueError, match=r'the task needs a scalar loss, got NoneType.*objective="distill_hidden"'
    ):
        run_sparsify(model, short(objective="task"))
    with pytest.raises(ValueError, match=r"scalar loss, got a tensor of shape \(4, 7, 24\)"):
        run_sparsify(model, short(objective="task"), loss=lambda model, batch: model(batch))
    with pytest.raises(TypeError, match="re-iterable"):
        run_sparsify(model, short(), iter(data()))
    bert = TINY["bert"]
    with pytest.raises(
        ValueError,
        match=r"the logits of a model are a Tensor that it returns, or \.logits; this one gives BaseM",
    ):
        run_sparsify(bert.model(), short(objective="distill_logits"), [bert.batch()])
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        run_sparsify(model.requires_grad_(False), short())
    headed = nn.Sequential(model, nn.Linear(D, 2))  # of which hidden states say nothing
    with pytest.raises(
        ValueError, match="sparsify: no parameter that requires a gradient has a part in the obj"
    ):
        run_sparsify(headed, short())


def test_a_folder_is_no_checkpoint():
    with pytest.raises(
        TypeError, match=r"checkpoint must be a Checkpoint or None, got 'state': give Checkpoint\(folder\)"
    ):
        sparsify_(two_ffns(), data(), short(), loss=mean_square, checkpoint="state", progress=False)


def test_it_trains_also_under_no_grad_and_says_where_it_cannot():
    plain, inside = two_ffns(), two_ffns()
    run_sparsify(plain, short(objective="task"), loss=mean_square)
    with torch.no_grad():
        run_sparsify(inside, short(objective="task"), loss=mean_square)
    assert same(state(plain), state(inside))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"called under torch\.inference_mode"):
        run_sparsify(inside, short(objective="task"), loss=mean_square)
    assert same(state(plain), state(inside))


def test_an_autocast_around_a_run_that_fails_keeps_no_cast_of_what_was_tried():
    tiny, calls = TINY["bert"], []
    model, batch = tiny.model().eval(), tiny.batch()

    def loss(model: nn.Module, batch: dict) -> Tensor:
        calls.append(1)
        value = model(**batch).last_hidden_state.square().mean()  # which fills the cache
        if len(calls) == 3:
            raise KeyError
        return value

    config = SparsifyConfig(steps=9, lr=1e-2, objective="task", relu_swap=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = call(model, batch)
        with pytest.raises(KeyError):
            sparsify_(model, [batch], config, loss=loss, progress=False)
        assert torch.equal(call(model, batch), wanted)


class Towers(nn.Module):
    """Two FFNs, of which a batch runs the one that it names."""

    def __init__(self):
        super().__init__()
        self.text, self.image = two_ffns()

    def forward(self, text=None, image=None):
        return self.image(image) if text is None else self.text(text)


def test_an_ffn_may_run_in_later_batches_alone():
    batches = [{"text": x} for x in data(9)] + [{"image": x} for x in data(2)]

    report = sparsify_(Towers(), batches, short(steps=2, objective="task"), loss=text_loss, progress=False)
    assert [layer.name for layer in report.before] == ["text.inner", "image.inner"]
    assert all(0 < layer.zero < 1 for layer in (*report.before, *report.after))
    with pytest.raises(ValueError, match=r"the batches never reach image\.inner"):
        sparsify_(Towers(), batches[:9], short(steps=2, objective="task"), loss=text_loss, progress=False)


class Counting(torch.utils.data.IterableDataset):
    """Batches of text without an end."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        while True:
            self.given += 1
            yield {"text": data(1)[0]}


def test_an_ffn_that_never_runs_is_told_of_data_without_an_end(monkeypatch):
    monkeypatch.setattr("sadmoe.sparsify.penalty.FURTHER", 2)
    batches = Counting()
    with pytest.raises(ValueError, match=r"the batches never reach image\.inner"):
        sparsify_(Towers(), batches, short(steps=2, objective="task"), loss=text_loss, progress=False)
    assert batches.given < 30


def text_loss(model: nn.Module, batch: dict) -> Tensor:
    return model(**batch).square().mean()


def test_a_teacher_may_not_share_what_is_trained():
    model = two_ffns()
    with pytest.raises(ValueError, match=r"teacher has 0\.norm\.weight of the model that is trained"):
        sparsify_(model, data(), short(), teacher=nn.Sequential(*model), progress=False)


def test_weights_with_gaps_in_memory_are_trained_as_others():
    model, gaps = two_ffns(), two_ffns()
    linear = gaps[0].inner.expand
    around = torch.zeros(FF, D + 5)
    around[:, :D] = linear.weight.detach()
    linear.weight = nn.Parameter(around[:, :D])
    assert not linear.weight.is_contiguous()
    run_sparsify(model, short(steps=3))
    run_sparsify(gaps, short(steps=3))
    torch.testing.assert_close(linear.weight, model[0].inner.expand.weight)
    assert not around[:, D:].any()


def test_a_buffer_whose_entries_are_one_is_put_back():
    model = two_ffns()
    model.register_buffer("scale", torch.tensor(1.0).expand(7))
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        sparsify_(model, data(), short(objective="task"), loss=_interrupted, progress=False)
    assert same(state(model), before)


def _interrupted(model: nn.Module, batch: Tensor) -> Tensor:
    if model.training:
        raise KeyboardInterrupt
    return mean_square(model, batch)
