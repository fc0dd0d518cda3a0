"""The swap of one activation for another: in the dense model, in its config, and where there is nothing to swap."""

from typing import Any

import pytest
import sadmoe
import torch
import torch.nn.functional as F
from sadmoe.ffn import find_ffns, swap_activations_
from tiny_models import F_, TINY, D, UserFFN, call
from torch import Tensor, nn


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5 v1.1", "gemma", "albert"])
def test_config_follows_so_that_a_saved_dense_model_reloads_alike(name: str, tmp_path: Any):
    tiny = TINY[name]
    model = tiny.model()
    model.save_pretrained(tmp_path)
    before = model.config.to_json_string()
    undo = swap_activations_(model, find_ffns(model))
    expected = call(model, tiny.batch())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {site.act for site in find_ffns(loaded)} == {"relu"}
    assert torch.equal(call(loaded, tiny.batch()), expected)
    undo()
    assert model.config.to_json_string() == before


def test_hooks_of_an_activation_that_goes_are_warned_of():
    model = UserFFN(nn.GELU())
    model.nonlinearity.register_forward_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match="^nonlinearity: relu takes their place, and their hooks do not run any more"
    ):
        swap_activations_(model, find_ffns(model))


def test_t5_config_tells_the_gelus_apart(tmp_path: Any):
    model = TINY["t5 v1.1"].model()
    swap_activations_(model, find_ffns(model), "gelu")
    model.save_pretrained(tmp_path)
    assert {site.act for site in find_ffns(type(model).from_pretrained(tmp_path))} == {"gelu"}


def test_config_stays_where_something_else_uses_its_activation(caplog: pytest.LogCaptureFixture):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": D, "intermediate_size": F_, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes))
    undo = swap_activations_(model, find_ffns(model))
    assert model.config.hidden_act == "gelu"
    assert (
        "the config keeps hidden_act=gelu, as cls.predictions.transform.transform_act_fn uses it too"
        in caplog.text
    )
    undo()
    caplog.clear()
    model = TINY["bert"].model()
    swap_activations_(model, find_ffns(model, filter=lambda name: "layer.0" in name))
    assert model.config.hidden_act == "gelu"
    assert "encoder.layer.1.intermediate.intermediate_act_fn uses it too" in caplog.text


def test_swap_wants_an_activation_it_knows():
    model = nn.Sequential(UserFFN(nn.GELU()))
    with pytest.raises(
        ValueError, match="act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'mish'"
    ):
        swap_activations_(model, find_ffns(model), "mish")


class Unused(nn.Module):
    """Has its activation as a module, and calls it as a function."""

    def __init__(self):
        super().__init__()
        self.expand, self.act, self.contract = nn.Linear(24, 60), nn.GELU(), nn.Linear(60, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))


def test_an_activation_that_forward_does_not_use_cannot_be_swapped():
    model = nn.Sequential(Unused())
    (site,) = find_ffns(model)
    assert site.act == "gelu"
    assert isinstance(model[0].act, nn.GELU)
    with pytest.raises(NotImplementedError, match="is a function called in forward"):
        sadmoe.sparsify_(model, [torch.randn(4, 24)], sadmoe.SparsifyConfig(steps=1), progress=False)


class InPlace(Unused):
    """Calls its activation with more than the input."""

    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.act(self.expand(x), inplace=True))


def test_an_activation_may_take_more_than_its_input():
    (site,) = find_ffns(nn.Sequential(InPlace()))
    assert (site.act, site.parts.activation) == ("relu", "act")
