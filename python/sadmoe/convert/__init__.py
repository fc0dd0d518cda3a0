"""The recipe from a dense model to a dynamic-k MoE, and the way back."""

from sadmoe.convert.config import ConvertConfig
from sadmoe.convert.recipe import checked_sites, convert_, restore_
from sadmoe.convert.report import ConversionReport, LayerReport
from sadmoe.convert.undo import after_surgery, surgery

__all__ = [
    "ConversionReport",
    "ConvertConfig",
    "LayerReport",
    "after_surgery",
    "checked_sites",
    "convert_",
    "restore_",
    "surgery",
]
