"""Holds compiled CUDA kernels to a budget, without a GPU: registers, no local memory, instructions meant, few a step.

Shared memory is the launch's, whose sizes static_asserts hold beside it, for the blocks that a multiprocessor must fit;
here, that there is none besides.

    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    python tests/sass_check.py build/_ops.so

A kernel without a budget fails, and so does a budget without a kernel.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """Most instructions of a warp in a step of a pipeline that does some work: patterns, and how often at least."""

    most: int
    work: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Budget:
    """Most registers a thread (65536 a multiprocessor), and patterns that the code must have; in_flight: copies of a
    thread, 16 bytes each, that are at least on their way before the first is used; shared: bytes no launch gives;
    least: registers without which a warp group would wait for ever for those that another hands on."""

    registers: int
    must: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    in_flight: int = 0
    shared: int = 0
    least: int = 0


@dataclass
class Kernel:
    """What was compiled for one architecture."""

    registers: int = -1
    stack: int = -1
    shared: int = 0
    code: str = ""


ARCHS = ("sm_80", "sm_90", "sm_90a", "sm_100", "sm_120")  # nvcc 12.8 or later makes them all
SYSTEM_SHARED = 1024  # bytes that a block has for the system, from sm_90 on
NEVER = {
    r"\b(STL|LDL)\b": "local memory",
    r"(?<!\.)\b(ATOMG?|ATOMS|RED)\.": "atomics, whose order is not the same twice",
}
COPY, MATRICES = r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4"
TRANSPOSED = r"LDSM\.16\.MT88\.4"
BY_16_BYTES = (r"LDG\.E\.128", r"STG\.E\.128")
BY_4_BYTES = r"\A(?![\s\S]*STG\.E\.U16)"  # h is written, never by single halves


MMA = {
    "Fma": ("FFMA",),
    "Mma<__nv_bfloat16>": (r"HMMA\.16816\.F32\.BF16", MATRICES),
    "Mma<__half>": (r"HMMA\.16816\.F32 ", MATRICES),
    "Tf32<1, 1>": (r"HMMA\.1688\.F32\.TF32", MATRICES),
    "ExactMma<__nv_bfloat16>": (r"HMMA\.16816\.F32\.BF16", MATRICES),
    "ExactMma<__half>": (r"HMMA\.16816\.F32 ", MATRICES),
    "Tf32<2, 1>": (r"HMMA\.1688\.F32\.TF32", MATRICES),
    "Tf32<1, 2>": (r"HMMA\.1688\.F32\.TF32", MATRICES),
}


# A twelfth above what nvcc 13.0 makes for any architecture: of a step, and of one that also begins and ends an expert.
STEPS: dict[str, tuple[int, ...]] = {
    "up<Fma, false>": (160,),
    "up<Fma, true>": (260,),
    "up<Mma, false>": (85,),
    "up<Mma, true>": (130,),
    "up<ExactMma, false>": (145,),
    "up<TallFma, false>": (180,),
    "up<TallFma, true>": (275,),
    "up<TallMma, false>": (110,),
    "up<TallMma, true>": (155,),
    "up<TallTf32, false>": (150,),
    "up<TallTf32, true>": (205,),
    "up<Tf32<1, 1>, false>": (120,),
    "up<Tf32<1, 1>, true>": (205,),
    "up<Tf32<2, 1>, false>": (250,),
    "up<Tf32<1, 2>, false>": (250,),
    "down<Fma, 1>": (185, 205),
    "down<Fma, 2>": (200, 225),
    "down<Mma, 1>": (100, 165),
    "down<Mma, 2>": (120, 180),
    "down<Mma, 4>": (120, 190),
    "down<Tf32<1, 1>, 1>": (155, 215),
    "down<Tf32<1, 1>, 2>": (170, 235),
    "down_crowd<Fma>": (),  # nvcc unrolls its depth for some architectures
    "down_crowd<Mma>": (170, 395),
    "down_crowd<Tf32<1, 1>>": (205, 340),
    "decode_up<Fma, false, 16>": (100,),
    "decode_up<Fma, false, 64>": (135,),
    "decode_up<Fma, true, 16>": (150,),
    "decode_up<Fma, true, 64>": (225,),
    "decode_up<Mma, false, 16>": (80,),
    "decode_up<Mma, false, 64>": (85,),
    "decode_up<ExactMma, false, 16>": (80,),
    "decode_up<ExactMma, false, 64>": (95,),
    "decode_up<Mma, true, 16>": (110,),
    "decode_up<Mma, true, 64>": (115,),
    "decode_up<Tf32<1, 1>, false, 16>": (130,),
    "decode_up<Tf32<1, 1>, false, 64>": (160,),
    "decode_up<Tf32<1, 1>, true, 16>": (210,),
    "decode_up<Tf32<1, 1>, true, 64>": (270,),
    "decode_up<Tf32<2, 1>, false, 16>": (255,),
    "decode_up<Tf32<2, 1>, false, 64>": (410,),
    "decode_up<Tf32<1, 2>, false, 16>": (205,),
    "decode_up<Tf32<1, 2>, false, 64>": (216,),
    "decode_down<Fma, 16>": (85, 125),
    "decode_down<Fma, 64>": (140, 190),
    "decode_down<Mma, 16>": (75, 110),
    "decode_down<Mma, 64>": (90, 160),
    "decode_down<Tf32<1, 1>, 16>": (105, 140),
    "decode_down<Tf32<1, 1>, 64>": (170, 240),
}


def _steps(name: str) -> tuple[Step, ...]:
    """A step has all copies of a thread, and the products of at least 16 rows: of Fma, a loop's first."""
    few, matrices = name.endswith(" 16>"), 2 if "true" in name else 1
    products = "FFMA" if "Fma" in name else "HMMA"
    # Copies, products, and shuffles at the end of an expert.
    copies, times, shuffles = {
        "up": (4 + matrices if "Tall" in name else 2 + 2 * matrices, 4 * matrices, 0),
        "down": (4, 4, 3),
        "down_crowd": (4, 16, 3) if "Tf32" in name else (6, 32, 5),
        "decode_up": (2 + (2 if few else 1) * matrices, (4 if few else 8) * matrices, 0),
        "decode_down": (2 if few else 3, 2 if few else 8, 2),
    }[name.split("<")[0]]
    work = ((COPY, copies), (products, times if products == "HMMA" else 1))
    ended = (*work, ("SHFL", shuffles), ("FADD", 4))
    most = STEPS[re.sub(r"Mma<\w+>", "Mma", name)]
    return tuple(Step(m, w) for m, w in zip(most, (work, ended), strict=False))


def _budgets() -> dict[str, Budget]:
    budgets = {
        "select": Budget(40, (r"SHFL\.BFLY",)),
        "plan_words": Budget(40, (r"SHFL\.BFLY",)),
        "plan_scan": Budget(64, ("POPC",)),  # words of four tiles on their way: a block of 512 threads fits
        "plan_fill": Budget(40, (r"SHFL\.UP",)),
        "plan_decode": Budget(40, (r"SHFL\.UP",)),
    }
    for tile, must in MMA.items():
        turned = (TRANSPOSED,) if tile.startswith("Mma") else ()
        experts = "Exact" not in tile and tile not in ("Tf32<2, 1>", "Tf32<1, 2>")  # those are the router's
        hidden = (COPY, BY_4_BYTES, *must)
        for gated in ("false", "true") if experts else ("false",):
            budgets[f"up<{tile}, {gated}>"] = Budget(168 if gated == "true" else 128, hidden)
            if experts:
                tall = "TallTf32" if tile == "Tf32<1, 1>" else f"Tall{tile}"
                for same in (f"up<{tall}, {gated}>", f"up_all<{tile}, {gated}>"):
                    budgets[same] = budgets[f"up<{tile}, {gated}>"]
            for tokens in (16, 64):
                budgets[f"decode_up<{tile}, {gated}, {tokens}>"] = Budget(96 if tokens == 16 else 128, hidden)
        if experts:
            # 4, 3 and 2 blocks of 1, 2 and 4 tiles fit a multiprocessor; of float32, which has twice the sums, 3 and 2.
            halves = tile.startswith("Mma")
            for tiles, registers in ((1, 128), (2, 168), (4, 168)) if halves else ((1, 168), (2, 255)):
                budgets[f"down<{tile}, {tiles}>"] = Budget(registers, (COPY, "VOTE", *must, *turned))
            budgets[f"down_crowd<{tile}>"] = Budget(255, (COPY, "VOTE", *must, *turned))  # 2 blocks fit
            for tokens in (16, 64):
                budgets[f"decode_down<{tile}, {tokens}>"] = Budget(128, (COPY, *must, *turned))
    for name, budget in budgets.items():
        if "<" in name:
            in_flight = 8 if name.startswith("decode") else 0  # kInFlight of decode.cuh
            budgets[name] = replace(budget, steps=_steps(name.replace("up_all<", "up<")), in_flight=in_flight)
    for dtype, together in (("float", 4), ("__nv_bfloat16", 8), ("__half", 8)):
        for gated in ("false", "true"):  # 8 blocks fit
            budgets[f"masked_activation<{dtype}, 1, {gated}>"] = Budget(64)
            budgets[f"masked_activation<{dtype}, {together}, {gated}>"] = Budget(64, BY_16_BYTES)
    return budgets


BUDGETS = _budgets()

# Of csrc/cuda/hopper.cu, for capability 9.0 alone. Launched with 168 registers, threads give up some or take more.
HOPPER_ARCH = "sm_90a"
_HALVES = (("__nv_bfloat16", r"\.BF16"), ("__half", " "))
_WARPGROUPS = (
    COPY,
    BY_4_BYTES,
    r"USETMAXREG\.DEALLOC",
    r"USETMAXREG\.TRY_ALLOC",
    r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
)


def _together(times: int) -> str:
    """Else the compiler waits for each product: it saw its sums touched."""
    return rf"(?:HGMMA(?:(?!DEPBAR)[\s\S])*){{{times}}}"


def _hopper_up(neurons: int, suffix: str) -> Budget:
    products = (rf"HGMMA\.64x{neurons}x16\.F32{suffix}", _together(8))
    return Budget(168, (*products, r"UTMALDG\.3D", *_WARPGROUPS), least=168)


HOPPER_BUDGETS = {
    f"hopper_up{which}>": _hopper_up(neurons, suffix)
    for dtype, suffix in _HALVES
    for gated in ("false", "true")
    for which, neurons in (
        *((f"<{dtype}, {gated}, {n}", n) for n in (32, 64, 96, 128)),
        (f"_all<{dtype}, {gated}", 128),
    )
} | {
    f"hopper_down<{dtype}, {slices}>": Budget(
        168,
        (rf"HGMMA\.64x128x16\.F32{suffix}", _together(slices), TRANSPOSED, r"MOVM\.16\.MT88", *_WARPGROUPS),
        least=168,
    )
    for dtype, suffix in _HALVES
    for slices in (1, 2, 4)
}


def _begun_early(name: str, budget: Budget) -> Budget:
    """From sm_90 on kernels of decoding wait for the one before them, and start the one after."""
    return replace(budget, must=(*budget.must, "ACQBULK", "PREEXIT")) if "decode" in name else budget


Kernels = dict[tuple[str, str], Kernel]  # by architecture and name


def short_name(function: str) -> str:
    """Without namespaces and arguments: `up<Mma<__half>, true>`."""
    return re.sub(r"void |sadmoe::cuda::|\(\w+\)(?=\d)|\(.*", "", function).replace("> >", ">>").strip()


def parse(resources: str, sass: str) -> Kernels:
    """From cuobjdump's demangled `--dump-resource-usage` and `--dump-sass`."""
    kernels: Kernels = defaultdict(Kernel)
    arch = name = ""
    for line in resources.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (.+):$", line):
            name = short_name(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernel = kernels[arch, name]
            kernel.registers, kernel.stack, kernel.shared = (int(number) for number in found.groups())
    code: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in sass.splitlines():
        if found := re.search(r"code for (sm_\w+)", line):
            arch, name = found[1], ""
        elif found := re.search(r"Function : (.+)$", line):
            name = short_name(found[1])
        elif name:
            code[arch, name].append(line)
    for key, lines in code.items():
        kernels[key].code = "\n".join(lines)
    return dict(kernels)


def _flow(code: str) -> tuple[list[str], list[list[int]]]:
    """The instructions, and by index which may come next. Calls return; a branch to what a register says ends a way."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([^;]+?)\s*;", code, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    after = []
    for i, (_, condition, text) in enumerate(lines):
        branch = re.match(r"BRA(?:\.U)?\s+(!?U?P\w+,\s*)?(0x[0-9a-f]+)$", text)
        ends = re.match(r"EXIT|RET|BRX|JMP|BRA(\.U)?\s+(?!!?U?P)", text) and not condition
        next_ones = [] if ends or i + 1 == len(lines) else [i + 1]
        after.append([*next_ones, index[int(branch[2], 16)]] if branch else next_ones)
    return [text for _, _, text in lines], after


def step_length(code: str, work: tuple[tuple[str, int], ...], limit: int = 1000) -> int | None:
    """Instructions of the shortest way from a block's barrier back to it that does the work; None above the limit."""
    texts, after = _flow(code)
    done = [tuple(bool(re.match(pattern, text)) for pattern, _ in work) for text in texts]
    enough = tuple(times for _, times in work)
    best = None
    for start in (i for i, text in enumerate(texts) if text.startswith("BAR.SYNC")):
        now, seen = {(start, (0,) * len(work))}, set()
        for length in range(1, best or limit + 1):
            found = set()
            for i, counts in now:
                counts = tuple(min(c + d, e) for c, d, e in zip(counts, done[i], enough, strict=True))
                found.update((following, counts) for following in after[i])
            if (start, enough) in found:
                best = length
                break
            now = {state for state in found - seen if state[0] != start}
            seen |= now
            if not now:
                break
    return best


def in_flight(code: str, copies: int) -> int:
    """Copies of a thread on their way before the first is used; so many a step, of what a wait leaves and one more."""
    left = [int(found, 16) for found in re.findall(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", code)]
    return copies * (max(left, default=-1) + 1)


def faults(name: str, kernel: Kernel, budgets: dict[str, Budget]) -> list[str]:
    """What is wrong with one kernel; empty when it keeps its budget."""
    if name not in budgets:
        return ["has no budget"]
    budget = budgets[name]
    wrong = [f"lacks {pattern}" for pattern in budget.must if not re.search(pattern, kernel.code)]
    wrong += [f"has {what}" for pattern, what in NEVER.items() if re.search(pattern, kernel.code)]
    if not budget.least <= kernel.registers <= budget.registers:
        least = f"at least {budget.least}, " if budget.least else ""
        wrong.append(f"{kernel.registers} registers, {least}budget {budget.registers}")
    if kernel.stack:
        wrong.append(f"{kernel.stack} bytes of stack")
    if kernel.shared > budget.shared:
        wrong.append(f"{kernel.shared} bytes of shared memory that no launch gives")
    copies = dict(budget.steps[0].work).get(COPY, 0) if budget.steps else 0
    if (found := in_flight(kernel.code, copies)) < budget.in_flight:
        wrong.append(f"{found} copies in flight, at least {budget.in_flight} are meant")
    for step in budget.steps:
        length = step_length(kernel.code, step.work)
        if length is None or length > step.most:
            wrong.append(f"{length or 'too many'} instructions a step, budget {step.most}")
    return wrong


def check(
    kernels: Kernels,
    budgets: dict[str, Budget] = BUDGETS,
    hopper: dict[str, Budget] = HOPPER_BUDGETS,
    archs: tuple[str, ...] = ARCHS,
) -> list[str]:
    """Prints a line a kernel and architecture; returns the faults."""
    found: list[str] = []

    def budgets_of(arch: str) -> dict[str, Budget]:
        if arch == "sm_80":
            return budgets
        own = hopper if arch == HOPPER_ARCH else {n: _begun_early(n, budget) for n, budget in budgets.items()}
        return {n: replace(budget, shared=SYSTEM_SHARED) for n, budget in own.items()}

    for (arch, name), kernel in sorted(kernels.items()):
        wrong = faults(name, kernel, budgets_of(arch))
        budget = budgets_of(arch)[name].registers if name in budgets_of(arch) else "-"
        print(f"{arch:7} {name:32} {kernel.registers:4} registers of {budget:>4}  {'; '.join(wrong) or 'ok'}")
        found += [f"{arch} {name}: {fault}" for fault in wrong]
    if not kernels:
        return ["no kernels at all"]
    made = {arch for arch, _ in kernels}
    if missing := [arch for arch in archs if arch not in made]:
        return [*found, f"nothing was compiled for {', '.join(missing)}: nvcc 12.8 or later does"]
    for arch in sorted(made):
        found += [f"{arch} {n}: was not compiled" for n in budgets_of(arch) if (arch, n) not in kernels]
    return found


def find_cuobjdump() -> str:
    """On PATH, or where its package on PyPI puts it."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or (str(packaged[-1]) if packaged else None)
    if tool is None:
        sys.exit("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return tool


def _dump(tool: str, option: str, path: str) -> str:
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}  # nvdisasm is beside it
    mangled = subprocess.run([tool, option, path], env=env, capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="the ops library built with SADMOE_CUDA=ON")
    path, tool = parser.parse_args().path, find_cuobjdump()
    kernels = parse(_dump(tool, "--dump-resource-usage", path), _dump(tool, "--dump-sass", path))
    if found := check(kernels):
        sys.exit("\n".join(["", *found]))


if __name__ == "__main__":
    main()
