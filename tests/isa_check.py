"""Holds the compiled CPU kernels to their instruction sets, by objdump and nm: nothing newer leaks into an older one.

    python tests/isa_check.py build/CMakeFiles

An object of one instruction set (kernels_ISA.cpp) exports its table alone, for a function that two objects share is
linked from either. All others, the portable kernels among them, hold nothing that not every x86-64 processor runs.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

AMX = {r"\btile\w+|\btdp\w+|%tmm\d": "AMX"}
BF16 = {r"\bvdpbf16ps|\bvcvtne2?ps2bf16": "AVX512-BF16"} | AMX
VNNI = {r"\bvpdp(wss|bus)ds?\b": "AVX512-VNNI"} | BF16
AVX512 = {r"%zmm\d|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b": "AVX-512"} | VNNI
AVX = {
    r"\bv(?!err|erw)[a-z]\w+|%ymm\d": "AVX",
    r"\b(andn|bextr|bls[ir]|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?\b": "BMI",
    r"\b(popcnt|lzcnt|movbe|crc32)[blqw]?\b": "POPCNT, LZCNT, MOVBE or CRC32",
    r"\b(pshufb|palignr|pabs[bdw]|phadd\w+|haddp[ds]|lddqu|mov(shdup|sldup|ddup))\b": "SSE3",
    r"\b(pmulld|p?blendv?\w+|round[ps][ds]|dpp[ds]|pmov[sz]x\w+|p(min|max)(s[bd]|u[dw])|packusdw|ptest|p?(extr|insr)[bdq]"
    r"|extractps|insertps|pcmp(eqq|gtq|[ei]str[im]))\b": "SSE4",
}
NEVER = {
    "portable": AVX | AVX512,
    "avx2": AVX512,
    "avx512": VNNI,
    "avx512vnni": BF16,
    "avx512bf16": AMX,
    "avx512zen5": AMX,
    "amx": {},
}  # by what an object is compiled for


def isa_of(path: Path) -> str:
    """The instruction set that an object was compiled for."""
    found = re.match(r"kernels_(\w+)\.", path.name)
    return found[1] if found else "portable"


def code_faults(isa: str, disassembly: str) -> list[str]:
    """Instructions that the instruction set has not, with their place; of every kind the first."""
    if isa not in NEVER:
        return [f"{isa} has no rule in {Path(__file__).name}"]
    lines = [
        line.split("\t", 1)[1] for line in disassembly.splitlines() if re.match(r"\s+[0-9a-f]+:\t", line)
    ]
    if not lines:
        return ["no code at all"]
    found = []
    for pattern, what in NEVER[isa].items():
        line = next((line for line in lines if re.search(pattern, re.sub(r"<.*|#.*", "", line))), None)
        if line:
            found.append(f"has {what}: {' '.join(line.split())}")
    return found


def symbol_faults(isa: str, symbols: str) -> list[str]:
    """The code that nm lists as defined for others to link, beyond the table of the instruction set."""
    code = re.compile(r"[0-9a-f]+ [TWi] (\S+)")  # T: code, W: linked from whichever object, i: chosen at load
    names = code.findall(symbols)
    table = f"sadmoe::cpu::kernels_{isa}()"
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    exported = plain.stdout.splitlines()
    found = [f"exports {name}" for name in exported if name != table]
    return found if table in exported else [*found, f"does not export {table}"]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(path: Path) -> list[str]:
    """The faults of one object."""
    isa = isa_of(path)
    found = code_faults(isa, _output("objdump", "-d", "--no-show-raw-insn", str(path)))
    if path.name.startswith("kernels_"):
        found += symbol_faults(isa, _output("nm", "--defined-only", "--extern-only", str(path)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path, help="where objects of csrc/cpu lie, at any depth")
    objects = sorted(parser.parse_args().build.rglob("csrc/cpu/*.o"))
    if not any(isa_of(path) != "portable" for path in objects):
        sys.exit("no object of an instruction set lies there: build kernel_test first")
    faults = {path: check(path) for path in objects}
    for path, wrong in faults.items():
        print(f"{path.name:24} {isa_of(path):10} {'; '.join(wrong) or 'ok'}")
    if any(faults.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
