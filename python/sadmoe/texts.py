"""Plain text and a transformers model of a local folder, as the batches that every step takes."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)
BLANK_LINES = re.compile(r"\n\s*\n")
MODULES = "modules.json"  # of a SentenceTransformer: its modules in order, each in a folder, "" this one
OF_SENTENCES = ("config_sentence_transformers.json", "sentence_bert_config.json")
TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "*.bpe*")


def read_text(path: Path) -> str:
    """What is in a file of text, in UTF-8, without a mark of the byte order."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file: parts between blank lines, or its lines where it has no blank ones."""
    text = read_text(path)
    parts = BLANK_LINES.split(text.strip())
    found = [" ".join(part.split()) for part in (parts if len(parts) > 1 else text.split("\n"))]
    found = [part for part in found if part]
    if not found:
        raise ValueError(f"{path} has no text")
    return found


def load_model(folder: Path) -> nn.Module:
    """A transformers model in eval mode, of the class its config names, from local files alone."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models of a folder need transformers: pip install 'transformers>=5.0'") from error
    if not folder.exists():
        raise FileNotFoundError(
            f"there is no folder {folder}: models are read from local folders; one of a hub has to be downloaded first"
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no model: config.json is missing")
    with loading(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    wanted = (config.architectures or [""])[0]
    named = getattr(transformers, wanted, None)
    model_class: Any = named if isinstance(named, type) else transformers.AutoModel
    if wanted and model_class is not named:
        logger.warning(
            "%s: its config names a %s, which transformers does not have: loaded by AutoModel, without a head",
            folder, wanted,
        )  # fmt: skip
    with loading(folder):
        return model_class.from_pretrained(folder, local_files_only=True).eval()


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Of damaged files libraries raise what they like: then ValueError, which names the folder."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder} cannot be loaded: a file of it is no JSON: {error}") from error
    except (OSError, ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a transformers model, from local files alone. Raises FileNotFoundError where there are none: of
    such a folder transformers makes a tokenizer of a few words."""
    import transformers

    if not _holds(folder, TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: put the model's there by tokenizer.save_pretrained({str(folder)!r})"
        )
    with loading(folder):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_processor(folder: Path) -> Any:
    """Whatever makes a model's inputs, of local files alone: processor, tokenizer or image processor; None without, or
    where it does not load, which is told."""
    import transformers

    if not _holds(folder, (*TOKENIZER_FILES, "*processor*")):
        return None
    try:
        return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a class of the model's raises
        logger.warning(
            "%s: AutoProcessor does not load what makes its inputs, so no converted model gets that: %s",
            folder,
            error,
        )
        return None


def processor_around(tokenizer: Any, folder: Path) -> Any:
    """What makes the inputs of a model of text and more (images, sounds), its tokenizer in it, where its folder has one
    that loads; else the tokenizer."""
    processor = load_processor(folder) if _holds(folder, ("*processor*",)) else None
    return tokenizer if processor is None else processor


def around_transformer(folder: Path) -> list[Path]:
    """What a SentenceTransformer's folder has around its transformer (pooling, normalization and their like), and says
    of it: files and folders in it, by their paths there. Of another folder none."""
    if not (folder / MODULES).is_file():
        return []
    with loading(folder):
        parts = [Path(module["path"]) for module in json.loads(read_text(folder / MODULES))]
    if outside := [part for part in parts if part.is_absolute() or ".." in part.parts]:
        raise ValueError(f"{folder / MODULES} names {outside[0]}, which is not in its folder")
    told = [Path(MODULES), *map(Path, OF_SENTENCES)]
    return [part for part in (*told, *parts) if part != Path() and (folder / part).exists()]


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(path.match(pattern) for path in folder.iterdir() for pattern in patterns)


def tokenized(
    tokenizer: Any, texts: Sequence[str], *, batch_size: int = 16, max_length: int = 128
) -> list[dict[str, Tensor]]:
    """Batches in the texts' order, each padded to its longest: input_ids, attention_mask [B, T] and what else the
    tokenizer gives."""
    settings = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    with padding(tokenizer):
        return [dict(tokenizer(part, **settings)) for part in parts]


@contextmanager
def padding(tokenizer: Any) -> Iterator[None]:
    """Inside, a tokenizer that has no token for padding pads with the one for the end."""
    if tokenizer.pad_token is not None:
        yield
        return
    tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.pad_token = None
