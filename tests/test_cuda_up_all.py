"""Where every neuron is computed on the way in, pairs have the bits of others: by warpgroups' products, and warps'."""

from functools import partial

import pytest
import torch
from backends import ALWAYS, BY_SHAPE, NEVER, SCHEDULES, Backend, set_options
from problems import assert_as_good_as_torch, experts_problem, in_double
from sadmoe import reference
from test_cuda_crowd import WAYS, bits, has_bias

# Tokens that fill a tile of the plan, go past it, and end within a group; strips of one expert's neurons and of many's
PROBLEMS = {
    "eight experts a strip": {"T": 65, "d": 16, "E": 20, "s": 8, "share": 0.7},
    "strips that end within an expert": {"T": 128, "d": 8, "E": 7, "s": 24, "share": 0.6},
    "an expert a strip": {"T": 193, "d": 72, "E": 2, "s": 64, "share": 0.5},
    "experts longer than a strip": {"T": 96, "d": 8, "E": 3, "s": 136, "share": 0.4},
    "GLU": {"T": 300, "d": 24, "E": 9, "s": 16, "share": 0.6, "gated": True},
    "GLU of experts longer than a strip": {"T": 65, "d": 8, "E": 2, "s": 72, "share": 0.9, "gated": True},
    "more tokens than blocks": {"T": 4200, "d": 8, "E": 2, "s": 8, "share": 0.5},
    "one expert": {"T": 70, "d": 8, "E": 1, "s": 8, "share": 0.5},
    "one pair": {"T": 70, "d": 8, "E": 40, "s": 8, "share": 0.0},
    "every pair": {"T": 130, "d": 8, "E": 3, "s": 8, "share": 1.0},
    "rows off 16 bytes": {"T": 70, "d": 11, "E": 6, "s": 16, "share": 0.6},
}


def with_all(gpu, run, share, warpgroups):
    """run() where every neuron is computed from this share of all pairs on."""
    gpu.use_hopper(warpgroups, up_all=share, crowd=NEVER)
    return run()


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_pairs_have_the_bits_of_others(gpu, name, warpgroups, dtype):
    args = experts_problem(
        **PROBLEMS[name], bias=has_bias(list(PROBLEMS).index(name), warpgroups, dtype), dtype=dtype
    )
    if name == "one pair":
        args[1][67, 33] = True
    run = partial(gpu.sparse_experts, *args, act="gelu")
    few = with_all(gpu, run, NEVER, warpgroups)
    every = with_all(gpu, run, ALWAYS, warpgroups)
    assert torch.equal(bits(every), bits(few))
    assert_as_good_as_torch(
        every,
        reference.sparse_experts(*args, act="gelu"),
        reference.sparse_experts(*in_double(args), act="gelu"),
    )


def all_products(native):
    """Of tensor cores, by warpgroups and by warps."""
    return native.sadmoe_products() + native.sadmoe_warp_products()


def costs(native, pairs, share, s=16, gated=False, T=80, *, warpgroups, dtype):
    """Launches, and products of tensor cores, of the way in alone: there is no way out. In float32 by TF32."""
    args = experts_problem(T, 16, 10, s, 0, dtype=dtype, gated=gated)
    flat = torch.randperm(10 * T, generator=torch.Generator().manual_seed(0))
    args[1] = (flat < pairs).view(T, 10)
    set_options(native, tf32=True, hopper=warpgroups, up_all=share)
    before = native.sadmoe_launches(), all_products(native)
    Backend("emulator").sparse_experts(*args)
    after = native.sadmoe_launches(), all_products(native)
    return [b - a for a, b in zip(before, after, strict=True)]


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
def test_the_pairs_decide_which_of_two_kernels_works(native, warpgroups, dtype):
    """320 of 800 pairs are 0.4 of all. For all neurons there are always as many products."""
    of = partial(costs, native, warpgroups=warpgroups, dtype=dtype)
    launches, products = of(319, NEVER)
    both, of_all = of(319, ALWAYS)
    assert both == launches + 1
    assert of(319, 0.4) == [both, products]
    assert of(320, 0.4) == of(20, ALWAYS) == [both, of_all]
    assert len({0, of_all, products, of(20, NEVER)[1]}) == 4
    assert of(800, ALWAYS, s=12) == of(800, NEVER, s=12), "rows of 12 neurons are filled up"


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
@pytest.mark.parametrize("gated", [False, True])
def test_by_the_shape_they_turn_where_the_model_says(native, gated, warpgroups, dtype):
    """By that of the kernels that run, on the three multiprocessors of the emulator; TF32 is as 16 bits there."""
    tile_maps = warpgroups and dtype != torch.float32
    of = partial(costs, native, gated=gated, T=600, warpgroups=warpgroups, dtype=dtype)
    turn = 6000 * native.sadmoe_up_all_share(600, 10, 16, 2, gated, tile_maps, 3)
    assert 0 < turn < 5400
    for pairs in (int(turn) - 1, int(turn) + 2):
        assert of(pairs, BY_SHAPE) == of(pairs, ALWAYS if pairs > turn else 1.0)


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
@pytest.mark.parametrize("act", ["relu", "gelu_tanh", "silu", "quick_gelu", "relu2"])
def test_every_activation_and_float32_by_tensor_cores(native, act, warpgroups, dtype):
    args = experts_problem(100, 40, 5, 24, bias=True, dtype=dtype, share=0.6, gated=act in ("silu", "relu2"))
    results, products = [], [all_products(native)]
    for share in (NEVER, ALWAYS):
        set_options(native, tf32=True, hopper=warpgroups, up_all=share, crowd=NEVER)
        results.append(Backend("emulator").sparse_experts(*args, act=act))
        products.append(all_products(native))
    assert torch.equal(*map(bits, results))
    assert products[2] - products[1] != products[1] - products[0]


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
def test_what_a_token_did_not_choose_stays_out_of_it(gpu, warpgroups, dtype):
    args = experts_problem(140, 16, 4, 24, bias=True, dtype=dtype, share=0.7)
    x, mask, w_up, *_ = args
    x[7] = float("inf")
    w_up[1, 3] = float("nan")
    mask[:, 1] = torch.arange(140) % 3 == 0
    mask[7] = False
    run = partial(gpu.sparse_experts, *args)
    few, every = (with_all(gpu, run, share, warpgroups) for share in (NEVER, ALWAYS))
    assert torch.equal(bits(every.nan_to_num(9)), bits(few.nan_to_num(9)))
    assert torch.equal(every.isnan().any(1), mask[:, 1])


@pytest.mark.parametrize("warpgroups", [True, False])
def test_tokens_in_chunks_decide_each_for_itself(native, warpgroups):
    """Of 320, 320 and 60 tokens the second chose enough."""
    gpu, args = Backend("emulator"), experts_problem(700, 8, 3, 16, dtype=torch.bfloat16)
    chosen = torch.rand(700, 3, generator=torch.Generator().manual_seed(1))
    args[1] = chosen < torch.tensor([0.2, 0.8, 0.3]).repeat_interleave(320)[:700, None]
    products = []

    def in_chunks(share):
        set_options(native, hidden_bytes=5 * 64 * 3 * 16 * 2, hopper=warpgroups, up_all=share, crowd=NEVER)
        before = all_products(native)
        y = gpu.sparse_experts(*args)
        products.append(all_products(native) - before)
        return y

    assert torch.equal(bits(in_chunks(NEVER)), bits(in_chunks(0.5)))
    assert torch.equal(bits(in_chunks(NEVER)), bits(in_chunks(ALWAYS)))
    none, some, _, every = products
    assert len({none, some, every}) == 3


@pytest.mark.parametrize(("warpgroups", "dtype"), WAYS)
def test_the_schedule_changes_nothing(native, warpgroups, dtype):
    """Nor do crowds on the way out."""
    set_options(native, hopper=warpgroups, up_all=ALWAYS, crowd=ALWAYS)
    gpu, args = Backend("emulator"), experts_problem(300, 72, 7, 24, 16, dtype=dtype)
    results = []
    for schedule in SCHEDULES:
        native.sadmoe_schedule(*schedule)
        results.append(gpu.sparse_experts(*args))
    assert all(torch.equal(bits(y), bits(results[0])) for y in results)
