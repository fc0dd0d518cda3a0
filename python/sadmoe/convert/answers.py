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
TOLERANCE = {
    2: 0.25,
    4: 0.01,
    8: 0.01,
}  # of relative errors, by bytes of the weights: rounding makes far smaller ones


class Answers:
    """All floating-point tensors that the model returns for the first batch.

    A block is proved by a probe. This proves the model: what its blocks do with an FFN around the probe, too.
    """

    def __init__(self, model: nn.Module, batches: Batches):
        self.model, self.batch = model, to_device(next(iter(batches)), device_of(model))
        self.tolerance = TOLERANCE[min(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())]
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
            output = run(self.model, self.batch)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def _is_same(self) -> bool:
        found = self._now()
        if [t.shape for t in found] != [t.shape for t in self.wanted]:
            return False
        return all(self._close(t, wanted) for t, wanted in zip(found, self.wanted, strict=True))

    def _close(self, found: Tensor, wanted: Tensor) -> bool:
        known = wanted.isfinite() & found.isfinite()
        wrong = torch.where(known, found.float() - wanted.float(), 0).norm()
        return bool(wrong <= self.tolerance * torch.where(known, wanted.float(), 0).norm())
