"""The engine of the recipes on a tiny model, without the packages that their workloads come from."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY, tokens

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parent.parent / "bench/recipes"))

import recipe
from sadmoe.batches import evaluating
from sadmoe.model_report import layer_heat
from workload import Workload

MICRO = recipe.Effort(0.2, 2, 0.2, 0.2, 0.2, 2, 0.2, 60, 8, 4, 0.01)


def batches(n: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [tokens() | {"input_ids": torch.randint(3, 50, (2, 9), generator=generator)} for _ in range(n)]


def likeness(dense):
    """Of the logits to the dense model's: 1 where they are equal."""

    def metric(model, tests) -> float:
        with evaluating(model), evaluating(dense):
            pairs = [(model(**batch).logits, dense(**batch).logits) for batch in tests]
        ours, theirs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return float(1 / (1 + (ours - theirs).norm() / theirs.norm()))

    return metric


@pytest.mark.slow
def test_a_recipe_runs_tells_all_of_it_and_is_not_trained_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipe.EFFORTS, "micro", MICRO)
    monkeypatch.setattr(recipe, "TAUS", (0.0, 0.1, 1.0))
    monkeypatch.setattr(recipe, "SHARES", (0.2, 0.5))
    monkeypatch.setattr(recipe, "ROUTER", 3)
    monkeypatch.setattr(recipe, "PROJECTION_ROUTER", 2)
    dense, (one, *_) = TINY["bert classifier"].model(), batches(1, 2)
    work = Workload(
        name="tiny",
        title="a tiny model",
        dense=dense,
        train=batches(4, 1),
        tests=[one],
        metric=likeness(dense),
        metric_name="likeness",
        higher_is_better=True,
        heat=lambda model: layer_heat(
            "tokens", model, {"input_ids": one["input_ids"][:1]}, [str(i) for i in range(9)]
        ),
        timers={"whole": lambda model: model(**one)},
    )
    args = SimpleNamespace(effort="micro", out=tmp_path, sizes=[4, 2], device="cpu")
    recipe.run_recipe(work, args)
    found = json.loads((tmp_path / "tiny-micro.json").read_text())
    assert found["dense"] == 1
    assert len(found["curves"]) == 6
    for points in found["curves"].values():
        assert all(0 < point["share"] <= 1 for point in points)
        assert all(point["kept"] == pytest.approx(point["metric"]) for point in points)
    ours = next(iter(found["curves"].values()))
    assert [point["setting"] for point in ours] == ["tau 0", "tau 0.1", "tau 1"]
    assert ours[0]["flops"] == 1 > ours[2]["flops"]
    assert all(point["gains"]["whole"] > 0 for point in ours)
    assert (tmp_path / "tiny-micro.png").read_bytes().startswith(b"\x89PNG")
    assert "a tiny model" in (tmp_path / "tiny-micro.html").read_text()
    assert "FLOPs saved" in capsys.readouterr().out

    recipe.run_recipe(work, args)  # as after a kill at the very end: nothing is trained again
    again = json.loads((tmp_path / "tiny-micro.json").read_text())
    for name, points in found["curves"].items():
        if "MoEfication" not in name:
            assert [p["metric"] for p in again["curves"][name]] == [p["metric"] for p in points]
