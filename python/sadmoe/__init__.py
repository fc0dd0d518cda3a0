"""Turns a pretrained dense transformer into a dynamic-k Mixture-of-Experts (arXiv 2310.04361).

`survey` says what a conversion could save. The steps in order: `replace_projections_` (which may be left out),
`sparsify_` (not needed with ReLU), `convert_`, `finetune_for_budget_` (or, with nothing fine-tuned, `calibrate_` and
`compensate_`), then the model runs as before and computes less; `set_tau` is its dial, `cost` and `record_masks` say
what it does, `restore_` makes it dense again. The compiled ops are in `sadmoe.ops` and under
`torch.ops.sadmoe`.
"""

from sadmoe import hf
from sadmoe.adapter import load_adapter, save_adapter
from sadmoe.attention import ProjectionConfig, ProjectionReport, find_projections, replace_projections_
from sadmoe.budget import BudgetReport, finetune_for_budget_
from sadmoe.calibrate import Calibration, calibrate_
from sadmoe.calibrate_layers import LayerCalibration, calibrate_layers_
from sadmoe.compensation import compensate_
from sadmoe.convert import ConversionReport, ConvertConfig, convert_, restore_
from sadmoe.cost import CostReport, cost
from sadmoe.dial import set_batch_invariant, set_tau, tau
from sadmoe.ffn import DenseFFN, FFNNotFoundError, find_ffns, moe_layers
from sadmoe.finetune import FinetuneConfig, FinetuneReport, finetune_
from sadmoe.gates import DynamicK, TopK
from sadmoe.int8 import Int8Report, dequantize_experts_, quantize_experts_
from sadmoe.layer import DynamicKMoE, Router, SharedExpert
from sadmoe.layerwise import finetune_layers_
from sadmoe.masks import record_masks
from sadmoe.ops import build_info
from sadmoe.packed import pack_experts_, unpack_experts_
from sadmoe.padding import padding_mask
from sadmoe.partition import partition
from sadmoe.router_loss import RouterLoss
from sadmoe.routers import RouterConfig, fit_router_, fit_routers_
from sadmoe.saving import SavedModelError, load, save
from sadmoe.sparsify import (
    SparsifyConfig,
    SparsifyReport,
    SparsityLoss,
    measure_sparsity,
    sparsify_,
)
from sadmoe.survey import Survey, survey
from sadmoe.training import Checkpoint

__version__ = "0.1.0"
__all__ = [
    "BudgetReport",
    "Calibration",
    "Checkpoint",
    "ConversionReport",
    "ConvertConfig",
    "CostReport",
    "DenseFFN",
    "DynamicK",
    "DynamicKMoE",
    "FFNNotFoundError",
    "FinetuneConfig",
    "FinetuneReport",
    "Int8Report",
    "LayerCalibration",
    "ProjectionConfig",
    "ProjectionReport",
    "Router",
    "RouterConfig",
    "RouterLoss",
    "SavedModelError",
    "SharedExpert",
    "SparsifyConfig",
    "SparsifyReport",
    "SparsityLoss",
    "Survey",
    "TopK",
    "build_info",
    "calibrate_",
    "calibrate_layers_",
    "compensate_",
    "convert_",
    "cost",
    "dequantize_experts_",
    "find_ffns",
    "find_projections",
    "finetune_",
    "finetune_for_budget_",
    "finetune_layers_",
    "fit_router_",
    "fit_routers_",
    "load",
    "load_adapter",
    "measure_sparsity",
    "moe_layers",
    "pack_experts_",
    "padding_mask",
    "partition",
    "quantize_experts_",
    "record_masks",
    "replace_projections_",
    "restore_",
    "save",
    "save_adapter",
    "set_batch_invariant",
    "set_tau",
    "sparsify_",
    "survey",
    "tau",
    "unpack_experts_",
]

hf.register()


def __dir__() -> list[str]:
    """What is public; modules below it, such as `sadmoe.ops`, are imported by their names."""
    return [*__all__, "__version__", "hf", "ops"]
