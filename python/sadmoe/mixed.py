"""Training in bfloat16 where that is faster."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn

from sadmoe.modules import device_of


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
    usual = [part.config._attn_implementation for part in parts]
    try:
        for part in parts:
            part.set_attn_implementation("eager")
        yield
    finally:
        for part, implementation in zip(parts, usual, strict=True):  # the outer first: it sets those inside
            part.set_attn_implementation(implementation)


@cache
def bf16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32; asked once in a process."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(size, dtype=dtype, device="cpu") for size in ((768, 384), (384, 1536)))
        samples = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            samples.append(time.perf_counter() - started)
        seconds.append(median(samples))
    return seconds[1] < 0.8 * seconds[0]
