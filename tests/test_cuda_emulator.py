"""The emulator itself: bugs that it must see, beside right twins that it must pass."""

import re
from pathlib import Path

import pytest
from cuda_backends import SCHEDULES

CUDA_SOURCES = Path(__file__).parent.parent / "csrc/cuda"
UNINITIALISED, RACE = "read of uninitialised shared memory", "data race on shared memory"
IN_FLIGHT = "read of shared memory.* while a copy to it is in flight"
PLANTED = {
    "barrier_between_warps": "",
    "missing_barrier": f"{UNINITIALISED}|{RACE}",
    "missing_barrier_before_reuse": RACE,
    "shuffle_as_barrier": f"{UNINITIALISED}|{RACE}",
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
    "blocks_write_one_place": "data race on out.*, unordered with a write by another block",
    "block_reads_another": "data race on out.*, .* by another block|read of uninitialised out",
    "blocks_apart": "",
    "copies": "",
    "copies_without_wait": IN_FLIGHT,
    "copies_without_barrier": f"{UNINITIALISED}|{IN_FLIGHT}|{RACE}",
    "copies_misaligned": "misaligned source of a copy of 16 bytes",
    "copy_over_what_is_read": f"{RACE}|{IN_FLIGHT}",
    "product": "",
    "product_transposed": "",
    "product_of_wrong_columns": "wrong numbers",
    "product_tf32": "",
    "product_tf32_of_wrong_depths": "wrong numbers",
    "bits": "",
    "too_many_threads": "invalid launch: 1 x 1 blocks of 2048 threads",
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_emulator_sees_a_planted_bug_and_passes_its_right_twin(native, name):
    for schedule in SCHEDULES:
        native.sadmoe_schedule(*schedule)
        said = native.sadmoe_run_planted(name.encode()).decode()
        assert re.match(PLANTED[name] or "$", said), f"{name} in schedule {schedule}: {said!r}"


def test_every_planted_case_is_expected():
    source = (Path(__file__).parent / "emulator/planted.cuh").read_text()
    assert set(re.findall(r'^    \{"(\w+)"', source, re.MULTILINE)) == PLANTED.keys()


def test_kernels_are_written_in_the_words_of_device_cuh_alone():
    for path in sorted(CUDA_SOURCES.iterdir()):
        if path.name == "device.cuh":
            continue
        found = re.findall(
            r"\basm\b|__\w+|\b(?:thread|block)Idx\b|\b(?:block|grid)Dim\b|cuda\w+\(|#include <cuda",
            path.read_text(),
        )
        assert not found, f"{path.name} uses {found}"


def test_a_device_runs_the_right_twins():
    source = (Path(__file__).parent.parent / "bench/cuda/conformance.cu").read_text()
    right = re.search(r"kRight\[\] = \{(.*?)\};", source, re.DOTALL)[1]
    assert set(re.findall(r'"(\w+)"', right)) == {name for name, said in PLANTED.items() if not said}
