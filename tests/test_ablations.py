"""What bench/ablations.py makes of a model."""

import copy
import sys
from pathlib import Path

import pytest
import sadmoe
import torch
from text_losses import text_batches
from tiny_models import TINY

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parent.parent / "bench"))

import ablations


def test_means_in_the_bias_leave_the_model_what_it_was_and_are_all_that_skipped_experts_give(monkeypatch):
    monkeypatch.setattr(ablations, "STEPS", 2)
    monkeypatch.setattr(ablations, "WIDTH", 4)
    model, batches = TINY["bert"].model(), text_batches()
    config = sadmoe.ConvertConfig(experts=6, tau=0.0, router=sadmoe.RouterConfig(steps=2, width=4))
    sadmoe.convert_(model, batches, config, progress=False)
    name, plain = next(iter(copy.deepcopy(sadmoe.moe_layers(model)).items()))
    real = [batch["attention_mask"].flatten().bool() for batch in batches]
    with torch.no_grad():
        hidden = [
            plain._hidden(rows)[kept] for rows, kept in zip(entering(model, name, batches), real, strict=True)
        ]
        mean, w_down = torch.cat(hidden).mean(0), plain.w_down.flatten(0, 1)
        before = model(**batches[0]).last_hidden_state
        ablations.centred(model, batches, skipping=0.3)
        sadmoe.set_tau(model, 0.0)
        torch.testing.assert_close(model(**batches[0]).last_hidden_state, before, rtol=1e-4, atol=1e-5)
        layer = sadmoe.moe_layers(model)[name]
        layer.gate = sadmoe.DynamicK(0.5)
        x = torch.randn(7, layer.shape.d)
        mask = layer.mask(x)
        assert not mask.all()
        chosen = mask.repeat_interleave(layer.expert_size, 1)
        by_hand = plain.b_out + (mean + (plain._hidden(x) - mean) * chosen) @ w_down
        torch.testing.assert_close(layer(x), by_hand, rtol=1e-4, atol=1e-5)


def entering(model, name, batches):
    """The rows of each batch that enter a layer."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].flatten(0, -2))
    )
    for batch in batches:
        model(**batch)
    hook.remove()
    return seen
