"""Which torch the build takes, and what it says where there is none that fits."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "cmake/find_torch.py"


def torch_of(folder: Path, version: str) -> Path:
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'")
    return folder


@pytest.fixture
def required_torch():
    return runpy.run_path(str(SCRIPT))["required_torch"]


def test_the_chosen_torch_is_taken(required_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(torch_of(tmp_path, "2.10.0")))
    assert required_torch() == tmp_path


def test_an_old_torch_is_named_with_what_to_do(required_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(torch_of(tmp_path, "2.4.1")))
    with pytest.raises(SystemExit, match=r"needs PyTorch >= 2\.10; found 2\.4\.1 in .*Install one first"):
        required_torch()


def test_a_chosen_folder_without_torch_is_not_passed_over(required_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("SADMOE_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="found no torch in SADMOE_TORCH_DIR="):
        required_torch()
