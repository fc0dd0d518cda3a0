"""The engine of the recipes on a tiny model, without the packages that their workloads come from."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from converted import converted, random_layer, random_rows
from tiny_models import TINY, tokens

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parent.parent / "bench/recipes"))

import moefication
import picture
import pruning
import recipe
from results import Saved, best, kept_by, panels, times_faster, working_tau
from run import CPU, GPU, Effort, Run, from_command_line
from run import TINY as TINY_EFFORT
from sadmoe import Checkpoint, DynamicK, FinetuneConfig
from sadmoe.demo.rows import added_to, masked
from sadmoe.ffn import find_ffns
from sadmoe.model_report import layer_heat
from sadmoe.modules import evaluating
from workload import Dense, Point, Workload, error_of_ratio, sweep

MICRO = Effort(0.2, 2, 0.2, 0.2, 2, 0.2, 60, 1, 8, 4, 0.01, taus=(0.0, 0.1, 1.0), shares=(0.5, 0.2))


def batches(n: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [tokens() | {"input_ids": torch.randint(3, 50, (2, 9), generator=generator)} for _ in range(n)]


def likeness(dense):
    """Of the logits to the dense model's: 1 where they are equal."""

    def metric(outputs) -> float:
        with evaluating(dense):
            pairs = [(output.logits, dense(**batch).logits) for output, batch in outputs]
        ours, theirs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return float(1 / (1 + (ours - theirs).norm() / theirs.norm()))

    return metric


@pytest.fixture
def small_routers(monkeypatch):
    monkeypatch.setattr("workload.LOST", 0.0)  # so little training keeps little
    monkeypatch.setattr("workload.OF_USE", 0.0)
    monkeypatch.setattr(recipe, "ROUTER", 3)
    monkeypatch.setattr(recipe, "PROJECTION_ROUTER", 2)


def workload() -> Workload:
    dense, (one, other) = TINY["bert classifier"].model(), batches(2, 2)
    return Workload(
        title="a tiny model",
        dense=dense,
        train=batches(4, 1),
        picks=[other],
        tests=[one],
        metric=likeness(dense),
        metric_name="likeness",
        higher_is_better=True,
        heat=lambda model: layer_heat(
            "tokens", model, {"input_ids": one["input_ids"][:1]}, [str(i) for i in range(9)]
        ),
        timers={"whole": lambda model: model(**one)},
    )


def start(out: Path) -> Run:
    return Run("tiny-micro", MICRO, out, out, [4, 2], "cpu")


@pytest.mark.slow
def test_a_recipe_goes_on_after_a_failure_tells_all_of_it_and_is_not_trained_twice(
    tmp_path, small_routers, monkeypatch, capsys
):
    def fails(*args):
        raise RuntimeError("out of memory")

    run = partial(replace, start(tmp_path), bf16=True, effort=replace(MICRO, pruned=(0.5,)))
    with monkeypatch.context() as broken:
        broken.setattr(recipe, "moefied", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            recipe.run_recipe(workload(), run())
    before = json.loads((tmp_path / "tiny-micro.json").read_text())["curves"]
    same = ("the same, static top-k", "the same, oracle gate")
    untrained = ("no fine-tuning, " + name for name in ("FFNs only, s = 4", "static top-k", "oracle gate"))
    in_bf16 = ("in bf16: dense", "in bf16: dynamic k, s = 4")
    narrow = ("pruned, 50% of the neurons", "in bf16: pruned, 50% of the neurons")
    ours = ("sadmoe, dynamic k, s = 4", *in_bf16, *narrow, *same, "fine-tuned with static top-k")
    assert list(before) == [*ours, *untrained]
    assert (tmp_path / "tiny-micro.png").exists()
    assert "the same, oracle gate" in (tmp_path / "tiny-micro.html").read_text()

    recipe.run_recipe(workload(), run())
    found = json.loads((tmp_path / "tiny-micro.json").read_text())
    assert found["dense"] == 1
    assert len(found["curves"]) == 14
    assert before.items() <= found["curves"].items(), "what was measured is kept"
    assert found["samples"] == {"train": 8, "picks": 2, "tests": 2}
    assert found["dense_on_picks"] == 1
    for points in found["curves"].values():
        assert all(0 < point["share"] <= 1 for point in points)
        assert all(point["kept"] == pytest.approx(point["metric"]) for point in points)
        assert all(0 < point["picked"] <= 1 for point in points)
    ours = next(iter(found["curves"].values()))
    (dense,), rounded = (found["curves"][name] for name in in_bf16)
    assert dense["flops"] == 1
    assert 0.9 < dense["metric"] < 1, "rounded"
    assert len(rounded) == len(ours)
    assert rounded[0]["metric"] == pytest.approx(ours[0]["metric"], rel=0.1)  # every expert on
    assert rounded[0]["metric"] != ours[0]["metric"]
    drawn = {series.name: list(series.y) for series in picture.panel(found).series}
    (pruned,), (pruned_in_bf16,) = (found["curves"][name] for name in narrow)
    assert pruned["share"] == 0.5
    assert 0.5 < pruned["flops"] == pruned_in_bf16["flops"] < 1
    in_both = {"dense, bf16": [dense], "converted, fp32": ours, "converted, bf16": rounded}
    in_both |= {"pruned, fp32": [pruned], "pruned, bf16": [pruned_in_bf16]}
    assert drawn == {"dense, fp32": [1], **{k: [p["metric"] for p in ps] for k, ps in in_both.items()}}
    assert [point["setting"] for point in ours] == ["tau 0", "tau 0.1", "tau 1"]
    assert ours[0]["flops"] == 1 > ours[2]["flops"]
    assert ours[2]["picked"] != ours[2]["kept"]
    one_model, tuned = (found["curves"][f"{name} static top-k"] for name in ("the same,", "fine-tuned with"))
    settings = [p["setting"] for p in one_model]
    assert settings == [p["setting"] for p in tuned]
    assert {"top 50.0%", "top 20.0%"} < set(settings), "and the share that it was tuned for"
    assert one_model[0]["metric"] != tuned[0]["metric"]
    assert all(point["gains"]["whole"] > 0 for point in ours)
    steps = {"controls", "sparsify", "s4 layers", "s4 static", "s2 routed", "MoEfication s4"}
    assert found["seconds"].keys() >= steps
    assert (tmp_path / "tiny-micro.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "tiny-micro.html").read_text()
    assert "a tiny model" in page
    assert page.count("<svg") > 2  # curves, heat map, histograms
    told = capsys.readouterr().out
    assert "FLOPs saved" in told
    assert "] s2 routed: took" in told

    recipe.run_recipe(workload(), run())  # as after a kill at the very end: nothing is trained again
    again = json.loads((tmp_path / "tiny-micro.json").read_text())
    assert again["curves"] == found["curves"], "nor measured"
    assert again["router_r2"] == found["router_r2"]
    assert "measured again" not in capsys.readouterr().out
    assert all(again["seconds"][step] > found["seconds"][step] for step in found["seconds"])  # of both starts

    saved = Saved(workload(), start(tmp_path))
    (name, curve), *_ = saved.curves.items()
    assert saved.get(name, curve["of"]) == [Point(**point) for point in found["curves"][name]]
    assert saved.get(name, {**curve["of"], "model": 1}) is None
    assert "it is measured again" in capsys.readouterr().out
    swapped = workload()
    swapped.picks, swapped.tests = swapped.tests, swapped.picks
    assert Saved(swapped, start(tmp_path)).get(name, curve["of"]) is None


def test_a_pruned_model_has_the_neurons_that_add_most(monkeypatch):
    monkeypatch.setattr(pruning, "MULTIPLE", 2)
    dense, data = TINY["bert classifier"].model(), batches(2, 3)
    sites, sums = find_ffns(dense), {}
    with evaluating(dense), masked(sites, added_to(sums)):
        for batch in data:
            dense(**batch)
    count = 12  # of 60
    least = {name: mean.topk(count).values.min() for name, mean in sums.items()}
    with evaluating(dense), masked(sites, lambda c, site: (sums[site.name] >= least[site.name]).expand_as(c)):
        wanted = dense(**data[0]).logits

    narrow = pruning.pruned(dense, data, 0.2).eval()
    torch.testing.assert_close(narrow(**data[0]).logits, wanted)
    ffn = narrow.bert.encoder.layer[1]
    assert (ffn.intermediate.dense.out_features, ffn.output.dense.in_features) == (count, count)


@pytest.mark.slow
def test_another_seed_gives_other_models(tmp_path, small_routers):
    made, effort = [], replace(MICRO, budget=0.9)  # which routers of three units can keep to
    for seed in (0, 1):
        steps = recipe.Recipe(workload(), replace(start(tmp_path / str(seed)), effort=effort, seed=seed))
        sparse = steps.sparse([4])
        made.append([sparse, steps.converted(sparse, 4), steps.untrained(4), steps.moefied(sparse, 4)])
    for one, other in zip(*made, strict=True):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


def test_moefication_s_router_is_that_of_its_paper(tmp_path):
    layer, rows = random_layer(), random_rows(600)
    found = moefication.fitted(layer, rows, 200, Checkpoint(tmp_path), "one", seed=0)
    scores = found(rows)
    assert (scores < 0).any()  # logits: neither their absolute values nor ReLU before them
    assert (scores > 0).any()
    sums = moefication.activity(layer, rows).detach()
    assert (sums >= 0).all()
    labels, untrained = sums / sums.max(), moefication.ActivityRouter(layer.router)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    assert loss(scores, labels) < 0.9 * loss(untrained(rows), labels)


@pytest.mark.slow
def test_moefication_is_fine_tuned_where_no_step_before_was(tmp_path, small_routers):
    run = replace(start(tmp_path), effort=replace(MICRO, projections=0, sparsify=0))
    recipe.run_recipe(workload(), run)
    found = json.loads((tmp_path / "tiny-micro.json").read_text())
    plain, tuned = (found["curves"][f"MoEfication, {kind}s = 2"] for kind in ("", "fine-tuned, "))
    assert [p["setting"] for p in plain] == [p["setting"] for p in tuned]
    assert {"top 50.0%", "top 20.0%"} < {p["setting"] for p in tuned}
    assert all(p["gains"]["whole"] > 0 for p in tuned)
    assert plain[0]["metric"] != tuned[0]["metric"]


def test_a_run_of_what_is_not_fine_tuned(tmp_path, small_routers):
    recipe.run_recipe(workload(), replace(start(tmp_path), untrained=True))
    curves = json.loads((tmp_path / "tiny-micro.json").read_text())["curves"]
    assert list(curves) == [
        "no fine-tuning, FFNs only, s = 4",
        f"the same, shared experts of rank {recipe.RANK}",
    ]
    alone, shared = ({p["setting"]: p for p in points} for points in curves.values())
    assert alone["tau 0"]["metric"] == shared["tau 0"]["metric"]
    others = alone.keys() & shared.keys() - {"tau 0"}
    assert others
    assert all(alone[tau]["metric"] != shared[tau]["metric"] for tau in others)


def test_a_curve_ends_where_most_is_lost():
    values, work = iter([0.7, 1.0, 0.76, 0.74, 0.9]), workload()
    work.picks = []
    work.metric = lambda outputs: next(values) if list(outputs) else 0.5
    model = converted("bert")
    gates = [(f"tau {t}", DynamicK(t)) for t in (0.0, 0.1, 0.2, 0.3, 0.4)]
    points = sweep(work, model, gates, Dense(picks=2.0, tests=1.0), 1e-3)
    assert [point.metric for point in points] == [0.7, 1.0, 0.76, 0.74]
    assert {point.picked for point in points} == {0.25}
    assert ["whole" in point.gains for point in points] == [False, True, False, False], "nor is it timed"
    assert points[0].share == 1 > points[-1].share > 0


@pytest.mark.parametrize("effort", [TINY_EFFORT, CPU, GPU], ids=["tiny", "cpu", "gpu"])
def test_an_effort_is_one_that_the_steps_take(effort):
    FinetuneConfig(seconds=effort.layers, share=effort.share)  # which checks them
    assert 0 < effort.budget <= 1
    assert all(0 <= tau <= 1 for tau in effort.taus)
    assert all(0 < share <= 1 for share in effort.shares)


def test_what_has_lost_too_much_takes_no_room_in_the_pictures():
    work = workload()
    work.higher_is_better = False
    points = [
        Point(f"tau {x}", 1, 0, x, x, 1 / kept, kept, kept) for x, kept in ((1, 1.0), (0.5, 0.8), (0.4, 1e-6))
    ]
    (panel,) = panels(work, {"ours": points}, 1.0)
    ours, dense = panel.series
    assert ours.labels == ["tau 1", "tau 0.5"]
    assert dense.is_level


def test_a_setting_is_picked_by_other_data_than_it_is_told_of():
    def point(setting: str, flops: float, kept: float, picked: float) -> Point:
        return Point(setting, 1, 0, flops, flops, kept, kept, picked)

    curve = [point("tau 0", 1, 1, 1), point("tau 0.1", 0.5, 0.97, 0.99), point("tau 0.2", 0.3, 0.99, 0.97)]
    found = best({"ours": curve})
    assert (found["99%"]["ours"]["setting"], found["99%"]["ours"]["kept"]) == ("tau 0.1", 0.97)
    assert best({"ours": curve[2:]}) == {"99%": {"ours": None}, "98%": {"ours": None}}
    assert working_tau({"ours": curve}) == 0.1


def test_the_error_of_what_is_kept_is_that_of_the_same_samples():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(4000, generator=generator) < 0.8
    worse = dense & (torch.rand(4000, generator=generator) < 0.9)
    assert error_of_ratio(dense, dense) == 0
    (count, wrong) = int(dense.sum()), int((dense & ~worse).sum())
    kept = 1 - wrong / count
    assert error_of_ratio(worse, dense) == pytest.approx((kept * (1 - kept) / count) ** 0.5, rel=1e-3)


def test_what_is_right_gives_a_point_its_error():
    work, given = workload(), []

    def right(output, batch):
        """All by the dense model; by the other, which comes after it, all but the first."""
        given.append(torch.ones(len(output.logits), dtype=torch.bool))
        if len(given) > len(work.tests):
            given[-1][0] = False
        return given[-1]

    work.right, model = right, converted("bert classifier")
    dense = work.dense_values()
    assert len(given) == len(work.tests)
    (point,) = sweep(work, model, [("tau 0", DynamicK(0.0))], dense, 0.0)
    (dense_s, ours) = torch.cat(given[: len(work.tests)]), torch.cat(given[len(work.tests) :])
    assert point.error == error_of_ratio(ours, dense_s) > 0
    assert kept_by({"kept": 0.9912, "error": 0.0031}) == "99.1% ± 0.3"
    assert kept_by({"kept": 0.9912}) == "99.1%"


def test_a_spread_that_makes_a_time_worthless_is_told():
    point = {"gains": {"reading": 5.014, "writing": 1.15}, "spreads": {"reading": 11.67, "writing": 0.0999}}
    assert times_faster(point, unit="x") == {"reading": "5.01x ± 1167%", "writing": "1.15x"}
    assert times_faster({"gains": {"reading": 1.5}}) == {"reading": "1.50"}, "of files that have no spreads"


def test_a_longer_run_has_files_and_a_state_of_its_own(monkeypatch, capsys, tmp_path):
    runs, out = [], ["--out", str(tmp_path)]
    for more in ([], ["--longer", "2.5", "--sizes", "4"], ["--seed", "1"]):
        monkeypatch.setattr(sys, "argv", ["w9", "--device", "cpu", *out, *more])
        runs.append(from_command_line("w9", "", {"cpu": CPU}))
    assert [run.name for run in runs] == ["w9-cpu", "w9-cpu-x2.5", "w9-cpu-seed1"]
    assert [run.file("json").name for run in runs] == ["w9-cpu.json", "w9-cpu-x2.5.json", "w9-cpu-seed1.json"]
    assert [run.seed for run in runs] == [0, 0, 1]
    assert runs[1].effort == CPU.longer(2.5)
    assert runs[1].effort.task == 2.5 * CPU.task
    assert f"{CPU.longer(2.5).training(1):.0f} s of training" in capsys.readouterr().out
    more = CPU.layers + CPU.routed
    monkeypatch.setattr(sys, "argv", ["w9", "--device", "cpu", *out, "--pruned", "0.3", "0.2"])
    assert from_command_line("w9", "", {"cpu": CPU}).effort.training(1) == CPU.training(1) + 2 * more
    monkeypatch.setattr(sys, "argv", ["w9", "--device", "cpu", *out])
    assert from_command_line("w9", "", {"cpu": CPU, "gpu": GPU}, effort="gpu").name == "w9-gpu"
    for wrong, told in (
        (["--longer", "0"], "argument --longer: expected a number above 0"),
        (["--bf16", "--untrained"], "argument --bf16: is of models that were fine-tuned"),
        (["--pruned", "0.3", "--untrained"], "argument --pruned: is of models that were fine-tuned"),
        (["--pruned", "0.3", "1.5"], "argument --pruned: expected numbers between 0 and 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["w9", *wrong])
        with pytest.raises(SystemExit):
            from_command_line("w9", "", {"cpu": CPU})
        assert told in capsys.readouterr().err
