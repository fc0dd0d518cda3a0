"""The ops against plain torch: on the CPU, on the emulator of CUDA, and on a CUDA device where there is one."""

import itertools
from functools import cache

import pytest
import torch
from backends import DTYPES, SCHEDULES, Backend, set_options
from problems import (
    assert_as_good_as_torch,
    assert_scores_as_good_as_torch,
    experts_problem,
    in_double,
    router_problem,
)
from sadmoe import ops, reference

ACTS = list(reference.ACTIVATIONS)
# gated, bias, activation: each activation with and without a gate, a bias with every other of them
KINDS = [(gated, (i + gated) % 2 == 0, act) for i, act in enumerate(ACTS) for gated in (False, True)]


def check_experts(backend, args, act):
    assert_as_good_as_torch(
        backend.sparse_experts(*args, act=act),
        reference.sparse_experts(*args, act=act),
        reference.sparse_experts(*in_double(args), act=act),
    )


PROBLEMS = {  # empty, one, beside and past a tile or a block of tokens, neurons and columns; aligned rows and others
    "no tokens": {"T": 0, "d": 64, "s": 8},
    "one token": {"T": 1, "d": 64, "s": 8},
    "one token of odd sizes": {"T": 1, "d": 40, "s": 17},
    "odd": {"T": 31, "d": 33, "s": 33, "d_out": 35},
    "one expert of one neuron": {"T": 33, "d": 8, "E": 1, "s": 1, "share": 1.0},
    "one neuron": {"s": 1, "E": 9},
    "wide": {"T": 5, "d": 130, "E": 3, "s": 33, "d_out": 97},
    "every width off a tile": {"T": 33, "d": 100, "E": 7, "s": 24, "d_out": 72},
    "whole tiles": {"T": 64, "d": 32, "E": 2, "s": 32, "d_out": 32},
    "many tokens": {"T": 200, "d": 40, "E": 7, "s": 8},
    "several blocks": {"T": 1100, "d": 40, "E": 3, "s": 40, "d_out": 50},
    "more experts than threads scan": {"T": 9, "d": 8, "E": 530, "s": 8, "share": 0.03},
    "more tokens than blocks take at once": {"T": 4200, "d": 8, "E": 2, "s": 8, "share": 1.0},
    "past a tile of neurons": {"T": 5, "d": 64, "E": 2, "s": 72},
    "empty experts": {"T": 20, "E": 40, "s": 3, "share": 0.02},
    "every expert of odd sizes": {"T": 37, "share": 1.0},
    "every expert": {"T": 70, "d": 24, "E": 5, "s": 8, "share": 1.0},
    "no expert": {"T": 9, "share": 0.0},
    "no output": {"T": 9, "d_out": 0},
}


@cache
def answered(name, gated, bias, act, dtype):
    """A problem, what torch makes of it, and the truth: the same for every backend."""
    args = experts_problem(**PROBLEMS[name], gated=gated, bias=bias, dtype=dtype)
    return (
        args,
        reference.sparse_experts(*args, act=act),
        reference.sparse_experts(*in_double(args), act=act),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_experts_are_as_good_as_torch(backend, name, dtype):
    few = [(False, True, "gelu"), (True, True, "silu")]  # where time counts; the next test has all
    for gated, bias, act in KINDS if backend.is_cpu else few:
        args, torchs, truth = answered(name, gated, bias, act, dtype)
        assert_as_good_as_torch(backend.sparse_experts(*args, act=act), torchs, truth)


@pytest.mark.parametrize("T", [20, 260])
def test_the_error_does_not_grow_with_the_number_of_experts(backend, T):
    """Of few tokens and of many, in float32, where 460 experts in one chain would have three times torch's."""
    args = experts_problem(T, 16, 512, 8, 16, share=0.9)
    truth = reference.sparse_experts(*in_double(args))

    def error(y):
        return (y.double() - truth).square().mean().sqrt()

    assert error(backend.sparse_experts(*args)) < 2 * error(reference.sparse_experts(*args))


@pytest.mark.parametrize("T", [1, 33, 100])
def test_the_error_does_not_grow_with_the_width(backend, T):
    """In float32, where one chain over 2,048 products would have four times torch's."""
    for seed in range(3):
        x, _, *weights = experts_problem(T, 2048, 1, 16, 40, seed=seed)
        check_experts(backend, [x, torch.ones(T, 1, dtype=torch.bool), *weights], "relu")
        for dtype in (torch.float32, torch.bfloat16):
            router = router_problem(2048, 7, r=16, dtype=dtype, seed=seed)
            assert_scores_as_good_as_torch(backend.router_scores(x, *router), x, *router)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "E", "s", "share"),
    [(384, 48, 32, 1.0), (768, 24, 128, 0.5), (2048, 256, 32, 0.25), (2048, 256, 32, 0.75)],
)
def test_a_layer_of_a_real_size_is_as_good_as_torch(isas, d, E, s, share, dtype):
    """Thousands of products in a sum."""
    args = experts_problem(17, d, E, s, share=share, dtype=dtype)
    torchs = reference.sparse_experts(*args, act="gelu")
    truth = reference.sparse_experts(*in_double(args), act="gelu")
    for isa in isas:
        ops.use_cpu_isa(isa)
        print(isa)  # which one, where it fails
        assert_as_good_as_torch(ops.sparse_experts(*args, act="gelu"), torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_gate_and_bias_is_as_good_as_torch(backend, dtype):
    for gated, bias, act in KINDS:
        check_experts(backend, experts_problem(5, 16, 3, 8, gated=gated, bias=bias, dtype=dtype), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_expert_among_empty_ones(backend, dtype):
    args = experts_problem(150, 32, 36, 8, dtype=dtype, share=0.0)
    args[1][:, 34] = True
    args[1][70, 3] = True
    check_experts(backend, args, "relu")


def test_rows_that_do_not_begin_on_16_bytes_are_read_right(backend):
    args = experts_problem(40, 64, 4, 16, dtype=torch.bfloat16)
    wanted = backend.sparse_experts(*args)

    def shifted(t):
        if t is None or t.dtype == torch.bool:
            return t
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    assert shifted(args[0]).data_ptr() % 16 == 2
    moved = [a if a is None else a.to(backend.device) for a in args]
    assert torch.equal(backend.sparse_experts(*map(shifted, moved)), wanted)


def test_non_contiguous_arguments_are_read_right(backend):
    args = [a if a is None else a.to(backend.device) for a in experts_problem(9, 20, 4, 5, gated=True)]
    router = [a.to(backend.device) for a in router_problem(20, 4)]

    def strided(t):
        if t is None:
            return None
        wide = torch.stack([t, t.logical_not() if t.dtype == torch.bool else t + 1], dim=-1)
        return wide[..., 0]

    views, of_router = [strided(a) for a in args], [strided(a) for a in router]
    assert not views[0].is_contiguous()
    assert torch.equal(backend.sparse_experts(*views), backend.sparse_experts(*args))
    scores = backend.router_scores(args[0], *router)
    assert torch.equal(backend.router_scores(views[0], *of_router), scores)
    wanted = backend.dynamic_k_select(scores, 0.6)
    assert torch.equal(backend.dynamic_k_select(strided(scores.to(backend.device)), 0.6), wanted)
    whole = backend.dynamic_k_moe(args[0], *router, *args[2:], tau=0.6)
    assert torch.equal(backend.dynamic_k_moe(views[0], *of_router, *views[2:], tau=0.6), whole)


@pytest.mark.parametrize("act", ACTS)
def test_activations_are_accurate_over_the_whole_range(backend, act):
    points = 4001 if backend.is_cpu else 801
    x = torch.cat([torch.linspace(-100, 100, points), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    one, wide = torch.ones(1, 1, 1), x.double()
    ours = backend.sparse_experts(x[:, None], torch.ones(len(x), 1, dtype=torch.bool), one, one, act=act)[
        :, 0
    ]
    exact = {
        "gelu": 0.5 * wide * torch.erfc(-wide * 0.5**0.5)
    }  # 1 + erf and 1 + tanh lose the tail even in float64
    truth = exact.get(act, reference.ACTIVATIONS[act](wide))
    assert_as_good_as_torch(ours, reference.ACTIVATIONS[act](x), truth)
    floor = 1e-14 if act == "gelu_tanh" else 1e-35
    assert ((ours.double() - truth).abs() <= 2e-5 * truth.abs() + floor).all(), "the tail keeps its digits"


@pytest.mark.parametrize("act", ACTS)
def test_what_is_far_from_zero_stays_there_or_becomes_nothing(backend, act):
    inf, one = float("inf"), torch.ones(1, 1, 1)
    x = torch.tensor([float("nan"), inf, 1.0, -1e3, -1e20, -3e38, -inf])
    y = backend.sparse_experts(x[:, None], torch.ones(7, 1, dtype=torch.bool), one, one, act=act)[:, 0]
    assert y[0].isnan()
    assert y[1] == inf
    assert y[2].isfinite()
    assert (y[3:].abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_of_an_odd_last_neuron_gives_infinity(backend, dtype):
    x, w_up, w_down = (torch.ones(*shape, dtype=dtype) for shape in ((2, 1), (1, 3, 1), (1, 3, 40)))
    w_down[0, 2, 7] = float("inf")
    y = backend.sparse_experts(x, torch.ones(2, 1, dtype=torch.bool), w_up, w_down)
    assert (y[:, 7] == float("inf")).all()
    assert y.isfinite().sum() == y.numel() - 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_with_their_token_and_expert(backend, dtype):
    args = experts_problem(70, 16, 3, 8, dtype=dtype)
    wanted = backend.sparse_experts(*args)
    args[0][5], args[0][6], args[2][1] = float("nan"), float("inf"), float("nan")
    args[1][6] = False
    y = backend.sparse_experts(*args)
    touched = args[1][:, 1].clone()
    touched[5] = args[1][5].any()
    assert y[touched].isnan().all()
    assert touched.any()
    untouched = ~touched
    untouched[5:7] = False
    assert torch.equal(y[untouched], wanted[untouched])
    assert torch.equal(y[6], args[7]), "a token of no expert is the bias"


@pytest.mark.parametrize("router_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d", "E"), [(0, 8, 3), (1, 40, 1), (7, 33, 150), (200, 64, 17)])
def test_scores_are_as_good_as_torch(backend, T, d, E, dtype, router_dtype):
    x = experts_problem(T, d, 1, 1, dtype=dtype)[0]
    v1, v2 = router_problem(d, E, dtype=router_dtype)
    assert_scores_as_good_as_torch(backend.router_scores(x, v1, v2), x, v1, v2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 9, 1100])
def test_a_router_or_an_output_may_be_empty(backend, T, dtype):
    x, _, *weights = experts_problem(T, 48, 6, 20, dtype=dtype)
    v1, v2 = torch.zeros(0, 48, dtype=dtype), torch.zeros(6, 0, dtype=dtype)
    assert torch.equal(backend.router_scores(x, v1, v2), torch.zeros(T, 6))
    every = backend.sparse_experts(x, torch.ones(T, 6, dtype=torch.bool), *weights)
    assert torch.equal(backend.dynamic_k_moe(x, v1, v2, *weights, tau=0.5), every), "a row of zeros runs all"
    x, mask, *weights = experts_problem(T, 48, 6, 20, d_out=0, dtype=dtype)
    assert backend.sparse_experts(x, mask, *weights).shape == (T, 0)


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.3, 1.0])
def test_selection_is_the_rule_bit_for_bit(backend, tau):
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
    g = torch.Generator().manual_seed(0)
    for scores in (
        edge,
        torch.rand(50, 4, generator=g),
        torch.rand(9, 70, generator=g),
        torch.rand(3, 1),
        torch.rand(0, 4),
    ):
        assert torch.equal(backend.dynamic_k_select(scores, tau), reference.dynamic_k_select(scores, tau))


@pytest.mark.parametrize(
    ("scores", "tau", "runs"),
    [
        ([3, 3, 1, 0], 1.0, [1, 1, 0, 0]),
        ([3, 3, 1, 0], 0.0, [1, 1, 1, 1]),
        ([0, 0, 0, 0], 1.0, [1, 1, 1, 1]),
        ([4, 2, 1.9, 0], 0.5, [1, 1, 0, 0]),
        ([torch.inf, 1, 0, torch.inf], 0.3, [1, 0, 0, 1]),
        ([torch.inf, 1, 0, 0], 0.0, [1, 1, 1, 1]),
        ([torch.nan, 1, 0.2, 0], 0.3, [0, 1, 0, 0]),
        ([-1, 2, 0.7, 0.5], 0.3, [0, 1, 1, 0]),
        ([5], 1.0, [1]),
    ],
)
def test_the_rule_by_hand(backend, scores, tau, runs):
    for select in (reference.dynamic_k_select, backend.dynamic_k_select):
        assert select(torch.tensor([scores], dtype=torch.float32), tau).tolist() == [
            [bool(run) for run in runs]
        ]


def test_selection_keeps_its_promises(backend):
    scores = torch.rand(200, 13, generator=torch.Generator().manual_seed(0))
    scores[::7] = 0
    masks = [backend.dynamic_k_select(scores, tau) for tau in (0.0, 0.01, 0.2, 0.5, 1.0)]
    assert masks[0].all(), "tau = 0 runs every expert"
    assert all((lower | ~higher).all() for lower, higher in itertools.pairwise(masks)), (
        "a larger tau, a subset"
    )
    assert (masks[-1].sum(1)[scores.amax(1) > 0] == 1).all(), "tau = 1 runs the top expert"
    assert (masks[-1] & (scores == scores.amax(1, keepdim=True))).any(1).all()
    assert masks[-1][0].all(), "a row of zeros runs every expert"
    assert torch.equal(masks[2], backend.dynamic_k_select(scores * 8, 0.2)), "their scale does not matter"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s", [10, 20])
@pytest.mark.parametrize("T", [0, 1, 6, 150])
def test_the_fused_op_is_its_three_stages_bit_for_bit(backend, T, s, dtype):
    x, _, *weights = experts_problem(T, 48, 11, s, gated=True, dtype=dtype)
    v1, v2 = router_problem(48, 11, dtype=dtype)
    for tau in (0.0, 0.4, 1.0):
        mask = backend.dynamic_k_select(backend.router_scores(x, v1, v2), tau)
        fused = backend.dynamic_k_moe(x, v1, v2, *weights, tau=tau, act="silu")
        assert torch.equal(fused, backend.sparse_experts(x, mask, *weights, act="silu"))


@pytest.mark.parametrize(("s", "d_out"), [(9, 35), (41, 150)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_neighbours_or_their_order(backend, dtype, s, d_out):
    T = 600 if backend.is_cpu else 150
    x, _, *weights = experts_problem(T, 40, 12, s, d_out, dtype=dtype)
    v1, v2 = router_problem(40, 12, dtype=dtype)

    def run(rows):
        return backend.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3, act="gelu")

    whole = run(x)
    assert torch.equal(run(x), whole), "two runs"
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(x[order]), whole[order]), "order"
    for part in (slice(0, 1), slice(7, 12), slice(40, 73), slice(T // 2, T)):
        assert torch.equal(run(x[part]), whole[part]), part
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    assert torch.equal(run(poisoned)[::2], whole[::2]), "NaN beside"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_grow_with_few_rows_an_expert_change_nothing(dtype):
    """Past a cache's worth of weights the CPU takes over 256 tokens at once, by what they chose: here over 600."""
    x, _, *weights = experts_problem(2500, 520, 16, 1024, 40, gated=True, dtype=dtype)
    router = router_problem(520, 16, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        for tau, count in ((0.9, 1), (0.9, 2), (1.0, 1)):
            torch.set_num_threads(count)
            mask = ops.dynamic_k_select(ops.router_scores(x, *router), tau)
            assert mask.float().mean() < 64 / 600
            whole = ops.dynamic_k_moe(x, *router, *weights, tau=tau)
            parts = [ops.dynamic_k_moe(part, *router, *weights, tau=tau) for part in x.split(250)]
            assert torch.equal(whole, torch.cat(parts))
            assert torch.equal(ops.sparse_experts(x, mask, *weights), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_schedule_of_threads_blocks_and_copies_changes_nothing(native, dtype):
    backend = Backend("emulator")
    x, _, *weights = experts_problem(100, 72, 9, 24, gated=True, dtype=dtype)
    v1, v2 = router_problem(72, 9, dtype=dtype)
    results = []
    for schedule in SCHEDULES:
        native.sadmoe_schedule(*schedule)
        results.append(backend.dynamic_k_moe(x, v1, v2, *weights, tau=0.3, act="gelu"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_tokens_that_do_not_fit_the_workspace_go_in_chunks(native):
    backend = Backend("emulator")
    args = experts_problem(200, 16, 5, 8, 20)
    whole = backend.sparse_experts(*args)
    for limit in (0, 64 * 5 * 8 * 4, 2 * 64 * 5 * 8 * 4):
        set_options(native, hidden_bytes=limit)
        assert torch.equal(backend.sparse_experts(*args), whole), limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "d", "s"),
    [(1, 72, 24), (16, 40, 8), (17, 64, 33), (64, 33, 10), (20, 40, 86), (20, 40, 96), (20, 40, 97)],
)
def test_few_tokens_have_the_bits_of_many(native, T, d, s, dtype):
    """The kernels of few tokens sum in the order of those of many: the shape of a call changes no result."""
    backend = Backend("emulator")
    ways = [(False, False), (False, True), *([(True, True)] if dtype == torch.float32 else [])]
    for tf32, gated in ways:
        x, _, *weights = experts_problem(T, d, 9, s, 35, gated=gated, dtype=dtype)
        routers = [router_problem(d, 9, dtype=v) for v in (dtype, torch.float16)]
        results = []
        for decode_tokens in (64, 0):
            set_options(native, decode_tokens=decode_tokens, tf32=tf32)
            scores = [backend.router_scores(x, *router) for router in routers]
            y = backend.dynamic_k_moe(x, *routers[0], *weights, tau=0.3, act="gelu")
            results.append([*scores, y])
        assert all(map(torch.equal, *results)), (tf32, gated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d_out", "s"), [(65, 24, 8), (200, 72, 24), (300, 33, 40)])
def test_tokens_of_a_block_change_no_result(gpu, T, d_out, s, dtype):
    """Blocks of 64 to 256 tokens, the last not full, of experts with more pairs than rows of a product, and none."""
    x, mask, *weights = experts_problem(T, 32, 37, s, d_out, dtype=dtype)
    mask = torch.rand(T, 37, generator=torch.Generator().manual_seed(4)) < torch.linspace(-0.1, 1.1, 37)
    mask[64:128] = False
    results = []
    for tiles in (1, 2, 4, 0):
        gpu.use_down_tiles(tiles)
        results.append(gpu.sparse_experts(x, mask, *weights, act="silu"))
    assert_as_good_as_torch(
        results[0],
        reference.sparse_experts(x, mask, *weights, act="silu"),
        reference.sparse_experts(*in_double([x, mask, *weights]), act="silu"),
    )
    assert all(torch.equal(y, results[0]) for y in results)


def tf32(t):
    """float32 to the nearest of 11 significant bits, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("T", [33, 200])
def test_tf32_is_as_good_as_torch_on_rounded_operands(native, T):
    args = experts_problem(T, 96, 5, 24, gated=True)
    set_options(native, tf32=True)
    y = Backend("emulator").sparse_experts(*args, act="silu")
    x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out = args
    flat = [tf32(w).flatten(0, 1) for w in (w_up, w_gate, w_down)]
    gate = torch.nn.functional.silu(tf32(x) @ flat[1].T + b_gate.flatten())
    hidden = gate * (tf32(x) @ flat[0].T + b_up.flatten()) * mask.repeat_interleave(24, 1)
    assert_as_good_as_torch(
        y, tf32(hidden) @ flat[2] + b_out, reference.sparse_experts(*in_double(args), act="silu")
    )
    exact = reference.sparse_experts(*args, act="silu")
    assert not torch.allclose(y, exact, rtol=1e-5, atol=1e-5), "tf32 was not used"


@pytest.mark.parametrize(("T", "E"), [(9, 7), (40, 1), (40, 70), (80, 7)])
def test_any_byte_but_0_of_a_mask_is_true(backend, T, E):
    x, _, *weights = experts_problem(T, 16, E, 8)
    mask = torch.randint(256, (T, E), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    mask[::2] = torch.where(mask[::2] < 128, 0, 128)
    y = backend.sparse_experts(x, mask.view(torch.bool), *weights)
    assert torch.equal(y, backend.sparse_experts(x, mask != 0, *weights))


@pytest.mark.parametrize("T", [9, 80])
def test_a_token_that_no_expert_or_every_expert_reaches(backend, T):
    """NaN scores choose none, zero scores all; also where the mask is never written."""
    x, _, *weights = experts_problem(T, 24, 5, 8)
    v1, v2 = router_problem(24, 5)
    x[3], x[4] = float("nan"), 0
    y = backend.dynamic_k_moe(x, v1, v2, *weights, tau=0.9)
    everyone = torch.ones(T, 5, dtype=torch.bool)
    assert torch.equal(y[3], weights[-1])
    assert torch.equal(y[4], backend.sparse_experts(x, everyone, *weights)[4])


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
        (
            experts_problem(),
            "tanh",
            "act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'",
        ),
        (experts_problem(dtype=torch.float64), "relu", "x must be float32, bfloat16 or float16, got Double"),
    ],
)
def test_a_wrong_argument_is_named(backend, args, act, message):
    with pytest.raises(RuntimeError, match=f"sadmoe::sparse_experts: {message}"):
        backend.sparse_experts(*args, act=act)


def test_wrong_router_arguments_are_named(backend):
    x, _, *weights = experts_problem(6, 12, 3, 4)
    v1, v2 = router_problem(12, 3)
    with pytest.raises(RuntimeError, match=r"v1 must be \[r, d = 12\], got \[9, 11\]"):
        backend.router_scores(x, v1[:, 1:], v2)
    with pytest.raises(RuntimeError, match=r"v2 must be \[E, r = 9\], got \[3, 8\]"):
        backend.router_scores(x, v1, v2[:, 1:])
    with pytest.raises(
        RuntimeError, match=r"v2 must have a row for each of the E = 3 experts of w_up, got \[2, 9\]"
    ):
        backend.dynamic_k_moe(x, v1, v2[1:], *weights)
    for tau in (-0.1, 1.5, float("nan")):
        with pytest.raises(RuntimeError, match=r"tau must be in \[0, 1\]"):
            backend.dynamic_k_select(torch.rand(2, 2), tau)
    with pytest.raises(RuntimeError, match="scores must be float32, got Double"):
        backend.dynamic_k_select(torch.rand(2, 2).double(), 0.1)


def test_an_input_without_columns_is_named(backend):
    x, mask, w_up, w_down, *rest = experts_problem(6, 12, 3, 4)
    v1, v2 = router_problem(12, 3)
    with pytest.raises(RuntimeError, match=r"x must be \[T, d\] with d >= 1, got \[6, 0\]"):
        backend.sparse_experts(x[:, :0], mask, w_up[..., :0], w_down, *rest)
    with pytest.raises(RuntimeError, match=r"x must be \[T, d\] with d >= 1, got \[6, 0\]"):
        backend.router_scores(x[:, :0], v1[:, :0], v2)


def test_scores_of_the_largest_floats_are_as_large(backend):
    x, largest = torch.zeros(2, 16), torch.finfo(torch.float32).max
    x[0, 0] = largest
    for of_v1, of_v2 in itertools.product(DTYPES, repeat=2):
        v1, v2 = torch.zeros(4, 16, dtype=of_v1), torch.full((3, 4), 0.25, dtype=of_v2)
        v1[:, 0] = 0.5
        scores = backend.router_scores(x, v1, v2)
        assert (scores[0] >= 0.49999 * largest).all(), (of_v1, of_v2)  # inf, where tensor cores round it up
        assert (scores[1] == 0).all()


def test_a_w_down_whose_offsets_do_not_fit_is_refused(native):
    w_up, w_down = (torch.zeros(1, 1, 1).expand(2**17, 2**9, width) for width in (1, 2**9))
    mask = torch.zeros(1, 2**17, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="sparse_experts: w_down must be under 64 GiB on CUDA, got 128"):
        torch.ops.sadmoe_emulated.sparse_experts(torch.zeros(1, 1), mask, w_up, w_down)


def test_more_outputs_than_a_grid_has_blocks_for_are_refused(native):
    one, w_up = torch.zeros(1, 1), torch.zeros(1, 1, 1)
    w_down = torch.zeros(1, 1, 1).expand(1, 1, 65535 * 64 + 1)
    with pytest.raises(RuntimeError, match="w_down must have at most 4194240 outputs on CUDA, got 4194241"):
        torch.ops.sadmoe_emulated.sparse_experts(one, one.bool(), w_up, w_down)
