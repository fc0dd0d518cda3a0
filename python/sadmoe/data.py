"""What a transformers model of a folder is run on, as the batches that it takes: text, pairs of texts, images, or
what a Python file of the user's makes."""

import inspect
import logging
import runpy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sadmoe.modules import is_encoder_decoder
from sadmoe.texts import (
    load_processor,
    load_tokenizer,
    loading,
    padding,
    paragraphs,
    read_text,
    tokenized,
)

logger = logging.getLogger(__name__)
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
OF_ONE_TEXT = ("ForSequenceClassification", "ForQuestionAnswering")  # encoder-decoders that read it in both
TABLES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}
SHOWN = 40  # tokens of the first text: what a heat map has room for

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """batches: all of it. processor: the tokenizer or image processor that goes with the model, as its folder has it
    (one that was used would be saved with how it cut and padded), None where there is none. kind: what it is. first:
    its first sample, a batch of one, a text cut to SHOWN tokens; None of "python"."""

    batches: Sequence[Any]
    processor: Any
    kind: Literal["text", "pairs", "images", "python"]
    first: Batch | None = None

    @property
    def words(self) -> list[str]:
        """The tokens of the first sample, of text; of a pair, those of the source."""
        assert self.first is not None
        return words_of(self.processor, self.first["input_ids"][0])


def words_of(tokenizer: Any, ids: Tensor) -> list[str]:
    """What each token of ids [n] stands for, to print."""
    return [tokenizer.decode([i]).strip() or "␣" for i in ids.tolist()]


def load_data(
    model: Any, folder: Path, path: Path, *, batch_size: int, max_length: int, whole: bool = False
) -> Data:
    """What is at `path`, in the form that the transformers model of `folder` takes.

    A model of images takes a folder of images, at any depth; an encoder-decoder of text a file of lines, source and
    target with a tab between; any other model of text a file of text, see `paragraphs`. Short texts come first; images
    are read when their batch is asked for. Every model takes a Python file, which is run, and whose `batches` are a
    list of what the model is called with, or a function that makes it.   max_length: tokens after which a text is cut.
    whole: each image is read to its end once at first, and not its head alone, so that none ends a long run.
    Raises NotImplementedError where the model needs a Python file, ValueError where the data is of another kind.
    """
    if path.suffix == ".py":
        return _from_python(path, folder)
    takes, name = str(getattr(model, "main_input_name", "")), type(model).__name__
    accepts = inspect.signature(model.forward).parameters
    # Not so DETR, whose decoder reads queries of its own.
    pairs = is_encoder_decoder(model) and "decoder_input_ids" in accepts and not name.endswith(OF_ONE_TEXT)
    if takes == "pixel_values" and not pairs:
        if not path.is_dir():
            raise ValueError(
                f"--data: a {name} takes images, and {path} is no folder: give one that holds them"
            )
        return _images(path, folder, model, batch_size, whole)
    if takes != "input_ids":
        takes = f"{takes or 'inputs of its own'}{' and a decoder that has its own' if pairs else ''}"
        raise NotImplementedError(
            f"{folder} holds a {name}, which takes {takes}, and not text or images alone: give a Python "
            "file as --data, whose `batches` are what it is called with"
        )
    if path.is_dir() and "pixel_values" in accepts:
        raise NotImplementedError(
            f"{folder} holds a {name}, which takes images and text: give a Python file as --data, whose `batches` are "
            "what it is called with"
        )
    if path.is_dir():
        raise ValueError(f"--data: a {name} takes text, and {path} is a folder: give a file of text")
    if path.suffix.lower() in (TABLES - {".tsv"} if pairs else TABLES):
        form = "lines of a source, a tab and a target" if pairs else "plain text"
        raise ValueError(
            f"--data: a {name} takes {form}, and all of {path} would be read as that, names and marks too: write its "
            "texts to a file of that kind, or give a Python file that makes batches of them"
        )
    tokenizer = load_tokenizer(folder)
    positions = positions_of(model)
    if positions is not None and positions < max_length:
        raise ValueError(
            f"--max-length must be at most {positions}, the positions of this {name}, got {max_length}"
        )
    marks = tokenizer.num_special_tokens_to_add()
    if max_length <= marks:  # transformers would cut nothing
        raise ValueError(
            f"--max-length must be at least {marks + 1}, as the tokenizer puts {marks} tokens of its own around a "
            f"text, got {max_length}"
        )
    if pairs:
        return _pairs(path, folder, model, tokenizer, batch_size, max_length)
    texts = paragraphs(path)
    (first,) = tokenized(tokenizer, texts[:1], max_length=min(max_length, SHOWN))
    ordered = sorted(texts, key=len)
    batches = tokenized(tokenizer, ordered, batch_size=batch_size, max_length=max_length)
    _check_tokens(model, folder, batches)
    _tell_of_cuts("texts", ordered, tokenizer, max_length, (b.get("attention_mask", ()) for b in batches))
    return Data(batches, load_tokenizer(folder), "text", first)


def _tell_of_cuts(
    what: str, texts: Sequence[str], tokenizer: Any, max_length: int, masks: Iterable[Iterable[Tensor]]
) -> None:
    """A warning where most of the text is left out, such as of one text a line with a blank line somewhere.

    masks: of each batch those of its texts. Without any, nothing is known.
    """
    kept = [int(mask.sum()) for of_batch in masks for mask in of_batch]
    cut = [text for text, count in zip(texts, kept, strict=bool(kept)) if count == max_length]
    if not cut:
        return
    given = {"text_target" if what == "targets" else "text": cut}
    whole = tokenizer(**given, truncation=False, verbose=False)["input_ids"]
    left_out = sum(map(len, whole)) - max_length * len(cut)
    if left_out <= sum(kept):
        return
    hint = "; a text goes to the next blank line, or to the end of its line where the file has no blank line"
    logger.warning(
        "--data: of its %d %s %d are cut after %d tokens (--max-length), which leaves most of it out%s",
        len(texts), what, len(cut), max_length, hint if what == "texts" else "",
    )  # fmt: skip


def _check_tokens(model: Any, folder: Path, batches: Sequence[Batch]) -> None:
    """Raises ValueError where the model has no embedding of one."""
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # it has none, but hashes
        return
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if known is not None and largest >= known:
        raise ValueError(
            f"the tokenizer of {folder} gives token {largest}, and this {type(model).__name__} knows {known} tokens, "
            "from 0: put the tokenizer that belongs to the model there"
        )


def positions_of(model: Any) -> int | None:
    """How many tokens of a text the model has positions for, None where it does not say. RoBERTa's first are no
    token's."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    skipped = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    )
    return positions - max(skipped, default=0)


def _from_python(path: Path, folder: Path) -> Data:
    arguments = sys.argv
    try:
        # As of a script: for modules beside it, also those that are imported when batches are read.
        sys.path.insert(0, str(path.resolve().parent))
        sys.argv = [str(path)]
        batches = runpy.run_path(str(path)).get("batches")
        if callable(batches):
            batches = batches()
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"--data: {path}{where} raised {type(error).__name__}: {error}") from error
    finally:
        sys.argv = arguments
    if not isinstance(batches, Sequence) or len(batches) == 0:
        raise ValueError(
            f"--data: {path} must set `batches` to a list of what the model is called with, or to a function that "
            f"makes one; got {'an empty ' if isinstance(batches, Sequence) else ''}{type(batches).__name__}"
        )
    return Data(batches, load_processor(folder), "python")


def _pairs(path: Path, folder: Path, model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Data:
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(model).__name__}: its config names no decoder_start_token_id, with which a target begins; set "
            "it there"
        )
    pairs = _lines_of_pairs(path, type(model).__name__)

    def batch(some: Sequence[Sequence[str]], longest: int) -> Batch:
        sources, targets = ([pair[side] for pair in some] for side in (0, 1))
        settings = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        with padding(tokenizer):
            made = dict(tokenizer(sources, **settings))
            # To the right, so that the start comes first.
            wanted = tokenizer(text_target=targets, padding_side="right", **settings)
        ids = wanted["input_ids"].roll(1, dims=1)  # each token is predicted from those before it
        ids[:, 0] = start
        return made | {"decoder_input_ids": ids, "decoder_attention_mask": wanted["attention_mask"]}

    ordered = sorted(pairs, key=lambda pair: len(pair[0]))
    parts = (ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size))
    batches = [batch(part, max_length) for part in parts]
    _check_tokens(model, folder, batches)
    sources, targets = zip(*ordered, strict=True)
    for what, texts, key in (
        ("sources", sources, "attention_mask"),
        ("targets", targets, "decoder_attention_mask"),
    ):
        _tell_of_cuts(what, texts, tokenizer, max_length, (b.get(key, ()) for b in batches))
    return Data(batches, load_tokenizer(folder), "pairs", batch(pairs[:1], min(max_length, SHOWN)))


def _lines_of_pairs(path: Path, name: str) -> list[list[str]]:
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        pair = [part.strip() for part in line.rstrip("\r").split("\t")]
        if pair == [""]:
            continue
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"--data: a {name} takes lines of a source, a tab and a target; line {number} of {path} "
                f"is {line[:60]!r}"
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} has no text")
    return pairs


def _images(path: Path, folder: Path, model: Any, batch_size: int, whole: bool) -> Data:
    files = images_in(path)
    if not files:
        raise ValueError(
            f"--data: {path} holds no image, by the names {', '.join('*' + end for end in IMAGES)}"
        )
    try:
        from transformers import AutoImageProcessor

        with loading(folder):
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise ImportError(
            f"images need pillow and transformers: pip install pillow 'transformers>=5.0' ({error})"
        ) from error
    looked_at = tqdm(files, "reading images", disable=not whole)
    if wrong := [why for file in looked_at if (why := _why_no_image(file, whole)) is not None]:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"--data: {'; '.join(wrong[:3])}{more}")
    takes = frozenset(inspect.signature(model.forward).parameters) | {model.main_input_name}
    batches = _Images(files, processor, batch_size, model.dtype, takes)
    return Data(batches, processor, "images", replace(batches, files=files[:1], size=1)[0])


def images_in(folder: Path) -> list[Path]:
    """The files in it, at any depth, that are named as images."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    return sorted(path for path in found if not path.name.startswith("._") and not path.is_dir())


@dataclass(frozen=True)
class _Images(Sequence[Batch]):
    """Batches of images, read when they are asked for, as transformers' pipelines read them."""

    same_again = True  # for the training loop
    files: Sequence[Path]
    processor: Any
    size: int
    dtype: torch.dtype
    takes: frozenset[str]  # what the model may be called with

    def __len__(self) -> int:
        return -(-len(self.files) // self.size)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        start = (i % len(self)) * self.size
        images = [_image(file) for file in self.files[start : start + self.size]]
        made = self.processor(images, return_tensors="pt")  # beside the pixels perhaps a mask of them
        tensors = {
            key: value for key, value in made.items() if key in self.takes and isinstance(value, Tensor)
        }
        return {key: t.to(self.dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def _why_no_image(file: Path, whole: bool) -> str | None:
    """What its head says against it, or all of it, None where nothing does."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            deep = image.mode.startswith("I") or image.mode == "F"
            if whole:
                image.draft("RGB", (1, 1))  # of a JPEG an eighth of the size, from all of its bytes
                image.load()
    except Exception as error:  # whatever a decoder raises
        return f"{file} cannot be read as an image: {error}"
    return (
        f"{file} has more than 8 bits a colour, and all above 255 would be white: make images of 8 bits, or give a "
        "Python file that makes batches of them"
        if deep
        else None
    )


def _image(file: Path) -> Any:
    """In colours of 8 bits, turned as it was taken. Raises ValueError where it cannot be read."""
    from transformers.image_utils import load_image

    try:
        return load_image(str(file))
    except Exception as error:  # whatever a decoder raises
        raise ValueError(f"--data: {file} cannot be read as an image: {error}") from error
