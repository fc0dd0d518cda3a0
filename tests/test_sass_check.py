"""The gate on compiled kernels sees what it is there to see."""

import pytest
from sass_check import BUDGETS, Budget, check, parse, short_name

RESOURCES = """
arch = sm_80
 Function void sadmoe::cuda::down<sadmoe::cuda::Mma<__half> >(sadmoe::cuda::Down):
  REG:{registers} STACK:{stack} SHARED:0 LOCAL:0
"""
SASS = """
code for sm_80
  Function : void sadmoe::cuda::down<sadmoe::cuda::Mma<__half> >(sadmoe::cuda::Down)
  /*0000*/ HMMA.16816.F32 R4, R8, R6, R4 ;
  /*0010*/ {more} ;
"""
BUDGET = {"down<Mma<__half>>": Budget(64, (r"HMMA\.16816\.F32 ",))}


def found(registers=64, stack=0, more="EXIT", budgets=BUDGET):
    return check(parse(RESOURCES.format(registers=registers, stack=stack), SASS.format(more=more)), budgets)


def test_a_kernel_within_its_budget_passes():
    assert found() == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"registers": 65}, "65 registers, budget 64"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"more": "STL [R1], R2"}, "has local memory"),
        ({"more": "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R5"}, "has atomics"),
        ({"budgets": {}}, "has no budget"),
        ({"budgets": {"down<Mma<__half>>": Budget(64, ("LDSM",))}}, "lacks LDSM"),
        ({"budgets": BUDGET | {"up": Budget(1)}}, "up: was not compiled"),
    ],
)
def test_a_kernel_beyond_its_budget_fails(change, fault):
    assert [text for text in found(**change) if fault in text]


def test_a_library_without_kernels_fails():
    assert check(parse("", "")) == ["no kernels at all"]


def test_names_are_short():
    assert short_name("void sadmoe::cuda::up<sadmoe::cuda::Fma, (bool)1>(sadmoe::cuda::Up)") == "up<Fma, 1>"
    assert short_name("sadmoe::cuda::select(sadmoe::cuda::Select)") in BUDGETS
