"""The ops of `torch.ops.sadmoe`, and everything about them that is not their kernels.

Every op runs in C++ on the CPU and in CUDA, traces on meta and fake tensors, has gradients and a FLOP formula,
and answers through `sadmoe.reference` on devices without a kernel, with one warning; but for `masked_activation_`, with
which a layer's dense path works in place where nothing of that is asked for.
"""

from sadmoe.ops import autocast, fallback, rules  # noqa: F401  (they register what they have)
from sadmoe.ops.build import allow_tf32, build_info, cpu_isa, cpu_isas, use_cpu_isa
from sadmoe.ops.call import runs_kernels
from sadmoe.ops.functions import (
    DTYPES,
    dynamic_k_moe,
    dynamic_k_moe_int8,
    dynamic_k_select,
    masked_activation_,
    router_scores,
    sparse_experts,
    sparse_experts_int8,
)
from sadmoe.ops.layout import packed, packing_gains

__all__ = [
    "DTYPES",
    "allow_tf32",
    "build_info",
    "cpu_isa",
    "cpu_isas",
    "dynamic_k_moe",
    "dynamic_k_moe_int8",
    "dynamic_k_select",
    "masked_activation_",
    "packed",
    "packing_gains",
    "router_scores",
    "runs_kernels",
    "sparse_experts",
    "sparse_experts_int8",
    "use_cpu_isa",
]
