"""Converted models for the tests, made without partition and without training."""

import torch
from sadmoe.ffn import find_ffns, layer_from_dense, swap_in
from sadmoe.layer import DynamicKMoE
from tiny_models import TINY
from torch import Tensor, nn


def converted(name: str, experts: int = 6, router_width: int = 16) -> nn.Module:
    """A tiny model with every FFN cut into experts at random, its routers random."""
    model = TINY[name].model()
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    for site in find_ffns(model):
        dense = site.dense()
        slots = torch.randperm(dense.f, generator=generator)
        swap_in(model, site, layer_from_dense(dense, slots, experts, router_width).eval())
    return model


def random_layer(d: int = 24, experts: int = 8, expert_size: int = 5, act: str = "relu", **kw) -> DynamicKMoE:
    """One layer of random weights with every bias that fits."""
    bias = ("b_up", "b_out") + (("b_gate",) if kw.get("gated") else ())
    layer = DynamicKMoE(d, experts, expert_size, act, bias=bias, **kw)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return layer


def random_rows(n: int, d: int = 24, seed: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
