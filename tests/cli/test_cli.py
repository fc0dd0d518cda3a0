"""The command line on a tiny model of a local folder: what it writes, prints and refuses."""

import json
import logging
import re
import subprocess
import sys

import pytest
import torch
from sadmoe import cli, cost, moe_layers, texts
from sadmoe.cli import convert as convert_command
from sadmoe.cli import evaluate as evaluate_command
from sadmoe.gates import DynamicK
from sadmoe.ops import layout
from sadmoe.report import Panel, Series, plot_curves

transformers = pytest.importorskip("transformers")
from command_line import bert, converted, evaluated


def test_convert_then_evaluate(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2") == 0
    printed = capsys.readouterr().out
    assert f'BertModel.from_pretrained("{out}")' in printed
    assert "nothing was fine-tuned: a model with GELU loses quality" in printed
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "sadmoe"
    assert evaluated(out, text, "0", "0.5") == 0
    header, zero, half = capsys.readouterr().out.strip().splitlines()
    assert "executed share" in header
    assert zero.split()[1] == "100.0%"
    assert float(half.split()[1].rstrip("%")) < 100
    assert evaluated(out, text) == 0
    rows = capsys.readouterr().out.strip().splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["0", "0.01", "0.03", "0.1", "0.2", "0.3", "1"], (
        "as saved, too"
    )


def test_gates_that_are_no_one_tau_are_evaluated_as_they_were_saved(tmp_path, text, capsys):
    two, out = bert(tmp_path / "two", num_hidden_layers=2), tmp_path / "moe"
    assert converted(two, text, out, "--tau", "0.2", "--router-width", "4") == 0
    model = texts.load_model(out)
    for layer, tau in zip(moe_layers(model).values(), (0.0, 1.0), strict=True):
        layer.gate = DynamicK(tau)
    model.save_pretrained(out)
    capsys.readouterr()
    assert evaluated(out, text) == 0
    rows = [row.split() for row in capsys.readouterr().out.strip().splitlines()[1:]]
    assert [row[0] for row in rows] == ["0", "0.01", "0.03", "0.1", "0.3", "1", "saved"]
    shares = {row[0]: float(row[1].rstrip("%")) for row in rows}
    assert shares["saved"] == pytest.approx((shares["0"] + shares["1"]) / 2, abs=0.1)
    page = tmp_path / "page.html"
    assert cli.main(["report", "--model", str(out), "--data", str(text), "--out", str(page)]) == 0
    assert "as saved" in page.read_text()


def test_a_model_that_loses_nothing_or_is_made_up_for_is_not_said_to_lose(folder, text, tmp_path, capsys):
    assert converted(folder, text, tmp_path / "a", "--tau", "0.2", "--sparsify", "0.1") == 0
    relu = bert(tmp_path / "relu", hidden_act="relu")
    assert converted(relu, text, tmp_path / "b", "--tau", "0.2") == 0
    assert converted(folder, text, tmp_path / "c", "--tau", "0.2", "--compensate", "2") == 0
    assert converted(folder, text, tmp_path / "d", "--tau", "0") == 0
    assert "nothing was fine-tuned" not in capsys.readouterr().out


def test_what_is_skipped_is_made_up_for_where_asked(folder, text, tmp_path, capsys):
    plain, made_up_for, quick = tmp_path / "plain", tmp_path / "made-up-for", ("--router-width", "4")
    assert converted(folder, text, plain, "--tau", "0.5", *quick) == 0
    assert "shared experts" not in capsys.readouterr().out
    assert converted(folder, text, made_up_for, "--tau", "0.5", "--compensate", "2", *quick) == 0
    assert re.search(
        r"shared experts take \d+% to \d+% of the squared errors of layers away", capsys.readouterr().out
    )
    one, two = (texts.load_model(path).state_dict() for path in (plain, made_up_for))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert {key.rpartition(".shared.")[2] for key in two.keys() - one.keys()} == {"w_up", "w_down", "b_out"}
    within = tmp_path / "within"
    assert converted(folder, text, within, "--budget", "0.6", "--compensate", "2", *quick) == 0
    model, tokenizer = texts.load_model(within), texts.load_tokenizer(within)
    batches = texts.tokenized(tokenizer, sorted(texts.paragraphs(text), key=len))
    found = cost(model, batches)
    assert 0.5 < found.layers_of_dense < 0.61, "shared experts included"
    (layer,) = moe_layers(model).values()
    told = f"with them tau is {layer.gate.tau:.4g}, and {found.share:.1%} of the experts run"
    assert told in capsys.readouterr().out
    assert converted(folder, text, tmp_path / "all", "--budget", "1", "--compensate", "2", *quick) == 0
    assert "nothing was made up for: the budget pays for every expert" in capsys.readouterr().out


def test_only_what_fits_a_pattern_is_changed(tmp_path, text, capsys):
    two = bert(tmp_path / "two", num_hidden_layers=2, hidden_act="gelu")
    out, quick = tmp_path / "moe", ("--tau", "0.2", "--router-width", "4")
    more = ("--sparsify", "0.1", "--projections", "1")
    assert converted(two, text, out, *quick, *more, "--only", "*.1.*", "nothing*") == 0
    model, dense = texts.load_model(out), texts.load_model(two)
    changed = set(moe_layers(model))
    assert len(changed) == 5, "the FFN, and four projections"
    assert all(".layer.1." in name for name in changed)
    first = "encoder.layer.0.intermediate."
    assert type(model.get_submodule(f"{first}intermediate_act_fn")) is type(
        dense.get_submodule(f"{first}intermediate_act_fn")
    )
    assert converted(two, text, tmp_path / "none", *quick, "--only", "layer.1") == 2
    assert "encoder.layer.1.intermediate" in capsys.readouterr().err, "of what there is"


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


@pytest.fixture
def configs(monkeypatch):
    """What conversions are asked for."""
    seen, convert = [], convert_command.convert_

    def kept(model, batches, config, **settings):
        seen.append(config)
        return convert(model, batches, config, **settings)

    monkeypatch.setattr(convert_command, "convert_", kept)
    return seen


def test_the_seed_is_that_of_the_routers_too(folder, text, tmp_path, configs):
    assert converted(folder, text, tmp_path / "moe", "--tau", "0.2", "--seed", "5") == 0
    assert (configs[0].seed, configs[0].router.seed) == (5, 5)


def test_neurons_are_clustered_and_routers_trained_as_asked(folder, text, tmp_path, configs):
    assert converted(folder, text, tmp_path / "a", "--tau", "0.2") == 0
    more = ("--cluster", "weights", "--target-power", "0.5", "--projections", "1")
    assert converted(folder, text, tmp_path / "b", "--tau", "0.2", *more) == 0
    told = [(c.cluster, c.router.target_power, c.projection_router) for c in configs]
    assert [one[:2] for one in told] == [("activity", None), ("weights", 0.5)]
    assert (configs[1].projection_router.target_power, configs[1].projection_router.width) == (0.5, 32)
    layers = moe_layers(transformers.BertModel.from_pretrained(tmp_path / "b")).values()
    assert {layer.router.target_power for layer in layers} == {0.5}


def test_convert_to_int8(folder, text, tmp_path, capsys):
    out = tmp_path / "moe"
    assert converted(folder, text, out, "--tau", "0.2", "--int8") == 0
    assert "MiB of experts" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert evaluated(out, text, "0", "0.5") == 0
    (layer,) = moe_layers(transformers.BertModel.from_pretrained(out)).values()
    assert layer.is_int8


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
        patched.setattr(
            evaluate_command, "evaluate", lambda model, batches, taus, dense, progress: [model, dense]
        )
        patched.setattr(evaluate_command, "table", lambda both: {next(m.parameters()).dtype for m in both})
        beside = ["--model", str(out), "--data", str(text), "--dense", str(half)]
        assert cli.main(["evaluate", *beside]) == 0  # or one of them would be timed in slower products
    said = capsys.readouterr().out
    assert "the dense model is bfloat16: run in float32, as the other" in said
    assert said.endswith("{torch.float32}\n")
    assert converted(half, text, tmp_path / "untrained", "--tau", "0.2") == 0
    untrained = texts.load_model(tmp_path / "untrained")
    assert {p.dtype for p in untrained.parameters()} == {torch.bfloat16}


def test_projections_and_a_checkpoint_that_is_taken_up_again(folder, text, tmp_path, capsys, monkeypatch):
    state, first, second = tmp_path / "state", tmp_path / "first", tmp_path / "second"
    more = ("--tau", "0.2", "--projections", "3", "--sparsify", "0.2", "--checkpoint", str(state))
    monkeypatch.setattr(convert_command, "convert_", interrupt)
    assert converted(folder, text, first, *more) == 130
    assert f"interrupted; the same command goes on from the last save in {state}" in capsys.readouterr().err
    assert {path.name for path in state.iterdir()} == {"projections", "sparsify", "sadmoe-data.json"}
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", once_only())
    assert converted(folder, text, first, *more) == 0
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was trained again"))
    assert converted(folder, text, second, *more) == 0
    moved = text.rename(tmp_path / "moved.txt")
    assert converted(folder, moved, tmp_path / "of_moved", *more) == 0
    moved.rename(text)
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


def test_a_checkpoint_of_a_run_that_saved_nothing_takes_another_command(
    folder, text, tmp_path, capsys, monkeypatch
):
    state, out = tmp_path / "state", tmp_path / "out"
    more = ("--tau", "0.2", "--checkpoint", str(state))
    monkeypatch.setattr(convert_command, "convert_", interrupt)
    assert converted(folder, text, out, *more) == 130
    assert "interrupted; nothing was saved" in capsys.readouterr().err
    monkeypatch.undo()
    (state / "mine").mkdir()
    (state / "mine" / "model.safetensors").touch()
    assert converted(folder, text, out, *more, "--batch-size", "2") == 0
    state = tmp_path / "file"
    state.write_text("")
    assert converted(folder, text, tmp_path / "other", "--tau", "0.2", "--checkpoint", str(state)) == 2
    assert f"--checkpoint: {state} is a file, and a folder is wanted" in capsys.readouterr().err


def test_a_checkpoint_may_lie_among_what_is_no_image_and_leaves_others_notes(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    first = convert_command._checksum(tmp_path)
    (tmp_path / "data.json").write_text("mine")
    (tmp_path / "projections").mkdir()
    (tmp_path / "projections" / "x.safetensors").write_bytes(b"2")
    assert convert_command._checksum(tmp_path) == first
    (tmp_path / "b.png").write_bytes(b"1")
    assert convert_command._checksum(tmp_path) != first


def test_tables_of_words_and_what_is_tied_to_them_stay_as_they_are(folder, text, tmp_path):
    more = ("--tau", "0.2", "--sparsify", "0.3", "--batch-size", "4")
    assert converted(folder, text, tmp_path / "moe", *more) == 0
    before, after = (transformers.BertModel.from_pretrained(path) for path in (folder, tmp_path / "moe"))
    tables = [name for name, m in before.named_modules() if isinstance(m, torch.nn.Embedding)]
    assert len(tables) == 3
    for name in tables:
        assert torch.equal(before.get_submodule(name).weight, after.get_submodule(name).weight)
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))


def test_finetune_does_all_that_comes_after_the_conversion(text, tmp_path, capsys, monkeypatch):
    folder, state, out = (tmp_path / name for name in ("wide", "state", "out"))
    bert(folder, hidden_size=128, intermediate_size=512)  # beside which the routers are small
    more = ("--finetune", "0.4", "--projections", "3", "--checkpoint", str(state), "--budget", "0.8")
    assert converted(folder, text, out, *more) == 0
    assert re.search(r"the whole model: \d+ updates in .*\ntau [01]\.\d+ executes", capsys.readouterr().out)
    assert {path.name for path in state.iterdir()} == {
        "projections",
        "convert",
        "finetune",
        "sadmoe-data.json",
    }
    taus = {layer.gate.tau for layer in moe_layers(transformers.BertModel.from_pretrained(out)).values()}
    assert len(taus) == 1
    assert taus.pop() > 0
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("it was trained again"))
    assert converted(folder, text, tmp_path / "again", *more) == 0
    monkeypatch.setattr(convert_command, "cost", interrupt)
    capsys.readouterr()
    assert converted(folder, text, tmp_path / "third", *more) == 130
    assert f"interrupted; the model is saved in {tmp_path / 'third'}" in capsys.readouterr().err
    assert (tmp_path / "third" / "config.json").exists()


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


def interrupt(*args, **kw):
    raise KeyboardInterrupt


def once_only():
    """AdamW's step, for routers alone: what came before them is loaded."""
    real = torch.optim.AdamW.step

    def step(self, *args, **kw):
        assert len(self.param_groups[0]["params"]) == 2, "more than a router is trained"
        return real(self, *args, **kw)

    return step


def test_random_tokens_are_no_more_than_there_are_positions(tmp_path, capsys):
    bert(tmp_path / "short", max_position_embeddings=16)
    assert cli.main(["survey", "--model", str(tmp_path / "short")]) == 0
    assert "of random input" in capsys.readouterr().out


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


def test_a_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    panel = Panel("cost", "x", "y", [Series("ours", [0.1, 0.2], [1, 2], ["a", "b"])])
    plot_curves(path, [panel], "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_is_warned_of_twice(capsys):
    handler = cli._once()
    for text in ("an FFN is left out", "another", "an FFN is left out"):
        handler.handle(logging.makeLogRecord({"msg": text, "levelno": logging.WARNING}))
    assert capsys.readouterr().err.splitlines() == ["an FFN is left out", "another"]
