"""What a conversion could save, said beforehand: what `cost` says of it afterwards."""

import pytest
import sadmoe
import torch
from converted import converted
from sadmoe.sparsify import measure_sparsity
from tiny_models import TINY
from torch import nn
from two_ffns import data, same, state, two_ffns


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "clip"])
def test_shares_of_flops_are_those_that_cost_counts_once_converted(name):
    model, batch = TINY[name].model(), TINY[name].batch()
    before = state(model)
    found = sadmoe.survey(model, [batch])
    report = sadmoe.cost(converted(name), [batch])
    exact = 0.06 if name == "gpt2" else 1e-6  # as it runs its GELU is many steps, which weigh in a tiny model
    assert found.share == pytest.approx(report.dense / (report.dense + report.rest), rel=exact)
    assert [ffn.name for ffn in found.ffns] == [layer.name for layer in report.layers]
    assert [(ffn.d, ffn.f) for ffn in found.ffns] == [
        (site.dense().d, site.dense().f) for site in sadmoe.find_ffns(model)
    ]
    assert 0 < found.ffn_parameters < 1
    assert same(state(model), before)


def test_projections_of_attention_are_told_apart():
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    found = sadmoe.survey(model, [batch, batch])
    sites = sadmoe.find_projections(model)
    tokens = 2 * batch["input_ids"].numel()
    flops = sum(tokens * site.first.weight.numel() for site in sites)
    assert found.projection_count == len(sites) > 0
    assert found.projections == pytest.approx(flops / found.flops)
    assert f"{len(sites)} projections of attention" in str(found)
    assert found.share + found.projections < 1


def test_a_model_is_sparse_where_its_activations_are_zero():
    relu, gelu = two_ffns(nn.ReLU), two_ffns(nn.GELU)
    with torch.no_grad():
        for module in relu.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.fill_(-3.0)
    sparse, dense = sadmoe.survey(relu, data()), sadmoe.survey(gelu, data())
    assert [ffn.sparsity for ffn in sparse.ffns] == measure_sparsity(relu, data())
    assert sparse.is_sparse
    assert "convert_ and calibrate_" in str(sparse)
    assert not dense.is_sparse
    assert "sparsify_ first" in str(dense)
    assert "projections" not in str(dense)


def test_what_cannot_be_converted_is_told():
    blocks = nn.Sequential(*two_ffns(nn.ReLU), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)))
    d = data()[0].shape[-1]
    blocks[2][0], blocks[2][2] = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
    found = sadmoe.survey(blocks, data())
    assert [skipped.name for skipped in found.skipped] == ["2"]
    assert "not converted: 2 (Sequential)" in str(found)


def test_a_converted_model_and_one_without_ffns_are_refused():
    batch = TINY["bert"].batch()
    with pytest.raises(ValueError, match="survey takes a dense model, and this one is converted"):
        sadmoe.survey(converted("bert"), [batch])
    with pytest.raises(sadmoe.FFNNotFoundError):
        sadmoe.survey(nn.Sequential(nn.Linear(4, 4)), [torch.ones(1, 4)])
