"""A converted model and its layers timed beside dense: `sadmoe bench`.

Variants take turns in one process (`timing`); medians and spreads are of a call, on a CUDA device with the wait for it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import run, to_device
from sadmoe.convert import restore_
from sadmoe.data import positions_of
from sadmoe.dial import converted_layers, gates_of, set_gates
from sadmoe.ffn import DenseFFN, dense_from_layer, has_originals
from sadmoe.gates import DynamicK, Gate
from sadmoe.hooks import calls_seen
from sadmoe.layer import DynamicKMoE, only_input
from sadmoe.masks import record_masks
from sadmoe.modules import device_of, evaluating
from sadmoe.tables import format_table
from sadmoe.timing import Timing, measure, waiting

WHOLE = "whole model"
DENSE = -1  # beside the numbers of settings
Gates = dict[str, Gate]


@dataclass(frozen=True)
class Row:
    """One layer, or the whole model, at one tau. tau: None for the gates that the model came with.

    share: executed pairs of the timed tokens.   dense_layers: how many of its layers took the dense path.
    """

    name: str
    tau: float | None
    tokens: int
    share: float
    dense: Timing
    ours: Timing
    layers: int
    dense_layers: int

    @property
    def faster(self) -> float:
        """Dense over ours."""
        return self.dense.median / self.ours.median


def table(rows: Sequence[Row]) -> str:
    """The rows as people read them."""
    header = ("", "tau", "tokens", "executed", "dense ms", "sadmoe ms", "faster", "layers run dense")
    cells = [
        (
            row.name,
            "saved" if row.tau is None else f"{row.tau:g}",
            str(row.tokens),
            f"{row.share:.1%}",
            *(f"{t.median * 1e3:.3f} ±{t.spread:4.0%}" for t in (row.dense, row.ours)),
            f"{row.faster:.2f}x",
            f"{row.dense_layers} of {row.layers}",
        )
        for row in rows
    ]
    return format_table(header, cells)


def random_batch(model: nn.Module, samples: int, length: int) -> dict[str, Tensor]:
    """What a transformers model is called with, at random: [samples, length] token ids, fewer where it has not as many
    positions, or as many images.

    Raises NotImplementedError where the model takes something else.
    """
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    kind = getattr(model, "main_input_name", None)
    sides = getattr(config, "image_size", None)
    sides = (sides, sides) if isinstance(sides, int) else sides
    if kind == "pixel_values" and isinstance(sides, Sequence) and len(sides) == 2:
        size = (samples, getattr(config, "num_channels", 3), *sides)
        dtype = next(model.parameters()).dtype
        return {kind: torch.randn(size, generator=generator, device="cpu").to(dtype)}
    if kind != "input_ids" or not isinstance(getattr(config, "vocab_size", None), int):
        raise NotImplementedError(
            f"{type(model).__name__} takes neither token ids nor images of a size that its config names, so no random "
            "input can be made for it: give --data"
        )
    length = min(length, positions_of(model) or length)
    ids = torch.randint(config.vocab_size, (samples, length), generator=generator, device="cpu")
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder}


def compare(
    model: nn.Module,
    batch: dict[str, Tensor],
    taus: Sequence[float],
    seconds: float = 0.6,
    *,
    progress: bool = False,
) -> list[Row]:
    """Times every layer on what enters it at the model's own gates, then the whole model, at those and at every tau.

    Beside them dense: a copy of the model that `restore_` made dense, and for a layer its FFN by torch's linear layers.
    A model that was loaded does not know the projections of attention that it once had: the MLPs in their place stay.
    seconds: for each variant. The model's gates come back.
    """
    layers, batch = converted_layers(model), to_device(batch, device_of(model))
    saved = gates_of(layers)
    settings: list[tuple[float | None, Gates]] = [(None, saved)]
    settings += [(tau, dict.fromkeys(layers, DynamicK(tau))) for tau in taus]
    try:
        with evaluating(model):
            seen = [_seen(model, layers, batch, gates) for _, gates in settings]
            rows: list[Row] = []
            for name, layer in tqdm(layers.items(), "layers", disable=not progress):
                rows += _compare_layer(name, layer, settings, seen[0].inputs[name], seconds)
            return rows + list(_compare_whole(model, layers, batch, settings, seen, seconds))
    finally:
        set_gates(layers, saved)


@dataclass(frozen=True)
class _Seen:
    """What one run of the model showed: by layer its input [..., d], and the executed share of all layers."""

    inputs: dict[str, Tensor]
    share: float


def _seen(model: nn.Module, layers: dict[str, DynamicKMoE], batch: Any, gates: Gates) -> _Seen:
    set_gates(layers, gates)
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[name] = only_input(args, kwargs)

    with calls_seen(layers, keep), record_masks(model, skip_padding=False) as record:
        run(model, batch)
    if missed := [name for name in layers if name not in inputs]:
        raise ValueError(
            f"the first batch never reaches {', '.join(missed)}: give data whose first batch does"
        )
    return _Seen(inputs, record.share)


def _compare_layer(
    name: str,
    layer: DynamicKMoE,
    settings: list[tuple[float | None, Gates]],
    x: Tensor,
    seconds: float,
) -> Iterator[Row]:
    times = _measure(
        partial(layer, x),
        partial(_linear(dense_from_layer(layer)), x),
        {name: layer},
        settings,
        x.device,
        seconds,
    )
    for i, (tau, gates) in enumerate(settings):
        layer.gate = gates[name]
        share = layer.mask(x).float().mean().item()  # of x, which other tau earlier would have changed
        dense, tokens = layer.takes_dense_path(x), x[..., 0].numel()
        yield Row(name, tau, tokens, share, times[DENSE], times[i], 1, int(dense))


def _compare_whole(
    model: nn.Module,
    layers: dict[str, DynamicKMoE],
    batch: Any,
    settings: list[tuple[float | None, Gates]],
    seen: list[_Seen],
    seconds: float,
) -> Iterator[Row]:
    original = copy.deepcopy(model)
    restore_(original, projections=has_originals(model))

    times = _measure(
        partial(run, model, batch), partial(run, original, batch), layers, settings, device_of(model), seconds
    )
    for i, (tau, gates) in enumerate(settings):
        set_gates(layers, gates)
        tokens = max(x[..., 0].numel() for x in seen[i].inputs.values())
        # On CUDA it takes some calls to know the share by which a path is taken: asked after what was timed.
        dense = sum(layer.takes_dense_path(seen[i].inputs[name]) for name, layer in layers.items())
        yield Row(WHOLE, tau, tokens, seen[i].share, times[DENSE], times[i], len(layers), dense)


def _measure(
    ours: Callable[[], object],
    dense: Callable[[], object],
    layers: dict[str, DynamicKMoE],
    settings: list[tuple[float | None, Gates]],
    device: torch.device,
    seconds: float,
) -> dict[int, Timing]:
    """Of `ours` at each of the settings, and at DENSE of the other. Setting gates is not timed."""

    def choose(which: int) -> None:
        if which != DENSE:
            set_gates(layers, settings[which][1])

    calls = {i: waiting(ours, device) for i in range(len(settings))}
    return measure({**calls, DENSE: waiting(dense, device)}, seconds, before=choose)


def _linear(ffn: DenseFFN) -> Callable[[Tensor], Tensor]:
    """The FFN as a model runs it, by linear layers; DenseFFN itself holds w_down as the transpose."""
    down = ffn.w_down.T.contiguous()
    return lambda x: F.linear(ffn.hidden(x), down, ffn.b_out)
