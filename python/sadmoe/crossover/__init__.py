"""Which way through a layer takes a CUDA device least time: sparsely or densely, from the shape and the executed share.

A model and not a measurement: rooflines of the kernels in csrc/cuda, whose constants are in gpu_constants.json, each
with its source and whether it was measured. Letters as everywhere: T tokens, d width, E experts, s neurons of one,
r router width. Times in seconds. Nothing here runs on the device or waits for it.
"""

from sadmoe.crossover.card import CONSTANTS, Card, card_for, cards
from sadmoe.crossover.choice import crossover, dense_seconds, masked_seconds, sparse_seconds
from sadmoe.crossover.shape import LayerShape

__all__ = [
    "CONSTANTS",
    "Card",
    "LayerShape",
    "card_for",
    "cards",
    "crossover",
    "dense_seconds",
    "masked_seconds",
    "sparse_seconds",
]
