"""FFNs of a model: found by structure, read as values, replaced by MoE layers and put back."""

from sadmoe.ffn.adapters import ADAPTERS
from sadmoe.ffn.dense import DenseFFN, dense_from_layer, layer_from_dense
from sadmoe.ffn.scan import FFNNotFoundError, Skipped, find_ffns, scan_ffns
from sadmoe.ffn.sites import FFNSite, Parts, site_from_spec, spec
from sadmoe.ffn.surgery import moe_layers, site_of, swap_in, swap_out
from sadmoe.ffn.swap import swap_activations_

__all__ = [
    "ADAPTERS",
    "DenseFFN",
    "FFNNotFoundError",
    "FFNSite",
    "Parts",
    "Skipped",
    "dense_from_layer",
    "find_ffns",
    "layer_from_dense",
    "moe_layers",
    "scan_ffns",
    "site_from_spec",
    "site_of",
    "spec",
    "swap_activations_",
    "swap_in",
    "swap_out",
]
