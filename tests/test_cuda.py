"""The CUDA kernels against plain torch: on the emulator, and on a CUDA device where there is one."""

import itertools

import pytest
import torch
from cuda_backends import DTYPES, SCHEDULES, Backend, set_options
from problems import assert_as_good_as_torch, experts_problem, in_double, router_problem
from sadmoe import reference

ACTS = list(reference.ACTIVATIONS)


def check_experts(backend, args, act):
    assert_as_good_as_torch(
        backend.sparse_experts(*args, act=act),
        reference.sparse_experts(*args, act=act),
        reference.sparse_experts(*in_double(args), act=act),
    )


PROBLEMS = {  # empty, one, beside and past a tile of tokens, neurons and columns; aligned rows and others
    "no tokens": {"T": 0, "d": 64, "s": 8},
    "one token": {"T": 1, "d": 64, "s": 8},
    "odd": {"T": 31, "d": 33, "s": 33, "d_out": 35},
    "one expert of one neuron": {"T": 33, "d": 8, "E": 1, "s": 1, "share": 1.0},
    "every width off a tile": {"T": 33, "d": 100, "E": 7, "s": 24, "d_out": 72},
    "many tokens": {"T": 200, "d": 40, "E": 7, "s": 8},
    "more experts than threads scan": {"T": 9, "d": 8, "E": 530, "s": 8, "share": 0.03},
    "more tokens than blocks take at once": {"T": 4200, "d": 8, "E": 2, "s": 8, "share": 1.0},
    "past a tile of neurons": {"T": 5, "d": 64, "E": 2, "s": 72},
    "every expert": {"T": 70, "d": 24, "E": 5, "s": 8, "share": 1.0},
    "no expert": {"T": 9, "share": 0.0},
    "no output": {"T": 9, "d_out": 0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_experts_are_as_good_as_torch(backend, name, dtype):
    for gated, act in ((False, "gelu"), (True, "silu")):
        check_experts(backend, experts_problem(**PROBLEMS[name], gated=gated, dtype=dtype), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_gate_and_bias_is_as_good_as_torch(backend, dtype):
    for gated, bias, act in itertools.product([False, True], [False, True], ACTS):
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


def test_activations_are_accurate_over_the_whole_range(backend):
    x = torch.cat([torch.linspace(-100, 100, 801), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    one = torch.ones(1, 1, 1)
    wide = x.double()
    exact = {
        "gelu": 0.5 * wide * torch.erfc(-wide * 0.5**0.5)
    }  # 1 + erf and 1 + tanh lose the tail even in float64
    for act in ACTS:
        ours = backend.sparse_experts(x[:, None], torch.ones(len(x), 1, dtype=torch.bool), one, one, act=act)[
            :, 0
        ]
        truth = exact.get(act, reference.ACTIVATIONS[act](wide))
        floor = 1e-14 if act == "gelu_tanh" else 1e-35
        assert ((ours.double() - truth).abs() <= 2e-5 * truth.abs() + floor).all(), act


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


@pytest.mark.parametrize("router_dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d", "E"), [(0, 8, 3), (1, 40, 1), (7, 33, 70), (130, 64, 17)])
def test_scores_are_as_good_as_torch(backend, T, d, E, dtype, router_dtype):
    x = experts_problem(T, d, 1, 1, dtype=dtype)[0]
    v1, v2 = router_problem(d, E, dtype=router_dtype or dtype)
    hidden = torch.relu(x.double() @ v1.double().T)
    truth, terms = (hidden @ v2.double().T).abs(), hidden @ v2.double().T.abs()
    assert_as_good_as_torch(
        backend.router_scores(x, v1, v2), reference.router_scores(x, v1, v2), truth, terms
    )


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 80])
def test_the_fused_op_is_its_three_stages_bit_for_bit(backend, T, dtype):
    x, _, *weights = experts_problem(T, 48, 11, 10, gated=True, dtype=dtype)
    v1, v2 = router_problem(48, 11, dtype=dtype)
    for tau in (0.0, 0.4, 1.0):
        mask = backend.dynamic_k_select(backend.router_scores(x, v1, v2), tau)
        fused = backend.dynamic_k_moe(x, v1, v2, *weights, tau=tau, act="silu")
        assert torch.equal(fused, backend.sparse_experts(x, mask, *weights, act="silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_neighbours_or_their_order(backend, dtype):
    x, _, *weights = experts_problem(150, 40, 12, 9, 35, dtype=dtype)
    v1, v2 = router_problem(40, 12, dtype=dtype)

    def run(rows):
        return backend.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3, act="gelu")

    whole = run(x)
    assert torch.equal(run(x), whole), "two runs"
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(x[order]), whole[order]), "order"
    for part in (slice(0, 1), slice(7, 12), slice(40, 73), slice(100, 150)):
        assert torch.equal(run(x[part]), whole[part]), part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_schedule_of_threads_blocks_and_copies_changes_nothing(native, dtype):
    backend = Backend("sadmoe_emulated", "cpu")
    x, _, *weights = experts_problem(100, 72, 9, 24, gated=True, dtype=dtype)
    v1, v2 = router_problem(72, 9, dtype=dtype)
    results = []
    for schedule in SCHEDULES:
        native.sadmoe_schedule(*schedule)
        results.append(backend.dynamic_k_moe(x, v1, v2, *weights, tau=0.3, act="gelu"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_tokens_that_do_not_fit_the_workspace_go_in_chunks(native):
    backend = Backend("sadmoe_emulated", "cpu")
    args = experts_problem(200, 16, 5, 8, 20)
    whole = backend.sparse_experts(*args)
    for limit in (0, 64 * 5 * 8 * 4, 2 * 64 * 5 * 8 * 4):
        set_options(native, hidden_bytes=limit)
        assert torch.equal(backend.sparse_experts(*args), whole), limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d", "s"), [(1, 72, 24), (16, 40, 8), (17, 64, 33), (64, 33, 10)])
def test_few_tokens_have_the_bits_of_many(native, T, d, s, dtype):
    """The kernels of few tokens sum in the order of those of many: the shape of a call changes no result."""
    backend = Backend("sadmoe_emulated", "cpu")
    for tf32, gated in ((False, False), (False, True), (True, True)):
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
def test_tokens_of_a_block_change_no_result(backend, T, d_out, s, dtype):
    """Blocks of 64 to 256 tokens, the last not full, of experts with more pairs than rows of a product, and none."""
    x, mask, *weights = experts_problem(T, 32, 37, s, d_out, dtype=dtype)
    mask = torch.rand(T, 37, generator=torch.Generator().manual_seed(4)) < torch.linspace(-0.1, 1.1, 37)
    mask[64:128] = False
    results = []
    for tiles in (1, 2, 4, 0):
        backend.use_down_tiles(tiles)
        results.append(backend.sparse_experts(x, mask, *weights, act="silu"))
    assert_as_good_as_torch(
        results[0],
        reference.sparse_experts(x, mask, *weights, act="silu"),
        reference.sparse_experts(*in_double([x, mask, *weights]), act="silu"),
    )
    assert all(torch.equal(y, results[0]) for y in results)


def tf32(t):
    """float32 to the nearest of 11 significant bits, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("T", [33, 100])
def test_tf32_is_as_good_as_torch_on_rounded_operands(native, T):
    args = experts_problem(T, 96, 5, 24, gated=True)
    set_options(native, tf32=True)
    y = Backend("sadmoe_emulated", "cpu").sparse_experts(*args, act="silu")
    x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out = args
    flat = [tf32(w).flatten(0, 1) for w in (w_up, w_gate, w_down)]
    gate = torch.nn.functional.silu(tf32(x) @ flat[1].T + b_gate.flatten())
    hidden = gate * (tf32(x) @ flat[0].T + b_up.flatten()) * mask.repeat_interleave(24, 1)
    assert_as_good_as_torch(
        y, tf32(hidden) @ flat[2] + b_out, reference.sparse_experts(*in_double(args), act="silu")
    )
    exact = reference.sparse_experts(*args, act="silu")
    assert not torch.allclose(y, exact, rtol=1e-5, atol=1e-5), "tf32 was not used"


@pytest.mark.parametrize("T", [9, 80])
def test_any_byte_but_0_of_a_mask_is_true(backend, T):
    x, _, *weights = experts_problem(T, 16, 7, 8)
    mask = torch.randint(256, (T, 7), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.randn(6, 12), torch.ones(6, 2, dtype=torch.bool)),
            r"mask must be \[T, E\] = \[6, 3\], got \[6, 2\]",
        ),
        (
            (torch.randn(12), torch.ones(6, 3, dtype=torch.bool)),
            r"x must be \[T, d\] with d >= 1, got \[12\]",
        ),
    ],
)
def test_a_wrong_argument_is_named(backend, args, message):
    with pytest.raises(RuntimeError, match=f"sadmoe::sparse_experts: {message}"):
        backend.sparse_experts(*args, *experts_problem(6, 12, 3, 4)[2:])
