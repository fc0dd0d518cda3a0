import math

import pytest
import torch
from converted import converted, random_layer, random_rows
from sadmoe.dial import converted_layers, set_tau, tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.masks import experts_per_token, record_masks
from tiny_models import TINY, call
from torch import Tensor, nn


def masks_by_hand(model, batch):
    """The mask of every layer, computed on what entered it."""
    inputs, layers = {}, converted_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        call(model, batch)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return {name: layer.mask(inputs[name].flatten(0, -2)) for name, layer in layers.items()}


def recorded(model, batch, **kw):
    with record_masks(model, **kw) as record, record.batch(batch), torch.no_grad():
        call(model, batch)
    return record.layers


@pytest.mark.parametrize("gate", [DynamicK(0.3), DynamicK(0.3, true_norms=True), TopK(2), DynamicK(0.0)])
def test_pairs_are_the_sum_of_the_masks_over_real_tokens(gate):
    model, batch = converted("bert"), TINY["bert"].batch()
    for layer in converted_layers(model).values():
        layer.gate = gate
    real = batch["attention_mask"].bool().flatten()
    masks, record = masks_by_hand(model, batch), recorded(model, batch)
    for name, mask in masks.items():
        k = mask[real].sum(-1)
        assert record[name].pairs == k.sum()
        assert record[name].tokens == len(k) == real.sum()
        assert record[name].rows == len(real)
        assert record[name].mean_k == pytest.approx(k.float().mean().item())
        assert record[name].share == pytest.approx(mask[real].float().mean().item())
        assert record[name].histogram.tolist() == [int((k == i).sum()) for i in range(7)]


def test_the_share_of_all_layers_is_that_of_their_pairs():
    model, batch = converted("bert"), TINY["bert"].batch()
    first, last = converted_layers(model).values()
    first.gate, last.gate = DynamicK(0.2), DynamicK(0.6)
    with record_masks(model) as record, torch.no_grad():
        assert math.isnan(record.share)
        for _ in range(2):
            call(model, batch)
        first(random_rows(500, first.w_up.shape[2]))  # it runs for more tokens than the other
    pairs = sum(int((counts.histogram * torch.arange(7)).sum()) for counts in record.layers.values())
    tokens = sum(int(counts.histogram.sum()) for counts in record.layers.values())
    assert record.share == pytest.approx(pairs / (6 * tokens))
    shares = [counts.share for counts in record.layers.values()]
    assert min(shares) < record.share < max(shares)


class TokensFirst(nn.Module):
    """Runs a model's layers on [T, B, d], as FSMT and nn.TransformerEncoder(batch_first=False) do."""

    def __init__(self, layer: nn.Module, turned: bool):
        super().__init__()
        self.layer, self.turned = layer, turned

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1) if self.turned else self.layer(x)


@pytest.mark.parametrize("true_norms", [False, True])
def test_padding_is_known_where_the_tokens_come_first(true_norms):
    layer = random_layer(gate=DynamicK(0.3, true_norms=true_norms)).eval()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    batch = {"x": random_rows(12).view(3, 4, -1), "attention_mask": mask}
    plain, turned = (recorded(TokensFirst(layer, way), batch)["layer"] for way in (False, True))
    assert plain.tokens == 7
    assert torch.equal(plain.histogram, turned.histogram)
    assert not torch.equal(
        plain.histogram, recorded(TokensFirst(layer, False), batch, skip_padding=False)["layer"].histogram
    )


class AtLeastTwo(DynamicK):
    """A rule of the user's own, made of another."""

    def mask(self, scores: Tensor) -> Tensor:
        return super().mask(scores).scatter(-1, scores.topk(2).indices, True)


def test_what_a_gate_made_of_another_says_is_what_runs():
    layer, x = random_layer(gate=AtLeastTwo(1.0)), random_rows(40)
    mask = layer.mask(x)
    assert (mask.sum(-1) == 2).all()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.masked_dense(x, mask))
        layer.gate = AtLeastTwo(0.0)
        assert not layer.runs_all_experts
        torch.testing.assert_close(layer(x), layer.masked_dense(x, layer.mask(x)))


class OfTheBatch(DynamicK):
    """Every expert takes the token of its largest score."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores == scores.amax(0)


@pytest.mark.parametrize("true_norms", [False, True])
def test_what_is_counted_is_what_ran_also_where_a_gate_looks_across_tokens(true_norms):
    layer, x = random_layer(gate=OfTheBatch(0.5, true_norms=true_norms)), random_rows(6)
    real = torch.tensor([[1, 1, 1, 1, 0, 0]])
    record = recorded(TokensFirst(layer, False), {"x": x.unsqueeze(0), "attention_mask": real})["layer"]
    ran = layer.mask(x)
    assert ran[4:].any(), "padding takes experts"
    assert record.pairs == ran[:4].sum()
    assert record.tokens == 4


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
@pytest.mark.parametrize("gate", [DynamicK(0.3, true_norms=True), DynamicK(0.3), DynamicK(0.0)], ids=str)
def test_no_token_counts_nothing(gate, shape):
    layer = random_layer(gate=gate)
    counts = recorded(layer, torch.empty(shape))[""]
    assert counts.tokens == counts.rows == 0


def test_padding_counts_where_it_is_wanted_or_not_known():
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, 0.3)
    masks = masks_by_hand(model, batch)
    with record_masks(model) as unknown, torch.no_grad():
        call(model, batch)
    for record in (unknown.layers, recorded(model, batch, skip_padding=False)):
        assert {name: counts.pairs for name, counts in record.items()} == {
            name: int(mask.sum()) for name, mask in masks.items()
        }


def test_calls_add_up_and_a_shared_layer_counts_every_call():
    model, batch = converted("albert"), TINY["albert"].batch()
    set_tau(model, 0.3)
    with record_masks(model, skip_padding=False) as record, torch.no_grad():
        call(model, batch)
        once = {name: (counts.rows, counts.pairs) for name, counts in record.layers.items()}
        call(model, batch)
    (name,) = record.layers
    assert once[name][0] == 2 * 18  # two blocks share it
    assert (record.layers[name].rows, record.layers[name].pairs) == (2 * once[name][0], 2 * once[name][1])


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_calls_under_other_gates_can_be_left_out(value):
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, value)
    expected = recorded(model, batch)
    with record_masks(model, same_gates=True) as record, record.batch(batch), torch.no_grad():
        call(model, batch)
        with tau(model, 0.0):
            call(model, batch)
    for name, counts in record.layers.items():
        assert counts.rows == expected[name].rows
        assert torch.equal(counts.histogram, expected[name].histogram)


def test_a_compiled_model_that_has_run_is_counted():
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, 0.3)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        call(compiled, batch)
    found = recorded(compiled, batch)
    assert {name.removeprefix("_orig_mod."): counts.pairs for name, counts in found.items()} == {
        name: counts.pairs for name, counts in recorded(model, batch).items()
    }
    assert all(counts.pairs for counts in found.values())


def test_nothing_stays_behind_also_after_an_error():
    model = converted("bert")
    with pytest.raises(KeyError), record_masks(model):
        raise KeyError
    layers = converted_layers(model).values()
    assert not any(layer._forward_pre_hooks or layer.norms_hooks for layer in layers)


def test_a_layer_that_saw_nothing_has_no_share():
    with record_masks(converted("bert")) as record:
        pass
    for counts in record.layers.values():
        assert (counts.tokens, counts.pairs, counts.rows) == (0, 0, 0)
        assert counts.share != counts.share


def test_a_dense_model_is_refused():
    with (
        pytest.raises(ValueError, match="BertModel has no converted layer"),
        record_masks(TINY["bert"].model()),
    ):
        pass


def test_experts_per_token_are_counted_on_the_model_s_device(monkeypatch):
    model, moved = converted("bert"), []
    monkeypatch.setattr("sadmoe.masks.device_of", lambda model: "elsewhere")
    monkeypatch.setattr("sadmoe.masks.to_device", lambda batch, device: moved.append(device) or batch)
    experts_per_token(model, TINY["bert"].batch())
    assert moved == ["elsewhere"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_experts_per_token_are_those_of_the_masks(name):
    model, batch = converted(name), TINY[name].batch()
    set_tau(model, 0.4)
    masks, found = masks_by_hand(model, batch), experts_per_token(model, batch)
    assert list(found) == list(masks)
    for layer, k in found.items():
        assert k.dim() == 2
        assert torch.equal(k.flatten(), masks[layer].sum(-1))
