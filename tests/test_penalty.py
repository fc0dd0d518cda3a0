"""The penalty of sparsity enforcement, as a loss term, and the measure of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sadmoe.ffn import find_ffns
from sadmoe.ffn.activations import ACTIVATION_MODULES
from sadmoe.sparsify import SparsifyConfig, SparsityLoss, measure_sparsity, square_hoyer
from tiny_models import TINY, UserGLU, hidden
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from two_ffns import FF, D, Plain, data, two_ffns

Relu2 = ACTIVATION_MODULES["relu2"]

# ---------------------------------------------------------------- square Hoyer


@pytest.mark.parametrize("m", [1, 2, 17, 64])
def test_hoyer_of_m_equal_entries_is_m(m):
    a = torch.zeros(64)
    a[:m] = 0.3
    assert square_hoyer(a).item() == pytest.approx(m, rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**40])
def test_hoyer_does_not_see_the_scale(scale):
    a = torch.randn(5, 33)
    assert torch.equal(square_hoyer(a * scale), square_hoyer(a))


def test_hoyer_lies_between_one_and_n():
    h = square_hoyer(torch.randn(1000, 33).relu() + 1e-3 * torch.rand(1000, 33))
    assert (h >= 1).all()
    assert (h <= 33).all()


def test_hoyer_of_nothing_is_zero_with_a_zero_gradient():
    a = torch.zeros(3, 8, requires_grad=True)
    h = square_hoyer(a)
    h.sum().backward()
    assert h.tolist() == [0, 0, 0]
    assert torch.equal(a.grad, torch.zeros(3, 8))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-9, 1e18])
def test_hoyer_has_finite_gradients_at_every_scale(scale):
    a = (torch.rand(4, 50) * scale).requires_grad_()
    square_hoyer(a).sum().backward()
    assert a.grad.isfinite().all()


def test_hoyer_of_doubles():
    a = torch.rand(3, 9, dtype=torch.float64, requires_grad=True)
    h = square_hoyer(a)
    torch.testing.assert_close(h, square_hoyer(a.float()))
    h.sum().backward()
    assert a.grad.dtype == torch.float64
    assert a.grad.any()


def test_hoyer_gradient_is_the_formulas():
    a = torch.rand(3, 9, dtype=torch.float64)
    a32 = a.float().requires_grad_()
    a.requires_grad_()
    square_hoyer(a32).sum().backward()
    (a.sum(-1).square() / a.square().sum(-1)).sum().backward()
    torch.testing.assert_close(a32.grad, a.grad.float(), rtol=1e-4, atol=1e-5)


def test_hoyer_of_half_precision_is_computed_in_float32():
    a = torch.full(
        (70000,), 3.0, dtype=torch.bfloat16
    )  # its sum of squares is far beyond bfloat16's integers
    assert square_hoyer(a).dtype == torch.float32
    assert square_hoyer(a).item() == pytest.approx(70000, rel=1e-4)


# ---------------------------------------------------------------- SparsityLoss


def expected(model: nn.Module, x: Tensor, act: str, penalty: str, displacement: float) -> Tensor:
    """The definition, written out for `two_ffns`."""
    means = []
    for block in model:
        inner = block.inner
        first = inner.c if isinstance(inner, UserGLU) else inner.expand
        z = first(block.norm(x))
        a = z.relu() if act in ("relu", "relu2") else (z - displacement).clamp(min=0)
        value = a.sum(-1).square() / a.square().sum(-1) if penalty == "hoyer" else a.abs().sum(-1)
        means.append((value / z.shape[-1]).mean())
        x = block(x)
    return torch.stack(means).mean()


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
@pytest.mark.parametrize(
    ("make", "act", "module"),
    [(Plain, "relu", nn.ReLU), (Plain, "gelu", nn.GELU), (UserGLU, "silu", nn.SiLU), (Plain, "relu2", Relu2)],
)
def test_the_loss_is_its_definition(make, act, module, penalty):
    model = two_ffns(module, make)
    with SparsityLoss(model, penalty=penalty, displacement=-0.5) as sparsity:
        model(hidden())
        got = sparsity()
    torch.testing.assert_close(got, expected(model, hidden(), act, penalty, -0.5))


def test_every_neuron_equally_active_gives_one():
    model = two_ffns()
    for block in model:
        nn.init.zeros_(block.inner.expand.weight)
        nn.init.ones_(block.inner.expand.bias)
    with SparsityLoss(model) as sparsity:
        model(hidden())
        assert sparsity().item() == pytest.approx(1)


@pytest.mark.parametrize(("pushed_to", "costs"), [(-11.0, 0.0), (-9.0, 1.0)])
def test_gelu_costs_nothing_below_minus_10(pushed_to, costs):
    model = two_ffns(nn.GELU)
    for block in model:
        nn.init.zeros_(block.inner.expand.weight)
        nn.init.constant_(block.inner.expand.bias, pushed_to)
    with SparsityLoss(model) as sparsity:
        model(hidden())
        assert sparsity().item() == pytest.approx(costs)
    assert SparsifyConfig(steps=1).displacement == -10.0


def test_padding_counts_nowhere():
    model = two_ffns()
    x = torch.cat([hidden(), 50 * torch.rand(2, 3, D)], dim=1)
    real = torch.ones(2, 10, dtype=torch.int64)
    real[:, 7:] = 0
    with SparsityLoss(model) as sparsity:
        model(hidden())
        short = sparsity()
        model(x)
        masked = sparsity(mask=real)
        model(x)
        by_batch = sparsity({"attention_mask": real})
        model(x)
        everything = sparsity()
        of_batches = []
        for batch in (x, (x, x), [{"attention_mask": real}]):
            model(x)
            of_batches.append(sparsity(batch))
    torch.testing.assert_close(masked, short)
    assert torch.equal(masked, by_batch)
    assert of_batches == [everything, everything, masked], (
        "a tensor is what the model was called with, not a mask"
    )
    assert not torch.allclose(masked, everything)


def test_a_decoder_answers_to_its_own_mask():
    tiny = TINY["t5"]
    model, batch = tiny.model(), tiny.batch()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[:, 4:] = 0
    for tower, heeds in (("encoder", False), ("decoder", True)):
        sites = [site for site in find_ffns(model) if site.name.startswith(tower)]
        with torch.no_grad(), SparsityLoss(model, sites) as sparsity:
            model(**batch)
            whole = sparsity(batch)
            model(**batch)
            assert (sparsity({**batch, "decoder_attention_mask": mask}) != whole) == heeds


def test_it_forgets_each_pass():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        model(hidden())
        first = sparsity()
        model(2 * hidden() + 1)
        second = sparsity()
        model(hidden())
        assert torch.equal(sparsity(), first)
    assert not torch.equal(first, second)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_what_comes_before_and_not_what_comes_after():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        model(hidden())
        sparsity().backward()
    assert model[0].inner.contract.weight.grad.abs().sum() > 0
    assert model[1].inner.contract.weight.grad is None


def test_under_autocast_it_stays_in_float32():
    model = two_ffns()
    with SparsityLoss(model) as sparsity, torch.autocast("cpu", torch.bfloat16):
        model(hidden())
        value = sparsity()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected(model, hidden(), "relu", "hoyer", 0), rtol=0.02, atol=0)


class Checkpointed(nn.Module):
    """Runs its blocks under gradient checkpointing."""

    def __init__(self, blocks: nn.Module, reentrant: bool):
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_checkpointing_counts_a_pass_once():
    plain = two_ffns()
    model = Checkpointed(two_ffns(), reentrant=False)
    values, grads = [], []
    for m, blocks in ((plain, plain), (model, model.blocks)):
        with SparsityLoss(m) as sparsity:
            for _ in range(2):
                m.zero_grad()
                out = m(hidden())
                value = sparsity()
                (out.square().mean() + value).backward()
                values.append(value.item())
        grads.append(blocks[0].inner.expand.weight.grad)
    assert len(set(values)) == 1
    torch.testing.assert_close(*grads)


def test_a_pass_without_gradients_is_an_error_where_one_is_wanted():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        with torch.no_grad():
            model(hidden())
            assert sparsity() > 0
            model(hidden())
        with pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant"):
            sparsity()
        model[1](model[0](hidden()).detach())  # one of two has a gradient, and then the other
        assert sparsity().requires_grad
        with torch.no_grad():
            x = model[0](hidden())
        model[1](x)
        with pytest.raises(RuntimeError, match=r"no gradient for the penalty of 0.inner"):
            sparsity()
        checkpointed = Checkpointed(model, reentrant=True)
        checkpointed(hidden().requires_grad_())
        with pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant"):
            sparsity()


def test_a_call_before_any_pass_says_what_to_do():
    sparsity = SparsityLoss(two_ffns())
    with pytest.raises(RuntimeError, match="enter SparsityLoss before"):
        sparsity()
    with sparsity:
        with pytest.raises(RuntimeError, match="run the model first"):
            sparsity()
        with pytest.raises(RuntimeError, match="entered already"), sparsity:
            pass


def test_wrong_arguments_of_the_loss_are_named():
    model = two_ffns()
    with pytest.raises(ValueError, match=r"penalty must be one of hoyer, l1, got 'l2'"):
        SparsityLoss(model, penalty="l2")
    with pytest.raises(ValueError, match="sites must hold at least one FFN"):
        SparsityLoss(model, [])
    with pytest.raises(ValueError, match="model: is compiled"):
        SparsityLoss(torch.compile(model))
    with SparsityLoss(model) as sparsity:
        model(hidden())
        with pytest.raises(ValueError, match=r"one entry for each of the 14 tokens.*got \(2, 3\)"):
            sparsity(mask=torch.ones(2, 3))
        with pytest.raises(TypeError, match=r"batch is a bool tensor.*: give it as mask="):
            sparsity(torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="sites must hold at least one FFN"):
        measure_sparsity(model, [hidden()], [])


# ---------------------------------------------------------------- measure_sparsity


@pytest.mark.parametrize(("module", "act"), [(nn.ReLU, F.relu), (nn.GELU, F.gelu)])
def test_the_measure_reads_what_the_activation_gives(module, act):
    model = two_ffns(module)
    layers = measure_sparsity(model, data(2))
    a = torch.cat([act(model[0].inner.expand(model[0].norm(x))) for x in data(2)]).abs().flatten(0, 1)
    assert layers[0].f == FF
    assert layers[0].zero == pytest.approx((a == 0).double().mean().item())
    assert layers[0].small == pytest.approx((a < 0.01 * a.amax(-1, keepdim=True)).double().mean().item())


def test_the_measure_of_a_glu_reads_its_gate():
    model = two_ffns(make=UserGLU)
    layers = measure_sparsity(model, data(2))
    x = torch.cat([model[0].norm(x) for x in data(2)])
    gate = F.silu(model[0].inner.c(x)).abs().flatten(0, 1)
    assert layers[0].small == pytest.approx(
        (gate < 0.01 * gate.amax(-1, keepdim=True)).double().mean().item()
    )
    product = gate * model[0].inner.b(x).abs().flatten(0, 1)
    assert layers[0].small != (product < 0.01 * product.amax(-1, keepdim=True)).double().mean().item()


def test_the_measure_leaves_padding_out_and_the_model_alone():
    tiny = TINY["bert"]
    model, batch = tiny.model().train(), tiny.batch()
    masked = measure_sparsity(model, [batch])
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 7)}
    assert measure_sparsity(model, [other]) == masked
    assert model.training


def test_the_measure_names_ffns_that_never_run():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(two_ffns())

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model = Half()
    with pytest.raises(ValueError, match=r"never reach blocks.1.inner"):
        measure_sparsity(model, data(1), find_ffns(model))


def test_a_model_inside_it_is_copied():
    model = two_ffns()
    with SparsityLoss(model) as sparsity:
        model(data()[0])
        again = copy.deepcopy(model)
        assert sparsity() > 0
    assert torch.equal(again(data()[0]), model(data()[0]))


class Picks(nn.Module):
    """Runs its FFN on some of the rows, which may be none."""

    def __init__(self):
        super().__init__()
        self.ffn = two_ffns()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x[x[:, 0] > 0])


def test_of_no_rows_there_is_no_penalty():
    model = Picks()
    with SparsityLoss(model) as sparsity:
        model(-torch.ones(3, D))
        assert sparsity() == 0


def test_a_batch_that_runs_none_of_the_ffns_is_told():
    model = nn.ModuleList([*two_ffns(), nn.Linear(D, D)])
    with SparsityLoss(model) as sparsity:
        model[2](torch.ones(3, D))
        with pytest.raises(RuntimeError, match="leave out batches that run nothing of what it watches"):
            sparsity()
