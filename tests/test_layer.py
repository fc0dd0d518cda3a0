"""The layer: any leading shape, its gates, its true norms, its dense path."""

import copy

import pytest
import torch
from problems import experts_problem
from sadmoe import ops, reference
from sadmoe.gates import DynamicK, TopK
from sadmoe.layer import DynamicKMoE, Router
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune


def make_layer(d=20, experts=6, expert_size=5, act="gelu", seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = DynamicKMoE(d, experts, expert_size, act, router_width=8, **kwargs)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith("router"):
                p.normal_(std=0.3)
    return layer.eval()


def tokens(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (0, 20), (2, 0, 20)])
def test_any_leading_shape(shape, gated):
    layer = make_layer(gated=gated, bias=("b_up", "b_out"), d_out=9)
    x = tokens(*shape)
    for tau in (0.0, 0.5):
        layer.gate = DynamicK(tau)
        y = layer(x)
        assert y.shape == (*shape[:-1], 9)
        torch.testing.assert_close(y.reshape(-1, 9), layer(x.reshape(-1, 20)))
        assert layer.mask(x).shape == (*shape[:-1], 6)


class Doubled(torch.nn.Module):
    made = 0

    def forward(self, weight):
        self.made += 1
        return 2 * weight


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_weights_may_be_made_of_others_at_every_access(tau):
    layer, plain = (make_layer(gate=DynamicK(tau)) for _ in range(2))
    for module, name in ((layer, "w_up"), (layer.router, "v1")):
        torch.nn.utils.parametrize.register_parametrization(module, name, Doubled())
    plain.w_up.data *= 2
    plain.router.v1.data *= 2
    x = tokens(30, 20)
    assert torch.equal(layer(x), plain(x))
    doubled = layer.parametrizations["w_up"][0]
    doubled.made = 0
    assert torch.equal(layer(x), plain(x))
    assert doubled.made == 1
    torch.nn.utils.parametrize.remove_parametrizations(layer, "w_up")
    assert torch.equal(layer(x), plain(x))


def test_weights_may_be_pruned():
    layer, plain = (make_layer(gate=DynamicK(0.5)) for _ in range(2))
    prune.l1_unstructured(layer, "w_down", amount=0.5)
    plain.w_down.data *= layer.w_down_mask
    x = tokens(30, 20)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("change", [None, "to_int8_", "pack_"])
@torch.no_grad()
def test_a_call_finds_its_weights_without_torch_s_search(monkeypatch, change, tau):
    """nn.Module.__getattr__, which takes half a microsecond of the few that a token does."""
    layer = make_layer(experts=2, expert_size=32, gated=True, bias=("b_up", "b_gate", "b_out"))
    if change is not None:
        getattr(layer, change)()
    layer.gate, x = DynamicK(tau), tokens(1, 20)
    before, searched = layer(x), []
    monkeypatch.setattr(torch.nn.Module, "__getattr__", lambda module, name: searched.append(name))
    assert torch.equal(layer(x), before)
    assert searched == []


def test_meta_tensors_give_shapes_also_under_autocast():
    layer = make_layer(d_out=9).to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        for layer.gate in (DynamicK(0.3), DynamicK(0.0)):
            with torch.no_grad():
                assert layer(torch.empty(5, 20, device="meta")).shape == (5, 9)


def test_forward_runs_the_experts_of_its_mask():
    layer = make_layer(bias=("b_up", "b_out"))
    x = tokens(30, 20)
    for gate in (DynamicK(0.3), DynamicK(0.3, true_norms=True), TopK(2), TopK(6), TopK(1, true_norms=True)):
        layer.gate = gate
        wanted = reference.sparse_experts(x, layer.mask(x), *layer.expert_weights(), act=layer.act)
        torch.testing.assert_close(layer(x), wanted, msg=str(gate))


def test_tau_zero_is_the_dense_path_and_equals_every_expert_run():
    for gated in (False, True):
        layer = make_layer(gated=gated, bias=("b_up", "b_out", *(("b_gate",) if gated else ())))
        x = tokens(30, 20)
        every = ops.sparse_experts(
            x, torch.ones(30, 6, dtype=torch.bool), *layer.expert_weights(), act=layer.act
        )
        torch.testing.assert_close(layer(x), every)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("experts", "expert_size"), [(24, 8), (10, 24), (7, 8), (3, 100), (2, 130), (17, 20)]
)
def test_every_neuron_by_the_op_is_the_dense_ffn(experts, expert_size, gated):
    layer = make_layer(experts=experts, expert_size=expert_size, gated=gated, bias=("b_up", "b_out"), d_out=9)
    x = tokens(12, 20)
    torch.testing.assert_close(layer.op_on_all(x), layer.dense(x), rtol=1e-5, atol=1e-4)


def test_gradients_flow_through_joined_experts():
    grads = []
    for batch_invariant in (True, None):
        layer = make_layer(experts=24, expert_size=8, gated=True, batch_invariant=batch_invariant)
        x = tokens(12, 20).requires_grad_()
        layer(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for name, p in layer.named_parameters() if "router" not in name)])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("experts", "expert_size", "joined"),
    [(96, 16, (12, 128)), (64, 24, (16, 96)), (7, 16, (1, 112)), (11, 16, (11, 16)), (4, 200, (4, 200))],
)
def test_every_neuron_by_the_op_is_few_experts(monkeypatch, experts, expert_size, joined):
    layer, seen = make_layer(experts=experts, expert_size=expert_size, bias=("b_up",)), []
    run = ops.sparse_experts
    monkeypatch.setattr(ops, "sparse_experts", lambda *a, **k: seen.append(a) or run(*a, **k))
    layer.op_on_all(tokens(3, 20))
    ((_, mask, w_up, w_down, b_up, *_),) = seen
    assert (mask.shape, w_up.shape) == ((3, joined[0]), (*joined, 20))
    for view, weight in ((w_up, layer.w_up), (w_down, layer.w_down), (b_up, layer.b_up)):
        assert view.data_ptr() == weight.data_ptr(), "the same memory"


def test_expert_norms_are_the_norms_of_the_outputs_without_the_output_bias():
    layer = make_layer(gated=True, bias=("b_up", "b_gate", "b_out"))
    x = tokens(11, 20)
    w_up, w_down, b_up, w_gate, b_gate, _ = layer.expert_weights()
    for e in range(6):
        only = torch.zeros(11, 6, dtype=torch.bool)
        only[:, e] = True
        output = ops.sparse_experts(x, only, w_up, w_down, b_up, w_gate, b_gate, act=layer.act)
        torch.testing.assert_close(layer.expert_norms(x)[:, e], output.norm(dim=1))


def test_the_error_is_bounded_by_the_skipped_norms():
    layer = make_layer(act="relu", bias=("b_up", "b_out"))
    x = tokens(200, 20)
    dense, norms = layer(x), layer.expert_norms(x)
    for gate in (DynamicK(tau, true_norms=true) for tau in (0.1, 0.4, 0.9) for true in (True, False)):
        layer.gate = gate
        mask = layer.mask(x)
        assert 0 < mask.float().mean() < 1
        error = (layer(x) - dense).norm(dim=1)
        assert error.max() > 0.01
        assert (error <= norms.masked_fill(mask, 0).sum(1) + 1e-5).all()
        if gate.true_norms:
            assert torch.equal(mask, ops.dynamic_k_select(norms, gate.tau))
            assert (error <= (6 - mask.sum(1)) * gate.tau * norms.amax(1) + 1e-5).all()


@pytest.mark.parametrize("act", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("bias", [(), ("b_up", "b_gate", "b_out")])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_in_float64_sum_up_to_the_dense_ffn(gated, bias, act):
    layer = make_layer(act=act, gated=gated, bias=tuple(b for b in bias if gated or b != "b_gate")).double()
    x = tokens(9, 20).double()
    *weights, b_out = (None if w is None else w.detach() for w in layer.expert_weights())
    parts = [
        reference.sparse_experts(x, torch.eye(6, dtype=torch.bool)[e].expand(9, 6), *weights, act=act)
        for e in range(6)
    ]
    w_up, w_down, b_up, w_gate, b_gate = (None if w is None else w.flatten(0, 1) for w in weights)
    up = torch.nn.functional.linear(x, w_up, b_up)
    hidden = reference.ACTIVATIONS[act](up)
    if gated:
        hidden = reference.ACTIVATIONS[act](torch.nn.functional.linear(x, w_gate, b_gate)) * up
    torch.testing.assert_close(sum(parts), hidden @ w_down, rtol=0, atol=1e-10)
    dense = hidden @ w_down + (0.0 if b_out is None else b_out)
    layer.gate = DynamicK(0.0)
    torch.testing.assert_close(layer(x), dense, rtol=0, atol=1e-10)
    layer.gate = DynamicK(1e-12)  # every expert, by the experts' op and not by torch's products
    torch.testing.assert_close(layer.float()(x.float()), dense.float(), rtol=1e-5, atol=1e-5)


def test_no_tokens_give_gradients_of_zero():
    layer = make_layer(gate=DynamicK(0.4), bias=("b_up", "b_out"))
    layer(tokens(0, 20)).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("router")}
    assert gradients.keys() == {"w_up", "w_down", "b_up", "b_out"}
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients.values())


def test_a_small_oracle_tau_drops_only_silent_experts():
    layer = make_layer(act="relu", bias=("b_up", "b_out"), experts=15, expert_size=2)
    with torch.no_grad():
        layer.b_up.sub_(1.0)
    x = tokens(100, 20)
    dense = layer(x)
    layer.gate = DynamicK(1e-6, true_norms=True)
    assert layer.mask(x).float().mean() < 0.9
    torch.testing.assert_close(layer(x), dense)


def test_top_k_runs_exactly_k_and_all_of_them_at_e():
    layer = make_layer()
    for k in (1, 4, 6):
        layer.gate = TopK(k)
        assert (layer.mask(tokens(50, 20)).sum(-1) == k).all()
    with pytest.raises(ValueError, match="k must be at most the number of experts, 6, got 7"):
        TopK(7).mask(torch.rand(2, 6))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopK(0)
    with pytest.raises(TypeError, match=r"k must be a whole number, got 2\.7"):
        TopK(2.7)


@pytest.mark.parametrize("true_norms", [False, True])
def test_top_k_runs_those_of_the_largest_scores(true_norms):
    layer, x = make_layer(gate=TopK(2, true_norms)), tokens(50, 20)
    scores, ran = layer.expert_norms(x) if true_norms else layer.router(x), layer.mask(x)
    least, beyond = scores.masked_fill(~ran, torch.inf).amin(-1), scores.masked_fill(ran, 0).amax(-1)
    assert (least >= beyond).all()


def test_permuting_experts_and_their_neurons_changes_nothing_but_rounding():
    layer = make_layer(gated=True, bias=("b_up", "b_gate", "b_out"))
    layer.gate = DynamicK(0.4)
    other = copy.deepcopy(layer)
    order, neurons = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (6, 5))
    with torch.no_grad():
        for name in ("w_up", "w_down", "w_gate", "b_up", "b_gate"):
            getattr(other, name).copy_(getattr(layer, name)[order][:, neurons])
        other.router.v2.copy_(layer.router.v2[order])
    x = tokens(40, 20)
    assert torch.equal(other.mask(x), layer.mask(x)[:, order])
    torch.testing.assert_close(other(x), layer(x))


def test_dropout_acts_on_the_output_in_training_only():
    layer = make_layer(dropout=0.5, bias=("b_out",))
    x = tokens(50, 20)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert 0.3 < (layer(x) == 0).float().mean() < 0.7


def test_the_router_predicts_non_negative_norms_in_float32():
    router = Router(12, 5, 7)
    x = tokens(2, 3, 12)
    assert router(x).shape == (2, 3, 5)
    assert (router(x) >= 0).all()
    half = copy.deepcopy(router).bfloat16()
    assert half(x.bfloat16()).dtype == torch.float32


def test_nan_is_refused_when_asked_to_look():
    layer = make_layer()
    layer.gate = DynamicK(0.2)
    x = tokens(4, 20)
    x[2, 3] = float("nan")
    layer(x)
    layer.check_nan = True
    with pytest.raises(ValueError, match="x has NaN, for which no expert can be chosen"):
        layer(x)


@pytest.mark.parametrize("gate", [DynamicK(0.2), TopK(2), DynamicK(0.2, true_norms=True)], ids=str)
def test_nan_in_scores_is_refused_when_asked_to_look(gate):
    layer, x = make_layer(), tokens(4, 20)
    layer.gate = gate
    with torch.no_grad():
        (layer.w_down if gate.true_norms else layer.router.v2)[0] = torch.nan
    layer(x)
    layer.check_nan = True
    weights = "experts" if gate.true_norms else "router"
    with pytest.raises(ValueError, match=f"experts' scores have NaN, .* weights of its {weights}"):
        layer(x)
    layer.gate = DynamicK(0.0)  # for which no scores are looked at
    layer(x)


def test_top_k_never_selects_a_nan():
    nan = torch.nan
    scores = torch.tensor([[nan, 1.0, 0.5], [0.25, nan, -torch.inf], [nan, nan, nan]])
    assert TopK(1).mask(scores).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert TopK(3).mask(scores).tolist() == [[False, True, True], [True, False, True], [False] * 3]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_computed_in_float32_whatever_the_dtype(dtype, gated):
    layer = make_layer(gated=gated, bias=("b_up", "b_out")).to(dtype)
    x = tokens(11, 20).to(dtype)
    hidden = layer._hidden(x).double().unflatten(-1, layer.w_down.shape[:2]).transpose(0, 1)
    wanted = (hidden @ layer.w_down.detach().double()).norm(dim=-1).t()
    found = layer.expert_norms(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-7)
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):  # the activations are of 16 bits, the norms are not
            rounded = layer._hidden(x)
            found = layer._norms(rounded)
        hidden = rounded.double().unflatten(-1, layer.w_down.shape[:2]).transpose(0, 1)
        wanted = (hidden @ layer.w_down.detach().double()).norm(dim=-1).t()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)


def test_wrong_settings_are_named():
    with pytest.raises(
        ValueError, match="act must be one of relu, gelu, gelu_tanh, silu, quick_gelu, relu2, got 'tanh'"
    ):
        DynamicKMoE(4, 2, 2, "tanh")
    layer = make_layer()
    with pytest.raises(
        TypeError,
        match=r"gate must be a DynamicK, a TopK or another Gate, got 0\.3: DynamicK\(tau\), or set_tau",
    ):
        layer.gate = 0.3
    assert layer.gate == DynamicK(0.0)
    with pytest.raises(ValueError, match="bias may name b_up, b_gate and b_out, got b_down"):
        DynamicKMoE(4, 2, 2, "relu", bias=("b_down",))
    with pytest.raises(ValueError, match=r"tau must be in \[0, 1\] .*got 1.5"):
        DynamicK(1.5)


def test_compiles_and_exports_whole_with_a_dynamic_number_of_tokens():
    layer = make_layer(bias=("b_up", "b_out"))
    layer.gate = DynamicK(0.4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(
        layer, (tokens(6, 20),), dynamic_shapes={"x": {0: torch.export.Dim("T")}}
    ).module()
    with torch.no_grad():
        for T in (6, 3, 17):
            x = tokens(T, 20, seed=T)
            assert torch.equal(compiled(x), layer(x))
            assert torch.equal(exported(x), layer(x))


def test_a_compiled_layer_follows_tau_and_an_exported_one_keeps_it():
    layer, x = make_layer(gate=DynamicK(0.2)), tokens(16, 20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(compiled(x), first)
        for tau in (0.8, 0.0, 0.2):
            layer.gate = DynamicK(tau)
            assert torch.equal(layer(x), first) == (tau == 0.2)
            assert torch.equal(compiled(x), layer(x)), tau
            assert torch.equal(exported(x), first), tau


def test_at_torch_s_limit_a_compiled_layer_runs_uncompiled_or_raises():
    layer, x = make_layer(gate=DynamicK(0.2)), tokens(16, 20)
    compiled = CompileCounter()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        torch._dynamo.reset()  # of what earlier tests compiled
        counted = torch.compile(layer, backend=compiled)
        for tau in (0.2, 0.4, 0.6, 0.8):
            layer.gate = DynamicK(tau)
            assert torch.equal(counted(x), layer(x))
        assert compiled.frame_count == 2
        torch._dynamo.reset()
        whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for tau in (0.2, 0.4):
            layer.gate = DynamicK(tau)
            whole(x)
        layer.gate = DynamicK(0.6)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            whole(x)
    torch._dynamo.reset()


def test_hooks_of_the_router_see_what_it_says():
    layer, x, seen = make_layer(gate=DynamicK(0.4)), tokens(6, 20), []
    with torch.no_grad():
        plain = layer(x)
        handle = layer.router.register_forward_hook(lambda module, args, scores: seen.append(scores))
        assert torch.equal(layer(x), plain)
        assert torch.equal(seen[0], layer.router(x))
        handle.remove()
        prune.l1_unstructured(layer.router, "v1", 0.5)  # its hook makes v1 anew at each call
        layer.router.v1_orig.data.mul_(torch.linspace(-1, 1, len(layer.router.v1_orig)).unsqueeze(1))
        y = layer(x)
        torch.testing.assert_close(y, layer.masked_dense(x, layer.mask(x)))
        assert not torch.equal(y, plain)


def test_a_router_of_the_user_s_own_is_asked():
    class Constant(Router):
        def forward(self, x):
            return super().forward(x) * torch.tensor([1.0, 0, 0, 0, 0, 0])

    layer, x = make_layer(gate=DynamicK(0.5)), tokens(30, 20)
    layer.router = Constant(20, 6, 8)
    mask = layer.mask(x)
    assert mask[:, 0].all()
    assert not mask[:, 1:].any()
    torch.testing.assert_close(layer(x), layer.masked_dense(x, mask))


def test_a_forward_that_is_put_back_as_it_was_takes_the_fused_op_again(monkeypatch):
    layer, x = make_layer(gate=DynamicK(0.5)), tokens(30, 20)
    layer.router.forward = layer.router.forward  # as accelerate leaves it
    with monkeypatch.context() as patch, torch.no_grad():
        patch.delattr(ops, "sparse_experts")
        layer(x)
    other = make_layer(seed=1).router
    layer.router.forward = other.forward  # another's is a forward of the user's
    torch.testing.assert_close(layer(x), layer.masked_dense(x, layer.mask(x)))


def test_a_mask_of_another_kind_is_refused_on_every_path():
    layer, x = make_layer(), tokens(4, 20)
    mask = layer.mask(x)
    for wrong, error in ((mask.float(), TypeError), (mask[:, :3], ValueError), (mask[:2], ValueError)):
        with torch.no_grad(), pytest.raises(error, match="mask must be"):
            layer.masked_dense(x, wrong)
        with pytest.raises(RuntimeError, match="mask must be"):
            ops.sparse_experts(x, wrong, *layer.expert_weights(), act=layer.act)


def test_trains_through_the_sparse_op():
    layer = make_layer(bias=("b_up", "b_out")).train()
    layer.gate = DynamicK(0.4)
    x, wanted = tokens(64, 20), experts_problem(64, 20, seed=5)[0]
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("gate", [DynamicK(0.6), TopK(2)])
def test_what_is_kept_for_the_backward_pass_gives_the_gradients_of_the_op(gate):
    layer, x = make_layer(gate=gate, gated=True, bias=("b_up", "b_out")), tokens(9, 20).requires_grad_()
    weights = [x, *(w for w in layer.expert_weights() if w is not None)]
    assert not layer.mask(x).all()
    by_op = layer(x)
    wanted = torch.autograd.grad(by_op.square().sum(), weights)
    layer.keeps_hidden = True
    kept = layer(x)
    torch.testing.assert_close(kept, by_op)
    for grad, right in zip(torch.autograd.grad(kept.square().sum(), weights), wanted, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("gate", [DynamicK(0.3), TopK(2)], ids=str)
def test_gradients_go_forward_as_they_go_back(gate, int8):
    layer = make_layer(gate=gate)
    if int8:
        layer.to_int8_()
    x, direction, cotangent = tokens(5, 20).requires_grad_(), tokens(5, 20, seed=4), tokens(5, 20, seed=5)
    (back,) = torch.autograd.grad(layer(x), x, cotangent)
    y, forward = torch.func.jvp(layer, (x.detach(),), (direction,))
    torch.testing.assert_close(y, layer(x).detach(), rtol=1e-3, atol=1e-3)  # int8 rounds x
    assert (forward * cotangent).sum().item() == pytest.approx((back * direction).sum().item(), rel=1e-3)
    every = torch.func.jacfwd(layer)(x.detach()[:2])
    torch.testing.assert_close(every, torch.autograd.functional.jacobian(layer, x.detach()[:2]))
    torch.testing.assert_close(torch.func.jacrev(layer)(x.detach()[:2]), every)


@pytest.mark.parametrize("int8", [False, True])
def test_under_autocast_torch_func_sees_the_dtypes_and_the_masks_of_the_op(int8):
    layer, x = make_layer(gate=DynamicK(0.3), bias=("b_up", "b_out")), tokens(64, 20)
    if int8:
        layer.to_int8_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores, y = layer.router(x), layer(x)
        of_scores, of_y = torch.vmap(layer.router)(x[None])[0], torch.vmap(layer)(x[None])[0]
    assert of_scores.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(of_scores, scores)
    assert of_y.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(of_y, y, rtol=0.05, atol=0.05)


def test_in_torch_func_arguments_are_named_too():
    layer, x = make_layer(), tokens(1, 2, 20)
    weights = layer.expert_weights()
    with pytest.raises(RuntimeError, match=r"dynamic_k_select: tau must be in \[0, 1\].*got 7"):
        torch.vmap(lambda rows: ops.dynamic_k_select(layer.router(rows), 7))(x)
    with pytest.raises(RuntimeError, match=r"sparse_experts: act must be one of relu, .*got 'tanh'"):
        torch.vmap(lambda rows: ops.sparse_experts(rows, layer.mask(rows), *weights, act="tanh"))(x)


def test_gradients_of_each_sample_by_torch_func():
    layer, xs = make_layer(gate=DynamicK(0.3)), tokens(3, 4, 20)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))
    of_samples, compiled = (
        each(weights, xs),
        torch.compile(each, backend="aot_eager", fullgraph=True)(weights, xs),
    )
    torch.testing.assert_close(compiled, of_samples)
    for i, x in enumerate(xs):
        layer.zero_grad()
        layer(x).square().sum().backward()
        torch.testing.assert_close(of_samples["w_up"][i], layer.w_up.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(of_samples["w_down"][i], layer.w_down.grad, rtol=1e-3, atol=1e-4)
