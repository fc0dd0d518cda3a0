"""Files that are damaged, or of another model: one clear error, and the model as it was."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from checkpoint_files import flip_a_bit, rewrite
from conversions import fingerprint
from converted import converted
from sadmoe import saving
from sadmoe.files import crc32
from sadmoe.saving import SavedModelError, load, save
from safetensors.torch import save_file
from tiny_models import TINY
from torch import nn


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(converted("user glu"), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_bytes(b"hello " * 100)


def foreign(path: Path) -> None:
    save_file({"w": torch.zeros(3)}, path, {"format": "pt"})


def no_json(path: Path) -> None:
    texts = {"sadmoe": "{", "sadmoe tensors": json.dumps({"w": crc32(torch.zeros(3))})}
    crc = str(zlib.crc32("".join(texts.values()).encode()))
    save_file({"w": torch.zeros(3)}, path, texts | {"sadmoe crc32": crc})


def newer(path: Path) -> None:
    rewrite(path, lambda h: h.update(format=2, layers="unknown"))


def without_layers(path: Path) -> None:
    rewrite(path, lambda h: h.update(layers={}))


def without_aliases(path: Path) -> None:
    rewrite(path, lambda h: h.pop("aliases"))


def other_aliases(path: Path) -> None:
    rewrite(path, lambda h: h["aliases"].update(a="b"))


def fewer_tensors(path: Path) -> None:
    rewrite(path, tensors=lambda t: t.pop("0.norm.weight"))


def broken_description(path: Path) -> None:
    rewrite(path, lambda h: h["layers"]["0.inner"].pop("gate"))


def broken_power(path: Path) -> None:
    rewrite(path, lambda h: h["layers"]["0.inner"].update(target_power="1"))


def broken_gate(path: Path) -> None:
    rewrite(path, lambda h: h["layers"]["0.inner"]["gate"].update(tau=7))


def unknown_rule(path: Path) -> None:
    rewrite(path, lambda h: h["layers"]["0.inner"]["gate"].update(rule="best"))


def wrong_count(path: Path) -> None:
    rewrite(path, lambda h: h["layers"]["0.inner"].update(experts=5))


def negative_count(path: Path) -> None:
    rewrite(path, lambda h: h["layers"]["0.inner"].update(experts=-6, expert_size=-10))


def another_tau(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'tau\\": 0.0', b'tau\\": 0.5'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_tau, "is damaged: the checksum of its metadata is wrong; copy or save it again"),
        (cut, "is no safetensors file, or is cut short"),
        (cut_in_header, "is no safetensors file, or is cut short"),
        (empty, "is no safetensors file, or is cut short"),
        (text, "is no safetensors file, or is cut short"),
        (flip_a_bit, "is damaged: the checksum of .* is wrong; copy or save it again"),
        (foreign, r"is no file of sadmoe\.save, or is damaged: it has no 'sadmoe' in its metadata"),
        (no_json, "is damaged: Expecting property name"),
        (newer, "has format 2, this sadmoe reads 1: update sadmoe"),
        (without_layers, "is damaged: its metadata is incomplete"),
        (without_aliases, "is damaged: its metadata is incomplete"),
        (other_aliases, "is damaged: its list of tensors is not what it holds"),
        (fewer_tensors, "is damaged: its list of tensors is not what it holds"),
        (broken_description, r"0\.inner: its description must have expert_size, experts, ffn, gate"),
        (broken_power, r"0\.inner: target_power must be in \(0, 2\], got '1'"),
        (broken_gate, r"0\.inner: unknown gate .*tau must be in"),
        (unknown_rule, r"0\.inner: unknown gate .*best"),
        (wrong_count, r"0\.inner: has 60 neurons in this model, 5 x 10 in the one saved"),
        (negative_count, r"experts, expert_size and router_width must be positive, got -6, -10, 16"),
    ],
)
def test_a_bad_file_is_one_clear_error_and_leaves_the_model_alone(file, damage, message):
    damage(file)
    model = TINY["user glu"].model()
    before = fingerprint(model)
    with pytest.raises(SavedModelError, match=message) as caught:
        load(model, file)
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert fingerprint(model) == before


def with_another_head() -> nn.Module:
    return TINY["user glu"].build().append(nn.Linear(24, 3))


def with_less() -> nn.Module:
    model = TINY["user glu"].build()
    model[1].norm = nn.Identity()
    return model


def with_other_shapes() -> nn.Module:
    model = TINY["user glu"].build()
    model[1].norm = nn.LayerNorm(23)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (TINY["bert"].build, r"does not fit this BertModel: 0\.inner"),
        (TINY["user functional relu"].build, r"does not fit this Sequential: 0\.inner"),
        (
            with_another_head,
            r"of another model: 2\.bias is in the model only; 2\.weight is in the model only",
        ),
        (
            with_less,
            r"of another model: 1\.norm\.bias is in the file only; 1\.norm\.weight is in the file only",
        ),
        (with_other_shapes, r"1\.norm\.weight is \[24\] in the file, \[23\] in the model"),
    ],
)
def test_a_file_of_another_model_is_refused_and_leaves_the_model_alone(file, build, message):
    model = build()
    before = fingerprint(model)
    with pytest.raises(SavedModelError, match=message):
        load(model, file)
    assert fingerprint(model) == before


def test_a_load_that_is_interrupted_leaves_the_model_alone(file, monkeypatch):
    model = TINY["user glu"].model()
    before = fingerprint(model)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(model, file)
    assert fingerprint(model) == before
