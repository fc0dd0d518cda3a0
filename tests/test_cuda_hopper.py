"""The kernels of sm_90a: as good as torch, and the bits of the others, whatever the schedule."""

from functools import partial

import pytest
import torch
from backends import SCHEDULES, Backend, set_options
from problems import assert_as_good_as_torch, experts_problem, in_double, router_problem
from sadmoe import reference

HALVES = [torch.bfloat16, torch.float16]
PROBLEMS = {  # tiles of 64 to 256 pairs, by how many there are, and 32 to 128 neurons: short, full, past; depths of 64
    "one tile": {"T": 70, "d": 64, "E": 2, "s": 8, "share": 1.0},
    "a short step": {"T": 70, "d": 8, "E": 2, "s": 8},
    "past a step": {"T": 90, "d": 72, "E": 3, "s": 32},
    "fewer steps than are on their way": {"T": 130, "d": 128, "E": 2, "s": 40},
    "many steps": {"T": 66, "d": 520, "E": 2, "s": 24, "share": 0.8},
    "past the largest tile of pairs": {"T": 600, "d": 72, "E": 3, "s": 24, "share": 0.95},
    "past a smaller one": {"T": 300, "d": 24, "E": 2, "s": 24, "share": 0.95},
    "neurons off a tile": {"T": 80, "d": 40, "E": 3, "s": 33},
    "two of 32 neurons": {"T": 80, "d": 40, "E": 3, "s": 64},
    "three of 32 neurons": {"T": 80, "d": 40, "E": 3, "s": 88},
    "four of 32 neurons": {"T": 80, "d": 40, "E": 2, "s": 128},
    "two strips": {"T": 80, "d": 40, "E": 2, "s": 172},
    "three strips": {"T": 65, "d": 16, "E": 2, "s": 300},
    "more experts than a warp looks at": {"T": 70, "d": 16, "E": 75, "s": 8, "share": 0.03},
    "no expert": {"T": 70, "d": 16, "share": 0.0},
    "every expert": {"T": 100, "d": 16, "E": 5, "s": 8, "share": 1.0},
}

# Of 256 tokens that are few, full and past; experts that share a stage by fours and twos, that fill it, and go past it
CROWDS = {
    "four experts a stage": {"T": 256, "d": 8, "E": 6, "s": 8, "share": 0.7},
    "four full ones": {"T": 300, "d": 8, "E": 4, "s": 16, "share": 0.7},
    "two a stage": {"T": 257, "d": 8, "E": 3, "s": 24, "share": 0.9},
    "two full ones": {"T": 320, "d": 8, "E": 2, "s": 32, "d_out": 72},
    "one a stage": {"T": 256, "d": 8, "E": 3, "s": 40, "d_out": 136},
    "a full one": {"T": 500, "d": 8, "E": 2, "s": 64, "d_out": 64, "share": 0.1},
    "two stages": {"T": 270, "d": 8, "E": 2, "s": 72, "share": 0.8},
    "three stages": {"T": 256, "d": 8, "E": 1, "s": 172, "share": 0.5},
    "more stages than are on their way": {"T": 256, "d": 8, "E": 8, "s": 64, "d_out": 8},
    "more experts than a warp looks at": {"T": 256, "d": 8, "E": 75, "s": 8, "share": 0.02},
    "no expert": {"T": 256, "d": 8, "E": 3, "s": 8, "share": 0.0},
    "every expert": {"T": 256, "d": 8, "E": 3, "s": 8, "share": 1.0},
}
ALWAYS, NEVER = 0.0, 2.0  # the share from which tokens are a crowd


@pytest.fixture
def both(gpu):
    """f(run): run() by the kernels of sm_80, then by those of sm_90a, which must have run where that can be seen."""

    def run_both(run, any_pair=True):
        gpu.use_hopper(False)
        plain, before = run(), gpu.products()
        gpu.use_hopper(True)
        result = run()
        if before is not None:
            assert (gpu.products() > before) == any_pair, "products of warpgroups"
        return plain, result

    return run_both


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_hopper_has_the_bits_of_the_others(gpu, both, name, dtype):
    for gated, act in ((False, "gelu"), (True, "silu")):
        args = experts_problem(**PROBLEMS[name], gated=gated, dtype=dtype)
        plain, result = both(partial(gpu.sparse_experts, *args, act=act), bool(args[1].any()))
        assert torch.equal(result, plain), gated


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_hopper_is_as_good_as_torch(gpu, name, dtype):
    """On a device, by whatever kernels it has."""
    gpu.use_hopper(True)
    for gated, bias, act in ((False, True, "relu"), (True, False, "gelu_tanh"), (True, True, "gelu")):
        args = experts_problem(**PROBLEMS[name], gated=gated, bias=bias, dtype=dtype)
        assert_as_good_as_torch(
            gpu.sparse_experts(*args, act=act),
            reference.sparse_experts(*args, act=act),
            reference.sparse_experts(*in_double(args), act=act),
        )


def with_crowds(gpu, run, share):
    """run() where so many of all pairs make a crowd; and how many products of warpgroups it took, if that is known."""
    gpu.use_hopper(True, crowd=share)
    before = gpu.products()
    result = run()
    return result, None if before is None else gpu.products() - before


def bits(t):
    return t.view(torch.int16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_has_the_bits_of_others(gpu, name, dtype):
    for bias in (False, True):
        args = experts_problem(**CROWDS[name], bias=bias, dtype=dtype)
        run = partial(gpu.sparse_experts, *args, act="gelu")
        alone, fewer = with_crowds(gpu, run, NEVER)
        crowd, more = with_crowds(gpu, run, ALWAYS)
        assert torch.equal(bits(crowd), bits(alone)), bias
        if more is not None:
            assert (more > fewer) == args[1].any(), "products of warpgroups"
    assert_as_good_as_torch(
        crowd,
        reference.sparse_experts(*args, act="gelu"),
        reference.sparse_experts(*in_double(args), act="gelu"),
    )


def test_tokens_are_a_crowd_by_what_they_chose(gpu):
    """Of three times 256 tokens the second are, and those after the last are not enough."""
    args = experts_problem(800, 16, 8, 16, bias=True, dtype=torch.bfloat16)
    args[1] = torch.rand(800, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    args[1][256:512] = torch.rand(256, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    results, products = zip(
        *(with_crowds(gpu, partial(gpu.sparse_experts, *args), share) for share in (NEVER, 0.4, ALWAYS)),
        strict=True,
    )
    assert all(torch.equal(bits(y), bits(results[0])) for y in results)
    if products[0] is not None:
        alone, some, every = products
        of_512 = (every - alone) - (some - alone)
        assert alone < some < every
        assert some - alone < of_512, "one block of three, and what is left"


def test_what_a_token_did_not_choose_adds_nothing_to_it_in_a_crowd(gpu):
    """Neither NaN, nor a zero to a negative zero."""
    args = experts_problem(260, 16, 4, 24, bias=True, dtype=torch.bfloat16)
    x, mask, _, w_down, _, _, _, b_out = args
    mask[:, 1] = torch.arange(260) % 3 == 0
    x[7] = float("inf")
    w_down[1, :, 3] = float("nan")
    mask[[20, 255]] = False
    b_out.fill_(-0.0)
    run = partial(gpu.sparse_experts, *args)
    alone, _ = with_crowds(gpu, run, NEVER)
    crowd, _ = with_crowds(gpu, run, ALWAYS)
    assert torch.equal(bits(crowd.nan_to_num(9)), bits(alone.nan_to_num(9)))
    mask[7] = False
    assert torch.equal(crowd[:, 3].isnan().logical_and(torch.arange(260) != 7), mask[:, 1])
    assert crowd[20].signbit().all()
    assert not crowd[20].any()


def test_crowds_of_tokens_in_chunks(native):
    """320, 320 and 60 tokens: no crowd ends where a chunk does, and the last chunk has none."""
    gpu = Backend("emulator")
    args = experts_problem(700, 8, 3, 16, dtype=torch.bfloat16)
    whole, _ = with_crowds(gpu, partial(gpu.sparse_experts, *args), NEVER)
    set_options(native, hidden_bytes=5 * 64 * 3 * 16 * 2, hopper=True, crowd=ALWAYS)
    before = native.sadmoe_products()
    assert torch.equal(bits(gpu.sparse_experts(*args)), bits(whole))
    in_chunks = native.sadmoe_products() - before
    set_options(native, hidden_bytes=5 * 64 * 3 * 16 * 2, hopper=True, crowd=NEVER)
    gpu.sparse_experts(*args)
    assert native.sadmoe_products() - before - in_chunks < in_chunks


def test_the_schedule_changes_nothing_in_a_crowd(native):
    set_options(native, hopper=True, crowd=ALWAYS)
    gpu = Backend("emulator")
    for s in (16, 72):
        args = experts_problem(256, 8, 7, s, 16, dtype=torch.bfloat16)
        results = []
        for schedule in SCHEDULES:
            native.sadmoe_schedule(*schedule)
            results.append(gpu.sparse_experts(*args))
        assert all(torch.equal(bits(y), bits(results[0])) for y in results)


@pytest.mark.parametrize("gated", [False, True])
def test_the_schedule_changes_nothing_on_hopper(native, gated):
    set_options(native, hopper=True)
    gpu = Backend("emulator")
    x, _, *weights = experts_problem(200, 200, 5, 24, gated=gated, dtype=torch.bfloat16)
    v1, v2 = router_problem(200, 5, dtype=torch.bfloat16)
    results = []
    for schedule in SCHEDULES:
        native.sadmoe_schedule(*schedule)
        results.append(gpu.dynamic_k_moe(x, v1, v2, *weights, tau=0.3, act="gelu"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_few_tokens_have_the_bits_of_many_on_hopper(gpu, both):
    x, _, *weights = experts_problem(150, 40, 12, 16, 35, dtype=torch.bfloat16)
    v1, v2 = router_problem(40, 12, dtype=torch.bfloat16)
    plain, whole = both(lambda: gpu.dynamic_k_moe(x, v1, v2, *weights, tau=0.3, act="gelu"))
    assert torch.equal(plain, whole)
    for part in (slice(0, 1), slice(40, 73)):
        assert torch.equal(gpu.dynamic_k_moe(x[part], v1, v2, *weights, tau=0.3, act="gelu"), whole[part])


def test_nan_stays_with_its_token_and_expert_on_hopper(native):
    set_options(native, hopper=True)
    gpu = Backend("emulator")
    args = experts_problem(70, 16, 3, 8, dtype=torch.bfloat16)
    wanted = gpu.sparse_experts(*args)
    args[0][5], args[2][1] = float("nan"), float("nan")
    y = gpu.sparse_experts(*args)
    touched = args[1][:, 1].clone()
    touched[5] = args[1][5].any()
    assert y[touched].isnan().all()
    assert torch.equal(y[~touched], wanted[~touched])


@pytest.mark.parametrize("d", [33, 64])
def test_what_does_not_fit_hopper_goes_the_other_way(native, d):
    """Rows off 16 bytes, and float32."""
    gpu = Backend("emulator")
    dtype = torch.bfloat16 if d == 33 else torch.float32
    args, before = experts_problem(70, d, 3, 8, dtype=dtype), native.sadmoe_products()
    wanted = gpu.sparse_experts(*args)
    set_options(native, hopper=True)
    assert torch.equal(gpu.sparse_experts(*args), wanted)
    assert native.sadmoe_products() == before
