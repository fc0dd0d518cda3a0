"""Sparsity fine-tuning in transformers' Trainer, in one process and in two, and in a loop of one's own."""

import copy
import os
from types import SimpleNamespace

import pytest
import sadmoe
import torch
from ports import free_port
from processes import run_together
from test_ffn_recorded import Windows
from tiny_models import tokens
from torch import nn
from trainers import (
    PLAIN_SGD,
    RouterCallback,
    Rows,
    SparsityCallback,
    model_of,
    routed,
    routed_alike,
    routed_model,
    states_differ,
    trained,
    transformers,
    weighs_batches,
    weighs_last_steps,
)

ARGUMENTS = {"n_gpu": 0, "label_smoothing_factor": 0.0}


@pytest.mark.parametrize("callback", [SparsityCallback, RouterCallback])
def test_several_devices_in_one_process_are_refused(callback):
    with pytest.raises(
        ValueError, match=rf"{callback.__name__} needs one device a process, got 2 in this one: launch"
    ):
        callback().check(SimpleNamespace(n_gpu=2))


def zeros(model: nn.Module) -> float:
    layers = sadmoe.measure_sparsity(model, [tokens()])
    return sum(layer.zero for layer in layers) / len(layers)


@pytest.mark.parametrize("name", ["bert classifier", "llama"])
def test_the_callback_makes_neurons_fewer(name, tmp_path):
    long = {"max_steps": 40, "learning_rate": 5e-3}
    sparse, _ = trained(tmp_path, SparsityCallback(alpha=1.0), name, **long)
    without, _ = trained(tmp_path, SparsityCallback(alpha=0.0), name, **long)
    assert zeros(sparse) > zeros(without) + 0.02


def test_after_training_the_model_is_free_of_it(tmp_path):
    model, _ = trained(tmp_path, SparsityCallback(alpha=1.0))
    assert all(not module._forward_hooks for module in model.modules())


class Fails(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("the disk is full")


def test_a_compiled_model_is_refused_before_its_activations_are_swapped(tmp_path):
    model = model_of("bert classifier")
    before = [(type(m), m.training) for m in model.modules()], model.config.hidden_act
    model.compile()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    callbacks = [SparsityCallback()]
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(8, causal=False), callbacks=callbacks)
    with pytest.raises(ValueError, match="compiled"):
        trainer.train()
    assert ([type(m) for m in model.modules()], model.config.hidden_act) == (
        [t for t, _ in before[0]],
        before[1],
    )


def test_a_run_that_failed_adds_nothing_to_the_loss_of_later_calls(tmp_path):
    callback, model = SparsityCallback(alpha=1e3), model_of("bert classifier")
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = Rows(8, causal=False)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback, Fails()])
    with pytest.raises(RuntimeError, match="the disk is full"):
        trainer.train()
    batch = {"input_ids": data[0]["input_ids"][None], "labels": data[0]["labels"][None]}
    loss = model.train()(**batch).loss
    callback.stop()
    assert torch.equal(model(**batch).loss, loss)
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_was_not_trained_gets_its_activations_back(trained, tmp_path):
    class Raises(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not trained:
                raise KeyboardInterrupt

        def on_optimizer_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt  # of the first step

    config = model_of("bert classifier").config
    config.hidden_act = "gelu"
    callback, model = SparsityCallback(), transformers.BertForSequenceClassification(config)
    batch = {"input_ids": Rows(1, causal=False)[0]["input_ids"][None]}
    before = model.eval()(**batch).logits
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = Rows(8, causal=False)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback, Raises()])
    for _ in range(1 if trained else 2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    callback.stop()
    assert model.config.hidden_act == ("relu" if trained else "gelu")
    assert torch.equal(model.eval()(**batch).logits, before) == (not trained)


def test_the_ffns_and_the_penalty_are_those_asked_for(tmp_path):
    seen = {}

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen["acts"] = [site.act for site in sadmoe.find_ffns(model)]

    names = [site.name for site in sadmoe.find_ffns(model_of("bert classifier"))]
    for penalty in ("hoyer", "l1"):
        model = model_of("bert classifier")
        for layer in model.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = nn.GELU()
        callback = SparsityCallback(penalty=penalty, filter=lambda name: name == names[1])
        routed(tmp_path, [callback, Looks()], model, max_steps=1).train()
        assert seen["acts"] == ["gelu", "relu"]
        seen[penalty] = callback.last
    assert seen["hoyer"] != seen["l1"]


def test_ffns_that_only_a_batch_shows_are_found(tmp_path):
    model, batch = Windows(), torch.randn(2, 14, 24)
    event = (SimpleNamespace(**ARGUMENTS), SimpleNamespace(global_step=0), None)
    with pytest.raises(NotImplementedError, match="Masked"):
        SparsityCallback().on_train_begin(*event, model=model)
    callback = SparsityCallback(batches=[batch])
    callback.on_train_begin(*event, model=model)
    assert [type(block.act) for block in model.blocks] == [nn.ReLU, nn.ReLU]
    callback.stop()
    assert [type(block.act) for block in model.blocks] == [nn.GELU, nn.GELU]


def test_with_alpha_zero_it_changes_nothing(tmp_path):
    ours, _ = trained(tmp_path, SparsityCallback(alpha=0.0))
    plain, _ = trained(tmp_path, None)  # a ReLU model, so nothing is swapped
    assert states_differ(ours, plain) == []


@weighs_batches
@pytest.mark.parametrize(("name", "scaled_by_model"), [("bert classifier", False), ("llama", True)])
def test_accumulated_batches_weigh_as_one_large_one(name, scaled_by_model, tmp_path):
    settings = PLAIN_SGD | {"max_steps": 2, "scaled_by_model": scaled_by_model}
    alpha = {"alpha": 5.0, "schedule": "constant"}
    whole, _ = trained(tmp_path, SparsityCallback(**alpha), name, **settings)
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    parts, _ = trained(tmp_path, SparsityCallback(**alpha), name, **settings)
    start = model_of(name)
    assert len(states_differ(whole, start)) > 10
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@weighs_last_steps
def test_an_epoch_s_last_step_of_fewer_batches_weighs_the_penalty_as_any(tmp_path):
    settings = PLAIN_SGD | {"n": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    models = []
    for scaled_by_model in (False, True):  # rows of as many labels: the loss is the same
        callback = SparsityCallback(alpha=5.0, schedule="constant")
        models.append(trained(tmp_path, callback, "llama", scaled_by_model=scaled_by_model, **settings)[0])
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class EndsEpochAfterOne(SparsityCallback):
    """As an early stop of one's own: the next update begins another epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        control.should_epoch_stop = state.global_step == 1


@weighs_last_steps
@pytest.mark.parametrize("how", ["an epoch stopped", "resumed from its start", "resumed inside"])
def test_steps_are_counted_from_where_their_epoch_began(how, tmp_path):
    settings = PLAIN_SGD | {"n": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    kind = SparsityCallback
    if how == "an epoch stopped":
        kind = EndsEpochAfterOne
    else:  # after the first of an epoch's two updates
        save = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trained(tmp_path, SparsityCallback(alpha=5.0, schedule="constant"), "llama", **settings | save)
        settings["resume_from_checkpoint"] = tmp_path / "checkpoint-1"
        settings["ignore_data_skip"] = how == "resumed from its start"
    models = []
    for scaled_by_model in (False, True):  # rows of as many labels: the loss is the same
        callback = kind(alpha=5.0, schedule="constant")
        models.append(trained(tmp_path, callback, "llama", scaled_by_model=scaled_by_model, **settings)[0])
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert classifier", "llama"])
def test_gradient_checkpointing_changes_nothing_but_rounding(name, tmp_path):
    plain, _ = trained(tmp_path, SparsityCallback(alpha=1.0), name)
    checkpointed, _ = trained(tmp_path, SparsityCallback(alpha=1.0), name, gradient_checkpointing=True)
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_bf16_trains_close_to_float32(tmp_path):
    callback, mixed = SparsityCallback(alpha=1.0), SparsityCallback(alpha=1.0)
    plain, _ = trained(tmp_path, callback)
    bf16, _ = trained(tmp_path, mixed, bf16=True)
    assert mixed.last.dtype == torch.float32
    torch.testing.assert_close(mixed.last, callback.last, rtol=0.02, atol=0.0)
    assert states_differ(bf16, plain) != []


def test_it_resumes_from_the_trainer_s_checkpoint(tmp_path):
    callback, again = SparsityCallback(alpha=1.0), SparsityCallback(alpha=1.0)
    whole, _ = trained(tmp_path / "a", callback, save_strategy="steps", save_steps=2)
    resumed, _ = trained(tmp_path / "a", again, resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert again.alpha == callback.alpha
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_evaluation_inside_training_has_no_penalty(tmp_path):
    model = model_of("bert classifier")
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, eval_strategy="steps", eval_steps=1,
        save_strategy="no", learning_rate=1e-9,
    )  # fmt: skip
    data = Rows(8, causal=False)
    callback = SparsityCallback(alpha=1e6, schedule="constant")
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    trainer.train()
    losses = {
        key: value for entry in trainer.state.log_history for key, value in entry.items() if "loss" in key
    }
    assert losses["eval_loss"] < 10 < losses["train_loss"]


def test_evaluation_inside_training_leaves_nothing_behind(tmp_path):
    callbacks = [SparsityCallback(alpha=10.0, schedule="constant") for _ in range(2)]
    plain, _ = trained(tmp_path / "plain", callbacks[0], max_steps=3)
    between = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Rows(8, causal=False)}
    evaluated, _ = trained(tmp_path / "evaluated", callbacks[1], max_steps=3, **between)
    assert states_differ(plain, evaluated) == []


def test_a_loss_of_the_trainer_s_own_is_refused(tmp_path):
    model = model_of("llama")
    arguments = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 1,
        "save_strategy": "no",
    }
    for refused, told in (
        ({"arguments": {"label_smoothing_factor": 0.1}}, "leave label smoothing out"),
        ({"trainer": {"compute_loss_func": lambda *args, **kwargs: None}}, "compute_loss_func out"),
    ):
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(tmp_path, **arguments, **refused.get("arguments", {})),
            train_dataset=Rows(8, causal=True),
            callbacks=[SparsityCallback(alpha=1.0)],
            **refused.get("trainer", {}),
        )
        with pytest.raises(ValueError, match=told):
            trainer.train()
        if "arguments" in refused:  # known before anything was changed
            assert {site.act for site in sadmoe.find_ffns(model)} == {"silu"}


def test_a_loss_of_one_s_own_that_leaves_the_term_out_is_refused(tmp_path, monkeypatch):
    def of_logits(trainer, model, inputs, **kwargs):
        labels = inputs["labels"]
        return nn.functional.cross_entropy(model(**inputs).logits, labels)

    monkeypatch.setattr(transformers.Trainer, "compute_loss", of_logits)
    with pytest.raises(ValueError, match=r"SparsityCallback adds .* that was not trained on: a compute_loss"):
        trained(tmp_path, SparsityCallback(alpha=1.0))


def test_passes_of_modules_inside_between_steps_leave_nothing_behind(tmp_path):
    class Embeds(SparsityCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            with torch.no_grad():
                model.bert(torch.arange(12).view(2, 6))

    callbacks = [kind(alpha=10.0, schedule="constant") for kind in (SparsityCallback, Embeds)]
    plain, embedded = (trained(tmp_path / str(i), one, max_steps=3)[0] for i, one in enumerate(callbacks))
    assert callbacks[0].last == callbacks[1].last
    assert states_differ(plain, embedded) == []


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="penalty must be one of hoyer, l1, got 'l2'"):
        SparsityCallback(penalty="l2")


def test_the_plain_loop_does_what_the_callback_does(tmp_path):
    callback = SparsityCallback(alpha=2.0, schedule="constant")
    ours, _ = trained(tmp_path, callback, n=4, **PLAIN_SGD, max_steps=1)
    model = model_of("bert classifier").train()
    rows = Rows(4, causal=False)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with sadmoe.SparsityLoss(model) as sparsity:
        (model(**batch).loss + 2.0 * sparsity(batch)).backward()
    for (name, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        expected = p if p.grad is None else p - 1e-2 * p.grad
        torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_converted_model_trains_in_the_trainer(tmp_path):
    model = model_of("bert classifier")
    config = sadmoe.ConvertConfig(experts=6, tau=0.1, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, [tokens()], config, progress=False)
    before = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_strategy="no", bf16=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=Rows(8, causal=False)).train()
    moved = states_differ(model, before)
    assert any("w_up" in key for key in moved)


WORKER = """
    import os, sys
    from pathlib import Path
    import torch, trainers
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    settings = trainers.PLAIN_SGD | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    callback = trainers.SparsityCallback(alpha=5.0, schedule="constant")
    model, trainer = trainers.trained(folder, callback, "llama", **settings)
    assert trainer.args.world_size == 2
    routers = trainers.routed_alike(folder, per_device_train_batch_size=2, ddp_backend="gloo")
    if trainer.args.process_index == 0:
        save_file(dict(model.named_parameters()), folder / "model.safetensors")
        save_file(dict(routers.named_parameters()), folder / "routers.safetensors")
    torch.distributed.barrier()  # neither leaves while the other may still talk to it
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's own threads have aborted a process that ended by itself
"""


def test_two_processes_do_what_one_does(tmp_path):
    from safetensors.torch import load_file

    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def place(rank: int) -> dict[str, str]:
        return os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)}

    assert run_together(WORKER, 2, str(tmp_path), env=place) == [0, 0]
    two = load_file(tmp_path / "model.safetensors")
    one, _ = trained(tmp_path, SparsityCallback(alpha=5.0, schedule="constant"), "llama", **PLAIN_SGD)
    assert len(states_differ(one, model_of("llama"))) > 10
    for name, p in one.named_parameters():
        torch.testing.assert_close(two[name], p.detach(), rtol=1e-3, atol=1e-5, msg=name)
    two, one = load_file(tmp_path / "routers.safetensors"), routed_alike(tmp_path)
    assert len(states_differ(one, routed_model())) == 4  # v1 and v2 of two layers
    for name, p in one.named_parameters():
        torch.testing.assert_close(two[name], p.detach(), rtol=1e-3, atol=1e-5, msg=name)
