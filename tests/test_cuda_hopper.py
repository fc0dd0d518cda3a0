"""The kernels of sm_90a: as good as torch, and the bits of the others, whatever the schedule."""

from functools import partial

import pytest
import torch
from backends import NEVER, SCHEDULES, Backend, set_options
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


@pytest.fixture
def both(gpu):
    """f(run): run() by the kernels of sm_80, then by those of sm_90a, which must have run where that can be seen."""

    def run_both(run, any_pair=True):
        gpu.use_hopper(False, up_all=NEVER)
        plain, before = run(), gpu.products()
        gpu.use_hopper(True, up_all=NEVER)
        result = run()
        if before is not None:
            assert (gpu.products() > before) == any_pair, "products of warpgroups"
        return plain, result

    return run_both


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_hopper_has_the_bits_of_the_others_and_is_as_good_as_torch(gpu, both, name, dtype):
    """On a device, by whatever kernels it has."""
    for gated, bias, act in ((False, True, "gelu"), (True, False, "silu")):
        args = experts_problem(**PROBLEMS[name], gated=gated, bias=bias, dtype=dtype)
        plain, result = both(partial(gpu.sparse_experts, *args, act=act), bool(args[1].any()))
        assert torch.equal(result, plain), gated
        assert_as_good_as_torch(
            result,
            reference.sparse_experts(*args, act=act),
            reference.sparse_experts(*in_double(args), act=act),
        )


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
