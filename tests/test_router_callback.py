"""Router fitting in transformers' Trainer."""

import copy

import pytest
import sadmoe
import torch
from tiny_models import tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainers import (
    PLAIN_SGD,
    RouterCallback,
    Rows,
    Unlabelled,
    model_of,
    routed,
    routed_alike,
    routed_model,
    states_differ,
    transformers,
    weighs_batches,
)


@weighs_batches
def test_accumulated_batches_fit_routers_as_one_large_one(tmp_path):
    whole = routed_alike(tmp_path)
    parts = routed_alike(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert len(states_differ(whole, routed_model())) == 4  # v1 and v2 of two layers
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_alone_are_fitted_without_labels(tmp_path, checkpointing):
    model, callback = routed_model("bert"), RouterCallback()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9  # of no consequence, as in evaluation
    before, asked = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
    settings = {"max_steps": 60, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 60}
    trainer = routed(
        tmp_path, [callback], model, Unlabelled(8, causal=False), gradient_checkpointing=checkpointing, **settings
    )  # fmt: skip
    trainer.train()
    assert all(".router." in name for name in states_differ(model, before))
    with sadmoe.RouterLoss(before) as at_first, sadmoe.tau(before, 0.0), torch.no_grad():
        before(input_ids=torch.stack([row["input_ids"] for row in Unlabelled(8, causal=False)]))
        assert callback.last < 0.5 * at_first()
    assert [p.requires_grad for p in model.parameters()] == asked
    watched = [model, *sadmoe.moe_layers(model).values()]  # checkpointing leaves hooks of its own elsewhere
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in watched)
    assert all(layer.gate == sadmoe.DynamicK(0.1) for layer in sadmoe.moe_layers(model).values())
    saved = type(model).from_pretrained(tmp_path / "checkpoint-60")
    assert states_differ(saved, model) == []
    assert all(layer.gate == sadmoe.DynamicK(0.1) for layer in sadmoe.moe_layers(saved).values())


def test_routers_beside_experts_take_the_step_of_a_plain_loop(tmp_path):
    ours = routed_model()
    data = Rows(4, causal=False)
    routed(tmp_path, [RouterCallback(2.0, alone=False)], ours, data, **PLAIN_SGD | {"max_steps": 1}).train()
    model = routed_model().train()
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with sadmoe.RouterLoss(model) as routers:
        (model(**batch).loss + 2.0 * routers(batch)).backward()
    moved = set()
    for (name, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        expected = p if p.grad is None else p - 1e-2 * p.grad
        torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-6, msg=name)
        moved |= {name.rpartition(".")[2]} if p.grad is not None and p.grad.any() else set()
    assert moved >= {"v1", "v2", "w_up", "w_down"}


def test_a_router_callback_of_a_second_trainer_leaves_what_asked_for_gradients(tmp_path):
    model, callback = routed_model(), RouterCallback()
    asked = [p.requires_grad for p in model.parameters()]
    for _ in range(2):
        routed(tmp_path, [callback], model)
        assert sum(p.requires_grad for p in model.parameters()) == 4  # of two routers
    callback.stop()
    assert [p.requires_grad for p in model.parameters()] == asked


def test_a_router_callback_that_comes_too_late_is_refused(tmp_path):
    trainer = routed(tmp_path, [], routed_model())
    trainer.add_callback(RouterCallback())
    with pytest.raises(
        ValueError, match=r"came after the Trainer.* give a new one to a new Trainer\(model, callbacks"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="alpha must be above 0, got 0"):
        RouterCallback(0.0)
    with pytest.raises(ValueError, match="target_power must be in"):
        RouterCallback(target_power=3.0)


def test_routers_of_projections_are_fitted_in_bfloat16(tmp_path):
    model, callback = model_of("bert"), RouterCallback()
    sadmoe.replace_projections_(model, [tokens()], sadmoe.ProjectionConfig(steps=2), progress=False)
    config = sadmoe.ConvertConfig(expert_size=4, tau=0.1, router=sadmoe.RouterConfig(steps=1, width=4))
    sadmoe.convert_(model, [tokens()], config, progress=False)
    before, losses = copy.deepcopy(model), []

    class Notes(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            losses.append(callback.last.item())

    settings = {"max_steps": 40, "learning_rate": 1e-2, "bf16": True}
    trainer = routed(tmp_path, [callback, Notes()], model, Unlabelled(8, causal=False), **settings)
    trainer.train()
    assert callback.last.dtype == torch.float32
    assert losses[-1] < 0.7 * losses[0]
    moved = states_differ(model, before)
    assert len(moved) == 2 * len(sadmoe.moe_layers(model))


def test_what_a_router_callback_cannot_follow_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave label smoothing out"):
        routed(tmp_path, [RouterCallback()], routed_model(), label_smoothing_factor=0.1)
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    trainer = transformers.Trainer(
        None,
        arguments,
        train_dataset=Rows(8, causal=False),
        model_init=lambda: routed_model(),
        callbacks=[RouterCallback()],
    )
    with pytest.raises(ValueError, match=r"made another model since \(model_init\)"):
        trainer.train()


def test_beside_experts_a_model_without_a_loss_is_refused(tmp_path):
    trainer = routed(
        tmp_path, [RouterCallback(alone=False)], routed_model("bert"), Unlabelled(8, causal=False)
    )
    with pytest.raises(ValueError, match="RouterCallback adds to the loss that the model returns"):
        trainer.train()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_gradients_gates_and_modes(tmp_path, error):
    model, callback = routed_model(), RouterCallback()
    asked = [p.requires_grad for p in model.parameters()]
    trainer = routed(tmp_path, [callback], model)

    def fails(module, args):
        assert not module.training
        raise error("out of memory")

    (layer, *_) = sadmoe.moe_layers(model).values()
    handle = layer.register_forward_pre_hook(fails)
    with pytest.raises(error, match="out of memory"):
        trainer.train()
    handle.remove()
    if error is KeyboardInterrupt:  # for which torch runs no hook
        callback.unwatch()
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    assert layer.gate == sadmoe.DynamicK(0.1)
    trainer.train()  # the same run again
    assert callback.last is not None
    assert [p.requires_grad for p in model.parameters()] == asked


def test_an_optimizer_without_the_routers_is_refused(tmp_path):
    model = routed_model()
    asked = [p for p in model.parameters() if p.requires_grad]
    trainer = routed(tmp_path, [RouterCallback()], model)
    trainer.optimizer = torch.optim.SGD(asked, lr=1e-2)
    with pytest.raises(ValueError, match=r"optimizer does not have all routers.*make it after the Trainer"):
        trainer.train()
    model = routed_model()
    trainer = routed(tmp_path, [RouterCallback()], model)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer.train()
    assert len(states_differ(model, routed_model())) == 4


def test_split_routers_are_refused_with_the_cause(tmp_path):
    model, callback = routed_model(), RouterCallback()
    trainer = routed(tmp_path, [callback], model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"split over processes.*by fit_routers_\(model, batches\)"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    finally:
        torch.distributed.destroy_process_group()
