"""Training in bfloat16 where that is faster."""

import pytest
import sadmoe
import torch
from sadmoe import mixed
from sadmoe.mixed import fast_training
from tiny_models import TINY
from torch import nn
from versions import transformers_before

pytest.importorskip("transformers")


@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16_and_eager_attention_inside_and_what_was_before_afterwards(faster, monkeypatch):
    monkeypatch.setattr(mixed, "bf16_is_faster", lambda: faster)
    whole = TINY["bert"].model()
    wrapped, plain = nn.Sequential(whole), nn.Linear(2, 2)
    usual = whole.config._attn_implementation
    seen = []

    def inside():
        with fast_training(wrapped, plain):
            seen.append((torch.is_autocast_enabled("cpu"), whole.config._attn_implementation))
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert seen == [(faster, "eager")]
    assert usual != "eager"
    assert whole.config._attn_implementation == usual
    assert not torch.is_autocast_enabled("cpu")


def test_attention_comes_back_where_training_gave_the_model_another_config():
    """`sparsify_` swaps GELU for ReLU, and with it the config."""
    tiny = TINY["bert"]
    model = tiny.model()
    config, usual = model.config, model.config._attn_implementation
    with fast_training(model):
        sadmoe.sparsify_(model, [tiny.batch()], sadmoe.SparsifyConfig(steps=1), progress=False)
    assert model.config is not config
    assert model.config._attn_implementation == usual


@pytest.mark.skipif(transformers_before("5.2"), reason="its parts are no models of their own")
def test_parts_of_a_model_may_have_attention_of_their_own():
    model = TINY["clip"].model()
    model.text_model.set_attn_implementation("eager")
    assert model.vision_model.config._attn_implementation == "sdpa"
    with fast_training(model):
        assert model.vision_model.config._attn_implementation == "eager"
    assert model.text_model.config._attn_implementation == "eager"
    assert model.vision_model.config._attn_implementation == "sdpa"


class NoSdpa(nn.Module):
    """A part that has eager attention alone, as a ResNet has, and says so."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def set_attn_implementation(self, implementation):
        if implementation != "eager":
            raise ValueError(f"does not support {implementation}")
        self.config._attn_implementation = implementation


class NoEager(NoSdpa):
    def set_attn_implementation(self, implementation):
        raise ValueError(f"does not support {implementation}")


def test_a_part_that_refuses_an_attention_ends_no_training():
    model = TINY["bert"].model()
    model.backbone = NoSdpa(type(model.config)(attn_implementation="sdpa"))
    model.other = NoEager(type(model.config)(attn_implementation="sdpa"))
    with fast_training(model):
        assert model.config._attn_implementation == "eager"
        assert model.other.config._attn_implementation == "sdpa"
    parts = (model, model.backbone, model.other)
    assert [part.config._attn_implementation for part in parts] == ["sdpa"] * 3


def test_float16_stays_float16(monkeypatch):
    monkeypatch.setattr(mixed, "bf16_is_faster", lambda: True)
    with fast_training(nn.Linear(2, 2).half()):
        assert not torch.is_autocast_enabled("cpu")


def test_a_caller_s_own_autocast_stays(monkeypatch):
    monkeypatch.setattr(mixed, "bf16_is_faster", lambda: False)
    with torch.autocast("cpu", torch.float16), fast_training(nn.Linear(2, 2)):
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_autocast_enabled("cpu")
