"""What the recipes measure, by hand; and that each script says what it takes."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
RECIPES = Path(__file__).parent.parent / "bench/recipes"
sys.path.append(str(RECIPES))

import w1_movie_polarity
import w2_language_model
import w3_image_classifier
import w4_translation
from run import Effort

SCRIPTS = sorted(path.stem for path in RECIPES.glob("w[0-9]_*.py"))


class Words:
    """A tokenizer of one letter a token."""

    eos_token_id, bos_token_id = 0, 1

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_bits_per_byte_are_those_of_the_bytes_that_the_tokens_are():
    ids = torch.tensor([[1, ord("a"), ord("ß")]])  # BOS, one byte, two bytes
    logits = torch.zeros(1, 3, 256)  # every token is as likely: 8 bits each
    output, batch = SimpleNamespace(logits=logits), {"input_ids": ids}
    metric = w2_language_model.BitsPerByte(Words())
    assert metric([(output, batch)]) == pytest.approx(16 / 3)
    assert metric([(output, batch), (output, batch)]) == pytest.approx(16 / 3)
    logits[0, 1, ord("ß")] = 50.0  # and now the last is certain
    assert metric([(output, batch)]) == pytest.approx(8 / 3, rel=1e-5)


def test_blocks_begin_with_bos_and_are_full():
    blocks = w2_language_model.blocks(Words(), "x" * 1200, 3)
    assert [block["input_ids"].shape for block in blocks] == [(1, 512)] * 2
    assert all(block["input_ids"][0, 0] == 1 for block in blocks)


def test_perplexity_leaves_padding_out():
    labels = torch.tensor([[2, 3], [1, w4_translation.IGNORED]])
    logits = torch.zeros(2, 2, 8)
    logits[1, 1] = torch.randn(8)  # at the padding: of no consequence
    assert w4_translation.perplexity([(logits, {"labels": labels})]) == pytest.approx(8)
    logits[0, 0, 2] = 100.0
    assert w4_translation.perplexity([(logits, {"labels": labels})]) == pytest.approx(8 ** (2 / 3))


def test_a_target_is_predicted_from_the_tokens_before_it():
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: SimpleNamespace(ids=list(map(ord, text)))
    )
    (batch,) = w4_translation.batches(tokenizer, [("ab", "xyz"), ("a", "x")], 2)
    eos, pad = w4_translation.EOS, w4_translation.IGNORED
    assert batch["input_ids"].tolist() == [[97, eos, eos], [97, 98, eos]]  # the short pair first
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[120, eos, pad, pad], [120, 121, 122, eos]]
    assert batch["decoder_input_ids"].tolist()[1] == [eos, 120, 121, 122]


class Repeats(torch.nn.Module):
    """Translates everything alike."""

    def __init__(self, words: list[int]):
        super().__init__()
        self.words, self.weight = words, torch.nn.Parameter(torch.zeros(1))

    def translated(self, ids, mask, longest):
        return [self.words[:longest] for _ in ids]


def test_bleu_is_of_the_words_without_padding_and_end():
    pytest.importorskip("sacrebleu")
    tokenizer = SimpleNamespace(decode_batch=lambda rows: [" ".join(f"w{i}" for i in row) for row in rows])
    eos, pad = w4_translation.EOS, w4_translation.IGNORED
    labels = torch.tensor([[5, 6, 7, 8, 9, eos, pad], [5, 6, 7, 8, 9, eos, pad]])
    ids = torch.ones(2, 4, dtype=torch.int64)
    tests = [{"input_ids": ids, "attention_mask": ids, "labels": labels}]
    score = w4_translation.bleu(Repeats([5, 6, 7, 8, 9]), tokenizer, tests)
    assert score == pytest.approx(100)
    assert w4_translation.bleu(Repeats([5, 6, 7, 8, 4]), tokenizer, tests) < 90
    assert w4_translation.bleu(Repeats([1, 2, 3, 4]), tokenizer, tests) < 1


@pytest.mark.parametrize("script", [w1_movie_polarity, w3_image_classifier])
def test_accuracy_is_the_share_that_is_right(script):
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    output = SimpleNamespace(logits=logits) if script is w1_movie_polarity else logits
    batches = [(output, {"labels": torch.tensor([0, 1, 1])})] * 2
    assert script.accuracy(batches) == pytest.approx(2 / 3)


def test_the_same_logits_cost_nothing_and_others_do():
    batch = {"decoder_attention_mask": torch.ones(2, 3)}
    for script, of in (
        (w2_language_model, lambda x: SimpleNamespace(logits=x)),
        (w4_translation, lambda x: x),
    ):
        a, b = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(1))
        assert script.same_logits(of(a), of(a), batch).item() == pytest.approx(0, abs=1e-6)
        assert script.same_logits(of(a), of(b), batch) > 0.1 * script.WEIGHT


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_how_it_is_run_and_its_efforts_fit(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert f"python bench/recipes/{script}.py" in told
    for name, effort in getattr(module, "EFFORTS", {}).items():
        assert name in told
        assert isinstance(effort, Effort)
        assert math.isfinite(effort.training(2))
