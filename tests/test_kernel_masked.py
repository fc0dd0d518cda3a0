"""What stands between the dense products of a layer, against plain torch; and the layer that calls it."""

import itertools
from functools import partial

import pytest
import torch
from backends import DTYPES
from converted import random_rows
from given_costs import layer_of
from problems import assert_as_good_as_torch
from sadmoe import ops, reference
from torch.autograd import forward_ad

SHAPES = [  # T, E, s: whole vectors of an expert and not, several blocks a row, more rows than blocks
    (0, 3, 8), (1, 1, 1), (1, 4, 32), (7, 5, 3), (33, 6, 24), (9, 3, 20), (70, 12, 32),
    (3, 40, 60), (2, 80, 32), (1100, 2, 8), (31, 128, 8), (1, 512, 24), (33, 1, 88), (1, 7, 128),
]  # fmt: skip


def problem(T, E, s, dtype, gated):
    g = torch.Generator().manual_seed(T)
    up, gate = (torch.randn(2, T, E * s, generator=g) * 3).to(dtype).unbind()
    return up, gate if gated else None, torch.rand(T, E, generator=g) < 0.5


def by_torch(up, gate, mask, act):
    hidden = up.clone()
    reference.masked_activation_(hidden, gate, mask, 0.0, act)
    return hidden


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_it_is_as_good_as_torch(backend, act, dtype):
    for shape, gated in itertools.product(SHAPES, (False, True)):
        up, gate, mask = problem(*shape, dtype, gated)
        truth = by_torch(up.double(), None if gate is None else gate.double(), mask, act)
        assert_as_good_as_torch(
            backend.masked_activation(up.clone(), gate, mask, 0.0, act),
            by_torch(up, gate, mask, act),
            truth,
            terms=up.double() if gate is None else up.double() * gate.double(),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [8, 3])
def test_outside_the_mask_are_zeros_also_of_nan(backend, s, dtype):
    up, gate, mask = problem(20, 4, s, dtype, True)
    mask[0] = False
    outside = ~mask.repeat_interleave(s, dim=-1)
    up[outside], gate[outside] = torch.nan, torch.inf
    assert (backend.masked_activation(up.clone(), gate, mask, 0.0, "silu")[outside] == 0).all()
    up[5, :s], mask[5, 0] = torch.nan, True
    assert backend.masked_activation(up, None, mask, 0.0, "gelu")[5, :s].isnan().all(), (
        "of experts that run, NaN stays"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_rows_that_do_not_begin_on_16_bytes(backend, first, dtype):
    """Of up where first is 1, else of gate."""
    mask = torch.rand(4, 4) < 0.5
    up, gate = (
        torch.randn(4 * 32 + 1).to(backend.device, dtype)[i:][: 4 * 32].view(4, 32)
        for i in (first, 1 - first)
    )
    expected = by_torch(up, gate, mask.to(backend.device), "relu").cpu()
    assert torch.equal(backend.masked_activation(up, gate, mask, 0.0, "relu"), expected)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_scores_those_run_that_reach_tau(backend, shape, tau):
    """A row of zeros chooses all, one of NaN none; a score below 0 counts as 0."""
    T, E, s = shape
    up, gate, _ = problem(T, E, s, torch.float32, True)
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(E)) - 0.1
    for row, value in enumerate((0.0, torch.nan, torch.inf)):
        if row + 3 < T:
            scores[row + 3] = value
    scores[:1, :1] = torch.nan
    expected = backend.masked_activation(up.clone(), gate, ops.dynamic_k_select(scores, tau), 0.0, "silu")
    assert torch.equal(backend.masked_activation(up, gate, scores, tau, "silu"), expected)


def test_any_byte_but_0_is_true(backend):
    up, mask = torch.randn(6, 16), torch.rand(6, 2) < 0.5
    odd = (mask.to(torch.uint8) * 6).view(torch.bool)
    assert torch.equal(
        backend.masked_activation(up.clone(), None, odd, 0.0, "relu"), by_torch(up, None, mask, "relu")
    )


@pytest.mark.parametrize("asking", ["up", "gate"])
def test_gradients_that_would_be_lost_are_refused(asking):
    up, gate, mask = problem(3, 2, 8, torch.float32, True)
    {"up": up, "gate": gate}[asking].requires_grad_()
    with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
        ops.masked_activation_(up, gate, mask, 0.0, "gelu")
    with torch.no_grad():
        ops.masked_activation_(up, gate, mask, 0.0, "gelu")


def test_threads_do_not_change_a_bit():
    up, gate, mask = problem(300, 12, 32, torch.bfloat16, True)
    one = up.clone()
    ops.masked_activation_(one, gate, mask, 0.0, "gelu")
    torch.set_num_threads(3)
    try:
        ops.masked_activation_(up, gate, mask, 0.0, "gelu")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, up)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.randn(4, 8, 2)}, r"up must be \[T, E s\] with E s >= 1, got \[4, 8, 2\]"),
        (
            {"up": torch.randn(16, 4).t()},
            r"up must be contiguous, as it is written in place; got strides \[1, 4\]",
        ),
        ({"up": torch.randn(4, 16).double()}, "up must be float32, bfloat16 or float16, got Double"),
        ({"gate": torch.randn(4, 15)}, r"gate must be \[T, E s\] = \[4, 16\], got \[4, 15\]"),
        ({"gate": torch.randn(4, 16).half()}, "gate must have up's dtype, Float, got Half"),
        (
            {"choice": torch.ones(4, 3, dtype=torch.bool)},
            r"choice must be \[T = 4, E\] where E divides the 16 columns of up, got \[4, 3\]",
        ),
        ({"choice": torch.ones(4, 2).half()}, "choice must be a bool mask or float32 scores, got Half"),
        ({"choice": torch.ones(4, 2), "tau": 2.0}, r"tau must be in \[0, 1\]"),
        ({"act": "tanh"}, "act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_named(change, message):
    choice = torch.ones(4, 2, dtype=torch.bool)
    args = {"up": torch.randn(4, 16), "gate": None, "choice": choice, "tau": 0.0, "act": "relu"}
    before = args["up"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.masked_activation_(**(args | change))
    assert torch.equal(args["up"], before)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_layer_computes_the_same_with_and_without_gradients(dtype, gated):
    layer = layer_of(dtype, gated=gated)
    x, mask = random_rows(9).to(dtype), random_rows(9, layer.experts) < 0
    in_parts = layer.masked_dense(x, mask), layer.dense(x)
    assert in_parts[0].requires_grad
    with torch.no_grad():
        in_one_pass = layer.masked_dense(x, mask), layer.dense(x)
        exact = layer.double()
        truth = exact.masked_dense(x.double(), mask), exact.dense(x.double())
    for ours, torchs, true in zip(in_one_pass, in_parts, truth, strict=True):
        assert_as_good_as_torch(ours, torchs.detach(), true)


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_that_is_dense_unasked_needs_no_mask(monkeypatch, gated):
    """As on CUDA, where the choice of this call is not waited for: the activation goes by the scores."""
    layer, x = layer_of(torch.bfloat16, tau=0.4, gated=gated), random_rows(9).bfloat16()
    monkeypatch.setattr(layer, "_choose", lambda x: (True, None))
    monkeypatch.setattr(layer, "mask", None)
    with torch.no_grad():
        mask = layer.gate.mask(layer.router(x))
        assert 0 < mask.float().mean() < 1
        assert torch.equal(layer(x), layer.masked_dense(x, mask))


@pytest.mark.parametrize("batched", ["tokens", "weights"])
@pytest.mark.parametrize("keeps_hidden", [False, True])
def test_a_layer_that_may_choose_runs_under_vmap(keeps_hidden, batched):
    """Also where the weights are what is batched, and the tokens look plain."""
    layer = layer_of(torch.bfloat16)
    layer.batch_invariant, layer.keeps_hidden = False, keeps_hidden
    x = random_rows(5).bfloat16()
    with torch.no_grad():
        if batched == "tokens":
            ys = torch.vmap(layer)(x[None])
        else:
            weights = {name: p[None] for name, p in layer.named_parameters()}
            ys = torch.vmap(partial(torch.func.functional_call, layer), in_dims=(0, None))(weights, (x,))
        torch.testing.assert_close(ys[0], layer(x), rtol=0.05, atol=0.1)


def test_tangents_go_through_the_activation():
    layer = layer_of()
    x, mask = random_rows(4), torch.ones(4, layer.experts, dtype=torch.bool)
    with torch.no_grad(), forward_ad.dual_level():
        y = layer.masked_dense(forward_ad.make_dual(x, torch.ones_like(x)), mask)
        tangent = forward_ad.unpack_dual(y).tangent
    _, expected = torch.func.jvp(lambda rows: layer.masked_dense(rows, mask), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected)
