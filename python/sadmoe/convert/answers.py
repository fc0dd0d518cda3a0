"""What the dense model answers to the first batch, which the converted one must, with every expert on."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sadmoe.batches import Batches, device_of, evaluating, run, to_device
from sadmoe.convert.build import Built
from sadmoe.ffn import swap_in, swap_out
from sadmoe.training.guards import seeded

logger = logging.getLogger(__name__)
ENTRIES = 2**20  # of a tensor, that are compared
# Of relative errors, where products are of 16 bits or less, and of more: rounding makes far smaller ones.
SHORT_TOLERANCE, TOLERANCE = 0.25, 0.05


class Answers:
    """The floating-point tensors that the model returns for the first batch.

    A block is proved by a probe. This proves the model: what its blocks do with an FFN around the probe, too.
    """

    def __init__(self, model: nn.Module, batches: Batches):
        self.model, self.batch = model, to_device(next(iter(batches)), device_of(model))
        short = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        short = short or any(p.dtype.itemsize < 4 for p in model.parameters())
        self.tolerance = SHORT_TOLERANCE if short else TOLERANCE
        self.wanted = self._now()

    def check_same(self, built: Sequence[Built]) -> None:
        """Raises NotImplementedError where the model, its FFNs converted and every expert on, does not run or answers
        otherwise. A dense model that does not answer twice alike proves nothing."""
        kind = type(self.model).__name__
        try:
            same = self._is_same()
        except Exception as error:  # whatever a foreign forward raises; the dense model ran the same batch
            raise NotImplementedError(
                f"this {kind} does not run with MoE layers in the place of its FFNs: {type(error).__name__}: {error}; "
                "leave out those that it is about by ConvertConfig(filter=...)"
            ) from error
        if same:
            return
        for one in built:
            swap_out(self.model, one.site.name)
        if not self._is_same():
            logger.warning(
                "this %s does not answer twice alike, so the converted one is not compared with it", kind
            )
            for one in built:
                swap_in(self.model, one.site, one.layer)
            return
        guilty = []
        for one in built:
            swap_in(self.model, one.site, one.layer)
            guilty += [] if self._is_same() else [one.site.name]
            swap_out(self.model, one.site.name)
        raise NotImplementedError(
            f"this {kind} answers otherwise with an MoE layer in the place of {', '.join(guilty) or 'its FFNs'}, every "
            "expert on: more happens between the linear layers there than an activation, or in hooks; leave those out "
            "by ConvertConfig(filter=...), or remove their hooks"
        )

    def _now(self) -> list[Tensor]:
        with evaluating(self.model), seeded(self.model, 0):
            leaves = tree_leaves(run(self.model, self.batch))
        floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and not t.is_sparse]
        return [_some(t) for t in floats]

    def _is_same(self) -> bool:
        found = self._now()
        alike = [len(t) for t in found] == [len(t) for t in self.wanted]
        return alike and all(map(self._close, found, self.wanted))

    def _close(self, found: Tensor, wanted: Tensor) -> bool:
        known = wanted.isfinite()
        wrong = torch.where(known, found - wanted, 0).norm()
        return bool(wrong <= self.tolerance * torch.where(known, wanted, 0).norm())


def _some(t: Tensor) -> Tensor:
    """Entries at even distances, ENTRIES at most, as float32: all logits of a language model may be too many."""
    flat = torch.cat([part.flatten() for part in t.unbind()]) if t.is_nested else t.flatten()
    n = min(len(flat), ENTRIES)
    return flat[torch.arange(n, device=t.device) * len(flat) // max(n, 1)].float()
