"""Which experts a model runs, counted while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.batches import Batch, run, to_device
from sadmoe.dial import converted_layers, gates_of
from sadmoe.forward import is_recomputed
from sadmoe.hooks import LatestCall, calls_seen, uncompiled
from sadmoe.layer import DynamicKMoE, only_input
from sadmoe.modules import device_of, evaluating
from sadmoe.padding import ran, real_rows


@dataclass
class LayerMasks:
    """Counts of one layer. histogram int64 [E + 1]: tokens by their number of experts. rows: with padding."""

    histogram: Tensor
    rows: int = 0

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.histogram.sum())

    @property
    def pairs(self) -> int:
        """Executed (token, expert) pairs: the sum of the masks."""
        return int((self.histogram * torch.arange(len(self.histogram), device="cpu")).sum())

    @property
    def mean_k(self) -> float:
        """Experts per token; nan without tokens."""
        return self.pairs / self.tokens if self.tokens else float("nan")

    @property
    def share(self) -> float:
        """Executed pairs over all pairs; nan without tokens."""
        return self.mean_k / (len(self.histogram) - 1)


class MaskRecord:
    """What `record_masks` counts: `layers`, by name, and their `share` together."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, DynamicKMoE], skip_padding: bool, same_gates: bool
    ):
        self.model, self.skip_padding = model, skip_padding
        self.layers = {
            name: LayerMasks(torch.zeros(layer.experts + 1, dtype=torch.int64, device="cpu"))
            for name, layer in layers.items()
        }
        self._gates = gates_of(layers) if same_gates else {}
        self._batch: Batch = ()
        self._call = LatestCall(model)

    @property
    def share(self) -> float:
        """Executed pairs over all pairs, all layers together; nan without tokens."""
        pairs = sum(counts.tokens * (len(counts.histogram) - 1) for counts in self.layers.values())
        return sum(counts.pairs for counts in self.layers.values()) / pairs if pairs else float("nan")

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[None]:
        """Calls of the model inside are calls with this batch, whose padding is then known."""
        former, self._batch = self._batch, batch
        try:
            yield
        finally:
            self._batch = former

    def _see(self, name: str, layer: DynamicKMoE, args: Any, kwargs: Any) -> None:
        """Counts one call of a layer; of one by true norms, `_see_norms` is told."""
        if not layer.gate.true_norms:
            self._count(name, layer, only_input(args, kwargs), layer.mask)

    def _see_norms(self, name: str, layer: DynamicKMoE, norms: Tensor) -> None:
        """Counts one call of a layer whose gate goes by these norms [..., E]."""
        self._count(name, layer, norms.detach(), layer.gate.mask)

    def _count(self, name: str, layer: DynamicKMoE, values: Tensor, mask: Callable[[Tensor], Tensor]) -> None:
        if is_recomputed() or layer.gate is not self._gates.get(name, layer.gate):
            return
        rows = values.reshape(-1, values.shape[-1])
        counts = self.layers[name]
        counts.rows += len(rows)
        batch = ran(self._batch, self._call.given)
        real = real_rows(self.model, name, batch, values) if self.skip_padding else None
        if layer.runs_all_experts:
            counts.histogram[-1] += len(rows) if real is None else int(real.sum())
            return
        with torch.no_grad():
            k = mask(rows).sum(-1)  # of padding too, as in the pass: a gate may look across tokens
        k = k if real is None else k[real]
        counts.histogram += torch.bincount(k, minlength=layer.experts + 1).cpu()


@contextmanager
def record_masks(
    model: nn.Module, *, skip_padding: bool = True, same_gates: bool = False
) -> Iterator[MaskRecord]:
    """Counts, inside the with block, the experts that every converted layer runs for every token.

        with record_masks(model) as record:
            for batch in batches:
                with record.batch(batch):  # only to leave out its padding
                    model(**batch)
        record.share, record.layers["encoder.layer.0.intermediate"].share

    A router is evaluated once more for it: not for timing. What torch.compile made runs as it was before,
    in the whole process: do not enter it from compiled code.
    skip_padding: see `padding.real_rows`.   same_gates: count only calls under the gates that the layers have at first,
    so that the model may run under `tau(model, 0.0)` in between.
    """
    layers = converted_layers(model)
    record = MaskRecord(model, layers, skip_padding, same_gates)
    with ExitStack() as hooks:
        hooks.enter_context(uncompiled())
        hooks.enter_context(record._call)
        hooks.enter_context(calls_seen(layers, record._see))
        for name, layer in layers.items():
            see_norms = partial(record._see_norms, name, layer)
            layer.norms_hooks.append(see_norms)
            hooks.callback(layer.norms_hooks.remove, see_norms)
        yield record


def experts_per_token(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """How many experts every converted layer runs for every token of one batch: name -> int64, x's shape but the last.

    The model runs once in eval mode. A layer that runs several times counts the last; one that does not is left out.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, layer: DynamicKMoE, args: Any, kwargs: Any) -> None:
        found[name] = layer.mask(only_input(args, kwargs)).sum(-1).cpu()

    layers = converted_layers(model)
    with uncompiled(), calls_seen(layers, see), evaluating(model):
        run(model, to_device(batch, device_of(model)))
    return {name: found[name] for name in layers if name in found}
