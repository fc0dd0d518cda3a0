"""The recipe from a dense model to a dynamic-k MoE, and the way back."""

from sadmoe.convert.config import ConvertConfig
from sadmoe.convert.recipe import checked_sites, convert_, restore_
from sadmoe.convert.report import ConversionReport, LayerReport

__all__ = [
    "ConversionReport",
    "ConvertConfig",
    "LayerReport",
    "checked_sites",
    "convert_",
    "restore_",
]
