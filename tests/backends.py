"""Where the ops run in tests: on the CPU by each instruction set, on the emulator of CUDA, and on a CUDA device.

The emulator needs no GPU: `cmake -DSADMOE_EMULATOR=ON` builds it; SADMOE_EMULATOR_LIB is its library's path.
"""

import ctypes
import os
from functools import cache

import pytest
import torch
from sadmoe import ops
from torch import library

OPS = ("router_scores", "dynamic_k_select", "sparse_experts", "dynamic_k_moe", "_masked_activation_")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_SHAPE = -1.0  # of use_hopper's up_all and crowd
HOPPER = "SADMOE_NO_HOPPER" not in os.environ  # set where the kernels of sm_90a have failed on the device
ALWAYS, NEVER = 0.0, 2.0  # likewise, of shares
SCHEDULES = [(order, seed, late) for order, seed in ((0, 1), (1, 1), (2, 1), (2, 2)) for late in (0, 1)]


@cache
def emulator():
    """The emulator's library, its ops defined as sadmoe's are, under torch.ops.sadmoe_emulated."""
    path = os.environ.get("SADMOE_EMULATOR_LIB")
    if path is None:
        missing = pytest.fail if "SADMOE_NEEDS_EMULATOR" in os.environ else pytest.skip
        missing("SADMOE_EMULATOR_LIB is not set: the emulator was not built")
    definitions = library.Library("sadmoe_emulated", "FRAGMENT")
    for name in OPS:
        definitions.define(str(getattr(torch.ops.sadmoe, name).default._schema).removeprefix("sadmoe::"))
    torch.ops.load_library(path)
    native = ctypes.CDLL(path)
    native.sadmoe_run_planted.restype = ctypes.c_char_p
    native.sadmoe_set_options.argtypes = [
        *[ctypes.c_int64] * 2, *[ctypes.c_bool] * 2, *[ctypes.c_double] * 2, ctypes.c_int64
    ]  # fmt: skip
    native.sadmoe_down_tiles.argtypes = [ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int] * 3]
    native.sadmoe_up_all_share.argtypes = [
        *[ctypes.c_int64] * 3, ctypes.c_int, *[ctypes.c_bool] * 2, ctypes.c_int
    ]  # fmt: skip
    native.sadmoe_up_all_share.restype = ctypes.c_double
    native.sadmoe_crowd_share.argtypes = [
        *[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_bool, ctypes.c_int
    ]  # fmt: skip
    native.sadmoe_crowd_share.restype = ctypes.c_double
    native.sadmoe_products.restype = ctypes.c_int64
    native.sadmoe_warp_products.restype = ctypes.c_int64
    native.sadmoe_launches.restype = ctypes.c_int64
    native.definitions = definitions  # they live as long as this object
    return native


class Backend:
    """An implementation of the ops: arguments from the CPU, results back on it."""

    def __init__(self, name):
        self.name, self.device = name, "cuda" if name == "cuda" else "cpu"
        self.namespace = "sadmoe_emulated" if name == "emulator" else "sadmoe"
        self.is_cpu = name in ops.cpu_isas()

    def __getattr__(self, name):
        op = getattr(getattr(torch.ops, self.namespace), name)

        def run(*args, **kwargs):
            if self.name == "cuda":
                poison_memory()
            return op(
                *(a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args), **kwargs
            ).cpu()

        return run

    def masked_activation(self, up, gate, choice, tau, act):
        """What the op leaves in up."""
        moved = [None if a is None else a.to(self.device) for a in (up, gate, choice)]
        getattr(torch.ops, self.namespace)._masked_activation_(*moved, tau, act)
        return moved[0].cpu()

    def reschedule(self, schedule):
        """Another order of threads, blocks and copies on the emulator; a device has its own, different every time."""
        if self.name == "emulator":
            emulator().sadmoe_schedule(*schedule)

    def use_hopper(self, use, up_all=BY_SHAPE, crowd=BY_SHAPE):
        """The kernels of sm_90a where a device has them and they fit, or those of sm_80 everywhere.

        up_all: share of all pairs from which every neuron is computed on the way in.
        crowd: share of its pairs from which a block of tokens goes through all experts on the way out.
        """
        if self.name == "emulator":
            set_options(emulator(), hopper=use, up_all=up_all, crowd=crowd)
        elif self.name == "cuda":
            torch.ops.sadmoe._use_hopper(use and HOPPER)
            torch.ops.sadmoe._use_up_all(up_all)
            torch.ops.sadmoe._use_crowd(crowd)

    def use_down_tiles(self, tiles):
        """Blocks of the down projection take 1, 2 or 4 times 64 tokens; 0: as many as fit the shape."""
        if self.name == "emulator":
            set_options(emulator(), down_tiles=tiles)
        elif self.name == "cuda":
            torch.ops.sadmoe._use_down_tiles(tiles)

    def products(self):
        """How many products of warpgroups there were; None on a device, which does not say."""
        return emulator().sadmoe_products() if self.name == "emulator" else None

    def warp_products(self):
        """Likewise of warps: of tensor cores, but for those of warpgroups."""
        return emulator().sadmoe_warp_products() if self.name == "emulator" else None


def set_options(
    native,
    hidden_bytes=512 << 20,
    decode_tokens=64,
    tf32=False,
    hopper=False,
    up_all=BY_SHAPE,
    crowd=BY_SHAPE,
    down_tiles=0,
):
    """csrc/cuda/launch.h has them. Tests ask for hopper: else the kernels of sm_80 would run in none with 16 bits."""
    native.sadmoe_set_options(hidden_bytes, decode_tokens, tf32, hopper, up_all, crowd, down_tiles)


def no_device():
    """Skips, or fails where a device must be there: what tests nothing has not passed."""
    (pytest.fail if "SADMOE_NEEDS_CUDA" in os.environ else pytest.skip)("no CUDA device")


def poison_memory():
    """Leaves torch's allocator on the device with memory that is NaN in every dtype: a kernel that leaves its output
    unwritten would find there what the same call before it has written."""
    torch.cuda.empty_cache()
    small = [torch.full((1 << 19,), 0xFF, dtype=torch.uint8, device="cuda") for _ in range(4)]
    large = torch.full((18 << 20,), 0xFF, dtype=torch.uint8, device="cuda")
    del small, large


def backend_of(name):
    """An instruction set of the CPU, "emulator" or "cuda"; skips where there is none."""
    if name == "emulator":
        emulator()
    elif name != "cuda":
        ops.use_cpu_isa(name)
    elif not torch.cuda.is_available():
        no_device()
    elif "cuda: yes" not in ops.build_info():
        pytest.skip(f"built without CUDA kernels ({ops.build_info()})")
    return Backend(name)
