"""Mistakes on the command line: a line that says what to do, before anything is loaded or trained."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sadmoe import cli
from sadmoe.cli import convert as convert_command
from sadmoe.cli.options import say

transformers = pytest.importorskip("transformers")
from command_line import WORDS, bert, converted


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("gpu", "--device gpu: "),
        ("cuda", "sees no CUDA device here"),
        ("cpu:x", "--device cpu:x: "),
        ("meta", "--device meta: nothing is computed there"),
        pytest.param(
            "xpu", "--device xpu: ", marks=pytest.mark.skipif(torch.xpu.is_available(), reason="is one")
        ),
    ],
)
@pytest.mark.parametrize("command", ["bench", "survey", "evaluate", "report", "convert"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_none_is_told_in_a_line(folder, text, tmp_path, capsys, command, device, told):
    words = [command, "--model", str(folder), "--data", str(text), "--device", device]
    words += ["--out", str(tmp_path / "out.html")] if command in ("convert", "report") else []
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_models_are_put_where_device_says(folder, text, monkeypatch, capsys):
    moved, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where: moved.append(where) or to(self, *where))
    assert cli.main(["survey", "--model", str(folder), "--data", str(text), "--device", "cpu:0"]) == 0
    assert moved == [(torch.device("cpu:0"),)]


def test_texts_are_cut_to_the_positions_where_no_length_is_asked_for(text, tmp_path):
    bert(tmp_path / "short", max_position_embeddings=16)
    assert converted(tmp_path / "short", text, tmp_path / "out", "--tau", "0.2") == 0


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


def of_another_size(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 64', '"intermediate_size": 72'))


def without_lfs(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def empty(folder):
    (folder / "model.safetensors").write_text("")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def half_a_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


@pytest.mark.parametrize("damage", [of_another_size, without_lfs, empty, broken_tokenizer, half_a_tokenizer])
def test_a_damaged_model_is_a_line_that_names_it(damage, text, tmp_path, capsys):
    folder = bert(tmp_path / "model")
    damage(folder)
    assert converted(folder, text, tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sadmoe: error: ")]
    assert str(folder) in line


def test_a_tokenizer_of_another_model_is_refused(text, tmp_path, capsys):
    folder = bert(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:5], "more", *WORDS[5:]]))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    assert converted(folder, text, tmp_path / "out") == 2
    told = f"gives token {len(WORDS)}, and this BertModel knows {len(WORDS)} tokens, from 0"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--finetune", "9", "--tau", "0.1"), "--finetune trains for a budget .*: give --budget, not --tau"),
        (
            ("--finetune", "9", "--target-power", "1"),
            "--finetune trains the routers on roots of norms: leave",
        ),
        (("--target-power", "3"), r"target_power must be in \(0, 2\], got 3"),
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


@pytest.mark.parametrize("command", ["evaluate", "report", "bench"])
def test_a_tau_that_is_no_share_is_refused_by_its_flag(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "--model", str(tmp_path), "--data", str(tmp_path), "--tau", "0.1", "1.5"])
    (line,) = capsys.readouterr().err.splitlines()  # no usage before it
    assert line.startswith(
        f"sadmoe {command}: error: argument --tau: must be a number from 0 to 1, got '1.5'; see "
    )


def test_a_seed_that_torch_does_not_take_is_refused_by_its_flag(tmp_path, capsys):
    for value in ("-1", "99999999999999999999", "x"):
        with pytest.raises(SystemExit, match="2"):
            converted(tmp_path / "no model", tmp_path / "no data", tmp_path / "out", "--seed", value)
        assert "argument --seed: must be a whole number from 0 to" in capsys.readouterr().err


def test_what_cannot_be_saved_is_refused_before_it_is_trained(folder, text, tmp_path, capsys, monkeypatch):
    def fails(*args, **settings):
        raise ValueError("it has a temperature and does not sample")

    monkeypatch.setattr(convert_command, "sparsify_", lambda *_, **__: pytest.fail("it was trained"))
    for place, name in ((transformers.BertConfig, "config"), (transformers.BertTokenizer, "what makes its")):
        with monkeypatch.context() as patch:
            patch.setattr(place, "save_pretrained", fails)
            assert converted(folder, text, tmp_path / "out", "--sparsify", "9") == 2
        told = capsys.readouterr().err
        assert f"--model: the {name}" in told
        assert "cannot be saved, so no converted model could be: it has a temperature" in told


def test_a_dense_model_of_another_kind_or_size_is_refused(folder, text, tmp_path, capsys):
    out, other = tmp_path / "moe", bert(tmp_path / "other", hidden_size=16)
    assert converted(folder, text, out, "--tau", "0.2") == 0
    argv = ["evaluate", "--model", str(out), "--data", str(text), "--dense"]
    assert cli.main([*argv, str(other)]) == 2
    told = f"--dense: {other} is not what {out} was converted from: embeddings."
    assert told in capsys.readouterr().err
    deeper = bert(tmp_path / "deeper", num_hidden_layers=2)
    assert cli.main([*argv, str(deeper)]) == 2
    assert "converted from: encoder.layer has 2 blocks in that one, 1 in this" in capsys.readouterr().err
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.BertForMaskedLM(config).save_pretrained(other)
    assert cli.main([*argv, str(other)]) == 2
    assert "converted from: that is a BertForMaskedLM, this a BertModel" in capsys.readouterr().err


def test_a_device_without_memory_left_is_one_line(folder, text, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(convert_command, "convert_", full)
    assert converted(folder, text, tmp_path / "out", "--tau", "0.2") == 2
    assert "sadmoe: error: CUDA out of memory. Tried to allocate 2.00 GiB." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--expert-size", "33"), "neurons do not split into experts of 33; expert_size may be one of"),
        (("--budget", "0.001"), "budget 0.001 cannot be met: router and one expert cost"),
        (("--budget", "0.1", "--projections", "9"), "budget 0.1 cannot be met: router and one expert cost"),
        (("--expert-size", "33", "--projections", "9"), "neurons do not split into experts of 33"),
        (
            ("--budget", "0.4", "--router-width", "4", "--compensate", "32"),
            "and a shared one of rank 32, cost",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_before_it_is_trained(
    folder, text, tmp_path, more, told, capsys, monkeypatch
):
    for step in ("sparsify_", "replace_projections_"):
        monkeypatch.setattr(convert_command, step, lambda *_, **__: pytest.fail("it was trained"))
    assert converted(folder, text, tmp_path / "out", "--sparsify", "9", *more) == 2
    assert told in capsys.readouterr().err


def test_a_place_that_cannot_be_a_folder_is_refused_at_once(tmp_path, text, capsys):
    assert converted(tmp_path / "no model", text, text / "out") == 2
    assert f"{text / 'out'} cannot be written: {text} is a file" in capsys.readouterr().err


def test_what_calibrate_would_not_look_at_is_refused(tmp_path, capsys):
    more = ("--json", str(tmp_path / "numbers.json"), "--tau", "0.1", "--packed", "--batch-size", "16")
    assert cli.main(["bench", "--model", str(tmp_path), "--calibrate", *more]) == 2
    assert (
        "--calibrate measures layers at shares of its own: leave out --tau, --batch-size, --packed, --json"
        in capsys.readouterr().err
    )
    assert cli.main(["bench", "--model", str(tmp_path), "--tokens", "8"]) == 2
    assert "--tokens are those to --calibrate at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["convert", "--model", "nowhere", "--out", "out", "--data", "{text}"],
            "there is no folder nowhere: models are read from local folders",
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


def test_a_model_that_is_converted_is_refused_before_it_is_trained(folder, text, tmp_path, capsys):
    assert converted(folder, text, tmp_path / "moe", "--tau", "0.1") == 0
    more = ("--projections", "400", "--sparsify", "600", "--finetune", "600")
    assert converted(tmp_path / "moe", text, tmp_path / "again", *more) == 2
    assert "is converted already: give the dense model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminal_that_lacks_letters_or_is_gone_loses_no_model(folder, text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sadmoe",
        "convert",
        "--model",
        folder,
        "--data",
        text,
        "--expert-size",
        "8",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--out", tmp_path / "one", "--tau", "0.1"], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"R\\xb2" in done.stdout
    reads, writes = os.pipe()
    os.close(reads)  # as of `| head` that has gone
    more = ["--out", tmp_path / "two", "--tau", "0.1", "--projections", "2", "--sparsify", "1"]
    done = subprocess.run([*command, *more], env=environment, stdout=writes, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert b"Exception ignored" not in done.stderr
    assert (tmp_path / "two" / "config.json").exists()
    done = subprocess.run([*command[:3], "info"], stdout=writes, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")
    os.close(writes)


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_output_that_cannot_be_written_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Full()), encoding="utf-8"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "sadmoe: error: [Errno 28] No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it where it is closed
    assert cli.main(["info"]) == 0


def test_what_is_told_between_steps_ends_nothing_where_a_disk_is_full(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Full()), encoding="utf-8"))
    say("a step is done")
    assert "what is printed from here on is lost: [Errno 28] No space left on device" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BrokenPipeError(32, "Broken pipe"), 141),
        (OSError(28, "No space left on device"), 2),
        (MemoryError("no more"), 2),
    ],
)
def test_what_cannot_be_printed_is_no_failed_run(folder, text, tmp_path, capsys, monkeypatch, error, status):
    def prints(*words, file=None, **settings):
        if file is None:
            raise error
        file.write(str(words))

    monkeypatch.setattr("builtins.print", prints)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which is put back
    assert converted(folder, text, tmp_path / "out", "--tau", "0.1") == status
    assert (tmp_path / "out/config.json").exists()
    told = f"the model is saved in {tmp_path / 'out'}" in capsys.readouterr().err
    assert told == (status == 2)


def test_a_full_disk_names_what_could_not_be_written(folder, text, tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    assert converted(folder, text, tmp_path / "moe", "--tau", "0.1") == 0
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fails)
    monkeypatch.setattr(Path, "write_text", fails)
    page = tmp_path / "page.html"
    report = [
        "report",
        "--model",
        str(tmp_path / "moe"),
        "--data",
        str(text),
        "--out",
        str(page),
        "--tau",
        "0.5",
    ]
    for run, name in (
        (lambda: converted(folder, text, tmp_path / "out", "--tau", "0.1"), tmp_path / "out"),
        (lambda: cli.main(report), page.with_suffix(".json")),
    ):
        assert run() == 2
        assert f"{name} cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err


def test_random_input_that_a_model_does_not_take_is_told(tmp_path, capsys):
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.BertForMultipleChoice(config).save_pretrained(tmp_path)
    assert cli.main(["survey", "--model", str(tmp_path)]) == 2
    told = "--data: this BertForMultipleChoice does not run on random input: give it some that it takes: RuntimeError"
    assert told in capsys.readouterr().err


def test_a_checkpoint_is_of_data_that_can_be_read_again(folder, text, tmp_path, capsys):
    reads, writes = os.pipe()
    os.write(writes, text.read_bytes())
    os.close(writes)
    more = ("--sparsify", "0.1", "--tau", "0.1", "--checkpoint", str(tmp_path / "state"))
    assert converted(folder, f"/dev/fd/{reads}", tmp_path / "out", *more) == 2
    os.close(reads)
    assert "--checkpoint: what /dev/fd/" in capsys.readouterr().err


def test_a_checkpoint_says_of_which_data_it_is(folder, text, tmp_path, capsys):
    more = ("--sparsify", "0.1", "--tau", "0.1", "--checkpoint", str(tmp_path / "state"), "--force")
    assert converted(folder, text, tmp_path / "out", *more) == 0
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "run\n")
    assert converted(folder, other, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert said.index(str(text)) < said.index(str(other))


def test_memory_that_lacks_is_one_line(folder, text, monkeypatch, capsys):
    for error in (
        MemoryError("no more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cli, "survey", lambda *args, error=error, **kw: (_ for _ in ()).throw(error))
            assert cli.main(["survey", "--model", str(folder), "--data", str(text)]) == 2
        assert "sadmoe: error: out of memory; try less of --data" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(cli, "survey", lambda *args, **kw: (_ for _ in ()).throw(RuntimeError("of ours")))
        with pytest.raises(RuntimeError, match="of ours"):
            cli.main(["survey", "--model", str(folder), "--data", str(text)])


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


def test_an_activation_that_cannot_be_swapped_is_told_before_anything_is_trained(
    folder, text, tmp_path, monkeypatch, capsys
):
    """As that of ESM, which its forward calls as a function."""
    monkeypatch.setattr(
        convert_command, "replace_projections_", lambda *_, **__: pytest.fail("it was trained")
    )
    found = convert_command.checked_sites

    def called_as_functions(*args, **kw):
        sites = found(*args, **kw)
        for site in sites:
            site.act, site.parts = "gelu", replace(site.parts, activation=None)
        return sites

    monkeypatch.setattr(convert_command, "checked_sites", called_as_functions)
    assert (
        converted(folder, text, tmp_path / "out", "--tau", "0.2", "--projections", "9", "--sparsify", "9")
        == 2
    )
    assert "is a function called in forward, which cannot be swapped for relu" in capsys.readouterr().err
