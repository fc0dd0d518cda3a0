"""Sparsity enforcement: fine-tuning a dense model so that fewer of its neurons are active (arXiv
2310.04361, 3.1)."""

from sadmoe.sparsify.loop import SparsifyConfig, SparsifyReport, Step, sparsify_
from sadmoe.sparsify.penalty import LayerSparsity, SparsityLoss, measure_sparsity, square_hoyer

__all__ = [
    "LayerSparsity",
    "SparsifyConfig",
    "SparsifyReport",
    "SparsityLoss",
    "Step",
    "measure_sparsity",
    "sparsify_",
    "square_hoyer",
]
