"""The translator of recipe W4, without the package that has its weights."""

import copy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import sadmoe
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench/recipes"))

from marian import Translator, read_weights


def entry(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Header, name, shape and data of one tensor, as the file has them."""
    text = name.encode() + b"\0"
    header = struct.pack("<4Q", len(text), kind, len(shape), len(data))
    return header, text, struct.pack(f"<{len(shape)}i", *shape), data


def test_floats_and_transposed_bytes_are_read(tmp_path):
    bias, matrix = (
        np.array([[0.5, -2.0, 3.25]], np.float32),
        np.array([[10, -20, 30], [40, 50, -127]], np.int8),
    )
    quantised = matrix.T.tobytes() + struct.pack("<f", 4.0) + b"\0" * 9  # its multiplier, and filling
    entries = [
        entry("b", 0x404, (1, 3), bias.tobytes()),
        entry("W", 0x4101, (2, 3), quantised),
        entry("Wemb", 0x4101, (2, 3), matrix.tobytes() + struct.pack("<f", 2.0)),
        entry("W_QuantMultA", 0x4101, (1, 1), b"\0" * 5),
    ]
    headers, names, shapes, data = (b"".join(parts) for parts in zip(*entries, strict=True))
    gap = b"\xff" * 3
    file = (
        struct.pack("<QQ", 1, len(entries))
        + headers
        + names
        + shapes
        + struct.pack("<Q", len(gap))
        + gap
        + data
    )
    (tmp_path / "model.bin").write_bytes(file)
    found = read_weights(tmp_path / "model.bin")
    assert found.keys() == {"b", "W", "Wemb"}
    assert torch.equal(found["b"], torch.from_numpy(bias))
    assert torch.equal(found["W"], torch.from_numpy(matrix) / 4)
    assert torch.equal(found["Wemb"], torch.from_numpy(matrix) / 2)


@pytest.fixture(scope="module")
def translator():
    torch.manual_seed(0)
    return Translator().eval()


def call(model, source, target, mask=None):
    ids, before = torch.tensor([source]), torch.tensor([target])
    mask = torch.ones_like(ids) if mask is None else torch.tensor([mask])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=before)[0]


def test_a_target_token_sees_the_source_and_what_is_before_it(translator):
    usual = call(translator, [5, 6, 7], [0, 8, 9, 10])
    later = call(translator, [5, 6, 7], [0, 8, 11, 10])
    assert torch.equal(usual[:2], later[:2])
    assert not torch.allclose(usual[2:], later[2:], atol=1e-3)
    assert not torch.allclose(usual, call(translator, [5, 6, 12], [0, 8, 9, 10]), atol=1e-3)
    assert torch.equal(usual, call(translator, [5, 6, 7], [3, 8, 9, 10]))  # the first is not read
    padded = call(translator, [5, 6, 7, 0, 0], [0, 8, 9, 10], [1, 1, 1, 0, 0])
    torch.testing.assert_close(padded, usual, rtol=1e-4, atol=1e-4)


def test_all_of_it_is_found(translator):
    assert len(sadmoe.find_ffns(translator)) == 6 + 2
    assert len(sadmoe.find_projections(translator)) == 4 * (6 + 2)


def test_a_translation_is_the_most_likely_token_after_the_other(translator):
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = translator.translated(ids, mask, 6)
    given = torch.tensor([[0, *row] + [0] * (6 - len(row)) for row in found])[:, :-1]
    with torch.no_grad():
        likely = translator(ids, mask, given).argmax(-1)
    for row, expected in zip(found, likely.tolist(), strict=True):
        assert row == expected[: len(row)]
        assert len(row) == 6 or expected[len(row)] == 0
    assert max(map(len, found)) > 1


def test_a_translation_ends_where_the_end_is_likeliest(translator):
    sure = copy.deepcopy(translator)
    sure.bias.data[0] = 1e4
    ids = torch.tensor([[5, 6, 7, 0]])
    assert sure.translated(ids, torch.ones_like(ids), 6) == [[]]
