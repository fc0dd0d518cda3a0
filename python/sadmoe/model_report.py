"""`sadmoe report`: everything about one converted model on one page."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from sadmoe.batches import Batch, run, samples_in, to_device
from sadmoe.data import SHOWN, Data, positions_of, words_of
from sadmoe.dial import converted_layers
from sadmoe.evaluate import Point, header
from sadmoe.gates import DynamicK, Gate
from sadmoe.layer import DynamicKMoE
from sadmoe.masks import experts_per_token, record_masks
from sadmoe.modules import device_of, evaluating, is_encoder_decoder
from sadmoe.report import Heat, Page, Panel, Series
from sadmoe.tables import si
from sadmoe.timing import machine

SAMPLES = {"text": "texts", "pairs": "pairs of texts", "images": "images", "python": "samples"}
WIDEST = 300  # tokens of an image in a heat map
NOTES = {  # by what errors are relative to
    "dense": "error: of the last hidden states or logits, |y - y0| / |y0|, y0 those of the dense model.",
    "tau 0": "error: of the last hidden states or logits, |y - y0| / |y0|, y0 those at tau = 0. What training changed "
    "is not in it: --dense names the model to compare with.",
}


def report_page(model: nn.Module, data: Data, points: Sequence[Point], heats: Sequence[Heat]) -> Page:
    """The page of a converted transformers model: `points` are from `evaluate`, `heats` from `heats_of`, the rest is as
    its gates stand now."""
    layers = converted_layers(model)
    samples = 0
    with record_masks(model) as record, evaluating(model):
        for batch in tqdm(data.batches, "experts"):
            samples += samples_in(batch)
            with record.batch(batch):
                run(model, to_device(batch, device_of(model)))
    now = told([layer.gate for layer in layers.values()])
    parameters = sum(p.numel() for p in model.parameters())
    return Page(
        title=f"{type(model).__name__}, converted",
        facts={
            "parameters": si(parameters),
            "converted": f"{len(layers)} layers of {_sizes(layers)}",
            "as saved": now,
            "data": f"{samples} {SAMPLES[data.kind]}",
            "machine": f"{machine()}, {device_of(model)}",
        },
        table=(header(points[0].base), [point.cells() for point in points]),
        notes=(NOTES[points[0].base],),
        panels=_panels(points),
        heats=heats,
        histograms={
            name: counts.histogram.tolist()
            for name, counts in zip(short_names(record.layers), record.layers.values(), strict=True)
        },
    )


def told(gates: Sequence[Gate]) -> str:
    """The gates of all layers, in words."""
    taus = sorted({gate.tau for gate in gates if isinstance(gate, DynamicK)})
    if len(set(gates)) == 1:
        return f"tau {taus[0]:g}" if taus else str(gates[0])
    alike = all(isinstance(gate, DynamicK) for gate in gates)
    return f"a tau for each layer, {taus[0]:g} to {taus[-1]:g}" if alike else "gates of several kinds"


def short_names(names: Iterable[str]) -> list[str]:
    """The names without the modules that they all are in."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return [".".join(path[shared:]) for path in paths]


def _panels(points: Sequence[Point]) -> list[Panel]:
    ordered = sorted(points, key=lambda point: -point.share)
    labels = ["as saved" if point.tau is None else f"tau {point.tau:g}" for point in ordered]
    errors = [point.error for point in ordered]
    whole, ffns = [100 * p.flops for p in ordered], [100 * p.ffn_flops for p in ordered]
    costs = [Series("whole model", whole, errors, labels), Series("converted layers", ffns, errors, labels)]
    gains = [Series("whole model", [p.gain for p in ordered], errors, labels)]
    return [
        Panel("FLOPs", "executed FLOPs, % of dense", "error", costs, "lower left"),
        Panel(
            "Wall time",
            f"times faster than {points[0].base}",
            "error",
            gains,
            "lower right",
        ),
    ]


def heats_of(model: nn.Module, data: Data, sentence: str | None = None) -> list[Heat]:
    """What share of the experts each token of a sample runs, as the gates stand now: of the sentence, where the model
    takes text, or of the data's first sample; [] where it has none. Raises ValueError where the sentence has no tokens.
    """
    now = told([layer.gate for layer in converted_layers(model).values()])
    heading = f"Experts of each token at {now}"
    if data.first is None:
        return []
    if data.kind == "images":
        counts = Counter(k.numel() for k in experts_per_token(model, data.first).values())
        ((tokens, _),) = counts.most_common(1)
        many = f", the first {WIDEST} of {tokens}" if tokens > WIDEST else ""
        heading = f"Experts of each token of the first image{many} at {now}"
        heat = layer_heat(heading, model, data.first, [str(i) for i in range(tokens)])
        rows = [values[:WIDEST] for values in heat.values]
        return [replace(heat, values=rows, columns=heat.columns[:WIDEST])]
    if sentence is not None:
        return [sentence_heat(heading, model, data.processor, sentence)]
    return [layer_heat(heading, model, data.first, data.words)]


def layer_heat(heading: str, model: nn.Module, batch: Batch, labels: Sequence[str]) -> Heat:
    """The executed share of every layer for every token of a batch of one sample, one label a token, as gates stand.

    Layers that see other tokens are left out: in an encoder-decoder those of the decoder.
    """
    layers = converted_layers(model)
    two_sided = is_encoder_decoder(model)
    counts = {
        name: k.flatten()
        for name, k in experts_per_token(model, batch).items()
        if k.numel() == len(labels) and not (two_sided and "decoder" in name.split("."))
    }
    values = [[float(v) / layers[name].experts for v in k] for name, k in counts.items()]
    return Heat(heading, values, short_names(counts), labels)


def sentence_heat(heading: str, model: nn.Module, tokenizer: Any, sentence: str) -> Heat:
    """The same for the tokens of a sentence, the first SHOWN."""
    longest = min(SHOWN, positions_of(model) or SHOWN)
    batch = dict(tokenizer(sentence, truncation=True, max_length=longest, return_tensors="pt"))
    if batch["input_ids"].numel() == 0:
        raise ValueError(f"the sentence has no tokens: {sentence!r}")
    words = words_of(tokenizer, batch["input_ids"][0])
    return layer_heat(heading, model, to_device(batch, device_of(model)), words)


def _sizes(layers: Mapping[str, DynamicKMoE]) -> str:
    sizes = dict.fromkeys(f"{layer.experts} x {layer.expert_size}" for layer in layers.values())
    return ", ".join(sizes)
