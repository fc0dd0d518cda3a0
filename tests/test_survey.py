"""What a conversion could save, said beforehand: what `cost` says of it afterwards."""

import pytest
import sadmoe
import torch
from converted import converted
from sadmoe.sparsify import measure_sparsity
from states import same, state
from tiny_models import TINY
from torch import nn
from two_ffns import D, data, two_ffns


class AttentionBlock(nn.Module):
    """An FFN below a class named attention, that takes weights of tokens beside hidden states."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(D), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, weights):
        return x + self.fc2(self.act(self.fc1(self.norm(x) * weights[:, None])))


class ThreeLayerMLP(nn.Sequential):
    """Named as an FFN, which it is not."""

    def __init__(self, *sizes: int):
        first, last = sizes[:2], sizes[1:]
        super().__init__(nn.Linear(*first), nn.ReLU(), nn.Linear(2 * D, 2 * D), nn.ReLU(), nn.Linear(*last))


class WithAttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = AttentionBlock(), nn.Linear(D, D)

    def forward(self, x):
        return self.head(self.block(x, torch.ones(x.shape[1])))


@pytest.mark.parametrize("name", [name for name in TINY if name != "dinov2 swiglu"])  # 64 wide
def test_shares_of_flops_are_those_that_cost_counts_once_converted(name):
    model, batch = TINY[name].model(), TINY[name].batch()
    before = state(model)
    found = sadmoe.survey(model, [batch])
    assert same(state(model), before)
    report = sadmoe.cost(converted(name), [batch])
    share = report.dense / (report.dense + report.rest)
    # As it runs, a GELU may be many steps, which weigh in a tiny model.
    assert share / 1.1 < found.share < share * (1 + 1e-6)
    assert [ffn.name for ffn in found.ffns] == [layer.name for layer in report.layers]
    assert 0 < found.ffn_parameters <= 1
    assert f"{found.share:.1%} of the FLOPs" in str(found)


def test_what_batches_are_made_by_is_no_part_of_the_model():
    model, batch = two_ffns(), data()[0]

    class Computed:
        def __iter__(self):
            yield batch * (torch.eye(64) @ torch.ones(64, 9)).mean()

    assert sadmoe.survey(model, Computed()).flops == sadmoe.survey(model, [batch]).flops > 0


def test_projections_of_attention_are_told_apart():
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    found = sadmoe.survey(model, [batch, batch])
    places = sadmoe.find_projections(model)
    tokens = 2 * batch["input_ids"].numel()
    flops = sum(tokens * place.linear.weight.numel() for place in places)
    assert found.projection_count == len(places) > 0
    assert found.projections == pytest.approx(flops / found.flops)
    assert f"{len(places)} projections of attention" in str(found)
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
    assert "sparsify_ (--sparsify) first" in str(dense)
    with torch.no_grad():
        for module in relu.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.fill_(3.0)
    assert "convert_ may do, as it is ReLU" in str(sadmoe.survey(relu, data()))
    assert "projections" not in str(dense)
    assert not sadmoe.survey(nn.Sequential(*relu, *gelu), data()).is_sparse


def test_of_a_model_that_is_all_ffn_nothing_would_be_left():
    found = sadmoe.survey(TINY["sequential alone"].model(), [TINY["sequential alone"].batch()])
    assert found.share == pytest.approx(1.0)
    assert "the model would need none" in str(found)


def test_an_ffn_that_a_batch_proved_is_no_projection_too():
    found = sadmoe.survey(WithAttentionBlock(), data())
    assert [ffn.f for ffn in found.ffns] == [4 * D]
    assert found.projection_count == 0
    assert 0.8 < found.share < 1


def test_nested_tensors_and_several_calls_are_counted():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    model, padded = nn.TransformerEncoder(layer, 2).eval(), torch.zeros(4, 10, dtype=torch.bool)
    padded[:, 8:] = True

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=padded)

    called, x = Called().eval(), torch.randn(4, 10, 16)
    found = sadmoe.survey(called, [x])
    assert [round(ffn.flops, 6) for ffn in found.ffns] == [round(found.share / 2, 6)] * 2
    assert 0 < found.share < 1


def test_what_cannot_be_converted_is_told():
    blocks = nn.Sequential(*two_ffns(nn.ReLU), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)))
    d = data()[0].shape[-1]
    blocks[2][0], blocks[2][2] = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
    found = sadmoe.survey(blocks, data())
    assert [skipped.name for skipped in found.skipped] == ["2"]
    named = nn.Sequential(*two_ffns(nn.ReLU), ThreeLayerMLP(D, 2 * D, D))
    assert [skipped.name for skipped in sadmoe.survey(named, data()).skipped] == ["2"]
    assert "not converted: 2 (Sequential)" in str(found)


def test_projections_that_cannot_be_replaced_are_told_and_not_all_of_many():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    found = sadmoe.survey(nn.TransformerEncoder(layer, 8).eval(), [torch.randn(2, 5, 16)])
    assert found.projection_count == 0
    assert len(found.refused) == 8
    assert str(found).count("not replaced: ") == 6
    assert "... and 2 more" in str(found)


def test_a_converted_model_and_one_without_ffns_are_refused():
    batch = TINY["bert"].batch()
    with pytest.raises(ValueError, match="survey takes a dense model, and this one is converted"):
        sadmoe.survey(converted("bert"), [batch])
    with pytest.raises(ValueError, match="is compiled"):
        sadmoe.survey(torch.compile(TINY["bert"].model()), [batch])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        sadmoe.survey(3, [batch])
    with pytest.raises(sadmoe.FFNNotFoundError):
        sadmoe.survey(nn.Sequential(nn.Linear(4, 4)), [torch.ones(1, 4)])


def test_what_these_batches_never_run_is_told_and_left_out():
    model = two_ffns()
    model[0].spare = two_ffns()
    found, alone = sadmoe.survey(model, data()), sadmoe.survey(two_ffns(), data())
    assert [ffn.name for ffn in found.ffns] == [ffn.name for ffn in alone.ffns]
    assert found.share == alone.share
    idle = {skipped.name: skipped.reason for skipped in found.skipped}
    assert idle.keys() == {f"0.spare.{ffn.name}" for ffn in alone.ffns}
    assert all(
        "these batches never run it: convert the others by a filter (--only)" in why for why in idle.values()
    )

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = two_ffns()

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"the batches never reach spare.*: pass batches that run the FFNs"):
        sadmoe.survey(Idle(), data())
