"""FFNs of a model: found by structure, read as values, replaced by MoE layers and put back."""

from sadmoe.ffn.activation_swap import activation_at, check_swappable, join_configs, swap_activations_
from sadmoe.ffn.adapters import ADAPTERS
from sadmoe.ffn.configs import configs_in, parted_configs
from sadmoe.ffn.dense import DenseFFN, dense_from_layer, layer_from_dense
from sadmoe.ffn.projection import (
    ProjectionMLP,
    bare_mlps,
    check_originals,
    empty_mlp,
    has_originals,
    original_of,
    projection_mlps,
    put_back_projections,
    stand_in,
)
from sadmoe.ffn.scan import ATTENTION, FFNNotFoundError, Skipped, find_ffns, overlooked, scan_ffns
from sadmoe.ffn.sites import FFNSite, site_from_spec, spec
from sadmoe.ffn.surgery import hooked, moe_layers, replaced_module, site_of, swap_in, swap_out, with_hooks

__all__ = [
    "ADAPTERS",
    "ATTENTION",
    "DenseFFN",
    "FFNNotFoundError",
    "FFNSite",
    "ProjectionMLP",
    "Skipped",
    "activation_at",
    "bare_mlps",
    "check_originals",
    "check_swappable",
    "configs_in",
    "dense_from_layer",
    "empty_mlp",
    "find_ffns",
    "has_originals",
    "hooked",
    "join_configs",
    "layer_from_dense",
    "moe_layers",
    "original_of",
    "overlooked",
    "parted_configs",
    "projection_mlps",
    "put_back_projections",
    "replaced_module",
    "scan_ffns",
    "site_from_spec",
    "site_of",
    "spec",
    "stand_in",
    "swap_activations_",
    "swap_in",
    "swap_out",
    "with_hooks",
]
