"""The gate on the compiled CPU kernels sees what it is there to see."""

import shutil
from pathlib import Path

import pytest
from isa_check import code_faults, isa_of, symbol_faults

LINE = "0000000000000000 <f>:\n   0:\t{}\n   4:\tret\n"


@pytest.mark.parametrize(
    ("isa", "instruction", "fault"),
    [
        ("portable", "vaddps %xmm0,%xmm1,%xmm2", "AVX"),
        ("portable", "andn   %eax,%edx,%ecx", "BMI"),
        ("portable", "popcnt %rax,%rcx", "POPCNT"),
        ("portable", "pshufb %xmm0,%xmm1", "SSE3"),
        ("portable", "roundps $0x8,%xmm0,%xmm1", "SSE4"),
        ("avx2", "vaddps %zmm0,%zmm1,%zmm2", "AVX-512"),
        ("avx2", "vmovups %ymm17,(%rdi)", "AVX-512"),
        ("avx2", "kmovw  %eax,%k1", "AVX-512"),
        ("avx512", "vdpbf16ps %zmm2,%zmm1,%zmm0", "AVX512-BF16"),
        ("avx512", "vpdpwssd %zmm2,%zmm1,%zmm0", "AVX512-VNNI"),
        ("avx512vnni", "vdpbf16ps %zmm2,%zmm1,%zmm0", "AVX512-BF16"),
        ("avx512bf16", "tdpbf16ps %tmm2,%tmm1,%tmm0", "AMX"),
        ("avx512zen5", "tdpbf16ps %tmm2,%tmm1,%tmm0", "AMX"),
        ("avx512", "tdpbf16ps %tmm2,%tmm1,%tmm0", "AMX"),
        ("sse9", "nop", "has no rule"),
    ],
)
def test_an_instruction_of_a_newer_set_fails(isa, instruction, fault):
    assert fault in "".join(code_faults(isa, LINE.format(instruction)))


@pytest.mark.parametrize(
    ("isa", "instruction"),
    [
        ("portable", "addps  %xmm15,%xmm1"),
        ("portable", "call   20 <vector_of_popcnt>"),
        ("portable", "andnps %xmm0,%xmm1"),
        ("avx2", "vfmadd231ps (%rax),%ymm15,%ymm1"),
        ("avx512", "vaddps %zmm30,%zmm1,%zmm2{%k1}"),
        ("avx512vnni", "vpdpwssd %zmm2,%zmm1,%zmm0"),
        ("avx512bf16", "vdpbf16ps %zmm2,%zmm1,%zmm0"),
        ("avx512zen5", "vdpbf16ps %zmm2,%zmm1,%zmm0"),
    ],
)
def test_its_own_instructions_pass(isa, instruction):
    assert code_faults(isa, LINE.format(instruction)) == []


def test_nothing_disassembled_fails():
    assert code_faults("portable", "file format elf64-x86-64\n") == ["no code at all"]


@pytest.mark.skipif(not shutil.which("c++filt"), reason="no binutils here")
def test_an_object_exports_its_table_alone():
    table = "0 T _ZN6sadmoe3cpu12kernels_avx2Ev"
    assert symbol_faults("avx2", table) == []
    assert symbol_faults("avx2", f"{table}\n9 W _ZN6sadmoe3cpu4tailEv") == ["exports sadmoe::cpu::tail()"]
    assert symbol_faults("avx2", f"{table}\n8 V DW.ref.__gxx_personality_v0") == []  # data
    assert symbol_faults("avx2", "") == ["does not export sadmoe::cpu::kernels_avx2()"]


def test_an_object_s_name_says_what_it_was_compiled_for():
    assert [isa_of(Path(name)) for name in ("kernels_avx2.cpp.o", "moe.cpp.o")] == ["avx2", "portable"]
