"""Fine-tuning of a converted model while it skips experts."""

import copy

import pytest
import sadmoe
import torch
from conversions import fingerprint
from sadmoe import finetune
from sadmoe.gates import DynamicK
from tiny_models import TINY
from torch import nn
from torch.utils.checkpoint import checkpoint
from two_ffns import KeepsTable, data, mean_square, two_ffns


@pytest.fixture(scope="module")
def converted():
    tiny = TINY["bert"]
    teacher, batch = tiny.model().eval(), tiny.batch()
    model = copy.deepcopy(teacher)
    config = sadmoe.ConvertConfig(experts=4, tau=0.2, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, [batch], config, progress=False)
    return teacher, model, [batch]


def tuned(converted, **settings):
    teacher, model, batches = converted
    model = copy.deepcopy(model)
    config = sadmoe.FinetuneConfig(**{"steps": 25, "share": 0.2, "lr": 3e-3, **settings})
    return model, sadmoe.finetune_(model, batches, config, teacher=teacher, progress=False)


def norms_of(model, batches):
    seen = {}
    layers = sadmoe.moe_layers(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: m.expert_norms(args[0].flatten(0, -2))})
        )
    with sadmoe.tau(model, 0.0), torch.no_grad():
        model(**batches[0])
    return torch.cat(list(seen.values()))


def test_the_penalty_makes_experts_fewer(converted):
    with_penalty, report = tuned(converted, alpha=1.0)
    without, _ = tuned(converted, alpha=0.0)
    batches = converted[2]
    shares = [
        DynamicK(0.3).mask(norms_of(model, batches)).float().mean() for model in (with_penalty, without)
    ]
    assert shares[0] < shares[1]
    assert report.history[-1].penalty < report.history[0].penalty
    assert "updates in" in str(report)


def test_a_compiled_model_is_refused(converted):
    teacher, model, batches = converted
    config = sadmoe.FinetuneConfig(steps=1)
    with pytest.raises(
        ValueError, match=r"model: is compiled, .* pass the model as it was before torch\.compile"
    ):
        sadmoe.finetune_(torch.compile(model), batches, config, teacher=teacher)
    with pytest.raises(ValueError, match="teacher: is compiled"):
        sadmoe.finetune_(model, batches, config, teacher=torch.compile(teacher))


def test_the_share_told_is_a_running_mean_of_the_executed_one(converted):
    probe, shares = copy.deepcopy(converted[1]), []
    real = converted[2][0]["attention_mask"].bool()
    for layer in sadmoe.moe_layers(probe).values():
        layer.gate = DynamicK(0.7, true_norms=True)
        layer.register_forward_pre_hook(
            lambda m, args: shares.append(m.mask(args[0])[real].float().mean().item())
        )
    with torch.no_grad():
        probe(**converted[2][0])
    executed = sum(shares) / len(shares)
    assert 0.1 < executed < 0.9
    _, report = tuned(converted, steps=1, tau=0.7, ramp=0.0)
    assert report.share == pytest.approx(executed, abs=1e-4)
    with finetune.ExpertPenalty(converted[1], {}, sadmoe.FinetuneConfig(steps=1, tau=0.7)) as penalty:
        assert penalty.share == 1.0  # before the first
        penalty.load_state_dict({"sum": 0.05, "weight": 0.1})
        penalty(None)  # without layers: the mean so far
        assert penalty.share == pytest.approx(0.5)


def test_reentrant_checkpointing_which_leaves_the_penalty_no_gradient_is_an_error(converted):
    model, config = copy.deepcopy(converted[1]), sadmoe.FinetuneConfig(steps=1, share=0.2, tau=0.3)
    layers = sadmoe.moe_layers(model)
    x = torch.randn(2, 9, 24, requires_grad=True)
    for reentrant in (False, True):
        with finetune.ExpertPenalty(model, layers, config) as penalty:
            penalty.at(1.0)
            for layer in layers.values():
                checkpoint(layer, x, use_reentrant=reentrant)
            if reentrant:
                with pytest.raises(RuntimeError, match=r"no gradient for the penalty.*use_reentrant"):
                    penalty(None)
            else:
                assert penalty(None).requires_grad


def test_without_the_penalty_it_follows_the_dense_model(converted):
    _, report = tuned(converted, alpha=0.0, tau=0.3)
    at_full_threshold = report.history[len(report.history) // 2 :]
    assert at_full_threshold[-1].objective < at_full_threshold[0].objective


def test_the_penalty_rests_below_the_share(converted):
    resting, _ = tuned(converted, alpha=5.0, share=1.0, tau=0.0)
    without, _ = tuned(converted, alpha=0.0, share=1.0, tau=0.0)
    for a, b in zip(resting.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_penalty_counts_until_the_running_mean_is_at_the_share(converted):
    _, model, batches = copy.deepcopy(converted)
    config = sadmoe.FinetuneConfig(steps=1, ramp=0.0, tau=0.9, share=0.8)
    counts = []
    with finetune.ExpertPenalty(model, sadmoe.moe_layers(model), config) as penalty:
        penalty.at(1.0)
        penalty.load_state_dict({"sum": 0.9, "weight": 0.9})  # as after many updates that executed all
        for _ in range(24):
            model(**batches[0])
            counts.append(penalty(batches[0]).requires_grad)
            assert counts[-1] == (penalty.share > 0.8)
    assert counts == sorted(counts, reverse=True)
    assert counts[1]  # what ran then was below the share, the mean was not
    assert not counts[-1]


def test_the_share_is_remembered_by_updates_however_many_batches_they_have(converted):
    _, model, batches = converted
    shares = []
    for accumulate in (1, 4):
        config = sadmoe.FinetuneConfig(steps=1, accumulate=accumulate, ramp=0.0, tau=0.9)
        layers = sadmoe.moe_layers(model)
        with finetune.ExpertPenalty(model, layers, config) as penalty, torch.no_grad():
            penalty.at(0.5)
            for _ in range(3 * accumulate):
                model(**batches[0])
                penalty(batches[0])
            shares.append(penalty.share)
    assert shares[0] < 0.95
    assert shares[0] == pytest.approx(shares[1])


def test_gates_routers_and_flags_come_back(converted):
    _, before, _ = converted
    model, _ = tuned(converted, steps=2)
    for name, layer in sadmoe.moe_layers(model).items():
        old = sadmoe.moe_layers(before)[name]
        assert layer.gate == old.gate
        assert not layer.keeps_hidden
        assert not layer.norms_hooks
        assert torch.equal(layer.router.v1, old.router.v1)
        assert not layer.router.v1.requires_grad
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_steps_are_repeatable(converted):
    a, b = (tuned(converted, steps=3)[0] for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_failure_leaves_the_model_as_it_was(converted):
    teacher, model, batches = converted
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="diverged"):
        sadmoe.finetune_(
            model, batches, sadmoe.FinetuneConfig(steps=9, lr=1e30), teacher=teacher, progress=False
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.norms_hooks for layer in sadmoe.moe_layers(model).values())


@pytest.mark.parametrize("taught", [True, False])
def test_a_table_that_a_model_keeps_in_evaluation_mode_holds_no_graph(taught):
    teacher = nn.Sequential(KeepsTable(), *two_ffns())
    model = copy.deepcopy(teacher)
    router = sadmoe.RouterConfig(steps=2, width=4)
    sadmoe.convert_(model, data(), sadmoe.ConvertConfig(experts=4, tau=0.2, router=router), progress=False)
    config, how = sadmoe.FinetuneConfig(steps=3), {"teacher": teacher} if taught else {"loss": mean_square}
    assert len(sadmoe.finetune_(model.train(), data(), config, **how, progress=False).history) == 3


def test_a_loss_of_one_s_own_is_the_objective(converted):
    _, model, batches = converted
    model = copy.deepcopy(model)
    report = sadmoe.finetune_(
        model,
        batches,
        sadmoe.FinetuneConfig(steps=15, alpha=0.0, lr=3e-3),
        loss=lambda m, batch: m(**batch).last_hidden_state.square().mean(),
        progress=False,
    )
    assert report.history[-1].objective < report.history[0].objective


def test_gradient_checkpointing_changes_nothing(converted):
    runs = []
    for checkpointing in (False, True):
        model = copy.deepcopy(converted[1])
        if checkpointing:
            model.gradient_checkpointing_enable()
        config = sadmoe.FinetuneConfig(steps=4, alpha=1.0, lr=3e-3)
        report = sadmoe.finetune_(
            model,
            converted[2],
            config,
            loss=lambda m, b: m(**b).last_hidden_state.square().mean(),
            progress=False,
        )
        runs.append([(step.objective, step.penalty) for step in report.history])
    assert runs[1] == [pytest.approx(step, rel=1e-4) for step in runs[0]]


def test_blocks_that_stand_alone_are_compared_too():
    torch.manual_seed(0)
    teacher = nn.Module()
    teacher.block = nn.TransformerEncoderLayer(24, 2, 60, 0.0, batch_first=True)
    teacher.forward = teacher.block.forward
    teacher, batches = teacher.eval(), [torch.randn(4, 5, 24)]
    model = copy.deepcopy(teacher)
    model.forward = model.block.forward
    config = sadmoe.ConvertConfig(experts=4, tau=0.2, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, batches, config, progress=False)
    settings = sadmoe.FinetuneConfig(steps=8, alpha=0.0, lr=1e-3, tau=0.3)
    report = sadmoe.finetune_(model, batches, settings, teacher=teacher, progress=False)
    assert report.history[0].objective < 1, "it is compared with its like"


def test_weights_of_16_bits_are_warned_of(converted):
    model = copy.deepcopy(converted[1]).bfloat16()
    with pytest.warns(UserWarning, match="finetune.* trains weights in torch.bfloat16.*float32"):
        sadmoe.finetune_(
            model,
            converted[2],
            sadmoe.FinetuneConfig(steps=1),
            teacher=copy.deepcopy(converted[0]).bfloat16(),
            progress=False,
        )


def test_the_teacher_is_left_as_it_was(converted):
    teacher, model, batches = (copy.deepcopy(one) for one in converted)
    teacher.train()
    before = fingerprint(teacher)
    sadmoe.finetune_(model, batches, sadmoe.FinetuneConfig(steps=1), teacher=teacher, progress=False)
    assert fingerprint(teacher) == before


def test_a_batch_of_padding_alone_teaches_nothing(converted):
    teacher, model, batches = converted
    model = copy.deepcopy(model)
    empty = batches[0] | {"attention_mask": torch.zeros_like(batches[0]["attention_mask"])}
    config = sadmoe.FinetuneConfig(steps=4, share=0.2, lr=3e-3, alpha=1.0)
    report = sadmoe.finetune_(model, [empty, *batches], config, teacher=teacher, progress=False)
    assert sorted(step.penalty > 0 for step in report.history) == [False, False, True, True]


def test_without_a_threshold_the_gates_of_the_model_pick(converted):
    teacher, model, batches = converted
    after, report = tuned(converted, tau=None, alpha=5.0, steps=25)
    assert report.history[-1].objective < report.history[0].objective
    assert report.share is None
    assert "experts" not in str(report)
    with torch.no_grad():
        masks = [sadmoe.moe_layers(m)["encoder.layer.0.intermediate"].gate for m in (model, after)]
    assert masks[0] == masks[1]
    # an expert that no token runs is never touched
    other = copy.deepcopy(model)
    sadmoe.set_tau(other, 1.0)
    layer = next(iter(sadmoe.moe_layers(other).values()))
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append(m.mask(args[0]).flatten(0, -2).any(0)))
    before = layer.w_down.detach().clone()
    config = sadmoe.FinetuneConfig(steps=3, tau=None, lr=1e-2, weight_decay=0.0)
    sadmoe.finetune_(other, batches, config, teacher=teacher, progress=False)
    ran = torch.stack(seen).any(0)
    changed = (layer.w_down != before).flatten(1).any(1)
    assert torch.equal(changed, ran)
    assert not ran.all()


def test_biases_of_neurons_are_not_decayed_though_they_are_matrices(converted):
    before = {n: p.detach().clone() for n, p in converted[1].named_parameters()}
    after, report = tuned(converted, steps=1, lr=1e-3, weight_decay=500.0)
    left = 1 - 500 * report.history[0].lr
    assert 0.2 < left < 0.8
    for name, p in after.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("b_up", "b_out"):
            assert not torch.equal(p, before[name])
            torch.testing.assert_close(p, before[name], rtol=0, atol=1.1e-3)
        elif last in ("w_up", "w_down"):
            torch.testing.assert_close(p, left * before[name], rtol=0, atol=1.1e-3)


def test_the_ramp_says_when_the_threshold_is_whole(converted):
    seen = {}
    for ramp in (0.0, 1.0):
        teacher, model, batches = converted
        model = copy.deepcopy(model)
        layer = next(iter(sadmoe.moe_layers(model).values()))
        taus = seen.setdefault(ramp, [])
        layer.register_forward_pre_hook(
            lambda m, args, taus=taus: taus.append(m.gate.tau) if torch.is_grad_enabled() else None
        )
        config = sadmoe.FinetuneConfig(steps=4, tau=0.2, ramp=ramp)
        sadmoe.finetune_(model, batches, config, teacher=teacher, progress=False)
    assert seen[0.0] == [0.2] * 4
    assert seen[1.0] == pytest.approx([0.025, 0.075, 0.125, 0.175])


def test_a_loss_on_the_outputs_is_added_to_the_hidden_states(converted):
    teacher, model, batches = converted
    calls = []

    def output_loss(output, wanted, batch):
        calls.append((output, wanted, batch))
        return (output.last_hidden_state - wanted.last_hidden_state).square().mean() + 7

    reports = [
        sadmoe.finetune_(
            copy.deepcopy(model),
            batches,
            sadmoe.FinetuneConfig(steps=1, alpha=0.0),
            teacher=teacher,
            output_loss=loss,
            progress=False,
        )
        for loss in (None, output_loss)
    ]
    (output, wanted, batch), extra = calls[0], output_loss(*calls[0])
    assert batch.keys() == batches[0].keys()
    assert not wanted.last_hidden_state.requires_grad
    assert output.last_hidden_state.requires_grad
    plain, more = (report.history[0].objective for report in reports)
    assert more - plain == pytest.approx(extra.item(), rel=1e-5)


def test_logits_are_held_to_the_teacher_s_at_real_tokens():
    tiny = TINY["llama"]
    teacher, batches = tiny.model(), [tiny.batch()]
    batches[0]["attention_mask"] = torch.ones_like(batches[0]["input_ids"])
    batches[0]["attention_mask"][0, 3:] = 0
    model = copy.deepcopy(teacher)
    sadmoe.convert_(
        model,
        batches,
        sadmoe.ConvertConfig(expert_size=10, tau=0.5, router=sadmoe.RouterConfig(steps=2, width=4)),
        progress=False,
    )

    def by_hand(output, wanted, batch):
        ours, theirs = (o.logits.float().softmax(-1) for o in (output, wanted))
        kl = (theirs * (theirs / ours).log()).sum(-1)
        return kl[batch["attention_mask"].bool()].mean()

    found = {}
    for loss in ("logits", by_hand, None):
        config = sadmoe.FinetuneConfig(steps=1, tau=None)
        report = sadmoe.finetune_(
            copy.deepcopy(model), batches, config, teacher=teacher, output_loss=loss, progress=False
        )
        found[loss] = report.history[0].objective
    assert found["logits"] == pytest.approx(found[by_hand], rel=1e-5)
    assert found["logits"] > found[None] * 1.001


def test_wrong_settings_are_named(converted):
    teacher, model, batches = converted
    for settings, message in (
        ({}, "give steps or seconds"),
        ({"steps": 1, "share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"steps": 1, "tau": 2.0}, r"tau must be in \[0, 1\]"),
        ({"steps": 1, "ramp": 1.5}, r"ramp must be a share of the run in \[0, 1\], got 1.5"),
        ({"steps": 1, "lr": -1.0}, "lr must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sadmoe.FinetuneConfig(**settings)
    config = sadmoe.FinetuneConfig(steps=1)
    with pytest.raises(ValueError, match="has no converted layer"):
        sadmoe.finetune_(teacher, batches, config)
    with pytest.raises(ValueError, match="give teacher or loss, not both"):
        sadmoe.finetune_(model, batches, config, teacher=teacher, loss=lambda m, b: 0)
    with pytest.raises(ValueError, match=r"output_loss compares .*: give it as teacher"):
        sadmoe.finetune_(model, batches, config, output_loss=lambda y, t, b: 0)
    with pytest.raises(ValueError, match="output_loss must be one of logits, got 'logit'"):
        sadmoe.finetune_(model, batches, config, teacher=teacher, output_loss="logit")
    with pytest.raises(ValueError, match=r"the logits of a model .* this one gives BaseModelOutput"):
        sadmoe.finetune_(model, batches, config, teacher=teacher, output_loss="logits", progress=False)


class Wrapper(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, **batch):
        return self.encoder(**batch)


def test_a_model_converted_alone_is_fine_tuned_as_a_part_of_another(converted):
    teacher, model, batches = (copy.deepcopy(one) for one in converted)
    whole = Wrapper(model)
    before = [p.clone() for p in whole.parameters()]
    config = sadmoe.FinetuneConfig(steps=2, share=0.2, lr=3e-3)
    sadmoe.finetune_(whole, batches, config, teacher=Wrapper(teacher), progress=False)
    assert not all(torch.equal(p, q) for p, q in zip(whole.parameters(), before, strict=True))
