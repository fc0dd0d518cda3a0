"""The CPU kernels of an earlier commit beside those of the tree, in one process, in turns: what a change of them gains.

    python bench/two_builds.py COMMIT BUILD [--layers 768x3072 ...] [--s 32] [--tokens 1 8 64] [--share 0.25]
                               [--dtypes float32 bfloat16 int8] [--rounds 41] [--core 0] [--threads 1] [--isa avx2]
                               [--packed]

BUILD: a folder that CMake configured with -G Ninja -DSADMOE_KERNEL_TEST=ON; its target kernel_test is built. The
earlier kernels are compiled by its commands into a namespace of their own, once a commit, in BUILD/before. A layer's
experts run by an independent mask, layer after layer, with weights from memory, on one thread or --threads of OpenMP,
as torch's are, each with a core from --core on. The ratio is the time now over the time before: on a machine shared
with others it tells a twentieth where two processes differ by a third. Last, whether both gave the same bits. --packed:
now the experts are packed, so COMMIT HEAD tells what that gains.
"""

import json
import shlex
import subprocess
import zlib
from pathlib import Path

import command
from layer_problem import shape_of

ROOT = Path(__file__).parent.parent
CPU = "csrc/cpu/"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("commit")
    parser.add_argument("build", type=Path)
    parser.add_argument("--layers", nargs="+", default=["384x1536", "768x3072", "2048x8192", "576x1536-glu"])
    parser.add_argument("--s", type=int, nargs="+", default=[32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--packed", action="store_true")
    arguments = parser.parse_args()
    cells = [
        (shape.d, shape.f, s, int(shape.gated), tokens, arguments.share, dtype)
        for layer in arguments.layers
        for s in arguments.s
        for shape in [shape_of(layer, s)]
        for tokens in arguments.tokens
        for dtype in arguments.dtypes
    ]
    words = [
        arguments.rounds,
        arguments.isa,
        int(arguments.packed),
        arguments.threads,
        *(word for cell in cells for word in cell),
    ]
    program = build(arguments.commit, arguments.build.resolve())
    cores = f"{arguments.core}-{arguments.core + arguments.threads - 1}"
    subprocess.run(["taskset", "-c", cores, program, *map(str, words)], check=True)


def build(commit: str, folder: Path) -> Path:
    """The program of both, in a folder of BUILD/before."""
    name = _run("git", "-C", ROOT, "rev-parse", "--short", commit).stdout.decode().strip()
    _run("cmake", "--build", folder, "-t", "kernel_test", "two_builds")
    commands = _commands(folder)
    before = (
        folder / "before" / f"{name}-{zlib.crc32(repr(sorted(commands.items())).encode()):08x}"
    )  # by these flags
    tracked = _run("git", "-C", ROOT, "ls-tree", "-r", "--name-only", name, CPU).stdout.decode().splitlines()
    had = {
        file: command for file, command in commands.items() if str(Path(file).relative_to(ROOT)) in tracked
    }
    earlier = [before / (Path(file).name + ".o") for file in had]
    if not all(each.exists() for each in earlier):
        before.mkdir(parents=True, exist_ok=True)
        archive = _run("git", "-C", ROOT, "archive", name, "csrc").stdout
        subprocess.run(["tar", "-x", "-C", before], input=archive, check=True)
        for (file, command), to in zip(had.items(), earlier, strict=True):
            words = [
                word.replace(str(ROOT / "csrc"), str(before / "csrc"))
                for word in command[: command.index("-o")]
            ]
            _run(
                *words, "-Dcpu=cpu_before", "-c", before / Path(file).relative_to(ROOT), "-o", to, cwd=folder
            )
    present = [folder / command[command.index("-o") + 1] for command in commands.values()]
    own = folder / "CMakeFiles/two_builds.dir/bench/cpu/two_builds.cpp.o"
    compiler, program = next(iter(commands.values()))[0], before / "two_builds"
    _run(compiler, own, *present, *earlier, "-fopenmp", "-o", program)
    return program


def _commands(folder: Path) -> dict[str, list[str]]:
    """How kernel_test's files of csrc/cpu are compiled, by file."""
    found = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        command = shlex.split(entry["command"])
        objects = command[command.index("-o") + 1]
        if CPU in entry["file"] and ("kernel_test" in objects or "sadmoe_csrc" in objects):
            found[entry["file"]] = command
    if not found:
        raise SystemExit(
            f"{folder} has no commands of the CPU kernels: configure it with -G Ninja -DSADMOE_KERNEL_TEST=ON"
        )
    return found


def _run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(str(word) for word in words)}\n{(done.stdout + done.stderr).decode()}")
    return done


if __name__ == "__main__":
    main()
