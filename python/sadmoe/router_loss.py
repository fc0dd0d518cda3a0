"""The routers' regression as a term of a training loss of the user's own. Source: arXiv 2310.04361, section 3."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe import reference
from sadmoe.dial import trainable_layers
from sadmoe.forward import without_autocast
from sadmoe.hooks import calls_seen
from sadmoe.layer import DynamicKMoE, only_input
from sadmoe.modules import device_of, refuse_compiled
from sadmoe.padding import ran, real_part, refuse_mask
from sadmoe.passes import PassesLoss
from sadmoe.routers import RouterConfig, power_of
from sadmoe.weights import check_no_adapters

EQUAL = 1e-9  # of a layer's SSE: an SST below it is rounding, of norms that are all equal


class RouterLoss(PassesLoss):
    """How badly the routers predict their experts' output norms, from the forward pass of the user's own loop.

        with RouterLoss(model) as routers, sadmoe.tau(model, 0.0):
            optimizer = torch.optim.AdamW(routers.weights, lr=1e-3)
            for batch in batches:
                with torch.no_grad():
                    model(**batch)
                routers(batch).backward()
                optimizer.step()
                optimizer.zero_grad()

    Calling it gives the mean over layers of SSE / SST, which is 1 - R² on the tokens of the passes since the last call,
    of targets norm ** target_power (see `RouterConfig`; None: each router's own; a router remembers what it was trained
    for), and forgets those passes. Layers whose norms are all equal there, such as silent ones, say nothing and are
    left out. Its gradient reaches the routers alone: what enters a layer and the norms are constants in it, so a pass
    under no_grad will do, and added to a task's loss it trains routers beside experts. It is computed without autocast,
    errors in float32, and computes each layer's up projection once more. At tau = 0 inputs are those of the dense
    model, which is what `fit_routers_` fits to.

    weights: the routers' parameters; inside the `with` they ask for gradients, afterwards as they did before.
    Keeps what enters every layer until it is called.
    Raises ValueError where nothing was converted, the model is compiled, a layer is inside an adapter, experts are in
    int8, beside which routers are in 16 bits, or target_power is not in (0, 2].
    """

    _called = "routers"

    def __init__(self, model: nn.Module, *, target_power: float | None = None):
        refuse_compiled(model)
        super().__init__(model)
        self.layers = trainable_layers(model)
        check_no_adapters(model, self.layers)
        self.target_power = RouterConfig(target_power=target_power).target_power  # which is checked
        self.weights = [v for layer in self.layers.values() for v in layer.router.parameters()]

    @contextmanager
    def _watching(self) -> Iterator[None]:
        asked = [v.requires_grad for v in self.weights]
        try:
            for v in self.weights:
                v.requires_grad_()
            with calls_seen(self.layers, self._record):
                yield
        finally:
            for v, before in zip(self.weights, asked, strict=True):
                v.requires_grad_(before)

    def __call__(self, batch: Mapping[str, Any] | None = None) -> Tensor:
        """The mean over layers of 1 - R²: a scalar, float32; 0 where no layer says anything.

        batch: what the model was called with in all those passes, whose "attention_mask" says which tokens are real (in
        an encoder-decoder also "decoder_attention_mask"). None: all are.
        Raises RuntimeError where no pass came before, TypeError for a mask alone.
        """
        refuse_mask(batch, "batch")
        seen = self._taken()
        parts = [
            _unexplained(
                layer,
                torch.cat(
                    [real_part(self.model, name, ran(batch, one.given), one.value) for one in seen[name]]
                ),
                self.target_power,
            )
            for name, layer in self.layers.items()
            if name in seen
        ]
        device = device_of(self.model)  # of one that lies on several, the first
        errors, around = (torch.stack([one.to(device) for one in sums]) for sums in zip(*parts, strict=True))
        told = around > EQUAL * errors.detach()
        loss = (errors * told / around.where(told, 1)).sum() / told.sum().clamp(min=1)
        if loss.requires_grad and self.target_power is not None:  # they are trained for it
            for name in seen:
                self.layers[name].router.target_power = self.target_power
        return loss

    def _record(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self._note(name, only_input(args, kwargs).detach().clone())  # which the model may write to


def _unexplained(layer: DynamicKMoE, rows: Tensor, power: float | None) -> tuple[Tensor, Tensor]:
    """SSE of the router and SST of its targets over (token, expert) pairs."""
    rows = rows.to(layer.w_up.dtype)
    with without_autocast(rows.device):
        targets = layer.expert_norms(rows).pow(power_of(layer.router, power))
        v1, v2 = (v.float() for v in (layer.router.v1, layer.router.v2))
        errors = reference.router_scores(rows.float(), v1, v2) - targets
        return errors.square().sum(), (targets - targets.mean()).square().sum()
