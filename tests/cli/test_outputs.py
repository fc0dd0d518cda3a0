"""What the command line writes: whole or not at all, and never over what is not its own."""

import json
from pathlib import Path

import pytest
import sadmoe
import torch
from sadmoe.outputs import place_for, replaced

transformers = pytest.importorskip("transformers")
from command_line import bert, converted
from sadmoe import cli
from sadmoe.cli import bench as bench_command
from sadmoe.cli import convert as convert_command
from sadmoe.cli import evaluate as evaluate_command


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
    monkeypatch.setattr("sadmoe.cli.options.load_model", lambda *_: pytest.fail("it was loaded"))
    with monkeypatch.context() as patch:
        patch.setattr("sadmoe.outputs.tempfile.TemporaryDirectory", refused)
        for wanted, place in ((tmp_path / "some/folder", tmp_path), (out, out)):
            capsys.readouterr()
            assert converted(folder, text, wanted, "--force") == 2
            assert f"{wanted} cannot be written: Permission denied in {place}" in capsys.readouterr().err


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "bert"}', "no json"])
def test_force_does_not_remove_what_is_not_ours(folder, text, tmp_path, capsys, config):
    out = tmp_path / "work"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    (out / "demo.json").write_text("{}" if config is None else "[1]")
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


def test_a_file_that_is_read_is_not_replaced(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    table = tmp_path / "reviews.json"
    table.write_text("[]")

    def report(data, page):
        places = ["--model", str(out), "--data", str(data), "--out", str(page)]
        return cli.main(["report", *places, "--tau", "0.1", "--force"])

    for data, read in ((table, table), (text, out / "config.json")):
        before = read.read_bytes()
        assert report(data, read.with_suffix(".html")) == 2
        assert f"{read} is read by this command, and would be replaced" in capsys.readouterr().err
        assert read.read_bytes() == before
    bench = ["bench", "--model", str(out), "--json", str(out / "config.json"), "--force"]
    assert cli.main(bench) == 2
    assert "is read by this command" in capsys.readouterr().err
    assert report(text, out / "report.html") == 0


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


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_is_written_there_meanwhile_is_not_lost(folder, text, tmp_path, capsys, monkeypatch, force):
    out = tmp_path / "moe"
    trained = convert_command.convert_

    def beside_another(*args, **settings):
        out.mkdir()
        (out / "config.json").write_text("somebody else's")
        return trained(*args, **settings)

    monkeypatch.setattr(convert_command, "convert_", beside_another)
    assert converted(folder, text, out, "--tau", "0.1", *force) == 0
    assert [path.name for path in out.iterdir()] == ["config.json"]
    (beside,) = (path for path in tmp_path.iterdir() if path.name.startswith("moe-"))
    assert (beside / "model.safetensors").exists()
    told = capsys.readouterr().out
    assert f"{out} was filled by somebody else meanwhile" in told
    assert f'from_pretrained("{beside}")' in told


def test_a_folder_without_a_name_has_one_beside_it(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert place_for(Path(), force=False) == Path()
    (tmp_path / "out/file").touch()
    beside = place_for(Path(), force=False)
    assert beside.parent == tmp_path
    assert beside.name.startswith("out-")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_numbers_that_another_run_wrote_meanwhile_are_not_lost(
    folder, text, tmp_path, capsys, monkeypatch, force
):
    """Of a report, and of a bench: with --force they are replaced, as was asked for."""
    model, page, numbers = tmp_path / "moe", tmp_path / "report.html", tmp_path / "bench.json"
    assert converted(folder, text, model, "--tau", "0.1") == 0

    def meanwhile(module, name, path):
        real = getattr(module, name)

        def beside_another(*args, **settings):
            path.write_text("of another run")
            return real(*args, **settings)

        monkeypatch.setattr(module, name, beside_another)

    meanwhile(evaluate_command, "evaluate", page)
    meanwhile(bench_command, "compare", numbers)
    places = ["--model", str(model), "--data", str(text)]
    commands = {
        page: ["report", *places, "--tau", "0.1", "--out", str(page)],
        numbers: ["bench", *places, "--seconds", "0.001", "--json", str(numbers)],
    }
    for path, words in commands.items():
        assert cli.main([*words, *force]) == 0
        told = capsys.readouterr().out
        written = {other.suffix: other for other in tmp_path.glob(f"{path.stem}-*")}
        if force:
            assert not written
            assert path.read_text() != "of another run"
            continue
        assert path.read_text() == "of another run"
        assert f"{path} was written by somebody else meanwhile" in told
        assert str(written[path.suffix]) in told
        assert written.keys() == ({".html", ".json"} if path == page else {".json"})
        assert json.loads(written[".json"].read_text())


def interrupted_in(folder):
    with replaced(folder) as new:
        (new / "new").touch()
        raise KeyboardInterrupt


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    (folder / "config.json").write_text("old")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes").touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted_in(folder)
    assert {path.name for path in tmp_path.rglob("*")} == {
        "out", "model-00001-of-00002.safetensors", "config.json", "sub", "notes"
    }  # fmt: skip
    before = folder.stat().st_ino
    with replaced(folder) as new:
        (new / "config.json").write_text("new")
        (new / "model.safetensors").write_text("new")
        (new / "sub").mkdir()
    assert folder.stat().st_ino == before, "the same folder"
    assert {path.name: path.read_text() for path in folder.iterdir() if path.is_file()} == {
        "config.json": "new", "model.safetensors": "new"
    }  # fmt: skip
    assert [path.name for path in (folder / "sub").iterdir()] == ["notes"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_move_that_fails_is_undone(tmp_path, monkeypatch):
    folder, rename = tmp_path / "out", Path.rename
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "notes", "sub/config.json"):
        (folder / name).write_text("old")

    def fails_at_last(path, to):
        if path.name == "zz":
            raise OSError("no more of it")
        return rename(path, to)

    def written():
        with replaced(folder) as new:
            (new / "sub").mkdir()
            for name in ("config.json", "sub/config.json", "sub/b", "zz"):
                (new / name).write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_at_last)
        with pytest.raises(OSError, match="no more of it"):
            written()
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == dict.fromkeys(("config.json", "notes", "sub/config.json"), "old")
    written()
    assert {path.read_text() for path in folder.rglob("*") if path.is_file() and path.name != "notes"} == {
        "new"
    }
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    target, link = tmp_path / "far" / "moe", tmp_path / "moe"
    if there:
        target.mkdir(parents=True)
        (target / "config.json").write_text("old")
    link.symlink_to(target)
    with replaced(link) as new:
        (new / "config.json").write_text("new")
    assert link.is_symlink()
    assert (target / "config.json").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replaced(tmp_path / "a" / "b" / "c"):
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()


def test_a_model_is_replaced_where_one_is_in_it(folder, text, tmp_path, monkeypatch):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    (out / "README").write_text("mine")
    monkeypatch.chdir(out)
    assert converted(folder, text, Path(), "--tau", "0.2", "--force") == 0
    assert '"tau": 0.2' in Path("config.json").read_text()
    assert Path("README").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_force_keeps_what_was_put_beside_a_model(folder, text, tmp_path):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.1") == 0
    (out / "thesis.tex").write_text("years of work")
    (out / "checkpoint-500").mkdir()
    (out / "checkpoint-500" / "model.safetensors").write_text("weights")
    (out / "model-best.safetensors").write_text("the best")
    (out / "chat_template.jinja").write_text("of a model that was there before")
    (out / "modules.json").write_text("of a SentenceTransformer that was")
    assert converted(folder, text, out, "--tau", "0.2", "--force") == 0
    assert (out / "thesis.tex").read_text() == "years of work"
    assert (out / "model-best.safetensors").read_text() == "the best"
    assert not (out / "chat_template.jinja").exists()
    assert not (out / "modules.json").exists(), "or its pooling would go around another model"
    assert (out / "checkpoint-500" / "model.safetensors").read_text() == "weights"
    assert '"tau": 0.2' in (out / "config.json").read_text()


def test_an_empty_folder_that_one_is_in_may_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), replaced(Path()):
        leave_unfinished()
    assert not any(tmp_path.iterdir())
    with replaced(Path()) as new:
        (new / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def leave_unfinished():
    (tmp := next(Path().iterdir()) / "half").mkdir()
    (tmp / "new").touch()
    raise KeyboardInterrupt


@pytest.mark.parametrize("begun", [False, True])
def test_a_kill_while_saving_hinders_no_later_run(folder, text, tmp_path, caplog, begun):
    """begun: the old model was already moved."""
    out, new = tmp_path / "moe", ".sadmoe.0123abcd.new"
    out.mkdir()
    force = ["--force"] if begun else []
    if begun:
        assert converted(folder, text, out, "--tau", "0.1") == 0
        (out / ".sadmoe.0123abcd.former").mkdir()
        (out / "config.json").rename(out / ".sadmoe.0123abcd.former/config.json")
    (out / new).mkdir()
    (out / new / "model.safetensors").write_text("half of it")
    assert converted(folder, text, out, "--tau", "0.2", *force) == 0
    assert "of a command that was killed while it saved, and of no use if it runs no more: " in caplog.text
    assert str(out / new) in caplog.text
    assert '"tau": 0.2' in (out / "config.json").read_text()


def test_what_a_sentence_transformer_has_around_its_transformer_is_kept(text, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    encoder = modules.Transformer(str(bert(tmp_path / "bert")))
    by_first = modules.Pooling(32, pooling_mode="cls")
    dense = library.SentenceTransformer(modules=[encoder, by_first, modules.Normalize()], device="cpu")
    dense.max_seq_length = 5
    dense.save(str(tmp_path / "dense"))
    assert converted(tmp_path / "dense", text, tmp_path / "moe", "--tau", "0") == 0
    again = library.SentenceTransformer(str(tmp_path / "moe"), device="cpu")
    assert len(sadmoe.moe_layers(again)) == 1
    assert [type(module).__name__ for module in again] == ["Transformer", "Pooling", "Normalize"]
    words = ["experts run few tokens choose them", "few"]
    wanted, found = (one.encode(words, convert_to_tensor=True) for one in (dense, again))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_modules_outside_its_folder_are_refused_before_anything_is_converted(text, tmp_path, capsys):
    folder = bert(tmp_path / "bert")
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "../mine", "type": "Pooling"}]')
    assert converted(folder, text, tmp_path / "moe") == 2
    assert "modules.json names ../mine, which is not in its folder" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()
