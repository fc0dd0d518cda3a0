"""Experts whose neurons stand side by side in memory: the ops beside the same weights in rows, layers, and models."""

import copy
import itertools

import pytest
import sadmoe
import torch
from backends import DTYPES
from converted import converted, random_layer, random_rows
from given_costs import layer_of
from problems import (
    assert_as_good_as_torch,
    assert_the_same_in_parts,
    experts_problem,
    in_double,
    router_problem,
)
from sadmoe import ops, reference
from sadmoe.measure_costs import calibrate_costs
from sadmoe.ops import layout
from sadmoe.ops.autocast import cast_all
from tiny_models import TINY
from torch import library, nn
from torch.nn.utils import prune

WAY_IN = (2, 5)  # w_up and w_gate, of the arguments of sparse_experts
PROBLEMS = {
    "no tokens": {"T": 0},
    "one token": {"T": 1, "d": 40, "s": 33},
    "several blocks": {"T": 1100, "d": 40, "E": 3, "s": 40, "d_out": 50},
    "long rows": {"T": 30, "d": 1500, "E": 4, "s": 32},
    "rows of an odd length": {"T": 30, "d": 1025, "E": 2, "s": 64},
    "one expert": {"T": 9, "E": 1, "s": 20},
}


def packed_arguments(args, which=WAY_IN):
    return [ops.packed(value) if i in which and value is not None else value for i, value in enumerate(args)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_op_is_as_good_as_torch(isa, name, dtype):
    for i, (act, gated) in enumerate(itertools.product(reference.ACTIVATIONS, [False, True])):
        args = experts_problem(**PROBLEMS[name], gated=gated, bias=i % 4 < 2, dtype=dtype)
        assert_as_good_as_torch(
            ops.sparse_experts(*packed_arguments(args), act=act),
            reference.sparse_experts(*args, act=act),
            reference.sparse_experts(*in_double(args), act=act),
        )


def test_the_kernels_take_them_as_they_are(isa):
    """A copy in rows would have the bits of rows."""
    args = experts_problem(T=40, d=700, E=4, s=32, gated=True)
    in_rows = ops.sparse_experts(*args, act="silu")
    assert not torch.equal(ops.sparse_experts(*packed_arguments(args), act="silu"), in_rows)
    for i in WAY_IN:
        one = packed_arguments(args, which=(i,))
        assert torch.equal(ops.sparse_experts(*one, act="silu"), in_rows), "one alone is copied"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_neighbours_or_threads(isa, dtype):
    x, _, *experts = packed_arguments(experts_problem(T=600, d=600, E=12, s=17, d_out=35, dtype=dtype))
    v1, v2 = router_problem(600, 12, dtype=dtype)

    def run(rows):
        return ops.dynamic_k_moe(rows, v1, v2, *experts, tau=0.3, act="gelu")

    whole = run(x)
    mask = ops.dynamic_k_select(ops.router_scores(x, v1, v2), 0.3)
    assert 0.1 < mask.float().mean() < 0.9
    assert torch.equal(ops.sparse_experts(x, mask, *experts, act="gelu"), whole), "the stages"
    assert_the_same_in_parts(run, x, whole)


@pytest.mark.by_torch
def test_torch_finds_the_ops_well_made():
    x, mask, *experts = packed_arguments(experts_problem(T=6, d=12, E=3, s=4, gated=True))
    x.requires_grad_()
    experts[0].requires_grad_()
    library.opcheck(torch.ops.sadmoe.sparse_experts.default, (x, mask, *experts, "silu"))


@pytest.fixture
def layer():
    return random_layer(experts=4, expert_size=32, act="silu", gated=True).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.4])
def test_a_layer_computes_what_it_did(layer, dtype, tau):
    layer.to(dtype).gate = sadmoe.DynamicK(tau)
    other, x = copy.deepcopy(layer), random_rows(30).to(dtype)
    other.pack_()
    assert other.is_packed
    assert not layer.is_packed
    assert "packed" in repr(other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), layer.parameters(), strict=True))
    with torch.no_grad():
        wanted = layer(x).float()
        assert (other(x).float() - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()
        assert not other.takes_dense_path(x)
    other.unpack_()
    assert not other.is_packed
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_a_layer_that_would_run_densely_runs_by_the_op(tau):
    layer, x = layer_of(torch.bfloat16, tau), random_rows(100).bfloat16()
    with torch.no_grad():
        assert layer.takes_dense_path(x)
        layer.pack_()
        assert not layer.takes_dense_path(x)
        by_the_op = ops.sparse_experts(x, layer.mask(x), *layer.expert_weights(), act=layer.act)
        assert torch.equal(layer(x), by_the_op)


@pytest.mark.parametrize("name", ["w_up", "w_gate"])
def test_weights_made_at_every_access_stay_in_rows(layer, name):
    wanted = layer(random_rows(20))
    prune.identity(layer, name)
    layer.pack_()
    assert not layer.is_packed
    assert all(value.is_contiguous() for value in layer.state_dict().values())
    assert torch.equal(layer(random_rows(20)), wanted)


def test_a_layer_is_packed_whole_or_not_at_all(layer, monkeypatch):
    made = []

    def fails(weight):
        if made:
            raise MemoryError
        made.append(weight)
        return layout.packed(weight)

    monkeypatch.setattr(ops, "packed", fails)
    with pytest.raises(MemoryError):
        layer.pack_()
    assert len(made) == 1
    assert all(weight.is_contiguous() for weight in layer.parameters())


def test_weights_are_assigned_as_they_come(layer):
    layer.pack_()
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    assert not layer.is_packed


def test_dtypes_without_a_kernel_stay_in_rows(monkeypatch):
    monkeypatch.setattr(layout, "cpu_isa", lambda: "avx512")
    model = nn.ModuleDict({"one": random_layer(expert_size=32).double()})
    assert sadmoe.pack_experts_(model) == ()


def test_packed_layers_are_not_trained():
    model = nn.ModuleDict({"one": random_layer(expert_size=32)})
    model["one"].pack_()
    with pytest.raises(ValueError, match=r"one are packed, to run only: unpack_experts_\(model\) first"):
        sadmoe.finetune_(model, [random_rows(4)], sadmoe.FinetuneConfig(steps=1), progress=False)


def test_what_is_cast_stays_packed():
    args = packed_arguments(experts_problem(d=24, E=3, s=8, gated=True))
    with torch.autocast("cpu", torch.bfloat16):
        cast = cast_all("sparse_experts", tuple(args), "cpu")
    assert all(cast[i].dtype == torch.bfloat16 and cast[i].stride() == args[i].stride() for i in WAY_IN)


@pytest.mark.by_torch
def test_autocast_computes_the_same(layer):
    layer.gate = sadmoe.DynamicK(0.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        in_rows = layer(random_rows(20))
        layer.pack_()
        y = layer(random_rows(20))
    assert y.dtype == torch.bfloat16
    assert (y.float() - in_rows.float()).norm() <= 0.02 * in_rows.float().norm()


@pytest.mark.by_torch
def test_a_packed_layer_compiles(layer):
    layer.gate = sadmoe.DynamicK(0.3)
    layer.pack_()
    x = random_rows(20)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_a_layer_is_packed_in_inference_mode_for_good(layer):
    with torch.inference_mode():
        layer.pack_()
    assert not layer.w_up.is_inference()
    layer(random_rows(5)).sum().backward()


def test_gradients_are_the_same(layer):
    layer.gate = sadmoe.DynamicK(0.3)
    gradients = []
    for pack in (False, True):
        if pack:
            layer.pack_()
        layer.zero_grad()
        layer(random_rows(20)).square().sum().backward()
        gradients.append([p.grad.clone() for p in (layer.w_up, layer.w_gate, layer.w_down, layer.b_up)])
    for mine, wanted in zip(*gradients, strict=True):
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


def test_copies_casts_and_loads_stay_packed(layer):
    wanted = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.pack_()
    assert copy.deepcopy(layer).is_packed
    assert copy.deepcopy(layer).bfloat16().is_packed
    saved = layer.state_dict()
    assert all(value.is_contiguous() for value in saved.values())
    assert all(torch.equal(value, wanted[name]) for name, value in saved.items())
    layer.load_state_dict({name: value + 1 for name, value in wanted.items()})
    assert layer.is_packed
    assert torch.equal(layer.w_up, wanted["w_up"] + 1)


def test_what_leaves_the_cpu_is_unpacked(layer):
    layer.pack_()
    assert not layer.to("meta").is_packed


def test_int8_is_not_packed(layer):
    rounded = copy.deepcopy(layer)
    rounded.to_int8_()
    layer.pack_()
    layer.to_int8_()
    assert not layer.is_packed
    assert layer.w_up.is_contiguous()
    assert torch.equal(layer.w_up, rounded.w_up)


@pytest.fixture
def model(monkeypatch):
    """With experts of a size that gains, on a processor where it does."""
    monkeypatch.setattr(layout, "cpu_isa", lambda: "avx512")
    monkeypatch.setattr(layout, "FULL", 15)
    model = converted("bert", experts=4).eval()
    sadmoe.hf.describe_to_transformers(model)
    sadmoe.set_tau(model, 0.2)
    return model


def test_a_model_is_packed_and_unpacked(model):
    batch, names = TINY["bert"].batch(), tuple(sadmoe.moe_layers(model))
    with torch.no_grad():
        wanted = model(**batch)[0]
        assert sadmoe.pack_experts_(model) == names
        assert sadmoe.pack_experts_(model) == names, "once more"
        torch.testing.assert_close(model(**batch)[0], wanted)
        sadmoe.unpack_experts_(model)
        assert not any(layer.is_packed for layer in sadmoe.moe_layers(model).values())
        assert torch.equal(model(**batch)[0], wanted)


@pytest.mark.parametrize(
    ("isa", "dtype", "gains"),
    [
        ("avx512bf16", torch.bfloat16, True),
        ("avx512zen5", torch.float32, True),
        ("avx512", torch.float32, True),
        ("amx", torch.float32, False),
        ("avx2", torch.float32, False),
        ("portable", torch.float32, False),
        ("neon", torch.float32, False),
    ],
)
def test_packed_is_what_gains(model, monkeypatch, isa, dtype, gains):
    monkeypatch.setattr(layout, "cpu_isa", lambda: isa)
    assert bool(sadmoe.pack_experts_(model.to(dtype))) == gains


def test_experts_of_other_sizes_stay(monkeypatch):
    monkeypatch.setattr(layout, "cpu_isa", lambda: "avx512")
    model = nn.ModuleDict({str(s): random_layer(experts=2, expert_size=s) for s in (16, 32, 48, 256, 288)})
    assert sadmoe.pack_experts_(model) == ("32", "256")


def test_saved_is_what_it_was(model, tmp_path):
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    sadmoe.pack_experts_(model)
    sadmoe.save(model, tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path / "folder")
    again = TINY["bert"].model()
    sadmoe.load(again, tmp_path / "model.safetensors")
    for loaded in (again, type(model).from_pretrained(tmp_path / "folder")):
        found = loaded.state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert not any(layer.is_packed for layer in sadmoe.moe_layers(loaded).values())


def test_a_failure_leaves_the_model_as_it_was(model, monkeypatch):
    layers = list(sadmoe.moe_layers(model).values())
    pack = type(layers[0]).pack_

    def fails(layer):
        if layer is layers[-1]:
            raise MemoryError
        pack(layer)

    monkeypatch.setattr(type(layers[0]), "pack_", fails)
    with pytest.raises(MemoryError):
        sadmoe.pack_experts_(model)
    assert len(layers) > 1
    assert not any(layer.is_packed for layer in layers)


def test_there_is_nothing_to_calibrate(model, tmp_path):
    sadmoe.pack_experts_(model)
    with pytest.raises(ValueError, match="int8 or packed"):
        calibrate_costs(model, tmp_path / "costs.json")


def test_a_model_that_is_not_converted_is_refused():
    for step in (sadmoe.pack_experts_, sadmoe.unpack_experts_):
        with pytest.raises(ValueError, match="has no converted layer"):
            step(TINY["bert"].model())
