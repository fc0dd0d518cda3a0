"""What bench/ablations.py makes of a model."""

import sys
from pathlib import Path

import pytest
import sadmoe
import torch
from test_calibrate import text_batches
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
    with torch.no_grad():
        before = model(**batches[0]).last_hidden_state
        ablations.centred(model, batches, skipping=0.3)
        sadmoe.set_tau(model, 0.0)
        torch.testing.assert_close(model(**batches[0]).last_hidden_state, before, rtol=1e-4, atol=1e-5)
        layer = next(iter(sadmoe.moe_layers(model).values()))
        layer.gate = sadmoe.DynamicK(0.5)
        x = torch.randn(7, layer.shape.d)
        mask = layer.mask(x)
        assert not mask.all()
        torch.testing.assert_close(layer(x), layer._down(layer._kept(layer._hidden(x), mask)))
