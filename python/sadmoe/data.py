"""What a transformers model of a folder is run on: text, pairs of texts or images, as the batches that it takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sadmoe.texts import load_tokenizer, padding, paragraphs, tokenized

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Data:
    """batches: all of it. first: its first sample, a batch of one. processor: the tokenizer or image processor that
    goes with the model."""

    batches: list[dict[str, Tensor]]
    first: dict[str, Tensor]
    processor: Any

    @property
    def is_images(self) -> bool:
        return "pixel_values" in self.first

    @property
    def words(self) -> list[str]:
        """The tokens of the first sample, of text."""
        ids = self.first["input_ids"][0].tolist()
        return [self.processor.decode([i]).strip() or "␣" for i in ids]


def load_data(model: nn.Module, folder: Path, path: Path, *, batch_size: int, max_length: int) -> Data:
    """What is at `path`, in the form that the model of `folder` takes.

    A model of images takes a folder of images, at any depth; an encoder-decoder of text a file of lines, source and
    target with a tab between; any other model of text a file of text, see `paragraphs`. Short texts come first.
    max_length: tokens after which a text is cut.
    Raises NotImplementedError where the model takes something else, ValueError where the data is of another kind.
    """
    takes, name = str(getattr(model, "main_input_name", "")), type(model).__name__
    pairs = bool(getattr(model.config, "is_encoder_decoder", False))
    if takes == "pixel_values" and not pairs:
        if not path.is_dir():
            raise ValueError(
                f"--data: a {name} takes images, and {path} is no folder: give one that holds them"
            )
        return _images(path, folder, batch_size)
    if takes != "input_ids":
        raise NotImplementedError(
            f"{folder} holds a {name}, which takes {takes or 'inputs of its own'}, and neither text nor images: "
            "convert it in Python, with batches of what it is called with (docs/convert-your-model.md)"
        )
    if path.is_dir():
        raise ValueError(f"--data: a {name} takes text, and {path} is a folder: give a file of text")
    tokenizer = load_tokenizer(folder)
    if pairs:
        return _pairs(path, model, tokenizer, batch_size, max_length)
    texts = paragraphs(path)
    sizes: Any = {"batch_size": batch_size, "max_length": max_length}
    (first,) = tokenized(tokenizer, texts[:1], **sizes)
    return Data(tokenized(tokenizer, sorted(texts, key=len), **sizes), first, tokenizer)


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _pairs(path: Path, model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Data:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no text")
    pairs = [line.split("\t") for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise ValueError(
                f"--data: a {type(model).__name__} takes lines of a source, a tab and a target; line {number} of "
                f"those in {path} has {len(pair) - 1} tabs"
            )

    def batch(some: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        sources, targets = ([pair[side] for pair in some] for side in (0, 1))
        settings = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
        with padding(tokenizer):
            made = dict(tokenizer(sources, **settings))
            wanted = tokenizer(text_target=targets, **settings)
        ids, mask = wanted["input_ids"], wanted["attention_mask"]
        shifted = model.prepare_decoder_input_ids_from_labels(
            ids
        )  # a place later, after the token that starts
        return made | {"decoder_input_ids": shifted, "decoder_attention_mask": mask}

    ordered = sorted(pairs, key=lambda pair: len(pair[0]))
    return Data([batch(part) for part in _parts(ordered, batch_size)], batch(pairs[:1]), tokenizer)


def _images(path: Path, folder: Path, batch_size: int) -> Data:
    try:
        from PIL import Image
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise ImportError("images need pillow and transformers: pip install pillow 'sadmoe[hf]'") from error
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    if not found:
        raise ValueError(
            f"--data: {path} holds no image, by the names {', '.join('*' + end for end in IMAGES)}"
        )
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def batch(files: Sequence[Path]) -> dict[str, Tensor]:
        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    return Data([batch(part) for part in _parts(found, batch_size)], batch(found[:1]), processor)
