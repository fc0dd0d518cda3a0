"""Builds by CMake and Ninja: CMakeLists.txt alone says what is compiled, and how.

Settings by environment: SADMOE_CUDA=auto|on|off, SADMOE_CUDA_ARCHS="90-real", SADMOE_CMAKE_ARGS, CUDACXX or CUDA_HOME,
SADMOE_TORCH_DIR, MAX_JOBS.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
from find_torch import required_torch  # noqa: E402


def _tool(name: str, oldest: tuple[int, ...] = ()) -> str:
    """On PATH, or beside this Python, whose environment need not be activated."""
    places = (None, sysconfig.get_path("scripts"))
    found = [path for path in (shutil.which(name, path=place) for place in places) if path]
    for path in found:
        if (version := _version_of(path)) is not None and version >= oldest:
            return path
    older = f" or older than {'.'.join(map(str, oldest))}" if oldest else ""
    told = f"is broken{older}: {', '.join(found)}" if found else "was not found"
    sys.exit(f"sadmoe: {name} {told}. pip install {name}, or let pip build in isolation.")


def _version_of(path: str) -> tuple[int, ...] | None:
    """As it tells it, None where it does not run."""
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    numbers = re.search(r"(\d+)\.(\d+)", told)
    return tuple(map(int, numbers.groups())) if numbers else None


def _environment() -> dict[str, str]:
    """The caller's, with nvcc's usual place as the last guess."""
    env = dict(os.environ)
    env.pop("DESTDIR", None)  # cmake --install would put everything below it
    home = (
        env.get("CUDA_HOME") or env.get("CUDA_PATH") or (None if shutil.which("nvcc") else "/usr/local/cuda")
    )
    if home and "CUDACXX" not in env and (nvcc := Path(home) / "bin/nvcc").exists():
        env["CUDACXX"] = str(nvcc)
    return env


def _cuda_choice() -> str:
    choice = os.environ.get("SADMOE_CUDA", "auto").lower()
    if choice not in ("auto", "on", "off"):
        sys.exit(f"sadmoe: SADMOE_CUDA must be auto, on or off, got {choice!r}")
    return choice.upper()


class CMakeBuild(build_ext):
    """One configure, build and install of the CMake project for all extensions."""

    def run(self) -> None:
        named = shlex.split(os.environ.get("CXX", ""))[:1]  # without its arguments
        if not any(map(shutil.which, [*named, "c++", "g++", "clang++"])):
            sys.exit(
                "sadmoe: no C++ compiler was found. Install g++ (Debian: apt-get install g++) or set CXX."
            )
        headers = Path(sysconfig.get_path("include"))
        if not (headers / "Python.h").exists():
            sys.exit(
                f"sadmoe: Python's headers were not found in {headers}. Install them (Debian: apt-get install "
                "python3-dev)."
            )
        inplace = self.editable_mode or self.inplace
        out = ROOT / "python/sadmoe" if inplace else Path(self.build_lib).resolve() / "sadmoe"
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake, env = _tool("cmake", oldest=(3, 24)), _environment()
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DCMAKE_INSTALL_PREFIX={out}"]
        configure += [f"-DPython3_EXECUTABLE={sys.executable}", f"-DSADMOE_TORCH_DIR={required_torch()}"]
        configure += [
            f"-DSADMOE_CUDA={_cuda_choice()}",
            f"-DSADMOE_CUDA_ARCHS={env.get('SADMOE_CUDA_ARCHS', '')}",
        ]
        configure += shlex.split(env.get("SADMOE_CMAKE_ARGS", ""))
        if not inplace:
            configure.append("--fresh")  # a cache in build/ may come from another environment
        jobs = env.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            configure,
            [cmake, "--build", str(build), "-j", jobs],
            [cmake, "--install", str(build)],
        ):
            subprocess.run(command, check=True, env=env)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "sadmoe").glob("_*.so")] or list(
            self.get_output_mapping()
        )

    def get_output_mapping(self) -> dict[str, str]:
        """Of an editable installation: where each library would be in a wheel, and where it is."""
        if not (self.editable_mode or self.inplace):
            return {}
        made = (ROOT / "python/sadmoe").glob("_*.so")
        return {str(Path(self.build_lib, "sadmoe", path.name)): str(path) for path in made}


setup(ext_modules=[Extension("sadmoe._ops", sources=[])], cmdclass={"build_ext": CMakeBuild})
