"""Layers with costs that a test makes up, by which they choose their path."""

import torch
from converted import random_layer, random_rows
from sadmoe import paths, reference
from sadmoe.gates import DynamicK
from sadmoe.measured import Costs

CPU = torch.device("cpu")
ALWAYS_DENSE, NEVER_DENSE = {1: ((0.01, 50.0),)}, {1: ((1.0, 0.01),)}
HALF = {1: ((0.25, 0.6), (0.75, 1.4))}  # as fast at an executed share of a half


def give(layer, curves, device=CPU, every_expert=None):
    """Makes `curves` what was measured of the layer's shape, and of every expert at tau = 0."""
    dtype = paths.dtype_name(layer.w_up.dtype)
    paths.use_costs([Costs(paths.device_name(device), dtype, layer.shape, 1, curves, every_expert or {})])


def layer_of(dtype=torch.float32, tau=0.3, **kw):
    layer = random_layer(gate=DynamicK(tau), **kw).to(dtype).eval()
    give(layer, ALWAYS_DENSE)
    return layer


def choosing_on_cuda():
    """A layer on a CUDA device that chooses its path by the share of earlier calls, and tokens for it."""
    layer = layer_of(torch.bfloat16, d=64, experts=16, expert_size=16).cuda()
    layer.batch_invariant = False
    x = random_rows(100, 64).bfloat16().cuda()
    give(layer, HALF, x.device)
    return layer, x


def by_hand(layer, x):
    mask = layer.gate.mask(layer.router(x))
    return reference.sparse_experts(x, mask, *layer.expert_weights(), act=layer.act)
