"""Bias correction: what skipped experts would have added on average goes into the output bias. Nothing is trained."""

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sadmoe.batches import Batches
from sadmoe.checks import named
from sadmoe.dial import check_own_weights, check_parameters, converted_layers
from sadmoe.gradients import without_autocast
from sadmoe.inputs import Place, stream_inputs
from sadmoe.layer import DynamicKMoE
from sadmoe.modules import evaluating
from sadmoe.tables import shortened
from sadmoe.training.guards import seeded

logger = logging.getLogger(__name__)
CHUNK = 4096  # tokens that are computed at once


def correct_bias_(
    model: nn.Module,
    batches: Batches,
    *,
    max_tokens: int = 20_000,
    skip_padding: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Adds to the output bias of every converted layer that skips experts what these would have added, the mean over
    tokens, in place. Returns by layer the share of the squared error of its output that this took away.

    For models that were converted and not fine-tuned: fine-tuning does the same and more, and after it this loses. It
    takes the gates as they stand, so first set tau, or calibrate: it holds for that tau, and at tau = 0 the model is
    then not the dense one. Like fine-tuning it stays in what `restore_` gives, and in no adapter file.
    Layer after layer, on what enters it where those before it are corrected: the model runs over the batches once for
    each. Layers without an output bias are left as they are, with a warning.

    batches: as in `convert_`; in several processes each must be given the same.   max_tokens, skip_padding, seed: of
    the tokens of each layer, see `stream_inputs`.
    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2, of rounded weights; here of skipped experts.
    Raises ValueError where nothing is converted, every layer runs all experts, weights of a layer are not just its own,
    or what enters is nothing or not finite, NotImplementedError where no such layer has an output bias. Whatever is
    raised, the model is as it was.
    """
    layers = converted_layers(model)
    check_own_weights(model, layers)
    check_parameters(layers)
    skipping = {name: layer for name, layer in layers.items() if not layer.runs_all_experts}
    if not skipping:
        raise ValueError("every expert runs, so nothing is to be corrected: set_tau or calibrate_ first")
    biased = {name: layer for name, layer in skipping.items() if layer.b_out is not None}
    if not biased:
        raise no_bias(model)
    if without := [name for name in skipping if name not in biased]:
        logger.warning("not corrected, for they have no output bias: %s", ", ".join(shortened(without, 5)))
    sites, taken = [Place(name, layer) for name, layer in biased.items()], {}
    with seeded(model, seed), ExitStack() as undo:  # a DataLoader may draw
        stream = stream_inputs(
            model, sites, batches, max_tokens=max_tokens, max_bytes=1, seed=seed, skip_padding=skip_padding,
            progress=progress,
        )  # fmt: skip
        for name, x in stream:
            with named(name), without_autocast(x.device):
                mean, taken[name] = _missed(biased[name], x)
            bias: Any = biased[name].b_out
            undo.callback(bias.data.copy_, bias.detach().clone())
            bias.data.add_(mean.to(bias.dtype))
            torch.clear_autocast_cache()  # of an autocast around all this
        undo.pop_all()
    return {name: taken[name] for name in biased}


def no_bias(model: nn.Module) -> NotImplementedError:
    """Of a model in which there is nothing to correct."""
    return NotImplementedError(f"no FFN of this {type(model).__name__} has an output bias to correct")


def _missed(layer: DynamicKMoE, x: Tensor) -> tuple[Tensor, float]:
    """Of inputs x [n, d], the mean [d_out] of what skipped experts would have added, in float64, and its share of their
    squared error; 0 without error."""
    if not len(x):
        raise ValueError("no token of these batches reaches it, padding left out: pass more batches")
    bias: Any = layer.b_out
    total, squares = torch.zeros((), dtype=torch.float64, device=x.device), 0.0
    with evaluating(layer):
        for part in x.to(bias.dtype).split(CHUNK):
            missed = (layer.dense(part) - layer(part)).double()
            total = total + missed.sum(0)
            squares += missed.square().sum().item()
    mean = total / len(x)
    if not mean.isfinite().all():
        raise ValueError("not every output is finite; look for NaN or inf in inputs or weights")
    return mean, len(x) * mean.square().sum().item() / squares if squares > 0 else 0.0
