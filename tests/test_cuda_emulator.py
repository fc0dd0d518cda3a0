"""The emulator itself: bugs that it must see, beside right twins that it must pass."""

import re
from pathlib import Path

import pytest
from backends import SCHEDULES

CUDA_SOURCES = Path(__file__).parent.parent / "csrc/cuda"
UNINITIALISED, RACE = "read of uninitialised shared memory", "data race on shared memory"
IN_FLIGHT = "read of shared memory.* while a copy to it is in flight"
PLANTED = {
    "barrier_between_warps": "",
    "missing_barrier": f"{UNINITIALISED}|{RACE}",
    "missing_barrier_before_reuse": RACE,
    "shuffle_as_barrier": f"{UNINITIALISED}|{RACE}",
    "warp_in_step": "",
    "warp_as_block": f"{UNINITIALISED}|{RACE}",
    "divergent_barrier": "divergent barrier: planted.cuh:",
    "barrier_without_some": "deadlock: thread 0 waits at planted.cuh:.*, thread 32 has returned",
    "warp_operation_without_some": "deadlock: thread 0 waits at planted.cuh:.*, thread 16 has returned",
    "different_warp_operations": "lanes of a warp meet in different operations: planted.cuh:",
    "warp_operations": "",
    "uninitialised_shared_memory": UNINITIALISED,
    "uninitialised_output": "read of uninitialised out",
    "shared_memory_overflow": "write of 4 bytes out of bounds.* thread 31",
    "read_past_the_end": "read of 4 bytes out of bounds.* thread 31",
    "write_past_the_end": "write of 4 bytes out of bounds.* thread 31",
    "write_to_input": "write to read-only in",
    "misaligned": "misaligned read of 4 bytes of in",
    "neighbours": "",
    "misaligned_pair": "misaligned read of 8 bytes of in",
    "blocks_write_one_place": "data race on out.*, unordered with a write by another block",
    "block_reads_another": "data race on out.*, .* by another block|read of uninitialised out",
    "blocks_apart": "",
    "early": "",
    "early_without_wait": "a thread of a kernel launched early returns without wait_kernel_before",
    "early_before_wait": "memory that a kernel writes is touched before wait_kernel_before",
    "copies": "",
    "copies_of_nothing": "",
    "copies_without_wait": IN_FLIGHT,
    "copies_without_barrier": f"{UNINITIALISED}|{IN_FLIGHT}|{RACE}",
    "copies_misaligned": "misaligned source of a copy of 16 bytes",
    "copies_past_shared_memory": "copy to an address outside shared memory",
    "copy_over_what_is_read": f"{RACE}|{IN_FLIGHT}",
    "product": "",
    "product_transposed": "",
    "product_f16": "",
    "product_of_wrong_columns": "wrong numbers",
    "cut_off": "",
    "not_cut_off": "wrong numbers",
    "turned": "",
    "not_turned": "wrong numbers",
    "product_tf32": "",
    "product_tf32_of_wrong_depths": "wrong numbers",
    "bits": "",
    "numbers": "",
    "too_many_threads": "invalid launch: 1 x 1 blocks of 2048 threads",
    "hand_over": "",
    "hand_over_of_wrong_parity": f"{UNINITIALISED}|{RACE}|deadlock",
    "hand_over_and_over": f"{RACE}|{UNINITIALISED}|deadlock",
    "hand_over_of_no_parity": "parity 2",
    "hand_over_of_none": "a barrier of 0 arrivals",
    "hand_over_outside": "a barrier outside shared memory",
    "hand_over_of_too_few": "deadlock: thread 0 waits at planted_hopper.cuh:",
    "hand_over_not_begun": "a barrier is used before init_barrier",
    "hand_over_begun_unordered": f"a barrier is used before init_barrier|{RACE}",
    "tile": "",
    "tile_without_expect": f"{UNINITIALISED}|{IN_FLIGHT}|{RACE}|deadlock",
    "tile_that_expects_more": "deadlock: thread 0 waits at planted_hopper.cuh:",
    "tile_without_fence": "load_tile uses shared memory .*, which thread 0 wrote, without fence_async",
    "tile_without_wait": f"{IN_FLIGHT}|{RACE}",
    "tile_not_swizzled": "wrong numbers",
    "tile_misplaced": "a swizzled tile that does not begin on 1024 bytes",
    "tile_outside": "a tile outside shared memory",
    "tile_with_too_many": "more arrivals at a barrier than its 1",
    "tile_over_what_is_read": f"{RACE}|{IN_FLIGHT}",
    "product_64": "",
    "product_64_without_fence": "a product reads shared memory .*, which thread .* wrote, without fence_async",
    "product_64_without_begin": "a product without begin_products",
    "product_64_without_wait": "sums are touched before wait_products",
    "product_64_over_its_operands": "write of shared memory .* while a product reads it",
    "product_64_touched_early": "sums are touched between begin_products and their product",
    "product_64_not_swizzled": "wrong numbers",
    "product_64_of_wrong_depths": "wrong numbers",
    "product_64_of_different_warps": "warps of a warpgroup issue different products at planted_hopper.cuh:",
    "product_64_of_different_lanes": "lanes of a warp multiply different operands",
    "product_64_outside": "an operand outside shared memory",
    "product_64_of_plain_rows": "an operand that is not swizzled by 128 bytes",
    "product_bits_bf16_32": "",
    "product_bits_bf16_64": "",
    "product_bits_bf16_96": "",
    "product_bits_bf16_128": "",
    "product_bits_f16_32": "",
    "product_bits_f16_128": "",
    "product_of_registers_bf16": "",
    "product_of_registers_f16": "",
    "product_of_registers_touched_early": "an operand is touched between begin_products and their product",
    "product_of_registers_written_over": "an operand is touched before wait_products",
    "product_of_registers_on_old_sums": "wrong numbers",
    "registers": "",
    "registers_that_nobody_gave": "a block of 66560 registers, launched with 64512",
    "registers_taken_down": "a thread of 168 registers cannot take 40 at planted_hopper.cuh:",
    "registers_given_up": "a thread of 168 registers cannot give up all but 200 at planted_hopper.cuh:",
    "registers_of_one_warp": "warps of a warpgroup set different registers",
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_emulator_sees_a_planted_bug_and_passes_its_right_twin(native, name):
    for schedule in SCHEDULES:
        native.sadmoe_schedule(*schedule)
        said = native.sadmoe_run_planted(name.encode()).decode()
        assert re.match(PLANTED[name] or "$", said), f"{name} in schedule {schedule}: {said!r}"


def test_every_planted_case_is_expected():
    sources = [
        (Path(__file__).parent / "emulator" / name).read_text()
        for name in ("planted.cuh", "planted_hopper.cuh")
    ]
    assert set(re.findall(r'^    \{"(\w+)"', "".join(sources), re.MULTILINE)) == PLANTED.keys()


def test_every_diagnostic_has_a_planted_bug():
    emulator = Path(__file__).parent / "emulator"
    said = [
        text for path in emulator.glob("*.cpp") for text in re.findall(r'\bfail\("([^"]+)"', path.read_text())
    ]
    assert len(said) > 15
    assert [text for text in said if not any(text in expected for expected in PLANTED.values())] == []


def test_kernels_are_written_in_the_words_of_device_and_hopper_cuh_alone():
    for path in sorted(CUDA_SOURCES.iterdir()):
        if path.name in ("device.cuh", "hopper.cuh"):
            continue
        found = re.findall(
            r"\basm\b|__\w+|\b(?:thread|block)Idx\b|\b(?:block|grid)Dim\b|cuda\w+\(|#include <cuda",
            path.read_text(),
        )
        assert not found, f"{path.name} uses {found}"


def test_a_device_runs_the_right_twins():
    bench = Path(__file__).parent.parent / "bench/cuda"
    right = [
        re.search(r"kRight\[\] = \{(.*?)\};", (bench / name).read_text(), re.DOTALL)[1]
        for name in ("conformance.cu", "conformance_hopper.cu")
    ]
    assert set(re.findall(r'"(\w+)"', "".join(right))) == {name for name, said in PLANTED.items() if not said}
