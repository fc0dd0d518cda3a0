"""How the weights of experts lie in memory: neuron after neuron, or packed, an expert's neurons side by side."""

import torch
from torch import Tensor

from sadmoe.ops.build import cpu_isa

FULL = 32  # bf16 of a register: other numbers of neurons leave one partly empty, and took up to 1.4 times as long


def packed(weight: Tensor) -> Tensor:
    """w_up or w_gate [E, s, d] in memory of its own that is [E, d, s], as the ops take it on the CPU."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def packing_gains(weight: Tensor) -> bool:
    """Whether the kernels in use are faster when w_up [E, s, d] is packed, as measured: with AVX-512 in experts of a
    multiple of 32 neurons; but not in bfloat16 with AMX, whose tiles want rows."""
    isa = cpu_isa()
    wide = isa.startswith("avx512") or (isa == "amx" and weight.dtype != torch.bfloat16)
    return weight.is_cpu and weight.is_floating_point() and wide and weight.shape[1] % FULL == 0
