"""Small models that transformers' Trainer trains with sadmoe's callbacks, and how."""

import pytest
import sadmoe
import torch
from tiny_models import TINY, tokens
from torch import Tensor, nn
from versions import transformers_before

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sadmoe.hf.trainer import RouterCallback, SparsityCallback

STEPS = 4
PLAIN_SGD = {"learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
# Not those whose own loss, without a callback, depends on how a step is cut.
weighs_batches = pytest.mark.skipif(
    transformers_before("5.5") and not transformers_before("5.1"),
    reason="this Trainer divides by the batches twice",
)
weighs_last_steps = pytest.mark.skipif(
    transformers_before("5.10"), reason="this Trainer counts a row's first label, which nothing predicts"
)


class Rows(torch.utils.data.Dataset):
    """Token ids with a class label, or with the ids themselves as labels."""

    def __init__(self, n: int, causal: bool):
        ids = torch.randint(3, 50, (n, 9), generator=torch.Generator().manual_seed(7))
        self.rows = [{"input_ids": row, "labels": row if causal else row[0] % 2} for row in ids]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def model_of(name: str) -> nn.Module:
    model = TINY[name].model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    return model


def trained(
    tmp_path,
    callback: SparsityCallback | None,
    name="bert classifier",
    n=8,
    scaled_by_model=None,
    **arguments,
):
    """The model after a Trainer's run, and the Trainer. scaled_by_model: whether the model is told how many labels the
    whole update has, by which it then divides its loss."""
    model = model_of(name)
    of_trainer = {key: arguments.pop(key) for key in ("eval_dataset",) if key in arguments}
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 1} | arguments
    callbacks = [] if callback is None else [callback]
    data = Rows(n, causal=name == "llama")
    arguments_ = transformers.TrainingArguments(tmp_path, **settings)
    trainer = transformers.Trainer(model, arguments_, train_dataset=data, callbacks=callbacks, **of_trainer)
    if scaled_by_model is not None:
        trainer.model_accepts_loss_kwargs = scaled_by_model
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return model, trainer


def states_differ(a: nn.Module, b: nn.Module) -> list[str]:
    ours, theirs = a.state_dict(), b.state_dict()
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


class Unlabelled(Rows):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i]["input_ids"]}


def routed_model(name="bert classifier") -> nn.Module:
    model = model_of(name)
    config = sadmoe.ConvertConfig(experts=6, tau=0.1, router=sadmoe.RouterConfig(steps=1, width=8))
    sadmoe.convert_(model, [tokens()], config, progress=False)
    return model


def routed(tmp_path, callbacks, model, data=None, **settings) -> transformers.Trainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "seed": 1} | settings
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    data = Rows(8, causal=False) if data is None else data
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def routed_alike(folder, **settings) -> nn.Module:
    """Routers fitted on samples that are all alike, so that every batch has the same loss, whatever its size."""
    data, model = Rows(8, causal=False), routed_model()
    data.rows = data.rows[:1] * 8
    routed(folder, [RouterCallback()], model, data, **PLAIN_SGD, **settings).train()
    return model
