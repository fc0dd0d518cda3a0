import pytest
import torch
from converted import converted, random_layer
from sadmoe.cost import cost, layer_cost
from sadmoe.dial import converted_layers, set_tau
from sadmoe.flops import count_flops
from sadmoe.gates import DynamicK
from sadmoe.layer import DynamicKMoE
from sadmoe.masks import record_masks
from sadmoe.reference import ACTIVATIONS
from tiny_models import TINY, call


def shaped(d, f, experts, width=128, act="gelu", gated=False, bias=("b_up", "b_out")):
    """A layer of a real model's shapes, without weights."""
    return DynamicKMoE(
        d,
        experts,
        f // experts,
        act,
        gated=gated,
        bias=bias,
        router_width=width,
        device="meta",
        gate=DynamicK(0.1),
    )


def test_one_expert_and_the_router_have_the_closed_forms_of_the_method():
    layer = layer_cost(shaped(768, 3072, 512, act="relu"), 1.0)
    assert layer.pair == 2 * 768 * 6 + 768 + 6
    assert layer.router == 768 * 128 + 128 * 512 + 4 * 512 + 1 + 768
    gelu = layer_cost(shaped(768, 3072, 512, act="gelu"), 1.0)
    assert gelu.pair == layer.pair + 6
    glu = layer_cost(shaped(2048, 16384, 512, width=512, act="relu", gated=True, bias=()), 1.0)
    assert glu.pair == 3 * 2048 * 32 + 2048 + 32
    assert glu.router == 2048 * 512 + 512 * 512 + 4 * 512 + 1


# FFN part of a model's dense FLOPs, router / FFN, overhead of all experts, floor of the whole model
METHOD = {
    "ViT-B, 512 experts": (dict(d=768, f=3072, experts=512, act="relu"), 0.633, 0.035, 0.084, 0.39),
    "ViT-B, 24 experts": (dict(d=768, f=3072, experts=24, act="relu"), 0.633, 0.021, 0.005, 0.41),
    "BERT-base": (dict(d=768, f=3072, experts=128, act="relu"), 0.647, 0.024, 0.021, 0.37),
    "GPT-2": (dict(d=768, f=3072, experts=768, act="relu"), 0.396, 0.042, 0.126, 0.62),
    "Gemma-2B": (
        dict(d=2048, f=16384, experts=512, width=512, act="relu", gated=True, bias=()),
        0.702,
        0.013,
        0.011,
        0.31,
    ),
}


@pytest.mark.parametrize("model", METHOD)
def test_what_the_method_can_reach_on_the_models_of_the_paper(model):
    shape, ffn, router, overhead, floor = METHOD[model]
    layer = layer_cost(shaped(**shape), 1.0)
    assert layer.router / layer.dense == pytest.approx(router, abs=0.001)
    combine_and_biases = layer.experts * layer.pair / layer.dense - 1
    assert combine_and_biases == pytest.approx(overhead, abs=0.002)
    assert 1 - ffn + ffn * layer.floor / layer.dense == pytest.approx(floor, abs=0.006)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_the_dense_form_is_what_is_counted(act, gated):
    layer = random_layer(act=act, gated=gated, d_out=10)

    class Dense(torch.nn.Module):
        def forward(self, x):
            return layer._down(layer._hidden(x))

    x = torch.ones(7, 24)
    assert count_flops(Dense(), x) == 7 * layer_cost(layer, 1.0).dense


def test_a_layer_costs_its_router_and_its_pairs_between_floor_and_all_experts():
    layer = random_layer(gate=DynamicK(0.2))
    costs = [layer_cost(layer, share) for share in (1 / 8, 0.5, 1.0)]
    assert costs[0].executed == costs[0].floor
    assert costs[1].executed == costs[1].router + 4 * costs[1].pair
    assert costs[2].executed == costs[2].all_experts
    assert [c.combine for c in costs] == [24, 4 * 24, 8 * 24]
    extra = 8 * (24 + 5)  # combine and input biases: what the dense path does not do
    assert costs[2].all_experts == costs[2].dense + costs[2].router + extra


def test_given_shares_are_what_a_router_chose_also_where_tau_is_zero():
    model = converted("bert")
    costs = []
    for tau in (0.0, 0.3):
        set_tau(model, tau)
        costs.append(cost(model, shares=0.25))
    assert costs[0] == costs[1]
    assert costs[0].executed < 0.5 * costs[0].dense


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma", "t5", "vit", "torch encoder"])
def test_a_report_adds_up_what_the_masks_and_the_counter_say(name):
    model, batch = converted(name), TINY[name].batch()
    set_tau(model, 0.3)
    samples = 2
    report = cost(model, [batch, batch])
    with record_masks(model) as record, torch.no_grad(), record.batch(batch):
        call(model, batch)
    expected = pairs = 0.0
    for (layer_name, layer), counted in zip(converted_layers(model).items(), report.layers, strict=True):
        masks = record.layers[layer_name]
        one = layer_cost(layer, masks.share)
        expected += masks.rows / samples * (one.router + one.pair * masks.pairs / masks.tokens)
        pairs += masks.rows * masks.share
        assert (counted.name, counted.share, counted.tokens) == (
            layer_name,
            masks.share,
            masks.rows / samples,
        )
    assert report.executed == pytest.approx(expected)
    assert report.share == pytest.approx(pairs / sum(m.rows for m in record.layers.values()))
    assert report.rest == count_flops(model, batch) / samples
    assert report.floor <= report.executed <= report.all_experts


@pytest.mark.parametrize("true_norms", [False, True])
def test_at_tau_zero_the_report_is_that_of_the_dense_model(true_norms):
    model, batch = converted("bert"), TINY["bert"].batch()
    for layer in converted_layers(model).values():
        layer.gate = DynamicK(0.0, true_norms=true_norms)
    report = cost(model, [batch])
    assert report.executed == report.dense
    assert (report.rest + report.dense) * 2 == count_flops(TINY["bert"].model(), batch)
    assert report.active_parameters == report.parameters


def test_active_parameters_leave_out_the_idle_share_of_the_experts():
    model = converted("bert")
    set_tau(model, 0.3)
    report = cost(model, shares=0.25)
    experts = sum(
        p.numel()
        for layer in converted_layers(model).values()
        for name, p in layer.named_parameters()
        if name in ("w_up", "w_down", "b_up")
    )
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.active_parameters == pytest.approx(report.parameters - 0.75 * experts)


def test_shares_can_be_given_by_layer_and_are_costs_of_one_token():
    model = converted("bert")
    set_tau(model, 0.3)
    names = list(converted_layers(model))
    report = cost(model, shares={names[0]: 0.5, names[1]: 1.0})
    assert [layer.share for layer in report.layers] == [0.5, 1.0]
    assert report.layers[0].executed == report.layers[0].router + 3 * report.layers[0].pair
    assert report.executed == sum(layer.executed for layer in report.layers)
    assert report.rest is None


def test_the_report_prints_as_an_aligned_table():
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, 0.3)
    report = cost(model, [batch])
    heading, *table = str(report).splitlines()
    assert heading == "FLOPs per token, by layer"
    assert table[0].split()[:4] == ["layer", "experts", "share", "dense"]
    assert table[1].startswith("encoder.layer.0.intermediate")
    assert len({len(line) for line in table[:4]}) == 1
    assert f"{report.executed / report.dense:.1%}" in table[3]
    whole = (report.rest + report.executed) / (report.rest + report.dense)
    assert table[4].startswith("whole model, per sample:")
    assert f"({whole:.1%})" in table[4]
    assert f"({report.active_parameters / report.parameters:.1%})" in table[5]
    assert "whole model" not in str(cost(model, shares=0.5))


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({}, "batches to run or shares to compute with, exactly one of them"),
        ({"batches": [torch.ones(1)], "shares": 0.5}, "batches to run or shares"),
        ({"shares": 0.0}, r"shares must be in \(0, 1\], got 0.0 for encoder.layer.0.intermediate"),
        (
            {"shares": {"a": 0.5}},
            "shares must name the converted layers encoder.layer.0.intermediate, .*got a",
        ),
        ({"batches": []}, "at least one batch"),
    ],
)
def test_what_cannot_be_computed_is_refused(kw, text):
    with pytest.raises(ValueError, match=text):
        cost(converted("bert"), **kw)


def test_a_layer_that_never_ran_is_named():
    model = converted("bert")
    model.spare = random_layer()
    with pytest.raises(ValueError, match="the batches never reach spare"):
        cost(model, [TINY["bert"].batch()])


class Nothing(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


def test_batches_of_nothing_are_named():
    with pytest.raises(ValueError, match="batches gave nothing"):
        cost(converted("bert"), torch.utils.data.DataLoader(Nothing()))


def test_counting_leaves_the_model_as_it_was():
    model = converted("bert").train()
    cost(model, [TINY["bert"].batch()])
    assert model.training
    layers = converted_layers(model).values()
    assert not any(m._forward_pre_hooks or m._forward_hooks or m.norms_hooks for m in layers)


class Computed:
    """Batches that are made by products of torch, as images are when they are read."""

    def __iter__(self):
        batch = TINY["bert"].batch()
        yield batch | {"token_type_ids": (torch.ones(2, 64, 64) @ torch.ones(64, 9))[:, 0].long() * 0}


def test_what_batches_are_made_by_is_no_cost_of_the_model():
    model = converted("bert")
    set_tau(model, 0.3)
    made = list(Computed())
    assert cost(model, Computed()).rest == cost(model, made).rest > 0
