"""Sparsity enforcement: fine-tuning a dense model so that fewer of its neurons are active (arXiv
2310.04361, 3.1)."""

from sadmoe.sparsify.config import SparsifyConfig
from sadmoe.sparsify.penalty import LayerSparsity, SparsityLoss, measure_sparsity, square_hoyer
from sadmoe.sparsify.run import SparsifyReport, sparsify_

__all__ = [
    "LayerSparsity",
    "SparsifyConfig",
    "SparsifyReport",
    "SparsityLoss",
    "measure_sparsity",
    "sparsify_",
    "square_hoyer",
]
