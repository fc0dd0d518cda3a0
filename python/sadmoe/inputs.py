"""What enters each FFN while a model runs: a uniform sample of its tokens, in bounded memory."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import NOTHING_AGAIN, Batches, check_batches, length, run, to_device
from sadmoe.hooks import calls_seen, hooks_on, uncompiled
from sadmoe.modules import device_of, evaluating
from sadmoe.padding import real_rows, rows_of
from sadmoe.randomness import seeded

CHUNK = 4096  # tokens whose outputs are computed at once, of samples that are held whole


def count_rows(
    model: nn.Module,
    modules: Iterable[nn.Module],
    batches: Iterable[Any],
    around: AbstractContextManager[Any] | None = None,
) -> dict[nn.Module, int]:
    """The rows that leave each of the modules, linear layers, while the model runs the batches, each in `around`."""
    rows = dict.fromkeys(modules, 0)

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        rows[module] += len(rows_of(output))

    with hooks_on(module.register_forward_hook(count) for module in rows), evaluating(model):
        for batch in batches:
            batch = to_device(batch, device_of(model))
            with around or nullcontext():
                run(model, batch)
    return rows


def stream_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Batches,
    *,
    max_tokens: int,
    max_bytes: int = 2**30,
    seed: int = 0,
    skip_padding: bool = True,
    skip_unreached: bool = False,
    progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, inputs [n, d]) module after module: a uniform sample of at most max_tokens of the tokens.

    The model runs over `batches` in eval mode without gradients, once for as many modules as fit in max_bytes
    together (at least one), so that inputs that were used can be freed before the next pass.
    Modules that see the same tokens sample the same ones, also in another pass: random numbers begin each anew, so that
    a DataLoader that shuffles gives the same. skip_padding: leave padding out (see
    `padding.real_rows`). skip_unreached: leave out modules that are never run; else they raise ValueError. Inputs come
    in the dtype of the module's weights, where the model runs under an autocast of its own.
    """
    check_batches(batches)
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, to hold some out, got {max_tokens}")
    waiting = dict(modules)
    while waiting:
        collector = _Collector(model, max_tokens, max_bytes, seed, skip_padding)
        with seeded(model, seed):
            samples = _one_pass(collector, waiting, batches, progress)
        if collector.batch is None:
            raise ValueError(NOTHING_AGAIN)
        missed = [name for name in waiting if name not in samples and name not in collector.refused]
        if missed and not skip_unreached:
            raise ValueError(
                f"the batches never reach {', '.join(missed)}: pass batches that run every FFN, or leave out those "
                "that they never run, by the filter of a config (--only)"
            )
        waiting, done = {name: modules[name] for name in waiting if name in collector.refused}, waiting
        for name in done:
            if name in samples:
                yield name, samples.pop(name).rows


def held_out_and_batches(
    name: str, whole: dict[str, Tensor], batch_tokens: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Tensors of equal length as the first tenth of their rows, and the rest in batches of about batch_tokens, all of
    the same length, give or take one, so that every token counts alike. Raises ValueError, by that name, where there is
    no row to hold out beside one."""
    rows = len(next(iter(whole.values())))
    if rows < 2:
        raise ValueError(f"{name} needs at least 2 tokens, one to hold out, got {rows}: pass more batches")
    held_out = max(1, rows // 10)
    test = {key: value[:held_out] for key, value in whole.items()}
    parts = max(1, round((rows - held_out) / batch_tokens))
    chunks = zip(*(value[held_out:].tensor_split(parts) for value in whole.values()), strict=True)
    return test, [dict(zip(whole, chunk, strict=True)) for chunk in chunks]


class _Sample:
    """A uniform sample without replacement of the rows that went by, in one buffer of fixed size.

    Every row draws a key and the rows of the smallest keys stay: equal seeds and counts make equal choices.
    """

    def __init__(self, size: int, rows: Tensor, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self.buffer = torch.empty(size, rows.shape[-1], dtype=rows.dtype, device=rows.device)

    @property
    def rows(self) -> Tensor:
        return self.buffer[: len(self.keys)]

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64, device="cpu")
        start = len(self.keys)
        fits = min(len(self.buffer) - start, len(rows))
        self.buffer[start : start + fits] = rows[:fits]
        self.keys = torch.cat([self.keys, keys[:fits]])
        if fits < len(rows):
            self._replace(rows[fits:], keys[fits:])

    def _replace(self, rows: Tensor, keys: Tensor) -> None:
        size = len(self.buffer)
        everyone = torch.cat([self.keys, keys])
        stays = torch.zeros(len(everyone), dtype=torch.bool, device="cpu")
        stays[everyone.topk(size, largest=False, sorted=False).indices] = True
        leaving, entering = (~stays[:size]).nonzero().squeeze(1), stays[size:].nonzero().squeeze(1)
        self.buffer[leaving.to(rows.device)] = rows[entering.to(rows.device)]
        self.keys[leaving] = keys[entering]


@dataclass
class _Collector:
    """The samples of one pass; a module whose buffer does not fit in what is left of max_bytes waits."""

    model: nn.Module
    max_tokens: int
    max_bytes: int
    seed: int
    skip_padding: bool
    samples: dict[str, _Sample] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    batch: Any = None

    def see(self, name: str, x: Tensor) -> None:
        if name in self.refused:
            return
        real = real_rows(self.model, name, self.batch, x) if self.skip_padding else None
        rows = rows_of(x)
        if name not in self.samples:
            used = sum(sample.buffer.nbytes for sample in self.samples.values())
            if (
                self.samples
                and used + self.max_tokens * rows.shape[-1] * rows.element_size() > self.max_bytes
            ):
                self.refused.add(name)
                return
            self.samples[name] = _Sample(self.max_tokens, rows, self.seed)
        self.samples[name].add(rows if real is None else rows[real])


def _one_pass(
    collector: _Collector, modules: Mapping[str, nn.Module], batches: Batches, progress: bool
) -> dict[str, _Sample]:
    def see(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        weight: Any = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x = x.to(weight.dtype)
        collector.see(name, x)

    device = device_of(collector.model)
    with uncompiled(), calls_seen(modules, see), evaluating(collector.model):
        for batch in tqdm(batches, "inputs", length(batches), disable=not progress):
            collector.batch = to_device(batch, device)
            run(collector.model, collector.batch)
    return collector.samples
