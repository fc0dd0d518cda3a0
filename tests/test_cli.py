"""The command line on a tiny model of a local folder: what it writes, prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sadmoe import cli, moe_layers, texts
from sadmoe.outputs import replaced
from sadmoe.report import Series, plot_curves

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "experts", "run", "few", "tokens", "choose", "them"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("experts run\n\nfew tokens choose\nthem\n\n" + "tokens choose few experts\n\n" * 20)
    return path


def converted(folder, text, out, *more):
    return cli.main(["convert", str(folder), str(out), "--text", str(text), "--expert-size", "8", *more])


def test_convert_then_evaluate(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2") == 0
    printed = capsys.readouterr().out
    assert f'BertModel.from_pretrained("{out}")' in printed
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "sadmoe"
    assert cli.main(["evaluate", str(out), "--text", str(text), "--tau", "0", "0.5"]) == 0
    header, zero, half = capsys.readouterr().out.strip().splitlines()
    assert "executed share" in header
    assert zero.split()[1] == "100.0%"
    assert float(half.split()[1].rstrip("%")) < 100


def test_convert_to_int8(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2", "--int8") == 0
    assert "MiB of experts" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert cli.main(["evaluate", str(out), "--text", str(text), "--tau", "0", "0.5"]) == 0
    (layer,) = moe_layers(transformers.BertModel.from_pretrained(out)).values()
    assert layer.is_int8


def test_nothing_is_overwritten_without_force(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    before = (out / "config.json").read_bytes()
    assert converted(folder, text, out, "--tau", "0.2") == 2
    assert "is not empty: choose another folder, or replace it with --force" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before
    assert converted(folder, text, out, "--tau", "0.2", "--force") == 0
    assert (out / "config.json").read_bytes() != before


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "bert"}', "no json"])
def test_force_does_not_remove_what_is_not_ours(folder, text, tmp_path, capsys, config):
    out = tmp_path / "work"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if config is not None:
        (out / "config.json").write_text(config)
    assert converted(folder, text, out, "--force") == 2
    assert "was not written by sadmoe" in capsys.readouterr().err
    assert (out / "thesis.tex").exists()


def test_what_is_read_is_not_replaced(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    before = sorted(out.iterdir())
    for model, words in ((out, text), (folder, out / "config.json")):
        assert converted(model, words, out, "--force") == 2
        assert "which is read: write to another folder" in capsys.readouterr().err
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize(
    "wrong", [("--expert-size", "7"), ("--budget", "3"), ("--tau", "0.1", "--budget", "0.3")]
)
def test_a_failure_leaves_what_was_there(folder, text, tmp_path, capsys, wrong):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert converted(folder, text, out, "--force", *wrong) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def interrupted_in(folder):
    with replaced(folder):
        assert not folder.exists()
        folder.mkdir()
        (folder / "new").touch()
        raise KeyboardInterrupt


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted_in(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with replaced(folder):
        folder.mkdir()
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_an_empty_folder_that_one_is_in_may_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), replaced(Path()):
        leave_unfinished()
    assert not any(tmp_path.iterdir())
    with replaced(Path()):
        Path("new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def leave_unfinished():
    Path("half").mkdir()
    Path("half/new").touch()
    raise KeyboardInterrupt


def test_text_does_not_run_every_model(folder, text, tmp_path, capsys):
    for config, takes in (
        (transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1), "pixel_values"),
        (
            transformers.T5Config(d_model=8, d_ff=16, num_layers=1, num_heads=1),
            "the input of encoder and decoder",
        ),
    ):
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / takes)
        assert converted(tmp_path / takes, text, tmp_path / "out") == 2
        assert f"which takes {takes}, and not text alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert", "nowhere", "out", "--text", "{text}"], "nowhere holds no model: config.json is missing"),
        (["convert", "{folder}", "out", "--text", "nothing.txt"], "nothing.txt"),
        (
            ["convert", "{folder}", "out", "--text", "{text}", "--expert-size", "7"],
            "64 neurons do not split into experts of 7",
        ),
        (["convert", "{folder}", "out", "--text", "{text}", "--budget", "3"], r"budget must be in (0, 1]"),
        (["evaluate", "{folder}", "--text", "{text}"], "has no converted layer: convert it first"),
        (
            ["report", "{folder}", "--text", "{text}", "--out", "no/a.html"],
            "there is no folder no: make it first",
        ),
        (["bench", "{folder}", "--json", "."], ". is a folder, and a file is to be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(folder, text, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([part.format(folder=folder, text=text) for part in argv]) == 2
    error = capsys.readouterr().err
    assert "sadmoe: error: " in error
    assert "Traceback" not in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys):
    for argv in (["--help"], ["demo", "--help"], ["convert", "--help"], ["evaluate", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "cpu kernels" in told
    module = subprocess.run(
        [sys.executable, "-m", "sadmoe", "info"], capture_output=True, text=True, check=True
    )
    assert module.stdout == told


def test_a_tokenizer_is_given_back_as_it_was(folder):
    tokenizer = texts.load_tokenizer(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    (batch,) = texts.tokenized(tokenizer, ["few", "few tokens choose"])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert tokenizer.pad_token is None


def test_texts_are_paragraphs_in_batches(folder, text, tmp_path):
    found = texts.paragraphs(text)
    assert found[:2] == ["experts run", "few tokens choose them"]
    _, tokenizer = texts.load_model(folder)
    first, *_ = texts.tokenized(tokenizer, found, batch_size=2, labels=True)
    assert first["input_ids"].shape == (2, 6)
    assert (first["labels"] == -100).sum() == (first["attention_mask"] == 0).sum() == 2
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    assert texts.paragraphs(lines) == ["one", "two"]
    lines.write_text(" \n\n")
    with pytest.raises(ValueError, match="has no text"):
        texts.paragraphs(lines)


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    plot_curves(path, [("cost", "x", "y", [Series("ours", [0.1, 0.2], [1, 2], ["a", "b"])])], "title")
    assert path.read_bytes().startswith(b"\x89PNG")
