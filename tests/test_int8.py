"""Experts in int8: the ops beside plain torch, the layers beside the floats they were."""

import copy
import itertools

import pytest
import sadmoe
import torch
from backends import DTYPES
from converted import converted, random_layer, random_rows
from problems import (
    assert_as_good_as_torch,
    assert_the_same_in_parts,
    in_double,
    int8_problem,
    router_problem,
)
from sadmoe import ops, reference
from sadmoe.layer import SCALES, experts
from sadmoe.layer.rounding import to_int8
from sadmoe.ops import fallback
from tiny_models import TINY
from torch import Tensor, library
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

ROUNDING = 2.0**-14  # of activations, to 16 bits, twice
CLOSE = {"rtol": 1e-3, "atol": 3e-4}
PROBLEMS = {
    "no tokens": {"T": 0},
    "one token": {"T": 1, "d": 40, "s": 17},
    "one neuron": {"s": 1, "E": 9},
    "short rows": {"T": 50, "s": 8},
    "several blocks": {"T": 1100, "d": 40, "E": 3, "s": 40, "d_out": 50},
    "no expert": {"T": 9, "share": 0.0},
}


def terms(args: list, act: str) -> Tensor:
    """Of every result, the sum of what it is the sum of, without signs: by which its rounding errors are judged."""
    x, mask, w_up, w_down, scale_up, scale_down, b_up, w_gate, scale_gate, b_gate, b_out, columns = in_double(
        args
    )
    E, s = w_up.shape[:2]
    neurons, one = torch.eye(E * s, dtype=torch.int8).view(E, s, E * s), torch.ones(E, s, dtype=torch.float64)
    hidden = reference.sparse_experts_int8(
        x, mask, w_up, neurons, scale_up, one, b_up, w_gate, scale_gate, b_gate, act=act
    )
    sums = (
        hidden.abs() @ reference.dequantized(w_down, scale_down, torch.float64, columns).flatten(0, 1).abs()
    )
    return sums if b_out is None else sums + b_out.abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_op_is_as_good_as_torch(isa, name, dtype):
    choices = itertools.product(reference.ACTIVATIONS, [False, True])
    for i, (act, gated) in enumerate(choices):
        bias, without_columns = i % 4 < 2, i % 3 == 0
        args = int8_problem(
            **PROBLEMS[name], gated=gated, bias=bias, dtype=dtype, without_columns=without_columns
        )
        assert_as_good_as_torch(
            ops.sparse_experts_int8(*args, act=act),
            reference.sparse_experts_int8(*args, act=act),
            reference.sparse_experts_int8(*in_double(args), act=act),
            terms(args, act),
            ROUNDING,
        )


@pytest.mark.parametrize(("d", "s"), [(5000, 2), (4, 1000)])
@pytest.mark.parametrize("size", [1e-35, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("weight", [127, -128])
def test_sums_of_integers_never_overflow(isa, size, d, s, weight):
    x = torch.full((2, d), size if weight > 0 else -size)
    x[0, 1:] = 0
    w_up = torch.full((1, s, d), weight, dtype=torch.int8)
    w_down = torch.full((1, s, 3), -abs(weight), dtype=torch.int8)
    one = torch.full((1, s), 1 / abs(weight))
    y = ops.sparse_experts_int8(x, torch.ones(2, 1, dtype=torch.bool), w_up, w_down, one, one)
    wanted = -s * x.double().abs().sum(1, keepdim=True).expand(2, 3)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-4, atol=1e-29)


def test_a_token_is_finite_whose_values_add_up_to_more_than_floats_hold(isa):
    x = torch.full((1, 768), 1e36)
    w_up, w_down = torch.zeros(1, 1, 768, dtype=torch.int8), torch.full((1, 1, 3), 127, dtype=torch.int8)
    w_up[..., 5] = 127
    one = torch.full((1, 1), 1 / 127)
    y = ops.sparse_experts_int8(x, torch.ones(1, 1, dtype=torch.bool), w_up, w_down, one, one)
    torch.testing.assert_close(y, torch.full((1, 3), 1e36), rtol=2e-4, atol=0)


def test_a_token_that_is_not_finite_stays_so_alone(isa):
    x, mask, *experts = int8_problem(T=20, d=40, E=4, s=5)
    mask[:] = True
    wanted = ops.sparse_experts_int8(x, mask, *experts)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[7, 3] = bad
        y = ops.sparse_experts_int8(x, mask, *experts)
        assert not y[7].isfinite().any()
        assert torch.equal(y[:7], wanted[:7])
        assert torch.equal(y[8:], wanted[8:])
    one, ones = torch.ones(1, 1), torch.ones(1, 40, dtype=torch.int8)
    x[7, 3] = float("inf")
    y = ops.sparse_experts_int8(x[7:8], mask[:1, :1], 64 * ones[None], ones[None], one, one)
    assert not y.isfinite().any(), "also where an activation could hide it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_neighbours_or_threads(isa, dtype):
    x, _, *experts = int8_problem(T=600, d=40, E=12, s=9, d_out=35, dtype=dtype)
    v1, v2 = router_problem(40, 12, dtype=dtype)

    def run(rows):
        return ops.dynamic_k_moe_int8(rows, v1, v2, *experts, tau=0.3, act="gelu")

    whole = run(x)
    mask = ops.dynamic_k_select(ops.router_scores(x, v1, v2), 0.3)
    assert 0.1 < mask.float().mean() < 0.9
    assert torch.equal(ops.sparse_experts_int8(x, mask, *experts, act="gelu"), whole), "the stages"
    assert_the_same_in_parts(run, x, whole)


@pytest.mark.parametrize("T", [1, 9, 40])
def test_arguments_are_read_right_wherever_they_lie_and_whatever_a_mask_holds(isa, T):
    args = int8_problem(T=T, d=64, E=7, s=16, gated=True)
    wanted = ops.sparse_experts_int8(*args)

    def strided(t):
        return None if t is None else torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]

    def shifted(t):
        return None if t is None else torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    for moved in (strided, shifted):
        assert torch.equal(ops.sparse_experts_int8(*map(moved, args)), wanted)
    args[1] = (args[1].to(torch.uint8) * 128).view(torch.bool)
    assert torch.equal(ops.sparse_experts_int8(*args), wanted)


@pytest.mark.parametrize("T", [0, 1, 40])
def test_a_router_or_an_output_may_be_empty(isa, T):
    x, mask, *experts = int8_problem(T=T, d=48, E=6, s=20)
    v1, v2 = torch.zeros(0, 48), torch.zeros(6, 0)
    every = ops.sparse_experts_int8(x, torch.ones_like(mask), *experts)
    assert torch.equal(ops.dynamic_k_moe_int8(x, v1, v2, *experts, tau=0.5), every), "a row of zeros runs all"
    for i, of_columns in ((1, experts[1][..., :0]), (8, experts[8][:0]), (9, experts[9][:0])):
        experts[i] = of_columns
    assert ops.sparse_experts_int8(x, mask, *experts).shape == (T, 0)


@pytest.mark.by_torch
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_reach_x_and_biases(gated):
    args = int8_problem(T=8, d=10, E=4, s=3, d_out=7, gated=gated)
    places = [i for i in (0, 6, 9, 10) if args[i] is not None]

    def gradients(run):
        leaves = [a.clone().requires_grad_() if i in places else a for i, a in enumerate(args)]
        run(*leaves, act="gelu").square().sum().backward()
        return [leaves[i].grad for i in places]

    wanted = gradients(reference.sparse_experts_int8)
    for ours, want in zip(gradients(ops.sparse_experts_int8), wanted, strict=True):
        torch.testing.assert_close(ours, want, **CLOSE)


@pytest.mark.by_torch
@pytest.mark.parametrize("needs_grad", [False, True])
def test_torch_finds_the_ops_well_made(needs_grad):
    x, mask, *experts = int8_problem(T=6, d=12, E=3, s=4, gated=True)
    v1, v2 = router_problem(12, 3)
    for tensor in (x, v1, v2, experts[4]):
        tensor.requires_grad_(needs_grad)
    library.opcheck(torch.ops.sadmoe.sparse_experts_int8.default, (x, mask, *experts, "silu"))
    library.opcheck(torch.ops.sadmoe.dynamic_k_moe_int8.default, (x, v1, v2, *experts, 0.3, "silu"))


@pytest.mark.by_torch
def test_flops_are_those_of_the_floats():
    args = int8_problem(T=6, d=12, E=3, s=4, d_out=5, gated=True)
    v1, v2 = router_problem(12, 3, r=9)
    pairs = int(ops.dynamic_k_select(ops.router_scores(args[0], v1, v2), 0.5).sum())
    with FlopCounterMode(display=False) as count:
        ops.dynamic_k_moe_int8(args[0], v1, v2, *args[2:], tau=0.5)
    assert count.get_total_flops() == 2 * pairs * 4 * (2 * 12 + 5) + 2 * 6 * 9 * (12 + 3)


@pytest.mark.parametrize(
    ("i", "value", "message"),
    [
        (2, torch.randn(3, 4, 12), "w_up must be int8, got Float"),
        (4, torch.ones(3, 5), r"scale_up must be \[E, s\] = \[3, 4\], got \[3, 5\]"),
        (5, torch.ones(3, 4, dtype=torch.int8), "scale_down must be float32, bfloat16 or float16, got Char"),
        (8, None, "w_gate and scale_gate need each other"),
        (11, torch.ones(5), r"scale_out must be \[d_out\] = \[12\], got \[5\]"),
        (6, torch.ones(3, 4).half(), "b_up must have x's dtype, Float, got Half"),
    ],
)
def test_a_wrong_argument_is_named(i, value, message):
    args = int8_problem(T=6, d=12, E=3, s=4, gated=True)
    args[i] = value
    with pytest.raises(RuntimeError, match=f"sadmoe::sparse_experts_int8: {message}"):
        ops.sparse_experts_int8(*args)


def test_pruned_weights_are_refused_and_the_model_runs_as_before():
    model, batch = converted("bert"), TINY["bert"].batch()
    name, layer = next(iter(sadmoe.moe_layers(model).items()))
    prune.l1_unstructured(layer, "w_down", amount=0.5)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        with pytest.raises(ValueError, match=rf"{name}.w_down is made of other tensors .* prune.remove"):
            sadmoe.quantize_experts_(model)
        assert torch.equal(model(**batch).last_hidden_state, before)
    prune.remove(layer, "w_down")
    sadmoe.quantize_experts_(model)


def test_sums_too_long_for_32_bits_are_refused():
    args = int8_problem(T=1, d=2**17 + 1, E=1, s=1, d_out=2)
    with pytest.raises(RuntimeError, match="s and d up to 131072, got s = 1, d = 131073"):
        ops.sparse_experts_int8(*args)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_what_its_rounded_weights_are(dtype, gated):
    layer = random_layer(act="silu", gated=gated).to(dtype).eval()
    x = random_rows(30).to(dtype)
    floats = {name: w.detach().clone() for name in SCALES if (w := getattr(layer, name)) is not None}
    layer.to_int8_()
    for name, weight in floats.items():
        step = getattr(layer, SCALES[name]).float().unsqueeze(-1)
        columns = layer.scale_out.float() if name == "w_down" else torch.ones(weight.shape[2])
        most = (weight.float() / columns).abs().amax(-1, keepdim=True)
        assert (step * 127 <= most * 1.02).all(), "no step is wasted"
        step = step * columns
        of_a_step = 0.5001 if dtype == torch.float32 else 1.01  # what widens is rounded to the dtype too
        assert ((layer.float_weights(name).float() - weight.float()).abs() <= of_a_step * step).all()
    wide = copy.deepcopy(layer)
    wide.to_float_()
    assert wide.w_up.dtype == wide.router.v1.dtype == dtype
    assert layer.router.v2.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    for tau in (0.0, 0.4):
        wide.gate = layer.gate = sadmoe.DynamicK(tau)
        ours, widened = layer(x).float(), wide(x).float()
        assert (ours - widened).norm() <= max(2 * torch.finfo(dtype).eps, ROUNDING) * widened.norm()
    assert torch.equal(layer.expert_norms(x), wide.expert_norms(x)), "the routers' targets"


def test_a_cast_loses_nothing_of_the_scales():
    layer = random_layer()
    with torch.no_grad():
        layer.w_down[..., 3] *= 1e6
    layer.to_int8_()
    before = [layer.scale_up.clone(), layer.scale_down.clone(), layer.scale_out.clone()]
    layer.bfloat16().float()
    after = [layer.scale_up, layer.scale_down, layer.scale_out]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(layer.scale_out.half().float(), layer.scale_out)
    assert layer.w_up.dtype == torch.int8


def test_large_features_leave_the_others_their_steps(monkeypatch):
    layer, x = random_layer(), random_rows(50)
    with torch.no_grad():
        layer.w_down[..., 3] *= 100
    layer.gate = sadmoe.DynamicK(0.3)
    plain, columns = copy.deepcopy(layer), copy.deepcopy(layer)
    columns.to_int8_(rounded_router=False)
    monkeypatch.setattr(experts, "column_scales", lambda weight: torch.ones(weight.shape[2]))
    plain.to_int8_(rounded_router=False)
    others = [c for c in range(layer.w_down.shape[2]) if c != 3]
    with torch.no_grad():
        wanted = layer(x)[:, others]
        wrong = [(rounded(x)[:, others] - wanted).norm() / wanted.norm() for rounded in (plain, columns)]
    assert wrong[1] < 0.02 < 0.1 < wrong[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routers_get_back_the_dtype_that_they_had(dtype):
    layer = random_layer().to(dtype)
    layer.router.float()
    layer.to_int8_()
    assert layer.router.v1.dtype == torch.bfloat16
    layer.to_float_()
    assert layer.router.v1.dtype == torch.float32
    layer.to_int8_(rounded_router=False)
    layer.to_float_()
    assert layer.router.v1.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_are_rounded_up_in_every_dtype_and_nan_is_not_lost(dtype):
    weight = torch.tensor([1.0, 1e-4, 3e-6, 1e-7, 0.0]).view(5, 1, 1) * torch.tensor([1.0, -0.5])
    _, scale = to_int8(weight, dtype)
    assert scale.dtype == dtype
    assert (127 * scale.float() >= weight.abs().amax(-1)).all(), "none of the weights is clipped"
    assert scale[:4].all()
    assert not scale[4].any()
    weight[0, 0, 0] = torch.nan
    assert to_int8(weight, dtype)[1][0].isnan().all()


def test_neurons_without_weights_stay_zero():
    layer = random_layer()
    with torch.no_grad():
        layer.w_up[0, 0] = 0
        layer.w_down[1] = 0
        layer.w_down[..., 2] = 0
    layer.to_int8_()
    assert not layer.float_weights("w_up")[0, 0].any()
    assert layer(random_rows(4)).isfinite().all()
    assert not (layer(random_rows(4)) - layer.b_out)[:, 2].any()


@pytest.mark.parametrize("gated", [False, True])
def test_devices_without_a_kernel_widen_the_weights(gated):
    x, mask, *experts = int8_problem(T=9, d=12, E=3, s=4, gated=gated)
    v1, v2 = router_problem(12, 3)
    slow = fallback.with_one_warning("sparse_experts_int8", fallback.sparse_experts_widened, fallback.WIDENED)
    with pytest.warns(
        UserWarning, match="sadmoe::sparse_experts_int8 has no kernel for cpu and widens the weig"
    ):
        widened = slow(x, mask, *experts, "gelu")
    torch.testing.assert_close(widened, ops.sparse_experts_int8(x, mask, *experts, "gelu"), **CLOSE)
    torch.testing.assert_close(
        fallback.dynamic_k_moe_widened(x, v1, v2, *experts, 0.3, "gelu"),
        ops.dynamic_k_moe_int8(x, v1, v2, *experts, 0.3, "gelu"),
        **CLOSE,
    )
    for name in ("sparse_experts_int8", "dynamic_k_moe_int8"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sadmoe::{name}", "CompositeExplicitAutograd")
    if gated:
        experts[6] = None
        with pytest.raises(RuntimeError, match="w_gate and scale_gate need each other"):
            fallback.sparse_experts_widened(x, mask, *experts)


@pytest.mark.parametrize(
    ("place", "wrong", "kernels"),
    [
        (2, lambda w_up: w_up.to(torch.uint8), "w_up must be int8, got"),
        (4, lambda scale_up: scale_up[:, :1], r"scale_up must be \[E, s\]"),
        (11, lambda scale_out: scale_out[:1], r"scale_out must be \[d_out\]"),
    ],
    ids=["weights", "scales", "scales of columns"],
)
def test_devices_without_a_kernel_refuse_what_kernels_refuse(place, wrong, kernels):
    problem = int8_problem(T=9, d=12, E=3, s=4, gated=True)
    problem[place] = wrong(problem[place])
    with pytest.raises(RuntimeError, match=kernels):
        ops.sparse_experts_int8(*problem)
    told = r"weights must be int8 \[E, s, n\] with scales \[E, s\] and \[n\], got"
    with pytest.raises(RuntimeError, match=told):
        fallback.sparse_experts_widened(*problem)


def test_int8_and_floats_are_not_loaded_into_each_other():
    floats, rounded = random_layer(), random_layer()
    rounded.to_int8_()
    for layer, other, told in (
        (
            floats,
            rounded,
            r"w_up is of int8, the model's experts are floats: quantize_experts_\(model\) first",
        ),
        (
            rounded,
            floats,
            r"w_up is of floats, the model's experts are int8: dequantize_experts_\(model\) first",
        ),
    ):
        before = {name: t.clone() for name, t in layer.state_dict().items() if not name.startswith("router")}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=told):
                layer.load_state_dict(other.state_dict(), strict=strict)
        assert all(torch.equal(layer.state_dict()[name], t) for name, t in before.items())
    for layer, other in ((floats, rounded), (rounded, floats)):
        part = {"w_down": other.state_dict()["w_down"]}
        with pytest.raises(RuntimeError, match="w_down is of"):
            layer.load_state_dict(part, strict=False)
    again = random_layer()
    again.to_int8_()
    again.load_state_dict(rounded.state_dict())
