"""The gate on compiled kernels sees what it is there to see."""

import re

import pytest
from sass_check import (
    ARCHS,
    BUDGETS,
    HOPPER_BUDGETS,
    Budget,
    Kernel,
    Step,
    check,
    in_flight,
    parse,
    short_name,
    step_length,
)

RESOURCES = """
arch = sm_80
 Function void sadmoe::cuda::down<sadmoe::cuda::Mma<__half> >(sadmoe::cuda::Down):
  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:0
"""
SASS = """
code for sm_80
  Function : void sadmoe::cuda::down<sadmoe::cuda::Mma<__half> >(sadmoe::cuda::Down)
  /*0000*/ HMMA.16816.F32 R4, R8, R6, R4 ;
  /*0010*/ {more} ;
"""
BUDGET = {"down<Mma<__half>>": Budget(64, (r"HMMA\.16816\.F32 ",))}


def found(registers=64, stack=0, shared=0, more="EXIT", budgets=BUDGET, hopper=None, archs=()):
    kernels = parse(RESOURCES.format(registers=registers, stack=stack, shared=shared), SASS.format(more=more))
    return check(kernels, budgets, hopper or {}, archs)


def test_a_kernel_within_its_budget_passes():
    assert found() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"registers": 65}, "65 registers, budget 64"),
        (
            {"registers": 63, "budgets": {"down<Mma<__half>>": Budget(64, least=64)}},
            "63 registers, at least 64, budget 64",
        ),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 4}, "4 bytes of shared memory that no launch gives"),
        ({"more": "STL [R1], R2"}, "has local memory"),
        ({"more": "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R5"}, "has atomics"),
        ({"budgets": {}}, "has no budget"),
        ({"budgets": {"down<Mma<__half>>": Budget(64, ("LDSM",))}}, "lacks LDSM"),
        ({"budgets": BUDGET | {"up": Budget(1)}}, "sm_80 up: was not compiled"),
        (
            {"hopper": {"hopper_up": Budget(1)}, "archs": ARCHS},
            "nothing was compiled for sm_90, sm_90a, sm_100",
        ),
        ({"archs": ARCHS}, "nvcc 12.8 or later does"),
        (
            {"budgets": {"down<Mma<__half>>": Budget(64, in_flight=8)}},
            "0 copies in flight, at least 8 are meant",
        ),
    ],
)
def test_a_kernel_beyond_its_budget_fails(change, fault):
    assert [text for text in found(**change) if fault in text]


@pytest.mark.parametrize(("arch", "wrong"), [("sm_80", []), ("sm_90", ["ACQBULK", "PREEXIT"])])
def test_decoding_begins_early_where_devices_can(arch, wrong):
    kernel = Kernel(registers=1, stack=0)
    assert check({(arch, "plan_decode"): kernel}, {"plan_decode": Budget(1)}, {}, ()) == [
        f"{arch} plan_decode: lacks {word}" for word in wrong
    ]


def test_products_that_wait_for_each_other_fail():
    must = next(iter(HOPPER_BUDGETS.values())).must[1]
    product, wait = "HGMMA.64x32x16.F32 R24, gdesc[UR4], R24 ;\n", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert re.search(must, product * 8 + wait)
    assert not re.search(must, (product + wait) * 8)


LOOP = """
  /*0000*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
  /*0010*/ MOV R1, R2 ;
  /*0020*/ @P0 BRA 0x60 ;
  /*0030*/ LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P1 ;
  /*0040*/ BRA.DIV UR4, 0xa0 ;
  /*0050*/ CALL.REL.NOINC 0xa0 ;
  /*0060*/ @!P2 EXIT ;
  /*0070*/ HMMA.1688.F32.TF32 R4, R8, R6, R4 ;
  /*0080*/ BRA.U UP0, 0x70 ;
  /*0090*/ BRA 0x0 ;
  /*00a0*/ BRA 0xa0 ;
"""


@pytest.mark.parametrize(
    ("work", "length"),
    [
        ((("HMMA", 1),), 7),
        ((("HMMA", 1), ("LDGSTS", 1)), 10),
        ((("HMMA", 3),), 11),
        ((("LDGSTS", 2),), None),
        ((("FADD", 1),), None),
    ],
)
def test_a_step_is_the_shortest_way_round_that_does_the_work(work, length):
    assert step_length(LOOP, work) == length
    kernel, steps = Kernel(registers=1, stack=0, code=LOOP), (Step(9, work),)
    faults = check({("sm_80", "up"): kernel}, {"up": Budget(1, steps=steps)}, {}, ())
    assert faults == (
        [] if length == 7 else [f"sm_80 up: {length or 'too many'} instructions a step, budget 9"]
    )


def test_copies_in_flight_are_those_of_the_steps_that_a_wait_leaves_and_of_one_more():
    copy = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;\n"
    assert in_flight(copy + "LDGDEPBAR ;\nDEPBAR.LE SB0, 0x1 ;\n", 3) == 6
    assert in_flight(copy + "DEPBAR.LE SB0, 0xd ;\nDEPBAR.LE SB0, 0x0 ;\n", 3) == 42
    assert in_flight(copy, 3) == 0


def test_a_library_without_kernels_fails():
    assert check(parse("", "")) == ["no kernels at all"]


def test_names_are_short():
    assert short_name("void sadmoe::cuda::up<sadmoe::cuda::Fma, (bool)1>(sadmoe::cuda::Up)") == "up<Fma, 1>"
    assert short_name("sadmoe::cuda::select(sadmoe::cuda::Select)") in BUDGETS
