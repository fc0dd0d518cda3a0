"""Which rows of what a model computes are real tokens, not padding, and what it answers at these."""

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sadmoe.batches import Batch, bare, run
from sadmoe.modules import is_encoder_decoder

SPAN = ("start_logits", "end_logits")  # [B, T] each, of a model that answers with a part of the text
IGNORED = -100  # label of a token that counts in no loss
# Keys and values of an attention to the encoder, by the names that BART, T5, BERT, GPT-2 and their like give to the
# attention and to its projections.
_OF_ENCODER_STATES = re.compile(
    r"(^|\.)[^.]*(encoder_?at|enc(oder)?_?dec|cross_?at)[^.]*(\.(self|attention))*"
    r"\.(k|v|kv|key|value|c_attn)(_?proj|_?lin|_?layer)?(\.|$)",
    re.IGNORECASE,
)


def answer(model: nn.Module, batch: Batch, *, skip_padding: bool = True) -> Tensor:
    """What the model says of every real token, float32 [tokens, n], or of every sample [samples, n]: its logits, else
    those of where a span starts and ends side by side, else the first floating-point tensor that it returns and was
    not given, but for a loss."""
    given = tree_leaves(batch)  # sentence-transformers return the batch itself, with more in it
    output = run(model, batch)
    if isinstance(output, Mapping) and all(output.get(key) is not None for key in SPAN):
        output = torch.stack([output[key] for key in SPAN], dim=-1)
    elif isinstance(output, Mapping):
        output = output.get("logits", [value for key, value in output.items() if key != "loss"])
    while not isinstance(output, Tensor):
        output = _first_part(model, output, given)
    side = "decoder" if is_encoder_decoder(model) else ""
    real = real_rows(model, side, batch, output) if skip_padding and output.dim() > 2 else None
    rows = output.reshape(-1, output.shape[-1]).float()
    return rows if real is None else rows[real]


def _first_part(model: nn.Module, output: Any, given: list[Any]) -> Any:
    """Of a tuple, list or mapping, the first part that may hold an answer, or is one and was not given."""
    parts = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, tuple | list | Mapping):
        for part in parts:
            if isinstance(part, tuple | list | Mapping):
                return part
            new = isinstance(part, Tensor) and not any(part is leaf for leaf in given)
            if new and part.dim() > 0 and part.is_floating_point():
                return part
    raise TypeError(
        f"{type(model).__name__} returned {type(output).__name__} with no tensor to compare: wrap it in a model that "
        "returns its answer as a tensor"
    )


def padding_mask(batch: Batch) -> Tensor | None:
    """bool [B, T], True for real tokens: "attention_mask" of a Mapping, or of one that a tuple begins with, where it is
    a 2-D tensor, or [..., T] as "input_ids" are, which makes one of all texts; else None."""
    return _mask(_given(batch), "attention_mask")


def real_rows(model: nn.Module, name: str, batch: Batch | None, x: Tensor) -> Tensor | None:
    """Which rows of the input of module `name` are real tokens, None where no batch says so.

    x [..., d] is what entered the module while the model ran `batch`; the result is bool [rows] for
    x.reshape(-1, d). A padding mask [B, T] applies where it has as many tokens as x: to [T, B, d], if B is not T, and
    to models that flatten [B, T, d] first. In an encoder-decoder, a module below one whose name ends in "decoder"
    uses the first of these that there is: "decoder_attention_mask"; "labels", whose padding is -100; or, where the
    decoder is given no tokens and so reads the encoder's, moved on by one, the encoder's mask moved on likewise. Keys
    and values of cross-attention are made from the encoder's tokens, and use the encoder's mask. Where images come
    beside text, what is below a module named after vision answers to no mask. Speech models of transformers say which
    frames the real part of a wave becomes. A mask that leaves tokens out is not used, and told in a UserWarning, where
    it is of another length than x [B, T, d], or in a mapping inside the batch.
    """
    given = _given(batch)
    mask = _mask_for(model, name, given)
    if mask is None and (parts := _masked_parts(given)):
        warnings.warn(
            f"the batches hold an attention_mask in each of {', '.join(parts)}, and no part of the model is known to "
            "answer to one of them: all tokens count as real",
            stacklevel=2,
        )
    if mask is None or x.is_nested:
        return None
    if x.dim() == 3 and getattr(
        getattr(model, "config", None), "attention_window", None
    ):  # Longformer fills up to it
        tokens = x.shape[1] if x.shape[0] == mask.shape[0] else x.shape[0]
        mask = F.pad(mask, (0, max(0, tokens - mask.shape[-1])))
    if x.dim() == 3 and x.shape[0] == len(mask) and x.shape[1] != mask.shape[1]:
        text = given.get("input_ids")
        of_text = isinstance(text, Tensor) and text.shape == mask.shape
        found = None if of_text else _of_frames(model, name, mask, x.shape[1])
        if found is None and x.shape[1] > 1 and not mask.all() and not _OF_ENCODER_STATES.search(name):
            warnings.warn(  # once, not for every layer
                f"the batches' attention_mask is of {mask.shape[1]} tokens, and layers of this {type(model).__name__} "
                f"run on {x.shape[1]}: all of these count as real tokens",
                stacklevel=2,
            )
        return None if found is None else found.flatten().to(x.device)
    if mask.numel() != x[..., 0].numel() or (x.dim() == 3 and {*x.shape[:2]} != {*mask.shape}):
        return None  # of another meaning, such as relative positions
    return mask_rows(mask, x.shape).to(x.device)


def _given(batch: Batch | None) -> Mapping[str, Any]:
    """What a batch holds by name: a mapping, or one that a tuple begins with; else nothing."""
    batch = bare(batch)
    return batch if isinstance(batch, Mapping) else {}


def _mask_for(model: nn.Module, name: str, given: Mapping[str, Any]) -> Tensor | None:
    """The mask in a batch that what enters module `name` answers to, as `real_rows` says."""
    parts = name.split(".")
    if "pixel_values" in given and "input_ids" in given and any(map(_sees, parts)):
        return None
    below = any(part.endswith("decoder") for part in parts) and not _OF_ENCODER_STATES.search(name)
    if not (below and (is_encoder_decoder(model) or _mask(given, "decoder_attention_mask") is not None)):
        return _mask(given, "attention_mask")
    possible = (_mask(given, "decoder_attention_mask"), _labelled(given), _moved_on(given))
    return next((mask for mask in possible if mask is not None), None)


def _masked_parts(given: Mapping[str, Any]) -> list[str]:
    """The mappings in a batch that are a mapping's values and leave tokens out."""
    parts = {str(key): part for key, part in given.items() if isinstance(part, Mapping)}
    masks = {key: _mask(part, "attention_mask") for key, part in parts.items()}
    return [key for key, mask in masks.items() if mask is not None and not mask.all()]


def _sees(part: str) -> bool:
    """Whether a part of a module's path is that of a tower for images."""
    return bool(re.search("vision|visual|image", part)) and not re.search("language|text", part)


def _of_frames(model: nn.Module, name: str, mask: Tensor, frames: int) -> Tensor | None:
    """The mask [B, frames] of what the speech model around a module makes of waves or spectra whose mask was given,
    where it tells, and they are at that rate."""
    parts = name.split(".")
    for n in reversed(range(len(parts))):
        with suppress(Exception):  # of private methods, which a version or a class may not have in full
            module: Any = model.get_submodule(".".join(parts[:n]))
            if hasattr(module, "_get_feature_vector_attention_mask"):  # Wav2Vec2, HuBERT and their like
                lengths = module._get_feat_extract_output_lengths
                adapts = (
                    "add_adapter" in signature(lengths).parameters
                )  # a part that makes fewer frames of them
                for given in [{"add_adapter": False}, {"add_adapter": True}] if adapts else [{}]:
                    if int(lengths(torch.tensor(mask.shape[1]), **given)) == frames:
                        return module._get_feature_vector_attention_mask(frames, mask, **given).bool()
            elif hasattr(module, "_get_output_attention_mask"):  # Parakeet and its like
                made = module._get_output_attention_mask
                if made(torch.ones_like(mask)).shape[1] == frames:
                    return made(mask, target_length=frames).bool()
    return None


def mask_rows(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask [B, T] as [rows], in the order in which the tokens of x, of that shape, are its rows: [B, T, ...] or
    [T, B, ...]."""
    turned = len(shape) > 2 and shape[:2] == mask.shape[::-1] != mask.shape
    return (mask.t() if turned else mask).flatten()


def ran(batch: Batch | None, given: Mapping[str, Any] | None) -> Batch | None:
    """What one pass of a loss ran of a batch: of several texts, each a mapping, the one that the model was given in
    that pass, see `hooks.LatestCall`. Where it was given none, as only parts of it were called, no mask is used, and a
    UserWarning tells so if one leaves tokens out."""
    if isinstance(batch, Mapping):  # of masks in mappings inside it `real_rows` tells
        inside = any(isinstance(part, Mapping) for part in batch.values())
        return given if inside and given is not None else batch
    parts = {str(i): part for i, part in enumerate(batch)} if isinstance(batch, tuple | list) else {}
    if sum(isinstance(part, Mapping) for part in parts.values()) < 2:
        return batch
    if given is None and (masked := _masked_parts(parts)):
        warnings.warn(
            f"the batches hold an attention_mask in each of parts {', '.join(masked)}, and the loss did not call the "
            "model with one of these: all tokens count as real",
            stacklevel=2,
        )
    return given


def real_part(model: nn.Module, name: str, batch: Batch | None, x: Tensor) -> Tensor:
    """The rows [rows, d] of x [..., d] that are real tokens, or all of them, see `real_rows`."""
    real = real_rows(model, name, batch, x)
    return rows_of(x) if real is None else rows_of(x)[real]


def refuse_mask(batch: Batch | None, instead: str) -> None:
    """Raises TypeError where a mask of tokens was given as the batch. instead: the argument to give it as."""
    if isinstance(batch, Tensor) and batch.dtype == torch.bool:
        told = "mask=" if instead == "mask" else 'the "attention_mask" of a dict'
        raise TypeError(f"batch is a bool tensor, which is what tells real tokens: give it as {told}")


def rows_of(x: Tensor) -> Tensor:
    """x [..., d] -> [rows, d]; of a nested tensor, which holds no padding, its parts one after the other."""
    return torch.cat(x.unbind()) if x.is_nested else x.reshape(-1, x.shape[-1])


def _labelled(given: Mapping[str, Any]) -> Tensor | None:
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    return None if labels.is_floating_point() else labels.ne(IGNORED)  # floats are of classes


def _moved_on(given: Mapping[str, Any]) -> Tensor | None:
    """Of a decoder that makes its input of the encoder's, as BART's does."""
    mask = _mask(given, "attention_mask")
    if mask is None or any(
        given.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds")
    ):
        return None
    return F.pad(mask[:, :-1], (1, 0), value=True) if "input_ids" in given else None


def _mask(given: Mapping[str, Any], key: str) -> Tensor | None:
    if not isinstance(mask := given.get(key), Tensor):
        return None
    ids = given.get(key.replace("attention_mask", "input_ids"))
    if mask.dim() > 2 and isinstance(ids, Tensor) and ids.shape == mask.shape:
        mask = mask.flatten(0, -2)  # several texts a sample, one after the other: multiple choice
    return mask.bool() if mask.dim() == 2 else None
