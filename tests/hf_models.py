"""Converted transformers models, and their files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")
import sadmoe
import sadmoe.hf
from converted import converted
from sadmoe import set_tau
from tiny_models import TINY, call


def described(name: str) -> Any:
    """A converted transformers model at tau = 0.3, its config up to date as convert_ leaves it."""
    model = converted(name)
    sadmoe.hf.describe_to_transformers(model)
    set_tau(model, 0.3)
    transformers.logging.set_verbosity_warning()
    return model


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def edit_config(path: Path, edit: Any) -> None:
    config = config_of(path)
    edit(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, edit: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors, next(key for key in tensors if key.endswith("w_up")))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def same(a: nn.Module, b: nn.Module, name: str) -> bool:
    batch = TINY[name].batch()
    return torch.equal(call(a, batch), call(b, batch))
