"""Tokens that go through all experts together have the bits of others: by products of warpgroups, and of warps."""

from functools import partial

import pytest
import torch
from backends import ALWAYS, NEVER, SCHEDULES, Backend, set_options
from problems import assert_as_good_as_torch, experts_problem, in_double
from sadmoe import reference

WAYS = [  # by the products of warpgroups, and dtype
    pytest.param(True, torch.bfloat16, id="warpgroups, bfloat16"),
    pytest.param(True, torch.float16, id="warpgroups, float16"),
    pytest.param(False, torch.bfloat16, id="warps, bfloat16"),
    pytest.param(False, torch.float16, id="warps, float16"),
    pytest.param(False, torch.float32, id="warps, float32"),
    pytest.param(True, torch.float32, id="warps where there are warpgroups, float32"),
]
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
    "rows off 16 bytes": {"T": 400, "d": 8, "E": 5, "s": 21, "d_out": 35, "share": 0.6},
    "no expert": {"T": 256, "d": 8, "E": 3, "s": 8, "share": 0.0},
    "every expert": {"T": 256, "d": 8, "E": 3, "s": 8, "share": 1.0},
}


def with_crowds(gpu, run, share, warpgroups):
    """run() where so many of all pairs make a crowd; and how many products of that kind it took, if that is known."""
    gpu.use_hopper(warpgroups, up_all=NEVER, crowd=share)
    products = gpu.products if warpgroups else gpu.warp_products
    before = products()
    result = run()
    return result, None if before is None else products() - before


def has_bias(number, warpgroups, dtype):
    """Of every other problem: a bias is where sums begin, whatever their shape. Each has one by some of WAYS."""
    return (number + warpgroups + (dtype == torch.float16)) % 2 == 1


def bits(t):
    return t.view(torch.int16)


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
def test_crowds_are_a_kernel_of_their_own(native, warpgroups, dtype):
    args = experts_problem(256, 8, 3, 8, dtype=dtype, share=0.5)
    launches = []
    for share in (NEVER, ALWAYS):
        before = native.sadmoe_launches()
        with_crowds(
            Backend("emulator"), partial(torch.ops.sadmoe_emulated.sparse_experts, *args), share, warpgroups
        )
        launches.append(native.sadmoe_launches() - before)
    assert launches[1] == launches[0] + 1


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
@pytest.mark.parametrize("name", CROWDS)
def test_a_crowd_has_the_bits_of_others(gpu, name, warpgroups, dtype):
    args = experts_problem(
        **CROWDS[name], bias=has_bias(list(CROWDS).index(name), warpgroups, dtype), dtype=dtype
    )
    run = partial(gpu.sparse_experts, *args, act="gelu")
    alone, fewer = with_crowds(gpu, run, NEVER, warpgroups)
    crowd, more = with_crowds(gpu, run, ALWAYS, warpgroups)
    assert torch.equal(bits(crowd), bits(alone))
    if more is not None and warpgroups and dtype != torch.float32 and args[3].shape[2] % 8 == 0:
        assert (more > fewer) == args[1].any(), "products of warpgroups"
    assert_as_good_as_torch(
        crowd,
        reference.sparse_experts(*args, act="gelu"),
        reference.sparse_experts(*in_double(args), act="gelu"),
    )


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS[:4])
def test_tokens_are_a_crowd_by_what_they_chose(gpu, warpgroups, dtype):
    """Of three times 256 tokens the second are, and those after the last are not enough."""
    args = experts_problem(800, 16, 8, 16, bias=True, dtype=dtype)
    args[1] = torch.rand(800, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    args[1][256:512] = torch.rand(256, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    run = partial(gpu.sparse_experts, *args)
    results, products = zip(
        *(with_crowds(gpu, run, share, warpgroups) for share in (NEVER, 0.4, ALWAYS)), strict=True
    )
    assert all(torch.equal(bits(y), bits(results[0])) for y in results)
    if products[0] is not None:
        alone, some, every = products
        of_512 = (every - alone) - (some - alone)
        assert alone < some < every
        assert some - alone < of_512, "one block of three, and what is left"


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
def test_what_a_token_did_not_choose_adds_nothing_to_it_in_a_crowd(gpu, warpgroups, dtype):
    """Neither NaN, nor a zero to a negative zero."""
    args = experts_problem(260, 16, 4, 24, bias=True, dtype=dtype)
    x, mask, _, w_down, _, _, _, b_out = args
    mask[:, 1] = torch.arange(260) % 3 == 0
    x[7] = float("inf")
    w_down[1, :, 3] = float("nan")
    mask[[20, 255]] = False
    b_out.fill_(-0.0)
    run = partial(gpu.sparse_experts, *args)
    alone, _ = with_crowds(gpu, run, NEVER, warpgroups)
    crowd, _ = with_crowds(gpu, run, ALWAYS, warpgroups)
    assert torch.equal(bits(crowd.nan_to_num(9)), bits(alone.nan_to_num(9)))
    mask[7] = False
    assert torch.equal(crowd[:, 3].isnan().logical_and(torch.arange(260) != 7), mask[:, 1])
    assert crowd[20].signbit().all()
    assert not crowd[20].any()


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
@pytest.mark.parametrize("down_tiles", [1, 2, 4])
def test_blocks_of_any_size_leave_crowds_to_the_other_kernel(native, down_tiles, warpgroups, dtype):
    """Of four times 256 tokens the first and the third are crowds."""
    gpu = Backend("emulator")
    args = experts_problem(1000, 8, 8, 8, bias=True, dtype=dtype)
    chosen = torch.rand(1000, 8, generator=torch.Generator().manual_seed(3))
    args[1] = chosen < torch.tensor([0.7, 0.1]).repeat_interleave(256).repeat(2)[:1000, None]
    results = []
    for share in (NEVER, 0.4):
        set_options(native, hopper=warpgroups, up_all=NEVER, crowd=share, down_tiles=down_tiles)
        results.append(gpu.sparse_experts(*args))
    assert torch.equal(*map(bits, results))


def test_float32_by_tensor_cores_in_a_crowd(native):
    gpu = Backend("emulator")
    args = experts_problem(300, 16, 8, 24, bias=True, share=0.6)
    results, products = [], [native.sadmoe_warp_products()]
    for share in (NEVER, ALWAYS):
        set_options(native, tf32=True, up_all=NEVER, crowd=share)
        results.append(gpu.sparse_experts(*args))
        products.append(native.sadmoe_warp_products())
    assert torch.equal(*map(bits, results))
    assert products[2] - products[1] > products[1] - products[0]


@pytest.mark.parametrize("warpgroups", [True, False])
def test_crowds_of_tokens_in_chunks(native, warpgroups):
    """320, 320 and 60 tokens: no crowd ends where a chunk does, and the last chunk has none."""
    gpu = Backend("emulator")
    args = experts_problem(700, 8, 3, 16, dtype=torch.bfloat16)
    run = partial(gpu.sparse_experts, *args)
    whole, _ = with_crowds(gpu, run, NEVER, warpgroups)

    def in_chunks(share):
        set_options(native, hidden_bytes=5 * 64 * 3 * 16 * 2, hopper=warpgroups, up_all=NEVER, crowd=share)
        products = native.sadmoe_products if warpgroups else native.sadmoe_warp_products
        before = products()
        assert torch.equal(bits(run()), bits(whole))
        return products() - before

    assert in_chunks(ALWAYS) > in_chunks(NEVER)


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
def test_the_schedule_changes_nothing_in_a_crowd(native, warpgroups, dtype):
    set_options(native, hopper=warpgroups, up_all=NEVER, crowd=ALWAYS)
    gpu = Backend("emulator")
    for s in (16, 72):
        args = experts_problem(256, 8, 7, s, 16, dtype=dtype)
        results = []
        for schedule in SCHEDULES:
            native.sadmoe_schedule(*schedule)
            results.append(gpu.sparse_experts(*args))
        assert all(torch.equal(bits(y), bits(results[0])) for y in results)
