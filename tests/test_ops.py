"""The ops against plain torch: values, gradients, and everything torch asks of a well-made op."""

import itertools
import warnings

import pytest
import torch
from problems import assert_as_good_as_torch, experts_problem, in_double, router_problem
from sadmoe import ops, reference
from torch.utils.flop_counter import FlopCounterMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = list(reference.ACTIVATIONS)
PROBLEMS = {  # awkward sizes: empty, one, odd, past a tile and a block, not a multiple of anything
    "no tokens": {"T": 0},
    "one token": {"T": 1, "d": 40, "s": 17},
    "one expert": {"E": 1, "share": 1.0},
    "one neuron": {"s": 1, "E": 9},
    "wide": {"T": 5, "d": 130, "E": 3, "s": 33, "d_out": 97},
    "many tokens": {"T": 300, "d": 32, "E": 12, "s": 8},
    "several blocks": {"T": 1100, "d": 40, "E": 3, "s": 40, "d_out": 50},
    "whole tiles": {"T": 64, "d": 32, "E": 2, "s": 32, "d_out": 32},
    "empty experts": {"T": 20, "E": 40, "s": 3, "share": 0.02},
    "every expert": {"T": 37, "share": 1.0},
    "no expert": {"T": 9, "share": 0.0},
}


@pytest.fixture(params=ops.cpu_isas())
def isa(request):
    ops.use_cpu_isa(request.param)
    yield request.param
    ops.use_cpu_isa("auto")


@pytest.mark.parametrize("E", [1, 7, 70])
def test_any_byte_but_0_of_a_mask_is_true(isa, E):
    x, _, *weights = experts_problem(40, 16, E, 4)
    bytes_ = torch.randint(256, (40, E), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    bytes_[::2] = torch.where(bytes_[::2] < 128, 0, 128)
    y = ops.sparse_experts(x, bytes_.view(torch.bool), *weights)
    assert torch.equal(y, ops.sparse_experts(x, bytes_ != 0, *weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_experts_are_as_good_as_torch(isa, name, dtype):
    for gated, bias, act in itertools.product([False, True], [False, True], ACTS):
        args = experts_problem(**PROBLEMS[name], gated=gated, bias=bias, dtype=dtype)
        assert_as_good_as_torch(
            ops.sparse_experts(*args, act=act),
            reference.sparse_experts(*args, act=act),
            reference.sparse_experts(*in_double(args), act=act),
        )


@pytest.mark.parametrize("act", ACTS)
def test_activations_are_accurate_over_the_whole_range(isa, act):
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    one = torch.ones(1, 1, 1)
    ours = ops.sparse_experts(x[:, None], torch.ones(len(x), 1, dtype=torch.bool), one, one, act=act)[:, 0]
    wide = x.double()
    exact = {
        "gelu": 0.5 * wide * torch.erfc(-wide * 0.5**0.5)
    }  # 1 + erf and 1 + tanh lose the tail even in float64
    truth = exact.get(act, reference.ACTIVATIONS[act](wide))
    assert_as_good_as_torch(ours, reference.ACTIVATIONS[act](x), truth)
    floor = 1e-14 if act == "gelu_tanh" else 1e-35
    assert ((ours.double() - truth).abs() <= 2e-5 * truth.abs() + floor).all(), "the tail keeps its digits"


def test_nan_and_infinity_pass_through(isa):
    x = torch.tensor([[float("nan")], [float("inf")], [1.0]])
    one = torch.ones(1, 1, 1)
    for act in ACTS:
        y = ops.sparse_experts(x, torch.ones(3, 1, dtype=torch.bool), one, one, act=act)[:, 0]
        assert y[0].isnan(), act
        assert y[1] == float("inf"), act
        assert y[2].isfinite(), act


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_of_an_odd_last_neuron_gives_infinity(isa, dtype):
    x, w_up, w_down = (
        torch.ones(2, 1, dtype=dtype),
        torch.ones(1, 3, 1, dtype=dtype),
        torch.ones(1, 3, 40, dtype=dtype),
    )
    w_down[0, 2, 7] = float("inf")
    y = ops.sparse_experts(x, torch.ones(2, 1, dtype=torch.bool), w_up, w_down)
    assert (y[:, 7] == float("inf")).all()
    assert y.isfinite().sum() == y.numel() - 2


def test_what_is_far_below_zero_becomes_nothing(isa):
    x, one = torch.tensor([[-1e3], [-1e20], [-3e38], [float("-inf")]]), torch.ones(1, 1, 1)
    for act in ACTS:
        y = ops.sparse_experts(x, torch.ones(4, 1, dtype=torch.bool), one, one, act=act)
        assert (y.abs() < 1e-30).all(), act


@pytest.mark.parametrize("router_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d", "E"), [(0, 8, 3), (1, 40, 1), (7, 33, 50), (200, 64, 17)])
def test_scores_are_as_good_as_torch(isa, T, d, E, dtype, router_dtype):
    x = experts_problem(T, d, 1, 1, dtype=dtype)[0]
    v1, v2 = router_problem(d, E, dtype=router_dtype or dtype)
    ours = ops.router_scores(x, v1, v2)
    assert ours.dtype == torch.float32
    hidden = torch.relu(x.double() @ v1.double().T)
    truth, terms = (hidden @ v2.double().T).abs(), hidden @ v2.double().T.abs()
    assert_as_good_as_torch(ours, reference.router_scores(x, v1, v2), truth, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 9, 1100])
def test_a_router_or_an_output_may_be_empty(isa, T, dtype):
    x, _, *weights = experts_problem(T, 48, 6, 20, dtype=dtype)
    v1, v2 = torch.zeros(0, 48, dtype=dtype), torch.zeros(6, 0, dtype=dtype)
    assert torch.equal(ops.router_scores(x, v1, v2), torch.zeros(T, 6))
    every = ops.sparse_experts(x, torch.ones(T, 6, dtype=torch.bool), *weights)
    assert torch.equal(ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.5), every), "a row of zeros runs all"
    x, mask, *weights = experts_problem(T, 48, 6, 20, d_out=0, dtype=dtype)
    assert ops.sparse_experts(x, mask, *weights).shape == (T, 0)


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.3, 1.0])
def test_selection_is_the_rule_bit_for_bit(tau):
    inf, nan = float("inf"), float("nan")
    edge = torch.tensor(
        [
            [0, 0, 0, 0],
            [1, 1, 0.3, 0],
            [inf, 1, 0, inf],
            [nan, 1, 0.2, 0],
            [nan] * 4,
            [-1, -2, -3, 0],
            [-1, 2, 0.6, 0.59],
        ]
    )
    random = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    for scores in (edge, random, torch.rand(3, 1), torch.rand(0, 4)):
        assert torch.equal(ops.dynamic_k_select(scores, tau), reference.dynamic_k_select(scores, tau))


def test_selection_keeps_its_promises():
    scores = torch.rand(200, 13, generator=torch.Generator().manual_seed(0))
    scores[::7] = 0
    masks = [ops.dynamic_k_select(scores, tau) for tau in (0.0, 0.01, 0.2, 0.5, 1.0)]
    assert masks[0].all(), "tau = 0 runs every expert"
    assert all((lower | ~higher).all() for lower, higher in itertools.pairwise(masks)), (
        "a larger tau runs a subset"
    )
    assert (masks[-1].sum(1)[scores.amax(1) > 0] == 1).all(), "tau = 1 runs the top expert"
    assert (masks[-1] & (scores == scores.amax(1, keepdim=True))).any(1).all()
    assert masks[-1][0].all(), "a row of zeros runs every expert"
    assert torch.equal(masks[2], ops.dynamic_k_select(scores * 8, 0.2)), (
        "the scale of the scores does not matter"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [10, 20])
@pytest.mark.parametrize("T", [0, 1, 6, 150])
def test_the_fused_op_is_its_three_stages_bit_for_bit(isa, T, s, dtype):
    x, _, *weights = experts_problem(T, 48, 11, s, gated=True, dtype=dtype)
    v1, v2 = router_problem(48, 11, dtype=dtype)
    for tau in (0.0, 0.4, 1.0):
        mask = ops.dynamic_k_select(ops.router_scores(x, v1, v2), tau)
        fused = ops.dynamic_k_moe(x, v1, v2, *weights, tau=tau, act="silu")
        assert torch.equal(fused, ops.sparse_experts(x, mask, *weights, act="silu"))


@pytest.mark.parametrize("s", [9, 41])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_neighbours_order_or_threads(isa, dtype, s):
    x, _, *weights = experts_problem(600, 40, 12, s, 35, dtype=dtype)
    v1, v2 = router_problem(40, 12, dtype=dtype)

    def run(rows):
        return ops.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3, act="gelu")

    whole = run(x)
    assert torch.equal(run(x), whole), "two runs"
    order = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(x[order]), whole[order]), "order"
    for part in (slice(0, 1), slice(7, 12), slice(40, 73), slice(100, 300)):
        assert torch.equal(run(x[part]), whole[part]), part
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    assert torch.equal(run(poisoned)[::2], whole[::2]), "NaN beside"
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x), whole), f"{count} threads"
            assert torch.equal(run(x[:5]), whole[:5]), f"{count} threads, few tokens"
    finally:
        torch.set_num_threads(threads)


def test_a_zero_has_the_same_sign_for_any_number_of_threads(isa):
    x, w_up, w_down = torch.full((2, 16), 1e-30), torch.full((9, 4, 16), -1e-30), torch.ones(9, 4, 16)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 4] = mask[1] = True  # 36 neurons: two threads share those of expert 4
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                ops.sparse_experts(x, mask, w_up, w_down, b_out=torch.full((16,), -0.0)).view(torch.int32)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_non_contiguous_arguments_are_read_right(isa):
    args = experts_problem(9, 20, 4, 5, gated=True)

    def strided(t):
        if t is None:
            return None
        wide = torch.stack([t, t.logical_not() if t.dtype == torch.bool else t + 1], dim=-1)
        return wide[..., 0]

    views = [strided(a) for a in args]
    assert not views[0].is_contiguous()
    assert torch.equal(ops.sparse_experts(*views), ops.sparse_experts(*args))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_the_reference_s_with_the_mask_held(gated, bias):
    args = experts_problem(8, 10, 4, 3, 7, gated=gated, bias=bias)
    v1, v2 = router_problem(10, 4)
    mask = ops.dynamic_k_select(ops.router_scores(args[0], v1, v2), 0.4)
    args[1] = mask

    def gradients(run):
        leaves = [a.clone().requires_grad_() if a is not None and a.dtype != torch.bool else a for a in args]
        run(leaves).square().sum().backward()
        return [a.grad for a in leaves if a is not None and a.dtype != torch.bool]

    wanted = gradients(lambda a: reference.sparse_experts(*a, act="gelu"))
    sparse = gradients(lambda a: ops.sparse_experts(*a, act="gelu"))
    fused = gradients(lambda a: ops.dynamic_k_moe(a[0], v1, v2, *a[2:], tau=0.4, act="gelu"))
    for w, s, f in zip(wanted, sparse, fused, strict=True):
        torch.testing.assert_close(s, w)
        torch.testing.assert_close(f, w)


def test_router_gradients_are_the_reference_s():
    x = experts_problem(8, 10, 1, 1)[0]

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in (x, *router_problem(10, 4))]
        run(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, wanted in zip(gradients(ops.router_scores), gradients(reference.router_scores), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_torch_finds_the_ops_well_made(needs_grad):
    x, mask, *weights = experts_problem(6, 12, 3, 4, gated=True)
    v1, v2 = router_problem(12, 3)
    for tensor in (x, v1, v2, *weights):
        tensor.requires_grad_(needs_grad)
    torch.library.opcheck(torch.ops.sadmoe.router_scores.default, (x, v1, v2))
    torch.library.opcheck(torch.ops.sadmoe.dynamic_k_select.default, (torch.rand(6, 3), 0.3))
    torch.library.opcheck(torch.ops.sadmoe.sparse_experts.default, (x, mask, *weights, "silu"))
    torch.library.opcheck(torch.ops.sadmoe.dynamic_k_moe.default, (x, v1, v2, *weights, 0.3, "silu"))


def test_meta_tensors_give_shapes():
    x, mask, *weights = (None if a is None else a.to("meta") for a in experts_problem(6, 12, 3, 4, 5))
    assert ops.sparse_experts(x, mask, *weights).shape == (6, 5)
    assert ops.router_scores(x, *(v.to("meta") for v in router_problem(12, 3))).shape == (6, 3)


def test_flops_are_those_executed():
    x, _, *weights = experts_problem(6, 12, 3, 4, 5, gated=True)
    v1, v2 = router_problem(12, 3, r=9)
    mask = ops.dynamic_k_select(ops.router_scores(x, v1, v2), 0.5)
    pairs = int(mask.sum())
    assert 6 <= pairs < 18
    experts, router = 2 * pairs * 4 * (2 * 12 + 5), 2 * 6 * 9 * (12 + 3)
    with FlopCounterMode(display=False) as count:
        ops.sparse_experts(x, mask, *weights)
    assert count.get_total_flops() == experts
    with FlopCounterMode(display=False) as count:
        ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.5)
    assert count.get_total_flops() == experts + router


def test_autocast_casts_the_experts_and_not_the_router():
    x, mask, *weights = experts_problem(6, 16, 3, 4)
    v1, v2 = router_problem(16, 3)
    low = [None if w is None else w.bfloat16() for w in weights]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            ops.sparse_experts(x, mask, *weights), ops.sparse_experts(x.bfloat16(), mask, *low)
        )
        assert torch.equal(ops.router_scores(x, v1, v2), ops.router_scores(x.bfloat16(), v1, v2))
        y = ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.3)
    assert torch.equal(y, ops.dynamic_k_moe(x.bfloat16(), v1, v2, *low, tau=0.3))


def test_gradients_flow_under_autocast():
    x, mask, *weights = experts_problem(6, 16, 3, 4)
    weights[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.sparse_experts(x, mask, *weights)
    y.float().sum().backward()
    assert weights[0].grad.dtype == torch.float32
    assert weights[0].grad.abs().sum() > 0


def test_compiles_whole_with_any_number_of_tokens():
    weights = experts_problem(6, 12, 3, 4)[2:]
    v1, v2 = router_problem(12, 3)
    compiled = torch.compile(
        lambda rows: ops.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for T in (6, 2, 9):
        rows = experts_problem(T, 12, seed=T)[0]
        assert torch.equal(compiled(rows), ops.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3))


def test_an_unknown_device_answers_through_the_reference_with_one_warning():
    for name in ("router_scores", "dynamic_k_select", "sparse_experts", "dynamic_k_moe"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sadmoe::{name}", "CompositeExplicitAutograd")
    args = experts_problem()
    slow = ops._with_one_warning("sparse_experts", reference.sparse_experts)
    with pytest.warns(
        UserWarning, match="sadmoe::sparse_experts has no kernel for cpu and runs in plain torch"
    ):
        first = slow(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(slow(*args), first)


def _replaced(i, value):
    args = experts_problem(6, 12, 3, 4, gated=True)
    args[i] = value
    return args


@pytest.mark.parametrize(
    ("args", "act", "message"),
    [
        (_replaced(0, torch.randn(12)), "relu", r"x must be \[T, d\] with d >= 1, got \[12\]"),
        (_replaced(0, torch.randn(6, 11)), "relu", r"w_up must be \[E, s, d = 11\], got \[3, 4, 12\]"),
        (
            _replaced(1, torch.ones(6, 2, dtype=torch.bool)),
            "relu",
            r"mask must be \[T, E\] = \[6, 3\], got \[6, 2\]",
        ),
        (_replaced(1, torch.ones(6, 3)), "relu", "mask must be bool, got Float"),
        (
            _replaced(3, torch.randn(3, 5, 12)),
            "relu",
            r"w_down must be \[E = 3, s = 4, d_out\], got \[3, 5, 12\]",
        ),
        (_replaced(3, torch.randn(3, 4, 12).half()), "relu", "w_down must have x's dtype, Float, got Half"),
        (_replaced(4, torch.randn(3)), "relu", r"b_up must be \[E, s\] = \[3, 4\], got \[3\]"),
        (_replaced(5, None), "relu", "b_gate needs w_gate"),
        (_replaced(7, torch.randn(5)), "relu", r"b_out must be \[d_out\] = \[12\], got \[5\]"),
        (experts_problem(), "tanh", "act must be one of relu, gelu, gelu_tanh, silu, got 'tanh'"),
        (experts_problem(dtype=torch.float64), "relu", "x must be float32, bfloat16 or float16, got Double"),
    ],
)
def test_a_wrong_argument_is_named(args, act, message):
    with pytest.raises(RuntimeError, match=f"sadmoe::sparse_experts: {message}"):
        ops.sparse_experts(*args, act=act)


def test_wrong_router_arguments_are_named():
    x, _, *weights = experts_problem(6, 12, 3, 4)
    v1, v2 = router_problem(12, 3)
    with pytest.raises(RuntimeError, match=r"v1 must be \[r, d = 12\], got \[9, 11\]"):
        ops.router_scores(x, v1[:, 1:], v2)
    with pytest.raises(RuntimeError, match=r"v2 must be \[E, r = 9\], got \[3, 8\]"):
        ops.router_scores(x, v1, v2[:, 1:])
    with pytest.raises(
        RuntimeError, match=r"v2 must have a row for each of the E = 3 experts of w_up, got \[2, 9\]"
    ):
        ops.dynamic_k_moe(x, v1, v2[1:], *weights)
    for tau in (-0.1, 1.5, float("nan")):
        with pytest.raises(RuntimeError, match=r"tau must be in \[0, 1\]"):
            ops.dynamic_k_select(torch.rand(2, 2), tau)
    with pytest.raises(RuntimeError, match="scores must be float32, got Double"):
        ops.dynamic_k_select(torch.rand(2, 2).double(), 0.1)


def test_an_input_without_columns_is_named():
    x, mask, w_up, w_down, *rest = experts_problem(6, 12, 3, 4)
    v1, v2 = router_problem(12, 3)
    with pytest.raises(RuntimeError, match=r"x must be \[T, d\] with d >= 1, got \[6, 0\]"):
        ops.sparse_experts(x[:, :0], mask, w_up[..., :0], w_down, *rest)
    with pytest.raises(RuntimeError, match=r"x must be \[T, d\] with d >= 1, got \[6, 0\]"):
        ops.router_scores(x[:, :0], v1[:, :0], v2)


def test_an_unknown_instruction_set_lists_what_runs():
    with pytest.raises(RuntimeError, match=r"does not run the 'sse9' kernels; it runs auto, .*portable"):
        ops.use_cpu_isa("sse9")
    assert "portable" in ops.build_info()
