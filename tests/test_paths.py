"""Which path a layer takes, from costs that are given to it, and that both paths compute the same thing."""

import copy
import dataclasses

import pytest
import torch
from converted import converted, random_rows
from given_costs import ALWAYS_DENSE, CPU, HALF, NEVER_DENSE, by_hand, give, layer_of
from problems import assert_as_good_as_torch, in_double
from sadmoe import measured, ops, paths, reference
from sadmoe.crossover import LayerShape
from sadmoe.dial import converted_layers, set_batch_invariant, set_tau
from sadmoe.gates import DynamicK, TopK
from sadmoe.layer import DynamicKMoE
from sadmoe.measured import Costs
from tiny_models import TINY, call
from torch.utils.flop_counter import FlopCounterMode


def called(monkeypatch):
    """The names of the ops and paths that run from here on."""
    names = []

    def spy(owner, name):
        original = getattr(owner, name)

        def run(*args, **kwargs):
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    for name in ("dynamic_k_moe", "sparse_experts", "router_scores"):
        spy(ops, name)
    spy(DynamicKMoE, "masked_dense")
    return names


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("mixed", [False, True])
def test_int8_always_takes_its_op(monkeypatch, mixed, tau):
    for batch_invariant in (None, False, True):
        layer = layer_of(torch.float32)
        layer.gate, layer.batch_invariant = DynamicK(tau), batch_invariant
        layer.to_int8_()
        give(layer, ALWAYS_DENSE)
        names = called(monkeypatch)
        for name in ("sparse_experts_int8", "dynamic_k_moe_int8"):
            monkeypatch.setattr(ops, name, spied(names, name))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            layer(random_rows(33))
        assert len([name for name in names if name.endswith("int8")]) == 1
        assert "masked_dense" not in names


def spied(names, name):
    original = getattr(ops, name)

    def run(*args, **kwargs):
        names.append(name)
        return original(*args, **kwargs)

    return run


# ---------------------------------------------------------------- both paths compute the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", list(reference.ACTIVATIONS))
def test_the_dense_path_is_as_good_as_torch_at_what_the_op_computes(act, gated, dtype):
    layer = layer_of(dtype, act=act, gated=gated, d_out=10)
    layer.batch_invariant = False
    for T in (33, 65):  # of fewer, torch's largest error may be small by luck
        x = random_rows(T).to(dtype)
        with torch.no_grad():
            assert layer.takes_dense_path(x)
            ours, wanted = layer(x), by_hand(layer, x)
            args = in_double([x, layer.mask(x), *layer.expert_weights()])
            assert_as_good_as_torch(ours, wanted, reference.sparse_experts(*args, act=act))


def test_experts_outside_the_mask_leave_nothing_behind_not_even_nan():
    layer = layer_of()
    layer.batch_invariant = False
    x = random_rows(40)
    with torch.no_grad():
        mask = layer.mask(x)
        layer.w_up[3] = float("nan")
        y = layer(x)
    assert mask[:, 3].any()
    assert not mask[:, 3].all()
    assert torch.equal(y.isnan().any(1), mask[:, 3])


# ---------------------------------------------------------------- what decides


@pytest.mark.parametrize(
    ("dtype", "batch_invariant", "dense"),
    [
        (torch.float32, None, False),
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, None, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
        (torch.float16, None, True),
    ],
    ids=str,
)
def test_float32_takes_the_dense_path_only_when_asked_and_16_bits_unless_told_not_to(
    monkeypatch, dtype, batch_invariant, dense
):
    layer = layer_of(dtype)
    layer.batch_invariant = batch_invariant
    x, names = random_rows(9).to(dtype), called(monkeypatch)
    with torch.no_grad():
        layer(x)
    assert names == (["router_scores", "masked_dense"] if dense else ["dynamic_k_moe"])


def test_unasked_dense_must_be_a_tenth_faster():
    layer = layer_of(torch.bfloat16, tau=1e-6)  # nearly every expert
    x = random_rows(9).bfloat16()
    share = layer.mask(x).float().mean().item()
    for cost, unasked, asked in ((1.05, False, True), (1.15, True, True), (0.95, False, False)):
        give(layer, {1: ((share * 0.99, cost), (1.0, cost * 1.001))})
        with torch.no_grad():
            layer.batch_invariant = None
            assert layer.takes_dense_path(x) == unasked, cost
            layer.batch_invariant = False
            assert layer.takes_dense_path(x) == asked, cost


def test_the_share_of_the_call_itself_decides_on_the_cpu(monkeypatch):
    layer = layer_of()
    layer.batch_invariant = False
    give(layer, HALF)
    x, names = random_rows(50), called(monkeypatch)
    ways = set()
    with torch.no_grad():
        for tau in (0.05, 0.2, 0.4, 0.6, 0.9):
            layer.gate = DynamicK(tau)
            share = layer.mask(x).float().mean().item()
            names.clear()
            y = layer(x)
            assert names == ["router_scores", "masked_dense" if share > 0.5 else "sparse_experts"]
            ways.add(names[-1])
            torch.testing.assert_close(y, by_hand(layer, x))
    assert len(ways) == 2


def test_the_choice_on_the_cpu_does_not_remember_earlier_calls():
    layer = layer_of(torch.bfloat16)
    give(layer, HALF)
    few, many = DynamicK(0.9), DynamicK(0.01)
    x = random_rows(50).bfloat16()
    with torch.no_grad():
        layer.gate = few
        first = layer(x)
        layer.gate = many
        assert layer.takes_dense_path(x)
        layer(x)
        layer.gate = few
        assert not layer.takes_dense_path(x)
        assert torch.equal(layer(x), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_default_in_float32_and_always_when_asked_a_token_does_not_depend_on_its_neighbours(dtype):
    layer = layer_of(dtype, d=64, experts=16, expert_size=16)
    layer.batch_invariant = None if dtype == torch.float32 else True
    x = random_rows(70, 64).to(dtype)
    with torch.no_grad():
        for gate in (DynamicK(0.3), DynamicK(0.01), TopK(3), TopK(15)):
            layer.gate = gate
            whole = layer(x)
            for rows in (slice(0, 1), slice(3, 10), slice(5, 70)):
                assert torch.equal(layer(x[rows]), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_tau_zero_every_expert_runs_by_whatever_is_faster_and_no_router(monkeypatch, dtype):
    layer = layer_of(dtype, tau=0.0)
    x, names = random_rows(40).to(dtype), called(monkeypatch)
    args = in_double([x, torch.ones(40, layer.experts, dtype=torch.bool), *layer.expert_weights()])
    truth = reference.sparse_experts(*args, act=layer.act)
    for asked, cost, ops_called in (
        (None, 1.2, []),
        (False, 1.2, []),
        (True, 1.2, ["sparse_experts"]),
        (None, 1.02, []),
        (None, 0.98, ["sparse_experts"]),
        (None, 0.9, ["sparse_experts"]),
        (False, 0.9, ["sparse_experts"]),
    ):
        layer.batch_invariant = asked
        give(layer, ALWAYS_DENSE, every_expert={1: cost})
        names.clear()
        with torch.no_grad():
            y = layer(x)
            assert names == ops_called, (asked, cost)
            assert layer.takes_dense_path(x) != bool(ops_called)
            assert_as_good_as_torch(y, by_hand(layer, x), truth)


def test_at_tau_zero_gradients_compiled_graphs_and_training_go_through_torch(monkeypatch):
    layer = layer_of(tau=0.0)
    give(layer, ALWAYS_DENSE, every_expert={1: 0.5})
    x, names = random_rows(9), called(monkeypatch)
    with torch.no_grad():
        dense = layer(x)
        assert names == ["sparse_experts"]
        names.clear()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), dense)
    torch.testing.assert_close(layer(x), dense)
    layer.batch_invariant, layer.keeps_hidden = True, True
    torch.testing.assert_close(layer(x), dense)
    assert names == []


def test_where_nothing_was_measured_tau_zero_is_torchs(monkeypatch):
    layer = layer_of(tau=0.0)  # whose costs tell nothing of it
    x, names = random_rows(9), called(monkeypatch)
    with torch.no_grad():
        for batch_invariant in (None, False):
            layer.batch_invariant = batch_invariant
            layer(x)
            assert names == []
            assert layer.takes_dense_path(x)


@pytest.mark.parametrize("every", [{}, {1: 0.5}], ids=["torch", "the op"])
def test_at_tau_zero_no_tokens_autocast_and_other_dtypes_are_as_before(every):
    layer = layer_of(tau=0.0)
    give(layer, ALWAYS_DENSE, every_expert=every)
    x = random_rows(9)
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, 24)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x).float(), layer.dense(x).float(), rtol=0.02, atol=0.02)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.half())


def test_batch_invariant_holds_at_tau_zero_too():
    layer = layer_of(tau=0.0)
    layer.batch_invariant = True
    x = random_rows(9)
    with torch.no_grad():
        assert torch.equal(layer(x[2:3]), layer(x)[2:3])


@pytest.mark.parametrize("int8", [False, True])
def test_at_tau_zero_graphs_of_the_op_take_any_number_of_tokens(int8):
    layer = layer_of(tau=0.0)
    layer.batch_invariant = True
    if int8:
        layer.to_int8_()
    x = random_rows(6)
    with torch.no_grad():
        shapes = {"x": {0: torch.export.Dim("T")}}
        exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
        for T in (6, 3, 17):
            x = random_rows(T, seed=T)
            assert torch.equal(exported(x), layer(x))


def test_top_k_is_counted_like_any_mask(monkeypatch):
    layer = layer_of()
    layer.batch_invariant = False
    give(layer, HALF)
    x, names = random_rows(9), called(monkeypatch)
    for k, way in ((2, "sparse_experts"), (7, "masked_dense")):
        layer.gate = TopK(k)
        names.clear()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), by_hand(layer, x))
        assert names[:2] == ["router_scores", way]


def test_the_nearest_measured_number_of_tokens_counts():
    layer = layer_of()
    layer.batch_invariant = False
    give(layer, {1: NEVER_DENSE[1], 64: ALWAYS_DENSE[1]})
    with torch.no_grad():
        dense = [layer.takes_dense_path(random_rows(T)) for T in (1, 7, 9, 500)]
    assert dense == [False, False, True, True]


def test_measurements_of_another_shape_dtype_or_device_do_not_count():
    layer = layer_of()
    layer.batch_invariant = False
    row = Costs(paths.device_name(CPU), "float32", layer.shape, 1, ALWAYS_DENSE)
    tau_of_a_few = DynamicK(0.95)  # so few that costs that came with sadmoe say sparse
    layer.gate = tau_of_a_few
    others = [
        dataclasses.replace(row, device="another processor"),
        dataclasses.replace(row, dtype="bfloat16"),
        dataclasses.replace(row, layer=dataclasses.replace(layer.shape, d=25)),
    ]
    with torch.no_grad():
        paths.use_costs(others)
        assert not layer.takes_dense_path(random_rows(9))
        paths.use_costs([*others, row])
        assert layer.takes_dense_path(random_rows(9))


SHAPE = LayerShape(384, 384, 48, 32, 128)
THESE, OTHERS = "these kernels", "others"


def built_in(dtype, curve=HALF):
    return Costs(THESE, dtype, SHAPE, 1, curve, {1: 0.5})


@pytest.fixture
def come_with_sadmoe(monkeypatch, tmp_path):
    """Costs that come with sadmoe, by hand: of THESE kernels, which are the fastest here, or of ELSEWHERE."""
    monkeypatch.setattr(paths, "ELSEWHERE", "kernels of another kind")
    names = {THESE: paths.kernels_name(), OTHERS: paths.ELSEWHERE}

    def come(*rows):
        rows = [dataclasses.replace(row, device=names[row.device]) for row in rows]
        path = tmp_path / "costs.json"
        measured.write(path, rows)
        monkeypatch.setattr(measured, "BUILT_IN", path)
        paths.use_costs([])
        paths._nearest_built_in.cache_clear()

    yield come
    paths._nearest_built_in.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "until", "op_at_tau_zero"),
    [
        (THESE, torch.float32, 0.5, True),
        (OTHERS, torch.float32, 0.5, False),
        (THESE, torch.bfloat16, 0.5, True),
        (OTHERS, torch.bfloat16, 1.0, False),
        (THESE, torch.float16, 1.0, False),
    ],
)
def test_without_measurements_those_that_came_with_sadmoe_decide(
    come_with_sadmoe, device, dtype, until, op_at_tau_zero
):
    come_with_sadmoe(
        *(dataclasses.replace(built_in(each), device=device) for each in ("float32", "bfloat16"))
    )
    assert paths.sparse_until(SHAPE, 40, CPU, dtype, 1.0) == pytest.approx(until)
    assert paths.op_runs_all(SHAPE, 40, CPU, dtype) == op_at_tau_zero


def test_costs_of_these_kernels_go_before_those_of_others(come_with_sadmoe):
    others = dataclasses.replace(built_in("float32", ALWAYS_DENSE), device=OTHERS)
    come_with_sadmoe(others)
    assert paths.sparse_until(SHAPE, 40, CPU, torch.float32, 1.0) == 0
    come_with_sadmoe(others, built_in("float32"))
    assert paths.sparse_until(SHAPE, 40, CPU, torch.float32, 1.0) == pytest.approx(0.5)


def test_at_tau_zero_a_small_gain_counts_where_it_was_measured_here(come_with_sadmoe):
    row = dataclasses.replace(built_in("float32"), every_expert={1: 0.97})
    come_with_sadmoe(row)
    assert not paths.op_runs_all(SHAPE, 40, CPU, torch.float32)
    paths.use_costs([dataclasses.replace(row, device=paths.device_name(CPU))])
    assert paths.op_runs_all(SHAPE, 40, CPU, torch.float32)


def test_what_came_with_sadmoe_tells_nothing_of_tau_zero_in_other_shapes(come_with_sadmoe):
    come_with_sadmoe(built_in("float32"))
    for d, told in ((768, True), (24, False), (384 * 9, False)):
        assert paths.op_runs_all(dataclasses.replace(SHAPE, d=d), 40, CPU, torch.float32) == told


def test_of_those_that_came_with_sadmoe_the_likest_shape_decides():
    paths.use_costs([])
    came = [row for row in measured.read(measured.BUILT_IN).values() if row.dtype == "float32"]
    rows = [row for row in came if row.device == paths.kernels_name()]
    rows = rows or [row for row in came if row.device == paths.ELSEWHERE]
    assert len({row.layer.d for row in rows}) > 1
    for row in rows:
        like = dataclasses.replace(row.layer, d=row.layer.d + 1, router_width=7)
        assert paths.sparse_until(like, 40, CPU, torch.float32, 1.0) == row.sparse_until(40)


# ---------------------------------------------------------------- what keeps the op


def test_gradients_flow_through_the_op(monkeypatch):
    layer = layer_of().train()
    layer.batch_invariant = False
    names = called(monkeypatch)
    y = layer(random_rows(9))
    assert names == ["dynamic_k_moe"]
    y.sum().backward()
    assert layer.w_up.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_compiled_and_exported_graphs_take_the_op_with_any_number_of_tokens(strict):
    layer = layer_of()
    layer.batch_invariant = False
    x = random_rows(6)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        shapes = {"x": {0: torch.export.Dim("T")}}
        exported = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=strict)
        assert any("dynamic_k_moe" in str(node.target) for node in exported.graph.nodes)
        for T in (6, 3, 17):
            x = random_rows(T, seed=T)
            layer.batch_invariant = True
            op = layer(x)
            layer.batch_invariant = False
            assert layer.takes_dense_path(x)
            assert torch.equal(compiled(x), op)
            assert torch.equal(exported.module()(x), op)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        assert torch.equal(traced(random_rows(5)), compiled(random_rows(5)))


def test_meta_tensors_fake_tensors_and_no_tokens_take_the_op(monkeypatch):
    layer = layer_of()
    layer.batch_invariant = False
    names = called(monkeypatch)
    with torch.no_grad():
        assert layer(torch.empty(0, 24)).shape == (0, 24)
        assert names == ["dynamic_k_moe"]
        assert copy.deepcopy(layer).to("meta")(torch.empty(5, 24, device="meta")).shape == (5, 24)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(random_rows(5))).shape == (5, 24)
    assert names == ["dynamic_k_moe"] * 3


def test_autocast_decides_by_the_dtype_it_computes_in():
    layer = layer_of()
    x = random_rows(9)
    low = dataclasses.replace(layer.shape, bytes_each=2)
    paths.use_costs([Costs(paths.device_name(CPU), "bfloat16", low, 1, ALWAYS_DENSE)])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.takes_dense_path(x)
        dense = layer(x)
        layer.batch_invariant = True
        assert not layer.takes_dense_path(x)
        op = layer(x)
    assert dense.dtype == op.dtype == torch.bfloat16
    torch.testing.assert_close(dense, op, rtol=0.05, atol=0.05)  # bfloat16 rounds to 0.004, hidden and sums
    with torch.no_grad():
        layer.batch_invariant = None
        assert not layer.takes_dense_path(x)


def test_the_dense_path_counts_the_flops_it_runs():
    layer = layer_of()
    x, (E, s, d) = random_rows(9), layer.w_up.shape
    router = 2 * 9 * layer.router.v1.shape[0] * (d + E)

    def counted():
        with FlopCounterMode(display=False) as count, torch.no_grad():
            layer(x)
        return count.get_total_flops()

    pairs = int(layer.mask(x).sum())
    assert counted() == router + 2 * pairs * s * 2 * d
    layer.batch_invariant = False
    assert counted() == router + 2 * 9 * E * s * 2 * d
    assert pairs < 9 * E


# ---------------------------------------------------------------- a whole model


def test_one_call_sets_a_whole_model():
    model, batch = converted("bert"), TINY["bert"].batch()
    set_tau(model, 0.3)
    first = next(iter(converted_layers(model).values()))
    give(first, ALWAYS_DENSE)
    with torch.no_grad():
        wanted = call(model, batch)
        set_batch_invariant(model, False, expected_share=0.4)
        assert {(m.batch_invariant, m.expected_share) for m in converted_layers(model).values()} == {
            (False, 0.4)
        }
        assert first.takes_dense_path(torch.randn(3, first.shape.d))
        torch.testing.assert_close(call(model, batch), wanted, rtol=1e-4, atol=1e-4)
        set_batch_invariant(model, True)
        assert torch.equal(call(model, batch), wanted)
    with pytest.raises(ValueError, match=r"expected_share must be in \[0, 1\], got 1.5"):
        set_batch_invariant(model, True, expected_share=1.5)
    with pytest.raises(ValueError, match="has no converted layer"):
        set_batch_invariant(torch.nn.Linear(2, 2), True)


def test_a_dtype_that_the_op_does_not_take_is_left_to_the_op_to_refuse(monkeypatch):
    monkeypatch.setattr(paths.ops, "runs_kernels", lambda device: True)
    card = torch.device("cuda", 5)
    assert paths.sparse_until(LayerShape(768, 768, 48, 64, 128, False, 8), 512, card, torch.float64, 1.0) == 1


def test_a_card_that_no_kernel_is_built_for_computes_densely(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    card = torch.device("cuda", 7)
    assert (
        paths.sparse_until(LayerShape(768, 768, 48, 64, 128, False, 2), 512, card, torch.float16, 1.0) == 0.0
    )
