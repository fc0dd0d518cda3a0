"""How the weights of experts lie in memory: neuron after neuron, or packed, an expert's neurons side by side."""

from torch import Tensor

from sadmoe.ops.build import cpu_isa
from sadmoe.ops.functions import DTYPES

FULL = 32  # bf16 of a register: other numbers of neurons leave one partly empty, and took up to 1.4 times as long
LARGEST = 256  # neurons of an expert; of a thousand, a token took up to 1.2 times as long


def packed(weight: Tensor) -> Tensor:
    """w_up or w_gate [E, s, d] in memory that is [E, d, s], as the ops take it on the CPU; no copy where it is."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def packing_gains(weight: Tensor) -> bool:
    """Whether the kernels in use are faster when w_up [E, s, d] is packed, by what was measured on a Zen 5.

    With AVX-512, in experts of a multiple of 32 neurons up to 256. float16, which runs as bfloat16 does without
    AVX512-BF16, was not timed; AMX, whose tiles want rows in bfloat16, was not tried.
    """
    s, wide = weight.shape[1], cpu_isa().startswith("avx512")
    return weight.is_cpu and weight.dtype in DTYPES and wide and s % FULL == 0 and s <= LARGEST
