"""Losses that run the model on several texts: each pass answers to the mask of its own text."""

import copy

import pytest
import sadmoe
import torch
from long_steps import converted
from sadmoe.dial import converted_layers
from sadmoe.finetune import ExpertPenalty
from sadmoe.hooks import calls_seen
from sadmoe.sparsify.penalty import measure_sparsity
from tiny_models import TINY, tokens
from torch import Tensor, nn

Text = dict[str, Tensor]


def texts() -> tuple[Text, Text]:
    """Two texts a sample, alike in shape, whose padding is elsewhere."""
    one, other = tokens(), tokens()
    other["input_ids"] = one["input_ids"].flip(1).contiguous()
    other["attention_mask"] = torch.ones_like(one["attention_mask"])
    other["attention_mask"][0, 3:] = 0
    return one, other


def dense() -> nn.Module:
    return TINY["bert"].model()


def distance(model: nn.Module, batch: tuple[Text, Text]) -> Tensor:
    one, other = (model(**text).last_hidden_state[:, 0] for text in batch)
    return (one - other).square().mean()


def through_parts(model: nn.Module, batch: tuple[Text, Text]) -> Tensor:
    """The same without calling the model itself."""
    outputs = [model.encoder(model.embeddings(input_ids=text["input_ids"])) for text in batch]
    return (outputs[0].last_hidden_state[:, 0] - outputs[1].last_hidden_state[:, 0]).square().mean()


@pytest.mark.parametrize("kind", ["tuple", "list", "mapping"])
def test_the_penalty_of_each_pass_is_of_its_own_text(kind):
    model, (one, other) = dense(), texts()
    batch = {"tuple": (one, other), "list": [one, other], "mapping": {"anchor": one, "positive": other}}[kind]
    with sadmoe.SparsityLoss(model) as sparsity:
        distance(model, (one, other))
        both = sparsity(batch)
        alone = []
        for text in (one, other):
            model(**text)
            alone.append(sparsity(text))
        model(**other)
        wrong = sparsity(one)
    torch.testing.assert_close(both, torch.stack(alone).mean())
    assert abs(wrong - alone[1]) > 1e-4


def test_sparsity_is_measured_on_the_real_tokens_of_each_text():
    model, pair = dense(), texts()
    together = measure_sparsity(model, [pair], loss=distance)
    assert together == measure_sparsity(model, list(pair))
    assert together != measure_sparsity(
        model, [dict(one, attention_mask=pair[0]["attention_mask"]) for one in pair]
    )


def test_experts_are_counted_on_the_real_tokens_of_each_text():
    _, model = converted()
    pair = texts()
    with sadmoe.record_masks(model) as both, both.batch(pair), torch.no_grad():
        distance(model, pair)
    with sadmoe.record_masks(model) as alone, torch.no_grad():
        for text in pair:
            with alone.batch(text):
                model(**text)
    assert all(
        torch.equal(both.layers[name].histogram, alone.layers[name].histogram) for name in alone.layers
    )


def test_the_penalty_on_experts_is_too():
    _, model = converted()
    pair, config = texts(), sadmoe.FinetuneConfig(steps=1, tau=0.5, share=0.01)
    with ExpertPenalty(model, converted_layers(model), config) as penalty:
        penalty.at(1.0)
        distance(model, pair)
        both = penalty(pair)
        alone = []
        for text in pair:
            model(**text)
            alone.append(penalty(text))
    torch.testing.assert_close(both, torch.stack(alone).mean())


def test_routers_are_judged_on_the_real_tokens_of_each_text():
    _, model = converted()
    pair = texts()
    real = torch.cat([text["attention_mask"].flatten().bool() for text in pair])
    rows: dict[str, list[Tensor]] = {}
    layers = converted_layers(model)

    def see(name: str, layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Tensor]) -> None:
        rows.setdefault(name, []).append(args[0].flatten(0, -2))

    with sadmoe.RouterLoss(model) as routers, sadmoe.tau(model, 0.0), torch.no_grad():
        with calls_seen(layers, see):
            distance(model, pair)
        both = routers(pair)
        for name, layer in layers.items():
            layer(torch.cat(rows[name])[real])
        assert routers() == pytest.approx(both.item(), rel=1e-4)


def test_passes_of_parts_answer_to_no_mask_and_it_is_told():
    model, pair = dense(), texts()
    with sadmoe.SparsityLoss(model) as sparsity:
        through_parts(model, pair)
        with pytest.warns(UserWarning, match="in each of parts 0, 1, and the loss did not call the model"):
            told = sparsity(pair)
        through_parts(model, pair)
        assert torch.equal(told, sparsity())


def test_what_was_given_is_forgotten_and_is_not_copied():
    model, pair = dense(), texts()
    with sadmoe.SparsityLoss(model) as sparsity:
        distance(model, pair)
        twin = copy.deepcopy(sparsity)
        assert sparsity._call.given is not None
        assert twin._call.given is None
    assert sparsity._call.given is None
    assert not model._forward_pre_hooks
