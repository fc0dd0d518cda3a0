"""The command line on a tiny model of a local folder: what it writes, prints and refuses."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sadmoe import cli, moe_layers, texts
from sadmoe.cli import convert as convert_command
from sadmoe.data import _lines_of_pairs, load_data
from sadmoe.ops import layout
from sadmoe.outputs import replaced
from sadmoe.report import Series, plot_curves
from sadmoe.routers import RouterConfig

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "experts", "run", "few", "tokens", "choose", "them"]


def bert(path, **sizes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **sizes,
    }
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **shape)).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Quick(RouterConfig):
    steps: int = 20


@pytest.fixture(autouse=True, scope="module")
def quick_routers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_command, "RouterConfig", Quick)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("experts run\n\nfew tokens choose\nthem\n\n" + "tokens choose few experts\n\n" * 20)
    return path


def converted(folder, data, out, *more):
    places = ["--model", str(folder), "--data", str(data), "--out", str(out)]
    return cli.main(["convert", *places, "--expert-size", "8", *more])


def evaluated(folder, data, *taus):
    return cli.main(["evaluate", "--model", str(folder), "--data", str(data), "--tau", *taus])


def test_convert_then_evaluate(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2") == 0
    printed = capsys.readouterr().out
    assert f'BertModel.from_pretrained("{out}")' in printed
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "sadmoe"
    assert evaluated(out, text, "0", "0.5") == 0
    header, zero, half = capsys.readouterr().out.strip().splitlines()
    assert "executed share" in header
    assert zero.split()[1] == "100.0%"
    assert float(half.split()[1].rstrip("%")) < 100


def test_survey_on_data_and_on_random_tokens(folder, text, capsys):
    assert cli.main(["survey", "--model", str(folder), "--data", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "of the FLOPs on this data" in printed
    assert "encoder.layer.0" in printed
    assert cli.main(["survey", "--model", str(folder), "--batch-size", "2", "--max-length", "9"]) == 0
    assert "encoder.layer.0" in capsys.readouterr().out


def test_evaluate_and_report_beside_the_dense_model(folder, text, tmp_path, capsys):
    out, page = tmp_path / "moe", tmp_path / "page.html"
    assert converted(folder, text, out, "--tau", "0.2") == 0
    places = ["--model", str(out), "--data", str(text), "--tau", "0.5", "--dense"]
    assert cli.main(["evaluate", *places, str(folder)]) == 0
    assert "faster than dense" in capsys.readouterr().out
    assert cli.main(["report", *places, str(folder), "--out", str(page)]) == 0
    assert "y0 those of the dense model" in page.read_text()
    capsys.readouterr()
    assert cli.main(["evaluate", *places, str(out)]) == 2
    assert f"--dense: {out} holds a converted model" in capsys.readouterr().err


def test_routers_are_as_wide_as_asked(folder, text, tmp_path):
    assert converted(folder, text, tmp_path / "moe", "--router-width", "4") == 0
    (layer,) = moe_layers(transformers.BertModel.from_pretrained(tmp_path / "moe")).values()
    assert layer.router.v1.shape[0] == 4


def test_convert_to_int8(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2", "--int8") == 0
    assert "MiB of experts" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert evaluated(out, text, "0", "0.5") == 0
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


def test_where_nothing_can_be_written_it_says_so_before_it_trains(
    folder, text, tmp_path, capsys, monkeypatch
):
    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    monkeypatch.setattr(convert_command, "load_model", lambda *_: pytest.fail("it was loaded"))
    with monkeypatch.context() as patch:
        patch.setattr("sadmoe.outputs.tempfile.TemporaryDirectory", refused)
        for wanted, place in ((tmp_path / "some/folder", tmp_path), (out, tmp_path)):
            capsys.readouterr()
            assert converted(folder, text, wanted, "--force") == 2
            assert f"{wanted} cannot be written: Permission denied in {place}" in capsys.readouterr().err
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    assert converted(folder, text, out, "--force") == 2
    assert "is a mount, which --force cannot replace: write to a folder inside it" in capsys.readouterr().err


def test_models_are_made_sparse_as_is_fast_on_a_cpu(folder, text, tmp_path, monkeypatch):
    step, seen = convert_command.sparsify_, []

    def noted(model, *args, **settings):
        seen.append(model.config._attn_implementation)
        return step(model, *args, **settings)

    monkeypatch.setattr(convert_command, "sparsify_", noted)
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2", "--router-width", "4", "--sparsify", "0.2") == 0
    assert seen == ["eager"]
    assert texts.load_model(out).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("more", [("--finetune", "0.2"), ("--sparsify", "0.2")])
def test_16_bits_are_trained_in_float32(folder, text, tmp_path, capsys, monkeypatch, more):
    half, out, dtypes = tmp_path / "half", tmp_path / "moe", []
    model, tokenizer = texts.load_model(folder), texts.load_tokenizer(folder)
    model.bfloat16().save_pretrained(half)
    tokenizer.save_pretrained(half)
    for name in ("finetune_for_budget_", "sparsify_", "convert_"):
        step = getattr(convert_command, name)

        def noted(model, *args, name=name, step=step, **settings):
            dtypes.append((name, next(model.parameters()).dtype))
            return step(model, *args, **settings)

        monkeypatch.setattr(convert_command, name, noted)
    assert converted(half, text, out, "--budget", "0.8", "--router-width", "4", *more) == 0
    assert "is bfloat16: trained and saved in float32" in capsys.readouterr().out
    steps = ["convert_", "finetune_for_budget_"] if "--finetune" in more else ["sparsify_", "convert_"]
    assert dtypes == [(step, torch.float32) for step in steps]
    saved = transformers.BertModel.from_pretrained(out, dtype=torch.bfloat16)
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    with monkeypatch.context() as patched:
        patched.setattr(cli, "evaluate", lambda model, batches, taus, dense: [model, dense])
        patched.setattr(cli, "table", lambda both: {next(m.parameters()).dtype for m in both})
        beside = ["--model", str(out), "--data", str(text), "--dense", str(half)]
        assert cli.main(["evaluate", *beside]) == 0  # or one of them would be timed in slower products
    said = capsys.readouterr().out
    assert "the dense model is bfloat16: run in float32, as the other" in said
    assert said.endswith("{torch.float32}\n")
    assert converted(half, text, tmp_path / "untrained", "--tau", "0.2") == 0
    untrained = texts.load_model(tmp_path / "untrained")
    assert {p.dtype for p in untrained.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("device", "told"),
    [("gpu", "--device gpu: "), ("cuda", "sees no CUDA device here"), ("cpu:x", "--device cpu:x: ")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_none_is_told_in_a_line(folder, capsys, device, told):
    assert cli.main(["bench", "--model", str(folder), "--device", device]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_roberta_s_first_positions_are_no_token_s(text, tmp_path, capsys):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=20, pad_token_id=1, **shape)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    assert converted(tmp_path / "model", text, tmp_path / "out", "--max-length", "19") == 2
    assert (
        "--max-length must be at most 18, the positions of this RobertaModel, got 19"
        in capsys.readouterr().err
    )


def test_a_tokenizer_of_another_model_is_refused(text, tmp_path, capsys):
    folder = bert(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:5], "more", *WORDS[5:]]))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    assert converted(folder, text, tmp_path / "out") == 2
    told = f"gives token {len(WORDS)}, and this BertModel knows {len(WORDS)} tokens, from 0"
    assert told in capsys.readouterr().err


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
        assert (
            "read by this command, and would be replaced: write to another folder" in capsys.readouterr().err
        )
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--expert-size", "7"), "expert_size"),
        (("--budget", "3"), "budget must be in (0, 1]"),
        (("--tau", "0.1", "--budget", "0.3"), "give tau, or budget"),
        (("--tau", "0.2"), "the disk is full"),
    ],
)
def test_a_failure_leaves_what_was_there(folder, text, tmp_path, capsys, monkeypatch, wrong, told):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def half_saved(model, folder, **settings):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("half")
        raise OSError("the disk is full")

    if told == "the disk is full":
        monkeypatch.setattr(transformers.BertModel, "save_pretrained", half_saved)
    assert converted(folder, text, out, "--force", *wrong) == 2
    assert told in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe", "text.txt"]


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


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def t5(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(20):
        place = tmp_path / "photos" / f"class {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (20, 24), (12 * i, 200 - 5 * i, 90)).save(place / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("experts run\tfew tokens choose them\nfew tokens\texperts\n" * 12)
    return path


def test_a_model_of_images_is_converted_evaluated_and_reported(vit, photos, tmp_path, capsys):
    out, page = tmp_path / "moe", tmp_path / "page.html"
    assert converted(vit, photos, out, "--tau", "0.2") == 0
    assert "ViTForImageClassification.from_pretrained" in capsys.readouterr().out
    assert (out / "preprocessor_config.json").exists()
    assert evaluated(out, photos, "0", "1") == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[3]) > 0  # error
    report = ["report", "--model", str(out), "--data", str(photos), "--out", str(page)]
    assert cli.main([*report, "--sentence", "few"]) == 2
    assert "--sentence: this ViTForImageClassification is not run on text alone" in capsys.readouterr().err
    assert cli.main([*report, "--tau", "0", "0.5"]) == 0
    assert "Experts of each token of the first image" in page.read_text()
    assert cli.main(["bench", "--model", str(out), "--data", str(photos), "--seconds", "0.01"]) == 0


def test_an_encoder_decoder_is_converted_evaluated_and_reported(t5, pairs, tmp_path, capsys):
    out, page = tmp_path / "moe", tmp_path / "page.html"
    assert converted(t5, pairs, out, "--tau", "0.2") == 0
    assert len(moe_layers(transformers.T5ForConditionalGeneration.from_pretrained(out))) == 2
    capsys.readouterr()
    assert evaluated(out, pairs, "0", "1") == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[3]) > 0
    report = ["report", "--model", str(out), "--data", str(pairs), "--out", str(page)]
    assert cli.main([*report, "--sentence", "few tokens"]) == 2
    assert "is not run on text alone" in capsys.readouterr().err
    assert cli.main(report) == 0
    titles = re.findall("<title>([^<]*)</title>", page.read_text())
    heat = [title.partition(":")[0] for title in titles if title.endswith("% of the experts")]
    words = ["[CLS]", "experts", "run", "[SEP]"]
    assert heat == [
        f"DenseReluDense {word}" for word in words
    ]  # of the encoder: the decoder sees other tokens


@pytest.fixture
def whisper(tmp_path):
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "vocab_size": 20,
    }
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_attention_heads": 2, "num_mel_bins": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(max_source_positions=10, **sizes, **ids)
    transformers.WhisperModel(config).save_pretrained(tmp_path / "whisper")
    return tmp_path / "whisper"


def test_any_model_takes_the_batches_of_a_python_file(whisper, tmp_path, capsys):
    data, out, page = tmp_path / "mine.py", tmp_path / "moe", tmp_path / "page.html"
    data.write_text(
        "import torch\n"
        "def batches():\n"
        "    ids = torch.randint(3, 20, (2, 6))\n"
        "    return [{'input_features': torch.randn(2, 8, 20), 'decoder_input_ids': ids} for _ in range(8)]\n"
    )
    assert converted(whisper, data, out, "--tau", "0.2") == 0
    assert len(moe_layers(transformers.WhisperModel.from_pretrained(out))) == 2
    capsys.readouterr()
    assert evaluated(out, data, "0", "1") == 0
    assert float(capsys.readouterr().out.splitlines()[-1].split()[3]) > 0
    assert cli.main(["report", "--model", str(out), "--data", str(data), "--out", str(page)]) == 0
    assert "WhisperModel, converted" in page.read_text()
    data.write_text("batches = 3")
    assert converted(whisper, data, tmp_path / "other") == 2
    assert "must set `batches` to a list of what the model is called with" in capsys.readouterr().err
    assert [file.name for file in out.iterdir() if "token" in file.name] == [], "the model had no tokenizer"
    for wrong, told in (
        ("x = 1\nbatches = [x / 0]", "mine.py, line 2 raised ZeroDivisionError: division by zero"),
        ("batches = [", "mine.py raised SyntaxError: '[' was never closed (mine.py, line 1)"),
    ):
        data.write_text(wrong)
        assert converted(whisper, data, tmp_path / "other") == 2
        assert told in capsys.readouterr().err


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_pair(pairs):
    pairs.write_text("\ufeff" + pairs.read_text(), encoding="utf-8")  # as some editors begin a file
    assert _lines_of_pairs(pairs, "t5")[0] == ["experts run", "few tokens choose them"]


def test_the_shortest_texts_and_pairs_come_first(folder, t5, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("tokens choose few experts\n\nrun\n\nfew tokens\n\n")
    found = load_data(texts.load_model(folder), folder, data, batch_size=1, max_length=8).batches
    assert [batch["input_ids"].shape[1] for batch in found] == [3, 4, 6]
    data.write_text("tokens choose few experts\trun\nrun\tfew tokens\n")
    found = load_data(texts.load_model(t5), t5, data, batch_size=1, max_length=8).batches
    lengths = [batch["input_ids"].shape[1] for batch in found]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[1]


def test_what_an_encoder_decoder_reads(t5, pairs):
    model = texts.load_model(t5)
    data = load_data(model, t5, pairs, batch_size=2, max_length=8)
    names = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert names <= data.first.keys()
    assert len(data.batches) == 12
    target = data.processor("few tokens choose them")["input_ids"]
    assert data.first["decoder_input_ids"].tolist() == [[0, *target[:-1]]]
    assert data.words[1:3] == ["experts", "run"]
    assert [len(batch["input_ids"]) for batch in data.batches] == [2] * 12


def test_projections_and_a_checkpoint_that_is_taken_up_again(folder, text, tmp_path, capsys, monkeypatch):
    state, first, second = tmp_path / "state", tmp_path / "first", tmp_path / "second"
    more = ("--tau", "0.2", "--projections", "3", "--sparsify", "0.2", "--checkpoint", str(state))
    monkeypatch.setattr(convert_command, "convert_", interrupt)
    assert converted(folder, text, first, *more) == 130
    assert f"interrupted; the same command goes on from the last save in {state}" in capsys.readouterr().err
    assert {path.name for path in state.iterdir()} == {"projections", "sparsify", "data.json"}
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", once_only())
    assert converted(folder, text, first, *more) == 0
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was trained again"))
    assert converted(folder, text, second, *more) == 0
    one, two = (transformers.BertModel.from_pretrained(out) for out in (first, second))
    assert len(moe_layers(one)) == 5
    assert converted(folder, text, tmp_path / "third", *more, "--max-length", "5000") == 2
    assert (
        "--max-length must be at most 512, the positions of this BertModel, got 5000"
        in capsys.readouterr().err
    )
    assert converted(folder, text, tmp_path / "third", *more, "--max-length", "5") == 2
    assert f"--checkpoint: {state} is of another run, of {{'batch_size'" in capsys.readouterr().err
    former = text.read_text()
    text.write_text(former.replace("tokens", "token"))
    assert text.read_text() != former
    assert converted(folder, text, tmp_path / "third", *more) == 2
    assert "is of another run" in capsys.readouterr().err
    assert converted(folder, text, tmp_path / "out", "--checkpoint", str(tmp_path / "out/state")) == 2
    assert "read by this command, and would be replaced: write to another folder" in capsys.readouterr().err
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_finetune_does_all_that_comes_after_the_conversion(text, tmp_path, capsys, monkeypatch):
    folder, state, out = (tmp_path / name for name in ("wide", "state", "out"))
    bert(folder, hidden_size=128, intermediate_size=512)  # beside which the routers are small
    more = ("--finetune", "0.4", "--projections", "3", "--checkpoint", str(state), "--budget", "0.8")
    assert converted(folder, text, out, *more) == 0
    assert re.search(r"the whole model: \d+ updates in .*\ntau [01]\.\d+ executes", capsys.readouterr().out)
    assert {path.name for path in state.iterdir()} == {"projections", "convert", "finetune", "data.json"}
    taus = {layer.gate.tau for layer in moe_layers(transformers.BertModel.from_pretrained(out)).values()}
    assert len(taus) == 1
    assert taus.pop() > 0
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was trained again"))
    assert converted(folder, text, tmp_path / "again", *more) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--finetune", "9", "--tau", "0.1"), "--finetune trains for a budget .*: give --budget, not --tau"),
    ],
)
def test_training_that_cannot_be_is_refused_before_anything_is_loaded(more, told, tmp_path, capsys):
    assert converted(tmp_path / "no model", tmp_path / "no data", tmp_path / "out", *more) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    "flag", ["--threads", "--batch-size", "--max-length", "--expert-size", "--sparsify", "--finetune"]
)
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan"])
def test_a_number_that_is_not_above_0_is_refused_by_its_flag(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        converted(tmp_path / "no model", tmp_path / "no data", tmp_path / "out", flag, value)
    kind = "number" if flag in ("--sparsify", "--finetune") else "whole number"
    assert f"argument {flag}: must be a {kind} above 0, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--expert-size", "33"), "neurons do not split into experts of 33; expert_size may be one of"),
        (("--budget", "0.001"), "budget 0.001 cannot be met: router and one expert cost"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_it_is_trained(
    folder, text, tmp_path, more, told, capsys, monkeypatch
):
    monkeypatch.setattr(convert_command, "sparsify_", lambda *_, **__: pytest.fail("it was trained"))
    assert converted(folder, text, tmp_path / "out", "--sparsify", "9", *more) == 2
    assert told in capsys.readouterr().err


def test_a_place_that_cannot_be_a_folder_is_refused_at_once(tmp_path, text, capsys):
    assert converted(tmp_path / "no model", text, text / "out") == 2
    assert f"{text / 'out'} cannot be written: {text} is a file" in capsys.readouterr().err


def test_packed_layers_are_timed_as_such(folder, text, tmp_path, capsys, monkeypatch):
    out, numbers = tmp_path / "moe", tmp_path / "numbers.json"
    assert converted(folder, text, out, "--tau", "0.2") == 0
    bench = ["bench", "--model", str(out), "--seconds", "0.01", "--packed", "--json", str(numbers)]
    monkeypatch.setattr(layout, "cpu_isa", lambda: "portable")
    assert cli.main(bench) == 2
    assert "--packed: no layer gains by it" in capsys.readouterr().err
    monkeypatch.setattr(layout, "cpu_isa", lambda: "avx512")
    monkeypatch.setattr(layout, "FULL", 1)
    assert cli.main(bench) == 0
    packed = json.loads(numbers.read_text())["packed"]
    assert f"{len(packed)} of {len(packed)} layers packed" in capsys.readouterr().out
    assert packed


def test_what_calibrate_would_not_look_at_is_refused(tmp_path, capsys):
    more = ("--json", str(tmp_path / "numbers.json"), "--tau", "0.1", "--packed")
    assert cli.main(["bench", "--model", str(tmp_path), "--calibrate", *more]) == 2
    assert (
        "--calibrate measures layers at shares of its own: leave out --tau, --packed, --json"
        in capsys.readouterr().err
    )


def test_images_are_read_by_batches_and_turned_as_they_were_taken(vit, tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "photos").mkdir()
    wide = image.new("RGB", (32, 16), (250, 0, 0))
    turned = image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    wide.save(tmp_path / "photos/0.jpg", exif=turned)
    wide.save(tmp_path / "photos/1.jpg")
    seen = []
    model = texts.load_model(vit).bfloat16()
    data = load_data(model, vit, tmp_path / "photos", batch_size=2, max_length=8)
    processor = data.batches.processor
    object.__setattr__(
        data.batches, "processor", lambda images, **kw: seen.extend(images) or processor(images, **kw)
    )
    assert len(data.batches) == 1
    assert data.batches[0]["pixel_values"].dtype == torch.bfloat16
    assert [one.size for one in seen] == [(16, 32), (32, 16)]
    assert data.batches[-1:][0]["pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(IndexError):
        data.batches[1]


def interrupt(*args, **kw):
    raise KeyboardInterrupt


def once_only():
    """AdamW's step, for routers alone: what came before them is loaded."""
    real = torch.optim.AdamW.step

    def step(self, *args, **kw):
        assert len(self.param_groups[0]["params"]) == 2, "more than a router is trained"
        return real(self, *args, **kw)

    return step


def test_what_is_mostly_cut_is_told(folder, tmp_path, caplog):
    model, data = texts.load_model(folder), tmp_path / "lines.txt"
    for blank, told in (("", 0), ("\n\n", 1)):  # one text a line, and a blank line somewhere
        data.write_text("\n".join(["experts run few tokens"] * 50) + blank + "choose them\n" * 50)
        load_data(model, folder, data, batch_size=8, max_length=16)
        assert len(caplog.records) == told
    assert "of its 2 texts 2 are cut after 16 tokens" in caplog.text
    data.write_text("experts run few tokens\n" * 9 + "run " * 20)  # one of ten
    load_data(model, folder, data, batch_size=8, max_length=16)
    assert len(caplog.records) == 1


def test_a_tokenizer_without_a_padding_mask_will_do(tmp_path):
    bert(tmp_path)
    tokenizer = transformers.BertTokenizer(
        vocab=str(tmp_path / "vocab.txt"), model_input_names=["input_ids", "token_type_ids"]
    )
    tokenizer.save_pretrained(tmp_path)
    data = tmp_path / "text.txt"
    data.write_text("experts run\nfew tokens choose them\n")
    found = load_data(texts.load_model(tmp_path), tmp_path, data, batch_size=2, max_length=8)
    assert "attention_mask" not in found.batches[0]


def test_images_that_cannot_be_read_are_named(vit, tmp_path):
    images = pytest.importorskip("PIL.Image")
    images.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"of another system")
    (tmp_path / "folder.png").mkdir()
    model = texts.load_model(vit)
    data = load_data(model, vit, tmp_path, batch_size=1, max_length=8)
    assert len(data.batches) == 1
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        list(load_data(model, vit, tmp_path, batch_size=1, max_length=8).batches)
    images.new("I;16", (20, 20)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has more than 8 bits a colour"):
        list(load_data(model, vit, tmp_path, batch_size=1, max_length=8).batches)


def test_a_python_file_may_import_what_lies_beside_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside_the_data.py").write_text("import torch\nids = torch.ones(1, 4, dtype=torch.long)\n")
    (tmp_path / "data.py").write_text("from beside_the_data import ids\nbatches = [{'input_ids': ids}]\n")
    data = load_data(texts.load_model(folder), folder, tmp_path / "data.py", batch_size=1, max_length=8)
    assert data.batches[0]["input_ids"].shape == (1, 4)


def test_random_tokens_are_no_more_than_there_are_positions(tmp_path, capsys):
    bert(tmp_path / "short", max_position_embeddings=16)
    assert cli.main(["survey", "--model", str(tmp_path / "short")]) == 0
    assert "of random input" in capsys.readouterr().out


def test_data_of_another_kind_is_refused(folder, vit, t5, whisper, text, pairs, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for model, data, message in (
        (vit, text, "a ViTForImageClassification takes images, and"),
        (vit, tmp_path / "empty", "holds no image, by the names *.bmp"),
        (folder, photos, "a BertModel takes text, and"),
        (t5, text, "takes lines of a source, a tab and a target; line 1 of"),
        (
            whisper,
            text,
            "which takes input_features and a decoder that has its own, and not text or images alone",
        ),
    ):
        assert converted(model, data, tmp_path / "out") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["convert", "--model", "nowhere", "--out", "out", "--data", "{text}"],
            "nowhere holds no model: config.json is missing",
        ),
        (["convert", "--model", "{folder}", "--out", "out", "--data", "nothing.txt"], "nothing.txt"),
        (
            ["convert", "--model", "{folder}", "--out", "out", "--data", "{text}", "--expert-size", "7"],
            "64 neurons do not split into experts of 7",
        ),
        (
            ["convert", "--model", "{folder}", "--out", "out", "--data", "{text}", "--budget", "3"],
            r"budget must be in (0, 1]",
        ),
        (["evaluate", "--model", "{folder}", "--data", "{text}"], "has no converted layer: convert it first"),
        (
            ["report", "--model", "{folder}", "--data", "{text}", "--out", "no/a.html"],
            "there is no folder no: make it first",
        ),
        (["bench", "--model", "{folder}", "--json", "."], ". is a folder, and a file is to be written"),
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
    for command, word in {
        "": "examples:",
        "demo": "--seconds",
        "convert": "--budget",
        "evaluate": "--tau",
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), "--help"])
        assert stop.value.code == 0
        assert word in capsys.readouterr().out
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert "cpu kernels" in told
    module = subprocess.run(
        [sys.executable, "-m", "sadmoe", "info"], capture_output=True, text=True, check=True
    )
    assert module.stdout == told


def test_what_is_not_there_is_named(folder, text, tmp_path, capsys):
    assert converted(folder, tmp_path / "none.txt", tmp_path / "out") == 2
    assert "--data: there is no file or folder" in capsys.readouterr().err
    bytes_only = tmp_path / "image.txt"
    bytes_only.write_bytes(b"\xd6\x00\xff")
    assert converted(folder, bytes_only, tmp_path / "out") == 2
    assert "image.txt is no text in UTF-8" in capsys.readouterr().err
    bare = tmp_path / "bare"
    transformers.AutoModel.from_pretrained(folder).save_pretrained(bare)
    assert converted(bare, text, tmp_path / "out") == 2
    assert "bare has no tokenizer: put the model's there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_given_back_as_it_was(folder):
    tokenizer = texts.load_tokenizer(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    (batch,) = texts.tokenized(tokenizer, ["few", "few tokens choose"])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert tokenizer.pad_token is None


def test_texts_are_paragraphs_in_batches(folder, text, tmp_path):
    found = texts.paragraphs(text)
    assert found[:2] == ["experts run", "few tokens choose them"]
    tokenizer = texts.load_tokenizer(folder)
    first, *_ = texts.tokenized(tokenizer, found, batch_size=2)
    assert first["input_ids"].shape == (2, 6)
    assert (first["attention_mask"] == 0).sum() == 2
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    assert texts.paragraphs(lines) == ["one", "two"]
    lines.write_text("\ufeffone\ntwo\n \t\nthree\n", encoding="utf-8")
    assert texts.paragraphs(lines) == ["one two", "three"], (
        "without a byte order mark; a blank line may have blanks"
    )
    lines.write_text(" \n\n")
    with pytest.raises(ValueError, match="has no text"):
        texts.paragraphs(lines)


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    plot_curves(path, [("cost", "x", "y", [Series("ours", [0.1, 0.2], [1, 2], ["a", "b"])])], "title")
    assert path.read_bytes().startswith(b"\x89PNG")
