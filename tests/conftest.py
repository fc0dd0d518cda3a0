"""Settings of every test: one thread, so that small problems are not lost in the cost of waking threads."""

import cuda_backends
import pytest
import torch
from sadmoe import paths

torch.set_num_threads(1)


def _as_found(native):
    native.sadmoe_schedule(0, 1, 1)
    cuda_backends.set_options(native)
    return native


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request):
    backend = cuda_backends.backend_of(request.param)
    if request.param == "emulator":
        _as_found(cuda_backends.emulator())
    yield backend
    if request.param == "emulator":
        _as_found(cuda_backends.emulator())
    else:
        backend.use_hopper(True)
        backend.use_down_tiles(0)


@pytest.fixture
def native():
    yield _as_found(cuda_backends.emulator())
    _as_found(cuda_backends.emulator())


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch, tmp_path_factory):
    """No layer chooses its path by what was measured on this machine, nor by what an earlier test made up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    paths.use_costs(None)
