"""The layer that replaces an FFN."""

from sadmoe.layer.experts import ALL_SCALES, SCALES
from sadmoe.layer.moe import DynamicKMoE, only_input
from sadmoe.layer.router import Router
from sadmoe.layer.shared import SharedExpert

__all__ = ["ALL_SCALES", "SCALES", "DynamicKMoE", "Router", "SharedExpert", "only_input"]
