"""The file of measured costs, measuring them, and `sadmoe bench` on a tiny model of a local folder."""

import dataclasses
import json
import re
from functools import partial

import pytest
import sadmoe
import torch
from clock import Clock
from converted import converted, random_layer
from sadmoe import cli, hf, measure_costs, measured, paths
from sadmoe.bench import WHOLE, compare, random_batch, table
from sadmoe.crossover import LayerShape
from sadmoe.dial import converted_layers, set_tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.measured import Costs, sparse_until
from sadmoe.timing import Timing, measure, processor
from tiny_models import TINY

LAYER = LayerShape(24, 24, 8, 5, 16, False, 4)
CURVES = {1: ((0.25, 0.6), (0.5, 1.2)), 16: ((0.1, 0.5),)}
ROW = Costs("a processor", "float32", LAYER, 2, CURVES, {1: 0.9, 64: 1.1})


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """A user whose cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths.use_costs(None)
    yield tmp_path / "cache/sadmoe/costs.json"
    paths.use_costs(None)


# ---------------------------------------------------------------- costs and their file


@pytest.mark.parametrize(
    ("curve", "slack", "until"),
    [
        (((0.25, 0.6), (0.5, 1.2), (1.0, 2.0)), 1.0, 0.25 + 0.25 * 0.4 / 0.6),  # between two
        (((0.25, 0.6), (0.5, 1.2)), 1.2, 0.5),
        (((0.25, 0.6), (0.5, 1.2)), 2.4, 1.0),
        (((0.25, 0.5),), 1.0, 0.5),  # past the last: as the share grows
        (((0.25, 0.1),), 1.0, 1.0),
        (((0.25, 1.01),), 1.0, 0.0),  # at no measured share
        (((0.25, 1.01), (0.5, 0.9)), 1.0, 0.0),
        (((0.25, 0.9), (0.5, 1.1), (1.0, 0.8)), 1.0, 0.375),  # the first crossing
    ],
)
def test_where_the_op_begins_to_cost_more(curve, slack, until):
    assert sparse_until(curve, slack) == pytest.approx(until)


def test_a_file_gives_back_what_was_written_and_nothing_is_there_before(tmp_path):
    path = tmp_path / "new folder" / "costs.json"
    assert measured.read(path) == {}
    other = dataclasses.replace(ROW, dtype="bfloat16")
    measured.write(path, [ROW, other])
    assert measured.read(path) == {ROW.key: ROW, other.key: other}
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_the_cost_of_every_expert_is_that_of_the_nearest_number_of_tokens():
    assert [ROW.cost_of_every_expert(T) for T in (1, 7, 9, 4096)] == [0.9, 0.9, 1.1, 1.1]
    assert dataclasses.replace(ROW, every_expert={}).cost_of_every_expert(1) is None


def test_what_came_with_sadmoe_tells_of_every_share_and_of_tau_zero():
    rows = measured.read(measured.BUILT_IN)
    for row in rows.values():
        assert all(curve[-1][0] == 1.0 for curve in row.curves.values())
        assert row.curves.keys() == row.every_expert.keys()
    kernels = {key[0] for key in rows}
    assert kernels == {paths.ELSEWHERE, "kernels avx512zen5", "kernels avx2"}
    for name in kernels:
        assert {key[1] for key in rows if key[0] == name} == {"float32", "bfloat16"}


def damage(how, path):
    text = path.read_text()
    whole = json.loads(text)
    if how == "cut short":
        return text[: len(text) // 2]
    if how == "empty":
        return ""
    if how == "a cost changed":
        return text.replace("0.6", "0.7")
    if how == "newer":
        return json.dumps(whole | {"format": 2})
    if how == "not a table":
        return "[1, 2]"
    rows = whole["rows"]
    if how == "a negative cost":
        rows[0]["curves"]["1"][0][1] = -1.0
    if how == "a negative cost of every expert":
        rows[0]["every_expert"]["1"] = -1.0
    if how == "no costs":
        rows[0]["curves"] = {}
    if how == "shares in no order":
        rows[0]["curves"]["1"].reverse()
    if how == "a key is missing":
        del rows[0]["device"]
    return json.dumps(whole | {"crc32": measured._crc32(rows)})


DAMAGES = {
    "cut short": "",
    "empty": "",
    "a cost changed": "its checksum is wrong",
    "newer": "has format 2, this sadmoe reads 1",
    "not a table": "",
    "a negative cost": "the costs at T = 1 are no costs",
    "a negative cost of every expert": "the costs of every expert are no costs",
    "no costs": "a layer has no costs",
    "shares in no order": "the costs at T = 1 are no costs",
    "a key is missing": "'device'",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_never_used(how, user):
    measured.write(user, [ROW])
    user.write_text(damage(how, user))
    with pytest.raises(ValueError, match=rf"costs.json.* is damaged \(.*{DAMAGES[how]}.*--calibrate --force"):
        measured.read(user)
    layer = random_layer(gate=DynamicK(0.2), batch_invariant=False)
    with torch.no_grad(), pytest.raises(ValueError, match="is damaged"):
        layer(torch.randn(3, 24))
    layer.gate, layer.batch_invariant = DynamicK(0.0), None
    with torch.no_grad(), pytest.raises(ValueError, match="is damaged"):
        layer(torch.randn(3, 24))
    layer.batch_invariant = True
    layer(torch.randn(3, 24))  # does not ask


def test_the_users_file_is_read_at_the_first_decision_of_a_process(user):
    layer = random_layer(gate=DynamicK(0.2), batch_invariant=False)
    device = paths.device_name(torch.device("cpu"))
    measured.write(user, [Costs(device, "float32", layer.shape, 1, {1: ((0.01, 9.0),)})])
    with torch.no_grad():
        assert layer.takes_dense_path(torch.randn(3, 24))
        user.write_text("damaged later")
        assert layer.takes_dense_path(torch.randn(3, 24))


# ---------------------------------------------------------------- measuring


def test_a_home_that_cannot_be_looked_into_is_a_warning(monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(measured, "read", refused)
    paths.use_costs(None)
    try:
        with pytest.warns(UserWarning, match="cannot be looked for.*XDG_CACHE_HOME"):
            assert paths._table() == {}
        assert paths._table() == {}, "and once"
    finally:
        paths.use_costs(None)


def test_costs_are_measured_at_the_shares_of_the_masks_and_both_paths_run(monkeypatch):
    layer = random_layer(gate=TopK(2)).eval()
    ran, seconds_of = [], {"masked": 2.0, "dense at tau 0": 4.0}

    def half_of_dense(variants, seconds, patience, before):
        assert callable(before), "or the weights stay in the caches"
        assert patience == measure_costs.PATIENCE * seconds, "or slow products take minutes"
        for name, call in variants.items():
            call()
            ran.append(name)
        return {name: Timing(seconds_of.get(name, 1.0), 0.0) for name in variants}

    monkeypatch.setattr(measure_costs, "measure", half_of_dense)
    costs = measure_costs.measure_costs(layer, tokens=(1, 64), shares=(0.25, 1.0))
    assert costs.key == (paths.device_name(torch.device("cpu")), "float32", layer.shape)
    assert costs.curves.keys() == {1, 64}
    (low, cost), (high, _) = costs.curves[64]
    assert low == pytest.approx(0.32, abs=0.06)  # a quarter, and an expert for every token
    assert (high, cost) == (1.0, 0.5)
    assert costs.every_expert == {1: 0.25, 64: 0.25}
    assert len(ran) == 2 * 5
    assert "0.50 at 100%" in measure_costs.costs_table(costs)


QUICK = {"tokens": (1, 3), "seconds": 0.0}


def test_every_shape_is_measured_once_kept_beside_others_and_again_only_by_force(user, monkeypatch):
    model, runs, measure = converted("bert"), [], measure_costs.measure
    monkeypatch.setattr(measure_costs, "measure", lambda *a, **k: runs.append(1) or measure(*a, **k))
    measured.write(user, [ROW])
    (found,) = measure_costs.calibrate_costs(model, user, **QUICK)
    first, *_ = converted_layers(model).values()
    assert found.layer == first.shape
    assert measured.read(user) == {ROW.key: ROW, found.key: found}
    before = user.read_bytes()
    with pytest.raises(FileExistsError, match=r"holds this model's shapes .* --force"):
        measure_costs.calibrate_costs(model, user, **QUICK)
    assert user.read_bytes() == before
    once = len(runs)
    (again,) = measure_costs.calibrate_costs(model, user, force=True, **QUICK)
    assert measured.read(user) == {ROW.key: ROW, again.key: again}
    assert len(runs) == 2 * once > 0
    measure_costs.calibrate_costs(model.bfloat16(), user, **QUICK)
    assert len(measured.read(user)) == 3
    first.half()
    measure_costs.calibrate_costs(model, user, **QUICK)
    assert len(measured.read(user)) == 4, "layers of one shape in two types of 16 bits"


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_costs, "measure", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        measure_costs.calibrate_costs(converted("bert"), tmp_path / "file" / "costs.json", **QUICK)


def test_a_damaged_file_is_measured_again_only_by_force(user):
    user.parent.mkdir(parents=True)
    user.write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        measure_costs.calibrate_costs(converted("bert"), user, **QUICK)
    assert user.read_text() == "{}"
    measure_costs.calibrate_costs(converted("bert"), user, force=True, **QUICK)
    assert len(measured.read(user)) == 1


def test_a_loaded_model_is_compared_with_its_mlps_for_projections_of_attention(tmp_path):
    model, batch = TINY["bert"].model(), TINY["bert"].batch()
    sadmoe.replace_projections_(model, [batch], sadmoe.ProjectionConfig(steps=1, multiple=4), progress=False)
    router = sadmoe.RouterConfig(width=4, steps=1)
    config = sadmoe.ConvertConfig(expert_size=4, router=router, projection_router=router, tau=0.2)
    sadmoe.convert_(model, [batch], config, progress=False)
    sadmoe.save(model, tmp_path / "m.safetensors")
    fresh = TINY["bert"].model()
    sadmoe.load(fresh, tmp_path / "m.safetensors")
    rows = compare(fresh, batch, [0.2], seconds=0.0)
    assert {row.name for row in rows} == {*converted_layers(model), WHOLE}
    assert len(rows) > 2 * 8, "projections are among the layers"


def test_a_model_and_its_layers_are_compared_at_their_own_gates_and_others():
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, 0.4)
    layers = converted_layers(model)
    gates = [layer.gate for layer in layers.values()]
    rows = compare(model, batch, [0.0, 0.9], seconds=0.0)
    assert [layer.gate for layer in layers.values()] == gates
    assert [(row.name, row.tau) for row in rows] == [
        (name, tau) for name in (*layers, WHOLE) for tau in (None, 0.0, 0.9)
    ]
    for own, zero, high in zip(*[iter(rows)] * 3, strict=True):
        assert zero.share == 1.0 > own.share > high.share
        assert own.dense is zero.dense
        assert own.tokens == 18
        assert own.faster == own.dense.median / own.ours.median > 0
    assert f"{rows[-1].share:.1%}" in table(rows).splitlines()[-1]


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "llama"])
def test_random_inputs_fit_the_model(name):
    model = TINY[name].model()
    with torch.no_grad():
        model(**random_batch(model, 2, 5))
    if name == "vit":
        model.config.image_size = (6, 9)
        assert random_batch(model, 2, 5)["pixel_values"].shape[2:] == (6, 9)
    with pytest.raises(NotImplementedError, match="Linear takes neither token ids nor images"):
        random_batch(torch.nn.Linear(2, 2), 2, 5)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "moe"
    model = converted("bert")
    hf.describe_to_transformers(model)
    set_tau(model, 0.3)
    model.save_pretrained(path)
    return path


SMALL = ["--batch-size", "2", "--max-length", "6", "--seconds", "0"]


def test_bench_times_layers_and_model_beside_dense(folder, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    argv = ["bench", "--model", str(folder), *SMALL, "--tau", "0.9", "--json", str(numbers)]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count(WHOLE) == 2
    assert "saved" in printed
    assert len(json.loads(numbers.read_text())["rows"]) == 6
    assert cli.main(argv) == 2
    assert "is there already: choose another, or replace it with --force" in capsys.readouterr().err
    assert cli.main([*argv, "--force", "--batch-invariant", "yes", "--dtype", "bfloat16"]) == 0
    assert "bfloat16, cpu" in capsys.readouterr().out


def test_calibrate_says_what_it_wrote_and_later_runs_use_it(folder, user, tmp_path, capsys, monkeypatch):
    argv = ["bench", "--model", str(folder), "--calibrate", "--seconds", "0", "--tokens", "1"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert f"wrote {user}" in printed
    assert "d 24, 6 experts of 10, float32" in printed
    assert "by it on this machine, in float32 where batch_invariant=False and at tau = 0" in printed
    (row,) = measured.read(user).values()
    assert cli.main(argv) == 2
    assert "measure them again with --force" in capsys.readouterr().err
    assert cli.main([*argv, "--force"]) == 0
    here = tmp_path / "here"
    assert cli.main([*argv, "--cache", str(here)]) == 0
    dense = dataclasses.replace(row, curves={1: ((0.01, 9.0),)})
    measured.write(here / "costs.json", [dense])
    capsys.readouterr()
    argv = ["bench", "--model", str(folder), *SMALL, "--batch-invariant", "no", "--cache", str(here)]
    assert cli.main([*argv[:-1], str(tmp_path / "elsewhere")]) == 2
    assert "elsewhere: no such file; with --calibrate" in capsys.readouterr().err
    assert cli.main(argv) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert cli.main([*argv, "--dtype", "bfloat16"]) == 2
    assert "it has no measurement of this model's layers, dtype and device" in capsys.readouterr().err
    transformers = pytest.importorskip("transformers")
    with monkeypatch.context() as patch:
        patch.setattr(cli.bench, "compare", lambda *_, **__: [])
        patch.setattr(cli.bench, "table", lambda rows: "timed")
        sadmoe.quantize_experts_(model := transformers.AutoModel.from_pretrained(folder))
        model.save_pretrained(tmp_path / "int8")
        assert cli.main(["bench", "--model", str(tmp_path / "int8"), "--cache", str(here)]) == 0
    (here / "costs.json").write_text("")
    assert cli.main(argv) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda:7"], "--device cuda:7: torch .* sees no CUDA device here"),
        (["--calibrate", "--tokens", "4", "0"], "tokens must be at least 1 in every measured call, got 0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_mistake_is_one_line_and_exit_status_2(folder, capsys, more, message):
    assert cli.main(["bench", "--model", str(folder), *more]) == 2
    capture = capsys.readouterr()
    assert re.search(message, capture.err)
    assert "Traceback" not in capture.err


def test_a_dense_model_is_refused(tmp_path, capsys):
    TINY["bert"].model().save_pretrained(tmp_path)
    for more in ([], ["--calibrate"]):
        assert cli.main(["bench", "--model", str(tmp_path), *more]) == 2
        assert "has no converted layer: convert it first" in capsys.readouterr().err


def test_help_teaches(user, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--calibrate" in printed
    assert "batch_invariant=False" in printed


def test_measurements_are_in_the_user_s_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert measured.cache_file() == tmp_path / "cache/sadmoe/costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.cache_file() == tmp_path / ".cache/sadmoe/costs.json"
    assert measured.cache_file(tmp_path) == tmp_path / "costs.json"


def test_without_a_home_it_says_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(measured.Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match=r"determine home directory.*; set XDG_CACHE_HOME to one"):
        measured.cache_file()
    assert measured.cache_file(measured.Path("here")) == measured.Path("here/costs.json")
    paths.use_costs(None)
    try:
        with pytest.warns(UserWarning, match="cannot be looked for.*XDG_CACHE_HOME"):
            assert paths._table() == {}
    finally:
        paths.use_costs(None)


def test_what_comes_before_a_call_knows_which_and_is_not_timed(monkeypatch):
    clock, events = Clock(0.0), []
    monkeypatch.setattr("sadmoe.timing.time", clock)

    def called(name: str, seconds: float) -> None:
        events.append(name)
        clock.now += seconds

    def before(name: str) -> None:
        events.append(f"before {name}")
        clock.now += 100.0

    timings = measure({"a": partial(called, "a", 0.25), "b": partial(called, "b", 0.5)}, 0.0, before=before)
    assert events[::2] == [f"before {name}" for name in events[1::2]]
    assert {name: events.count(name) for name in "ab"} == {"a": 9, "b": 9}  # two of them to warm up
    assert {name: one.median for name, one in timings.items()} == {"a": 0.25, "b": 0.5}


def test_calls_past_their_patience_end_the_measuring(monkeypatch):
    """Instead of waiting until the seconds are over with nothing left to call."""
    clock = Clock(1.0)
    monkeypatch.setattr("sadmoe.timing.time", clock)
    timings = measure({"a": lambda: None, "b": lambda: None}, seconds=400.0, patience=1.0)
    assert [timing.calls for timing in timings.values()] == [1, 1]
    assert clock.now < 20


def test_processors_have_names_of_their_own(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: a b\n" * 2)
    assert processor(info) == "Some CPU @ 2 GHz"
    info.write_text(2 * "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n")
    assert processor(info) == "AMD EPYC (family 26, model 2)"
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n" * 2)
    assert processor(info) == "aarch64 0x41 0xd0c"
    assert processor(tmp_path / "missing") == "aarch64"
