"""Settings of every test: one thread, so that small problems are not lost in the cost of waking threads, nor those of
tests that run beside each other; no network; nothing that was measured on this machine. Fixtures of modules and other
processes have them too."""

import os
import shutil
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it, in other processes
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sadmoe-tests-")  # where costs of layers would be

import backends
import pytest
import torch
from sadmoe import ops, paths

torch.set_num_threads(1)


def _as_found(native):
    native.sadmoe_schedule(0, 1, 1)
    backends.set_options(native)
    return native


def _with_options_as_found(name):
    backend = backends.backend_of(name)
    if name == "emulator":
        _as_found(backends.emulator())
    else:
        backend.use_hopper(True)
    yield backend
    if name == "emulator":
        _as_found(backends.emulator())
    else:
        backend.use_hopper(True)
        backend.use_down_tiles(0)
        ops.use_cpu_isa("auto")


GPUS = ["emulator", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=[*ops.cpu_isas(), *GPUS])
def backend(request):
    """Where the ops run: by each instruction set of this processor, and on GPUs."""
    yield from _with_options_as_found(request.param)


@pytest.fixture(params=GPUS)
def gpu(request):
    yield from _with_options_as_found(request.param)


@pytest.fixture(params=ops.cpu_isas())
def isa(request):
    ops.use_cpu_isa(request.param)
    yield request.param
    ops.use_cpu_isa("auto")


@pytest.fixture
def isas():
    """All of them, for a test that asks for one after the other."""
    yield ops.cpu_isas()
    ops.use_cpu_isa("auto")


@pytest.fixture
def native():
    yield _as_found(backends.emulator())
    _as_found(backends.emulator())


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        backends.no_device()
    if "cuda: yes" in ops.build_info():
        torch.ops.sadmoe._use_hopper(backends.HOPPER)


@pytest.fixture(autouse=True)
def as_alone():
    """Random numbers as in a test that runs alone; no layer chooses its path by costs that an earlier one made up."""
    torch.manual_seed(0)
    yield
    paths.use_costs(None)


@pytest.fixture
def loud():
    """transformers' warnings reach caplog, its progress bars nobody."""
    transformers = pytest.importorskip("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity(verbosity)


def pytest_unconfigure():
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
