"""Who may include or import whom. A file in the wrong room fails here, not in review."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "python/sadmoe"
ROOMS = [  # a room imports only rooms above it
    {"reference", "tables", "files", "outputs", "checks", "hooks", "modules", "randomness", "undo"},
    {"forward"},
    {"passes", "ops", "_partition"},
    {"gates", "crossover", "timing"},
    {"measured"},
    {"paths"},
    {"layer"},
    {"batches", "partition"},
    {"padding"},
    {"ffn"},
    {"dial", "weights"},
    {"inputs", "masks", "flops", "mixed"},
    {"training"},
    {"sparsify", "cost"},
    {"routers"},
    {"calibrate", "compensation", "finetune", "evaluate", "router_loss"},
    {"layerwise", "calibrate_layers"},
    {"budget"},
    {"convert", "describe"},
    {"attention", "saving", "int8", "packed"},
    {"adapter", "survey"},
    {"hf"},
    {"report", "texts"},
    {"data"},
    {"demo", "model_report", "bench", "measure_costs"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
INCLUDE = re.compile(r'#include [<"]([^>"]+)[>"]')


def includes(path: Path) -> set[str]:
    return set(INCLUDE.findall(path.read_text()))


def sources(*suffixes: str) -> list[Path]:
    return [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in suffixes]


def room_of(path: Path) -> str:
    return path.relative_to(PYTHON).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and node.module == "sadmoe":
            rooms |= {alias.name for alias in node.names}
            public = {alias.name for alias in node.names} - LEVEL.keys() - {"__version__"}
            assert not public, f"{path}: {public} of the package, which imports every room"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sadmoe."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert "sadmoe" not in {alias.name for alias in node.names}, (
                f"{path}: the package, which imports every room"
            )
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sadmoe.")}
    return rooms & LEVEL.keys()


def test_every_module_has_a_room():
    assert {room_of(path) for path in PYTHON.rglob("*.py")} <= LEVEL.keys()


def test_modules_import_only_rooms_above_theirs():
    for path in PYTHON.rglob("*.py"):
        room = room_of(path)
        wrong = {other for other in imported_rooms(path) - {room} if LEVEL[other] >= LEVEL[room]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_only_bindings_see_torch_or_python():
    for path in sources(".h", ".cpp", ".cu", ".cuh"):
        seen = {name for name in includes(path) if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", name)}
        assert not seen or path.parent.name == "bind", f"{path.relative_to(ROOT)} includes {seen}"


def test_an_instruction_set_file_includes_only_its_template():
    for path in (ROOT / "csrc/cpu").glob("kernels_*.cpp"):
        vectors = {"cpu/vec_avx512.h", "cpu/vec_avx512bf16.h"}
        shared = {"cpu/table.h", "cpu/tiles_amx.h", "cpu/int_tiles_amx.h"} | vectors
        assert includes(path) <= {"immintrin.h", "arm_neon.h", "cstring"} | shared, path.name
    reached, waiting = set(), [f"cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("kernels_*.cpp")]
    while waiting:  # what is compiled with an instruction set's flags
        file = waiting.pop()
        others = includes(ROOT / "csrc" / file)
        headers = {other for other in others if other.startswith("cpu/")}
        if file.endswith(
            ".h"
        ):  # functions of the standard library would be shared with what has no such flags
            library = {"immintrin.h", "cstdint", "cstring", "initializer_list", "type_traits"}
            assert others - headers <= library | {"contract.h", "plan.h"}, file
        waiting += headers - reached
        reached |= headers
    tiles = {"tile_unit", "tiles_amx", "int_tiles_amx"}
    algorithms = {"table", "ahead", "project", "packed", "accumulate", "held", "activate", "quantize"}
    vectors = {"vec_avx512", "vec_avx512bf16", "half", "unroll", "widen", "columns"}
    names = {f"cpu/{name}.h" for name in {"kernels", *tiles, *algorithms, *vectors}}
    assert reached == names | {"cpu/kernels.inc"}


def test_nothing_is_compiled_for_the_build_machine_s_own_processor():
    for path in (ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "cmake").iterdir()):
        if path.is_file():
            assert "march=native" not in path.read_text(), path.name


def test_no_kernel_nor_its_launch_waits_for_the_device():
    files = [
        path for room in ("cuda", "bind") for path in (ROOT / "csrc" / room).rglob("*") if path.is_file()
    ]
    assert len(files) > 10
    waits = re.compile(r"Synchronize|cudaMemcpy|cudaMalloc|cudaFree|\.item\s*[<(]")
    assert [path.name for path in files if waits.search(path.read_text())] == []


def test_importing_sadmoe_imports_no_model_library():
    libraries = ("transformers", "timm", "torchvision", "matplotlib")
    code = f"import sys, sadmoe; print([m for m in {libraries} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
