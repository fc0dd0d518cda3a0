"""The model types of transformers that take text, an image or sound: what sadmoe converts of them, and if it works.

    python bench/architectures.py [TYPE ...] [--out FOLDER]

A random model of each type, made small by the names of its configuration's sizes, in a process of its own. Held to:

  converted   FFNs that are now experts of 8 neurons, of those that ran or were refused; the refused are listed below
  tau 0       largest difference to the dense outputs, relative to the largest of them
  tau 0.5     share of the experts that ran; all outputs must be finite
  loaded      the converted model, saved and loaded by plain transformers, gives its outputs bit for bit; "-": the
              dense model, saved and loaded, does not give its own
  restored    restore_ gives the dense outputs bit for bit

Types that have experts of their own, other inputs, or do not run when made small, are not tried. Towers for inputs that
were not given stay dense. One whose FFN is then as wide as the model counts as one without: sadmoe takes it for none.
Writes architectures.json and architectures.md.
"""

import copy
import inspect
import json
import multiprocessing
import re
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import command
import sadmoe
import torch
import transformers
from sadmoe.ffn import scan_ffns
from sadmoe.inputs import stream_inputs
from sadmoe.tables import format_table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

HEADS = (
    *(
        "IMAGE_TEXT_TO_TEXT",
        "SPEECH_SEQ_2_SEQ",
        "CTC",
        "AUDIO_CLASSIFICATION",
        "SEQ_TO_SEQ_CAUSAL_LM",
        "CAUSAL_LM",
        "MASKED_LM",
    ),
    *("IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION"),
)
SOUNDS, BANDS = (
    ("input_features", "input_values"),
    ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"),
)
IMAGE_TOKEN = 4
TOKEN_IDS = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "decoder_start"))}
TOKEN_IDS |= {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
VOCABULARY, TOKENS, PIXELS, EXPERT = 100, 12, 64, 8
CLOSE = 1e-4
SIZES: list[tuple[str, Callable[[int], int]]] = [  # the first name that fits: what becomes of its size
    (r"type_vocab|num_labels|num_channels|in_chans|feat_extract|mel_bins", lambda n: n),
    (r"vocab|num_embeddings", lambda n: min(n, VOCABULARY)),
    (r"(key_value|kv)_heads|num_kv", lambda n: min(n, 2)),
    (r"heads?$", lambda n: min(n, 4)),
    (r"head_dim|d_kv|head_size|rope_dim|rotary_dim|attention_size", lambda n: min(n, 8)),
    (r"(layers?|depth|blocks|n_layer)$", lambda n: min(n, 2)),
    (r"rank|group|n_mamba|d_state|state_size|d_conv", lambda n: min(n, 8)),
    (
        r"intermediate|ffn|ff_dim|d_ff|mlp_(dim|hidden)|n_inner|d_inner|feed_?forward|^hidden_dim$",
        lambda n: min(n, 64),
    ),
    (r"image_size|img_size", lambda n: min(n, PIXELS)),
    (r"patch_size", lambda n: min(n, 8)),
    (r"window", lambda n: min(n, 2)),
    (r"max_pos|n_positions|seq|n_ctx|max_len|position_emb", lambda n: min(n, 64)),
    (r"hidden|d_model|n_embd|emb|dim$|width|channels|_size$", lambda n: min(n, 32)),
]


class NotTried(Exception):
    """The type is none for this bench, and why."""


def small(config: PretrainedConfig) -> dict[str, Any]:
    """Sizes of a configuration that differ when it is made small."""
    sizes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, bool) or name.endswith(("_id", "_ids")):
            continue
        if isinstance(value, int):
            shrink = next((shrink for names, shrink in SIZES if re.search(names, name)), None)
            if shrink and shrink(value) != value:
                sizes[name] = shrink(value)
        elif re.search(r"depths|num_blocks|layers$", name) and _are_ints(value):
            sizes[name] = [1 for _ in value]
        elif re.search(r"heads", name) and _are_ints(value):
            sizes[name] = [min(n, 2) for n in value]
        elif re.search(r"(sizes|dims?|channels)$", name) and _are_ints(value) and max(value) > 64:
            sizes[name] = [max(16, n // max(min(value) // 16, 1) // 16 * 16) for n in value]
        elif name == "layer_types" and value:
            kinds = list(dict.fromkeys(value))
            sizes[name], sizes["num_hidden_layers"] = (kinds * 2)[: max(2, len(kinds))], max(2, len(kinds))
        elif isinstance(value, dict) and "rope_theta" in value:
            sizes[name] = {**value, "mrope_section": [2, 1, 1]}  # where positions are of three kinds
    for name, part in parts_of(config):
        sizes[name] = {"model_type": part.model_type, **small(part)}
    sizes |= {name: i for name, i in TOKEN_IDS.items() if getattr(config, name, None) is not None}
    if getattr(config, "vocab_size", VOCABULARY) is None:
        sizes["vocab_size"] = VOCABULARY
    return sizes


def parts_of(config: PretrainedConfig) -> list[tuple[str, PretrainedConfig]]:
    """The configurations of its towers, by name."""
    parts = [(name, getattr(config, name, None)) for name in type(config).sub_configs]
    return [(name, part) for name, part in parts if isinstance(part, PretrainedConfig)]


def has_experts(config: PretrainedConfig) -> bool:
    own = any(re.search(r"experts", name) and value for name, value in vars(config).items())
    return own or any(has_experts(part) for _, part in parts_of(config))


def _are_ints(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(n) is int for n in value)


def small_config(kind: str) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[kind]
    config = config_class()
    if has_experts(config):
        raise NotTried("experts of its own")
    return config_class(**small(config))


def model_class(kind: str) -> type[nn.Module]:
    tables = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS]
    for table in (*tables, modeling_auto.MODEL_MAPPING_NAMES):
        names = table.get(kind, "")  # one or several
        if found := getattr(transformers, names if isinstance(names, str) else names[0], None):
            return found
    raise NotTried("no model of its own")


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """Two texts, two images, two sounds, or two of several of them: the first that the model runs with."""
    names = inspect.signature(model.forward).parameters
    texts, images = texts_for(model.config), images_for(model.config)
    sounds = [{name: sound} for name in SOUNDS for sound in sounds_for(model.config)]
    several = [
        shown | image
        for text in texts
        for image in images
        for shown in (with_image(model, text, image), text)
    ]
    decoded = {"decoder_input_ids": torch.randint(4, 40, (2, 7))} if model.config.is_encoder_decoder else {}
    possible = [
        batch | decoded for batch in (*several, *texts, *images, *sounds) if batch.keys() <= names.keys()
    ]
    if not possible:
        raise NotTried("neither text, nor image, nor sound")
    return next((batch for batch in possible if runs(model, batch)), possible[0])


def texts_for(config: Any) -> list[dict[str, Tensor]]:
    most = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
    ids = torch.randint(IMAGE_TOKEN + 1, min(most, VOCABULARY) - 4, (2, TOKENS))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids}]


def with_image(model: nn.Module, text: dict[str, Tensor], image: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text after as many tokens that stand for the image as the model makes of it, where it says."""
    try:
        with torch.no_grad():
            found = model.get_image_features(**image)
        rows = [part.flatten(0, -2) for part in getattr(found, "pooler_output", found)]
        tokens = F.pad(text["input_ids"], (sum(map(len, rows)) // 2, 0), value=IMAGE_TOKEN)
    except Exception:  # there are many ways
        return text
    return {name: tokens if name == "input_ids" else torch.ones_like(tokens) for name in text}


def images_for(config: Any) -> list[dict[str, Tensor]]:
    """Of the size that the configuration has, or that of a tower."""
    found = [
        part for part in (config, *(part for _, part in parts_of(config))) if hasattr(part, "image_size")
    ]
    size = getattr(found[0], "image_size", PIXELS) if found else PIXELS
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(found[0], "num_channels", 3) if found else 3
    return [{"pixel_values": torch.randn(2, channels, height, width)}]


def sounds_for(config: Any) -> list[Tensor]:
    """Spectra with the frames first or last, of the sizes that the configuration has, and waves."""
    bands = {getattr(config, name) for name in BANDS if hasattr(config, name)}
    frames = [64, getattr(config, "max_length", 64), 2 * getattr(config, "max_source_positions", 32)]
    spectra = [torch.randn(2, *shape) for n in bands for m in frames for shape in ((m, n), (n, m))]
    return [*spectra, torch.randn(2, 3200)]


def runs(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    try:
        outputs(model, batch)
    except Exception:
        return False
    return True


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of a model in eval mode: all that are floats."""
    with torch.no_grad():
        found = (
            model(**batch, use_cache=False)
            if "use_cache" in inspect.signature(model.forward).parameters
            else model(**batch)
        )
    values = [v for value in found.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def loaded(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def reloads_densely(model: nn.Module, batch: dict[str, Tensor], wanted: list[Tensor]) -> bool:
    try:
        return same(outputs(loaded(model), batch), wanted)
    except RuntimeError:  # transformers cannot read what it wrote
        return False


def looked_at(kind: str) -> dict[str, Any]:
    """The row of a type. Raises NotTried."""
    chosen = model_class(kind)
    try:
        config = small_config(kind)
        torch.manual_seed(0)
        model = chosen(copy.deepcopy(config)).eval()
        if sum(p.numel() for p in model.parameters()) > 5e7:
            raise NotTried("not made small")
        batch = batch_of(model)
        model(**batch)  # with its cache, too
        wanted = outputs(model, batch)
        if not same(outputs(model, batch), wanted):
            raise NotTried("random by itself")
    except NotTried:
        raise
    except Exception as error:
        raise NotTried("does not run when made small") from error
    sites, skipped = scan_ffns(model, batches=[batch])
    row: dict[str, Any] = {"type": kind, "class": chosen.__name__, "converted": 0}
    row["refused"] = {skip.name: skip.reason for skip in skipped}
    if not sites:
        return row
    first = {site.name: site.first for site in sites}
    ran = {
        name
        for name, x in stream_inputs(model, first, [batch], max_tokens=99, skip_unreached=True)
        if len(x) > 1
    }
    if not ran:
        raise NotTried("its FFNs run for other inputs alone")
    row["idle"] = sorted(first.keys() - ran)
    reloads = reloads_densely(model, batch, wanted)
    router = sadmoe.RouterConfig(width=8, steps=2)
    config = sadmoe.ConvertConfig(expert_size=EXPERT, router=router, filter=ran.__contains__)
    sadmoe.convert_(model, [batch], config, progress=False)
    row["converted"] = len(sadmoe.moe_layers(model))
    at_0 = outputs(model, batch)
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-9) for a, b in zip(at_0, wanted, strict=True)]
    row["tau 0"] = max(errors).item()
    sadmoe.set_tau(model, 0.5)
    with sadmoe.record_masks(model) as record:
        at_half = outputs(model, batch)
    row["tau 0.5"] = sum(layer.share for layer in record.layers.values()) / len(record.layers)
    row["finite"] = all(bool(y.isfinite().all()) for y in at_half)
    row["loaded"] = same(outputs(loaded(model), batch), at_half) if reloads else None
    sadmoe.restore_(model)
    row["restored"] = same(outputs(model, batch), wanted)
    return row


def is_well(row: dict[str, Any]) -> bool:
    good = row["tau 0"] <= CLOSE and row["finite"] and row["tau 0.5"] < 1
    return good and row["loaded"] is not False and row["restored"]


def in_a_process(kind: str, sender: Connection) -> None:
    try:
        row = looked_at(kind)
    except NotTried as reason:
        cause = reason.__cause__
        row = {"type": kind, "not tried": str(reason), "why": repr(cause)[:200] if cause else ""}
    except Exception as error:
        trace = traceback.format_exc()[-2000:]
        row = {"type": kind, "failed": f"{type(error).__name__}: {error}", "trace": trace}
    sender.send(row)


def rows_of(kinds: list[str], seconds: float = 120) -> list[dict[str, Any]]:
    """One after another, each in a fork of this process."""
    context = multiprocessing.get_context("fork")
    rows = []
    for kind in kinds:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=in_a_process, args=(kind, sender))
        process.start()
        sender.close()  # so that the end of the process ends the wait, too
        row = {"type": kind, "failed": f"died, or took over {seconds:.0f} s"}
        with suppress(EOFError):
            row = receiver.recv() if receiver.poll(seconds) else row
        process.kill()
        process.join()
        rows.append(row)
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "trace"}), flush=True)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    loaded = {True: "yes", False: "NO", None: "-"}[row["loaded"]]
    of = row["converted"] + len(row["refused"])
    numbers = f"{row['tau 0']:.0e}", f"{row['tau 0.5']:.0%}"
    return (
        row["type"],
        row["class"],
        f"{row['converted']} of {of}",
        *numbers,
        loaded,
        "yes" if row["restored"] else "NO",
    )


def text_of(rows: list[dict[str, Any]]) -> str:
    tried = [row for row in rows if "not tried" not in row]
    failed = [row for row in tried if "failed" in row or (row["converted"] and not is_well(row))]
    converted = [row for row in tried if row.get("converted") and row not in failed]
    whole = [row for row in converted if not row["refused"]]
    refused = [row for row in tried if row not in failed and row not in converted]
    idle = [row for row in converted if row["idle"]]
    reasons = Counter(row["not tried"] for row in rows if "not tried" in row)
    header = ("type", "class", "converted", "tau 0", "tau 0.5", "loaded", "restored")
    lines = [
        f"`{command.typed()}`",
        f"transformers {transformers.__version__}, torch {torch.__version__}: {len(rows)} types, {len(tried)} tried. "
        f"Of {len(whole)} every FFN that ran is converted, of {len(converted) - len(whole)} some; {len(refused)} have "
        f"none that can be; {len(failed)} failed. In {len(idle)} types others run for inputs that were not given, and "
        "stayed dense. Not tried: "
        + ", ".join(f"{count} ({reason})" for reason, count in reasons.most_common())
        + ".",
        "```\n" + format_table(header, [cells(row) for row in converted]) + "\n```",
        "Refused, or without an FFN:",
        *(
            f"- {row['type']}: " + ("; ".join(dict.fromkeys(row["refused"].values())) or "no FFN found")
            for row in [*converted, *refused]
            if row["refused"] or row in refused
        ),
        *(
            f"- FAILED {row['type']}: {row.get('failed', cells(row) if 'converted' in row else '')}"
            for row in failed
        ),
    ]
    return "\n\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]) + "\n"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("types", nargs="*", default=list(CONFIG_MAPPING.keys()))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = rows_of(arguments.types)
    text = text_of(rows)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        kept = [{name: value for name, value in row.items() if name != "trace"} for row in rows]
        about = {
            "command": command.typed(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        command.write(
            arguments.out / "architectures.json", json.dumps(about | {"rows": kept}, indent=1) + "\n"
        )
        command.write(arguments.out / "architectures.md", text)


if __name__ == "__main__":
    main()
