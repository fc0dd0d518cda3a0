"""Masks [T, E] that no router made: popular experts, runs of like tokens, and those that a converted model used."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from layer_problem import LayerShape
from safetensors import safe_open
from torch import Tensor

RUN = 16  # neighbouring tokens of a cluster


def skewed(T: int, E: int, share: float) -> Tensor:
    """Expert e runs with a probability like 1 / (e + 1), cut at 1, of mean share; experts in random order."""
    g = torch.Generator().manual_seed(T)
    popularity = 1 / torch.arange(1, E + 1)
    low, high = 0.0, E / popularity.min().item()
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (low, scale) if (scale * popularity).clamp(max=1).mean() > share else (scale, high)
    chances = (high * popularity).clamp(max=1)[torch.randperm(E, generator=g)]
    return torch.rand(T, E, generator=g) < chances


def clustered(T: int, E: int, share: float) -> Tensor:
    """Tokens in runs of 16 that start from the same experts, a tenth of which each token draws anew."""
    g = torch.Generator().manual_seed(T)
    common = (torch.rand(-(-T // RUN), E, generator=g) < share).repeat_interleave(RUN, 0)[:T]
    return torch.where(torch.rand(T, E, generator=g) < 0.1, torch.rand(T, E, generator=g) < share, common)


@cache
def _names(path: Path, layer: LayerShape) -> list[str]:
    """The layers of the file with this shape; says once where there are none."""
    wanted = layer.text
    with safe_open(path, "pt") as file:
        shapes = file.metadata()
    if wanted not in shapes.values():
        print(f"{path} has no masks of {wanted}, only of {', '.join(sorted(set(shapes.values())))}: left out")
    return sorted(name for name, shape in shapes.items() if shape == wanted)


def recorded_shapes(path: Path) -> list[LayerShape]:
    """Those of the layers in the file."""
    with safe_open(path, "pt") as file:
        return [LayerShape.of_text(text) for text in sorted(set(file.metadata().values()))]


def recorded(path: Path, layer: LayerShape, T: int) -> Iterator[tuple[str, Tensor]]:
    """By name, the first T tokens of each layer in the file with this shape; fewer are repeated."""
    with safe_open(path, "pt") as file:
        for name in _names(path, layer):
            mask = file.get_tensor(name).bool()
            yield name, mask[torch.arange(T) % len(mask)]
