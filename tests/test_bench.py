"""The benches' own arithmetic, where it can be checked by hand: masks, floors, peers that compute the same thing."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import cuda_constants
import cuda_peers
import layers_goals
from cuda_goals import aims
from layer_problem import ROUTER_WIDTH, LayerShape, problem, weights, with_mask
from layers import floor, shape_of
from mask_kinds import clustered, recorded, recorded_shapes, skewed
from variants import as_layer, checked, dense, eager, int8, largest, loop, sadmoe, torch_grouped_mm


@pytest.mark.parametrize("kind", [skewed, clustered])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_kind_of_mask_has_the_share(kind, share):
    mask = kind(4096, 48, share)
    assert mask.shape == (4096, 48)
    assert mask.float().mean().item() == pytest.approx(share, abs=0.02)


def test_skewed_masks_have_popular_experts_and_clustered_ones_like_neighbours():
    popularity = skewed(4096, 48, 0.1).float().mean(0)
    assert popularity.max() > 5 * popularity.median()
    mask = clustered(4096, 48, 0.25)
    changes = (mask[1:] != mask[:-1]).float().mean(1)
    inside = torch.arange(1, 4096) % 16 != 0
    assert changes[inside].mean() < 0.3 * changes[~inside].mean()


def test_recorded_masks_are_those_of_the_shape_and_repeat(tmp_path, capsys):
    layer, mask = LayerShape(8, 12, 4), torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.uint8)
    save_file(
        {"a": mask, "b": mask.clone()},
        tmp_path / "m",
        {"a": "d=8 f=12 s=4 gated=False", "b": "d=9 f=12 s=4 gated=False"},
    )
    assert recorded_shapes(tmp_path / "m") == [layer, LayerShape(9, 12, 4)]
    ((name, found),) = recorded(tmp_path / "m", layer, 3)
    assert name == "a"
    assert torch.equal(found, mask[[0, 1, 0]].bool())
    assert not list(recorded(tmp_path / "m", LayerShape(7, 12, 4), 3))
    assert "no masks of d=7" in capsys.readouterr().out


def test_the_floor_is_the_executed_products_or_the_needed_weights_and_the_router():
    layer = LayerShape(d=10, f=12, s=4, gated=True)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    router = ROUTER_WIDTH * (10 + 3)
    work = 2 * 3 * 4 * 3 * 10 + 2 * 2 * router  # FLOPs: pairs, neurons, matrices, width; tokens
    read = (2 * 4 * 3 * 10 + router) * 2  # bytes: the two experts that some token needs
    assert floor(layer, mask, torch.bfloat16, {"flops": 1.0, "bytes": 1e12}) == pytest.approx(work)
    assert floor(layer, mask, torch.bfloat16, {"flops": 1e12, "bytes": 1.0}) == pytest.approx(read)


def test_a_cell_that_misses_an_aim_says_where_its_time_goes(tmp_path, monkeypatch, capsys):
    """384 x 1536: 1,179,648 weights a matrix pair; the router has 128 (384 + 48)."""
    reached = {
        "layer": "384x1536", "s": 32, "dtype": "float32", "T": 64, "masks": "independent", "share": 0.25, "union": 1.0,
        "seconds": {"dense": 3e-3, "loop": 2e-3, "sadmoe": 1e-3}, "of_floor": 0.95, "of_ideal": 0.75,
        "limits": {"flops": 1e11, "bytes": 1e10},
    }  # fmt: skip
    missed = reached | {"of_floor": 0.7, "seconds": {"dense": 0.9e-3, "loop": 2e-3, "sadmoe": 1e-3}}
    (tmp_path / "a.json").write_text(json.dumps({"machine": "some", "rows": [reached, missed]}))
    monkeypatch.setattr(sys, "argv", ["layers_goals.py", str(tmp_path / "a.json"), "--misses"])
    layers_goals.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {" ".join(line[:2]): line[5:8] for line in lines if line[3:4] == ["to"]}
    assert counts["floor 0.80"] == ["1", "of", "2"]
    assert counts["dense 0.95"] == ["1", "of", "2"]
    assert counts["peers 1.00"] == ["2", "of", "2"]
    assert not counts.keys() & {"ideal 0.80", "int8 3.00", "layer 0.95"}, "no such cells"
    misses = [line for line in lines if line[2:3] == ["384x1536"]]
    assert [" ".join(line[:2]) for line in misses] == ["floor 0.80", "floor 0.90", "dense 0.95"]
    assert misses[0][-7:-1] == ["0.70", "1000", "38%", "47%", "7%", "8%"]  # 377, 472 and 71 of 1,000 us


def test_a_shape_that_cannot_be_read_is_named():
    assert shape_of("576x1536-glu", 32) == LayerShape(576, 1536, 32, gated=True)
    with pytest.raises(SystemExit, match=r"DxF or DxF-glu.*'576-glu'"):
        shape_of("576-glu", 32)
    with pytest.raises(SystemExit, match=r"record_masks\.py writes: 'd=8'"):
        LayerShape.of_text("d=8")
    for layer in (LayerShape(8, 12, 4), LayerShape(576, 1536, 32, gated=True)):
        assert LayerShape.of_text(layer.text) == shape_of(layer.name, layer.s) == layer


@pytest.mark.parametrize("gated", [False, True])
def test_variants_compute_the_same_thing(gated):
    w = weights(LayerShape(16, 24, 4, gated), torch.float32)
    routed = problem(w, T=5, share=0.5)
    for p in (routed, with_mask(routed, clustered(5, 6, 0.5)), problem(w, 5, 1)):
        for way in (sadmoe, loop, eager, torch_grouped_mm, int8):
            checked(p, {way.__name__: way(p)()})
    for p in (routed, problem(w, 5, 1)):
        with torch.inference_mode():
            checked(p, {"layer": as_layer(p)()})
    assert (dense(p)() - sadmoe(p)()).abs().max() < 1e-5  # p runs every expert
    with pytest.raises(SystemExit, match="wrong is wrong"):
        checked(p, {"wrong": sadmoe(p)() + 1e-3})


def test_the_largest_tensor_of_a_peer():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    p = with_mask(problem(weights(LayerShape(8, 12, 4), torch.bfloat16), 2, 1), mask)
    k, E = 2, 3
    assert largest("torch_grouped_mm", p) == 3 * 8 * 2  # pairs, d, bytes
    assert largest("grouped_mm", p) == 2 * k * 8 * 2  # a busiest token's k of each token
    assert largest("eager", p) == 2 * k * (E + 1) * 8  # one int64 for each expert, and for none
    assert largest("loop", p) == 0


def _gpu_cell(**changed):
    """A cell of cuda_peers.py: one token, a quarter of the experts, dense 8 us and the layer's way 7.6."""
    cell = {"layer": "768x3072", "s": 64, "masks": "independent", "T": 1}
    cell |= {"asked": 0.25, "share": 0.25, "union": 0.25}
    return cell | {"seconds": {"dense": 8e-6}, "auto": 0.95, "peer": 1.2} | changed


@pytest.mark.parametrize(
    ("what", "cell", "most", "verdict"),
    [
        ("prefill", _gpu_cell(T=50432, share=0.26, auto=0.8), 0.8, "met"),
        ("prefill", _gpu_cell(T=50432, auto=0.81), 0.8, "missed"),
        ("decode", _gpu_cell(), 8.0, "met"),
        ("decode", _gpu_cell(share=0.175), (7.5 + 8) / 2, "met"),  # halfway between two shares
        ("decode", _gpu_cell(asked=0.1, share=0.02, auto=0.9), 7.5, "met"),  # one token may run few
        ("decode", _gpu_cell(auto=1.01), 8.0, "missed"),
        ("decode", _gpu_cell(T=8, union=0.5, auto=0.9), 6 + 1.15 * 3072 * 768 * 2 * 2 * 0.5 / 3e6, "met"),
        ("never worse", _gpu_cell(auto=1.06, masks="skewed"), 1.05, "missed"),
        ("peers", _gpu_cell(peer=0.9, masks="skewed"), 1.0, "missed"),
    ],
)
def test_cells_of_a_gpu_are_held_to_their_aims(what, cell, most, verdict):
    (aim,) = [aim for aim in aims([cell]) if aim.what == what and aim.found is not None]
    assert aim.most == pytest.approx(most)
    assert aim.verdict == verdict


def test_a_cell_that_hangs_ends_the_process_whatever_comes_of_telling(monkeypatch):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(cuda_peers.os, "_exit", lambda code: (codes.append(code), ended.set()))
    told_of, thrown = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", lambda args: (thrown.append(args.exc_type), told_of.set()))

    def told():
        raise OSError("disk full")

    with cuda_peers.hung(0.01, told):
        assert ended.wait(60)
        assert told_of.wait(60)
    assert (codes, thrown) == ([3], [OSError])


@pytest.mark.parametrize(("capability", "warpgroups"), [([8, 6], 0), ([9, 0], 0.5), ([12, 0], 0)])
def test_only_a_hopper_s_constants_have_products_of_warpgroups(monkeypatch, capability, warpgroups):
    monkeypatch.setattr(cuda_constants, "dense_rate", lambda dtype: 800e12)
    raw = {"capability": capability, "memory": 2e12, "products_16": 400e12, "products_32": 40e12}
    found = cuda_constants.constants(raw | {"products_16_hopper": 400e12}, "a bench")
    assert found["hopper_16"]["value"] == warpgroups
    assert found["capability"]["value"] == capability
    assert found["ours_16"] == found["ours_16"] | {"value": 0.5, "source": "a bench", "measured": True}


def test_cells_of_a_gpu_that_failed_are_missed_and_those_not_measured_named():
    failed = _gpu_cell()
    del failed["auto"], failed["peer"]
    (worse,) = [aim for aim in aims([failed]) if aim.what == "never worse"]
    assert worse.verdict == "missed"
    assert ("peers", "not measured") in {(aim.what, aim.verdict) for aim in aims([failed])}
    unmeasured = [aim.cell for aim in aims([]) if aim.verdict == "not measured"]
    assert "768x3072 s 64, T 50432, 25%" in unmeasured
    assert "768x3072, T 1, 10%" in unmeasured
    assert "768x3072, T 8" in unmeasured
