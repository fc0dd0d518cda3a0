"""Sparsity enforcement: fine-tuning a dense model so that fewer of its neurons are active (arXiv
2310.04361, 3.1)."""

from sadmoe.sparsify.config import SparsifyConfig, Step
from sadmoe.sparsify.loop import SparsifyReport, sparsify_
from sadmoe.sparsify.penalty import LayerSparsity, SparsityLoss, measure_sparsity, square_hoyer
from sadmoe.sparsify.resume import Checkpoint

__all__ = [
    "Checkpoint",
    "LayerSparsity",
    "SparsifyConfig",
    "SparsifyReport",
    "SparsityLoss",
    "Step",
    "measure_sparsity",
    "sparsify_",
    "square_hoyer",
]
