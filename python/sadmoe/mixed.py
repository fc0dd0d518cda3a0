"""Training in bfloat16 where that is faster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from sadmoe.modules import device_of
from sadmoe.timing import measure


@contextmanager
def fast_training(*models: nn.Module) -> Iterator[None]:
    """Autocast to bfloat16, on a CPU only where that is faster; there also attention of transformers without the fused
    kernel, whose backward is slow in it. A caller's own autocast, and a model in float16, which bfloat16 does not mix
    with, stay as they are."""
    device = device_of(models[0]).type
    half = any(p.dtype == torch.float16 for model in models for p in model.parameters())
    faster = not half and not torch.is_autocast_enabled(device) and (device != "cpu" or bf16_is_faster())
    with (
        torch.autocast(device, torch.bfloat16) if faster else nullcontext(),
        _eager_attention(models) if device == "cpu" else nullcontext(),
    ):
        yield


@contextmanager
def _eager_attention(models: Sequence[nn.Module]) -> Iterator[None]:
    parts: list[Any] = [
        part for model in models for part in model.modules() if hasattr(part, "set_attn_implementation")
    ]

    def configs() -> list[Any]:  # training may give a model others
        return [config for part in parts for config in _with_parts(part.config)]

    usual = [config._attn_implementation for config in configs()]
    try:
        for part in parts:
            with suppress(ValueError, NotImplementedError):  # of one that cannot
                part.set_attn_implementation("eager")
        yield
    finally:
        # The outer first: it sets those inside.
        for config, implementation in zip(configs(), usual, strict=True):
            config._attn_implementation = implementation


def _with_parts(config: Any) -> Iterator[Any]:
    """It, and the configs in it."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)


@cache
def bf16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32; asked once in a process."""
    products: dict[torch.dtype, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(size, dtype=dtype, device="cpu") for size in ((768, 384), (384, 1536)))
        products[dtype] = partial(torch.mm, a, b)
    times = measure(products, seconds=0.0)
    return times[torch.bfloat16].median < 0.8 * times[torch.float32].median
