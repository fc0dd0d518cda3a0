"""Settings of every test: one thread, so that small problems are not lost in the cost of waking threads."""

import cuda_backends
import pytest
import torch

torch.set_num_threads(1)


def _as_found(native):
    native.sadmoe_schedule(0, 1, 1)
    native.sadmoe_set_options(256 << 20, 64, False)


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request):
    yield cuda_backends.backend_of(request.param)
    if request.param == "emulator":
        _as_found(cuda_backends.emulator())


@pytest.fixture
def native():
    yield cuda_backends.emulator()
    _as_found(cuda_backends.emulator())


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
