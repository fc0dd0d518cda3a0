"""The ops on the CPU: gradients, threads, and all that torch asks of a well-made op. Their values: test_kernels.py."""

import itertools
import sys
import warnings

import pytest
import torch
from backends import DTYPES
from problems import assert_as_good_as_torch, experts_problem, in_double, router_problem
from sadmoe import crossover, ops, reference
from sadmoe.ops import call as op_call
from sadmoe.ops import fallback
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(("s", "d_out"), [(9, 35), (41, 150)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_number_of_threads(isa, dtype, s, d_out):
    x, _, *weights = experts_problem(600, 40, 12, s, d_out, dtype=dtype)
    v1, v2 = router_problem(40, 12, dtype=dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (x, x[:5]):
                found.append(ops.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3, act="gelu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0][: len(y)]) for y in found)


def test_a_zero_has_the_same_sign_for_any_number_of_threads(isa):
    x, w_up, w_down = torch.full((100, 16), 1e-30), torch.full((20, 4, 16), -1e-30), torch.ones(20, 4, 16)
    mask = torch.zeros(100, 20, dtype=torch.bool)
    mask[0, 4] = mask[1::3] = True  # 80 neurons: two threads share those of expert 4
    # A token of 20 experts has two sums; token 2 has none.
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (slice(None), slice(0, 1), slice(2, 3)):
                y = ops.sparse_experts(x[rows], mask[rows], w_up, w_down, b_out=torch.full((16,), -0.0))
                found.append((y.view(torch.int32), rows))
    finally:
        torch.set_num_threads(threads)
    whole = found[0][0]
    assert all(torch.equal(y, whole[rows]) for y, rows in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_experts_of_a_token_are_summed_alike_for_any_number_of_threads(isa, dtype):
    x, mask, *weights = experts_problem(300, 24, 40, 5, 150, share=0.6, dtype=dtype)  # 5 of them by halves
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (slice(None), slice(0, 5)):
                found.append(ops.sparse_experts(x[rows], mask[rows], *weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0][: len(y)]) for y in found)


@pytest.mark.parametrize("copies", [1, 40])  # one wide strip of columns; narrow ones
def test_experts_of_a_token_are_summed_in_two_halves_and_each_in_chains_of_16(isa, copies):
    counts = torch.tensor([0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 50, 64, 66, 97]).repeat(copies)
    x, _, *weights, b_out = experts_problem(len(counts), 24, 97, 5, 150)
    order = torch.rand(len(counts), 97, generator=torch.Generator().manual_seed(5)).argsort(1)
    mask = order < counts[:, None]

    def sum_of(half, sums):
        before, ran = torch.zeros_like(sums), torch.zeros_like(counts)
        for e in half:
            only = torch.zeros_like(mask)
            only[:, e] = mask[:, e]
            sums += ops.sparse_experts(x, only, *weights)
            ran += mask[:, e]
            ended = mask[:, e] & (ran % 16 == 0)
            before[ended] += sums[ended]
            sums[ended] = 0
        return before + sums

    first = sum_of(range(49), b_out.repeat(len(counts), 1))
    second = sum_of(range(49, 97), torch.zeros(len(counts), 150))
    assert torch.equal(ops.sparse_experts(x, mask, *weights, b_out), first + second)


@pytest.mark.by_torch
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_the_reference_s_with_the_mask_held(gated, bias, act):
    args = experts_problem(8, 10, 4, 3, 7, gated=gated, bias=bias)
    v1, v2 = router_problem(10, 4)
    mask = ops.dynamic_k_select(ops.router_scores(args[0], v1, v2), 0.4)
    args[1] = mask

    def gradients(run):
        leaves = [a.clone().requires_grad_() if a is not None and a.dtype != torch.bool else a for a in args]
        run(leaves).square().sum().backward()
        return [a.grad for a in leaves if a is not None and a.dtype != torch.bool]

    wanted = gradients(lambda a: reference.sparse_experts(*a, act=act))
    sparse = gradients(lambda a: ops.sparse_experts(*a, act=act))
    fused = gradients(lambda a: ops.dynamic_k_moe(a[0], v1, v2, *a[2:], tau=0.4, act=act))
    for w, s, f in zip(wanted, sparse, fused, strict=True):
        close = {"rtol": 1e-5, "atol": 2e-6 * w.abs().max().item()}
        torch.testing.assert_close(s, w, **close)
        torch.testing.assert_close(f, w, **close)


@pytest.mark.by_torch
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits_are_as_good_as_torch_s(dtype, gated):
    args = experts_problem(200, 32, 4, 8, 24, gated=gated, dtype=dtype)

    def gradients(run, args):
        leaves = [a.clone().requires_grad_() if a is not None and a.dtype != torch.bool else a for a in args]
        run(*leaves, act="gelu").sum().backward()
        return [a.grad for a in leaves if a is not None and a.dtype != torch.bool]

    ours, torch_s = gradients(ops.sparse_experts, args), gradients(reference.sparse_experts, args)
    for found in zip(ours, torch_s, gradients(reference.sparse_experts, in_double(args)), strict=True):
        assert_as_good_as_torch(*found)


@pytest.mark.by_torch
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_gradients_of_gradients_are_the_reference_s(act):
    args = experts_problem(T=9, gated=True)
    x = args[0].requires_grad_()
    found = []
    for experts in (ops.sparse_experts, reference.sparse_experts):
        (first,) = torch.autograd.grad(experts(*args, act=act).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * found[1].abs().max().item())


@pytest.mark.by_torch
def test_router_gradients_are_the_reference_s():
    x = experts_problem(8, 10, 1, 1)[0]

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in (x, *router_problem(10, 4))]
        run(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, wanted in zip(gradients(ops.router_scores), gradients(reference.router_scores), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.by_torch
@pytest.mark.parametrize("needs_grad", [False, True])
def test_torch_finds_the_ops_well_made(needs_grad):
    x, mask, *weights = experts_problem(6, 12, 3, 4, gated=True)
    v1, v2 = router_problem(12, 3)
    for tensor in (x, v1, v2, *weights):
        tensor.requires_grad_(needs_grad)
    library.opcheck(torch.ops.sadmoe.router_scores.default, (x, v1, v2))
    library.opcheck(torch.ops.sadmoe.dynamic_k_select.default, (torch.rand(6, 3), 0.3))
    library.opcheck(torch.ops.sadmoe.sparse_experts.default, (x, mask, *weights, "silu"))
    library.opcheck(torch.ops.sadmoe.dynamic_k_moe.default, (x, v1, v2, *weights, 0.3, "silu"))


def test_a_tensor_on_meta_beside_others_is_no_reason_to_return_nothing():
    x, mask, *weights = experts_problem()
    v1, v2 = router_problem(33, 5)
    meta = [None if w is None else w.to("meta") for w in weights]
    for call in (
        lambda: ops.router_scores(x, v1.to("meta"), v2),
        lambda: ops.sparse_experts(x, mask, weights[0], meta[1], *weights[2:]),
        lambda: ops.dynamic_k_moe(x, v1, v2, *weights[:5], meta[5], tau=0.3),
    ):
        with pytest.raises(RuntimeError, match="must be on one device, got cpu and meta"), torch.no_grad():
            call()


def test_meta_tensors_give_shapes():
    x, mask, *weights = (None if a is None else a.to("meta") for a in experts_problem(6, 12, 3, 4, 5))
    assert ops.sparse_experts(x, mask, *weights).shape == (6, 5)
    assert ops.router_scores(x, *(v.to("meta") for v in router_problem(12, 3))).shape == (6, 3)


MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


@pytest.mark.by_torch
@MODES
def test_flops_are_those_executed(mode):
    x, _, *weights = experts_problem(6, 12, 3, 4, 5, gated=True)
    v1, v2 = router_problem(12, 3, r=9)
    mask = ops.dynamic_k_select(ops.router_scores(x, v1, v2), 0.5)
    pairs = int(mask.sum())
    assert 6 <= pairs < 18
    experts, router = 2 * pairs * 4 * (2 * 12 + 5), 2 * 6 * 9 * (12 + 3)
    with mode(), FlopCounterMode(display=False) as count:
        ops.sparse_experts(x, mask, *weights)
    assert count.get_total_flops() == experts
    with mode(), FlopCounterMode(display=False) as count:
        ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.5)
    assert count.get_total_flops() == experts + router


@pytest.mark.by_torch
@MODES
def test_autocast_casts_the_experts_and_not_the_router(mode):
    x, mask, *weights = experts_problem(6, 16, 3, 4)
    v1, v2 = router_problem(16, 3)
    low = [None if w is None else w.bfloat16() for w in weights]
    scores = ops.router_scores(x.bfloat16(), v1, v2)
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            ops.sparse_experts(x, mask, *weights), ops.sparse_experts(x.bfloat16(), mask, *low)
        )
        assert torch.equal(ops.router_scores(x, v1, v2), scores)
        y = ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.3)
    assert torch.equal(y, ops.dynamic_k_moe(x.bfloat16(), v1, v2, *low, tau=0.3))


def test_without_gradients_the_result_is_the_same_and_an_error_leaves_no_trace():
    x, mask, *weights = experts_problem(6, 12, 3, 4)
    weights[0].requires_grad_()
    with torch.no_grad():
        quiet = ops.sparse_experts(x, mask, *weights)
        with pytest.raises(RuntimeError, match="mask must be"):
            ops.sparse_experts(x, mask[:, :2], *weights)
    assert not quiet.requires_grad
    y = ops.sparse_experts(x, mask, *weights)
    assert torch.equal(y, quiet)
    y.sum().backward()
    assert weights[0].grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_their_rule_is_not_called(mode):
    x, mask, *weights = experts_problem(6, 12, 3, 4)
    weights[0].requires_grad_()
    seen = set()

    def note(frame, event, arg):
        seen.add((frame.f_code.co_filename.rsplit("/", 1)[-1], frame.f_code.co_name))

    def calls():
        seen.clear()
        sys.setprofile(note)
        try:
            ops.sparse_experts(x, mask, *weights)
        finally:
            sys.setprofile(None)
        return {file for file, _ in seen}

    assert "autograd.py" in calls()
    with mode():
        assert "autograd.py" not in calls()


@pytest.mark.by_torch
def test_gradients_flow_under_autocast():
    x, mask, *weights = experts_problem(6, 16, 3, 4)
    weights[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.sparse_experts(x, mask, *weights)
    y.float().sum().backward()
    assert weights[0].grad.dtype == torch.float32
    assert weights[0].grad.abs().sum() > 0


@pytest.mark.by_torch
@pytest.mark.parametrize("tau", [0.3, 0.7])
def test_backward_in_another_autocast_has_the_masks_of_forward(tau):
    x, _, *weights = experts_problem(200, 16, 12, 4)
    v1, v2 = router_problem(16, 12)
    x.requires_grad_()
    y = ops.dynamic_k_moe(x, v1, v2, *weights, tau=tau)
    (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, wanted)


@pytest.mark.by_torch
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_experts_that_did_not_run_leave_no_nan_in_gradients(act, gated):
    x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out = experts_problem(5, 16, 3, 4, gated=gated)
    mask[:, 1] = False
    b_up[1], b_gate = -torch.inf, None  # as what overflows in float16
    if gated:
        b_gate = torch.zeros(3, 4)
        b_gate[1] = -torch.inf
    x.requires_grad_()
    y = ops.sparse_experts(x, mask, w_up, w_down, b_up, w_gate, b_gate, b_out, act=act)
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    weights = w_up, w_down, b_up, w_gate, b_gate, b_out
    in_torch = torch.func.grad(lambda x: ops.sparse_experts(x, mask, *weights, act=act).sum())(x.detach())
    torch.testing.assert_close(in_torch, x.grad)


@pytest.mark.by_torch
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_batched_by_either_of_torch_s_two_ways(gated):
    x, mask, *weights = experts_problem(5, 16, 3, 4, gated=gated)

    def f(x):
        return ops.sparse_experts(x, mask, *weights, act="silu")

    wanted = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True), wanted)
    torch.testing.assert_close(torch.func.jacrev(f)(x), wanted)


@pytest.mark.by_torch
def test_a_vmap_of_gradients_is_of_the_experts_that_ran(monkeypatch):
    x, _, *weights = experts_problem(5, 16, 3, 4)
    x.requires_grad_()
    y = ops.dynamic_k_moe(x, *router_problem(16, 3), *weights, tau=0.5, act="gelu")
    monkeypatch.setitem(
        op_call.BY_TORCH, "router_scores", lambda *_: pytest.fail("scored again, and rounded otherwise")
    )
    along = torch.randn(4, *y.shape)
    wanted = torch.stack([torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in along])
    found = torch.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(along)
    torch.testing.assert_close(found, wanted)


@pytest.mark.by_torch
def test_a_mask_of_other_experts_is_refused_in_plain_torch_too():
    x, _, *weights = experts_problem(5, 16, 4, 6)

    def in_plain_torch(mask: Tensor) -> Tensor:
        return torch.vmap(lambda rows: ops.sparse_experts(rows, mask, *weights))(x[None])

    for shape in ((5, 8), (5, 1), (1, 4)):
        for call in (lambda mask: ops.sparse_experts(x, mask, *weights), in_plain_torch):
            with pytest.raises(RuntimeError, match=r"mask must be \[T, E\] = \[5, 4\]"):
                call(torch.ones(shape, dtype=torch.bool))


def test_what_autograd_kept_is_not_overwritten_without_a_word():
    weight, up = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    mask = torch.ones(4, 2, dtype=torch.bool)
    y = (up * weight).sum()
    ops.masked_activation_(up, None, mask, 0.0, "relu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        made = torch.randn(4, 16)
        wanted = made.relu()
        ops.masked_activation_(made, None, mask, 0.0, "relu")
        assert torch.equal(made, wanted)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"outside torch\.func and forward-mode"):
        ops.masked_activation_(forward_ad.make_dual(up, up), None, mask, 0.0, "relu")


def test_a_tau_that_float32_does_not_hold_is_0():
    scores = torch.tensor([[1.0, torch.inf, 0.0]])
    for tau in (0.0, 1e-50, 2.0**-150):
        assert ops.dynamic_k_select(scores, tau).all()
        assert reference.dynamic_k_select(scores, tau).all()
    assert ops.dynamic_k_select(scores, 2.0**-149).tolist() == [[False, True, False]]
    assert reference.dynamic_k_select(scores, 2.0**-149).tolist() == [[False, True, False]]


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_tensors_that_are_not_plain_are_refused(make):
    x, mask, *weights = experts_problem()
    made = make(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="sparse_experts: tensors must be strided, and not quantized"):
            ops.sparse_experts(made, mask, *weights)


def test_a_dtype_that_torch_s_stable_interface_does_not_name_is_told_of():
    x, mask, *weights = experts_problem()
    strange = torch.zeros(x.shape, dtype=torch.float8_e8m0fnu)
    with pytest.raises(
        RuntimeError, match="sparse_experts: x must be float32, bfloat16 or float16, got a dtype"
    ):
        ops.sparse_experts(strange, mask, *weights)


@pytest.mark.by_torch
def test_compiles_whole_with_any_number_of_tokens():
    weights = experts_problem(6, 12, 3, 4)[2:]
    v1, v2 = router_problem(12, 3)
    compiled = torch.compile(
        lambda rows: ops.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for T in (6, 2, 9):
        rows = experts_problem(T, 12, seed=T)[0]
        assert torch.equal(compiled(rows), ops.dynamic_k_moe(rows, v1, v2, *weights, tau=0.3))


def test_an_unknown_device_answers_through_the_reference_with_one_warning():
    for name in ("router_scores", "dynamic_k_select", "sparse_experts", "dynamic_k_moe"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sadmoe::{name}", "CompositeExplicitAutograd")
    args = experts_problem()
    slow = fallback.with_one_warning("sparse_experts", reference.sparse_experts, fallback.IN_TORCH)
    with pytest.warns(
        UserWarning, match="sadmoe::sparse_experts has no kernel for cpu and runs in plain torch"
    ):
        first = slow(*args)
    torch.testing.assert_close(first, ops.sparse_experts(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(slow(*args), first)


@pytest.mark.parametrize("grad", [False, True])
def test_a_gpu_without_kernels_computes_in_plain_torch_and_says_so_once(monkeypatch, grad):
    x, mask, *weights = experts_problem()
    v1, v2 = router_problem(x.shape[1], mask.shape[1])
    scores = ops.router_scores(x, v1, v2)
    up = torch.randn(len(x), mask.shape[1] * 4)
    wanted, activated = ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.3), up.clone()
    ops.masked_activation_(activated, None, scores, 0.3, "relu")

    for module in (ops.call, ops.functions):
        monkeypatch.setattr(module, "lacks_kernels", lambda x: True)
    fresh = {
        name: fallback.with_one_warning(name, by_torch, fallback.IN_TORCH)
        for name, by_torch in ops.call.BY_TORCH.items()
    }
    monkeypatch.setattr(ops.call, "WITH_WARNING", fresh)
    with torch.set_grad_enabled(grad):
        x.requires_grad_(grad)
        with pytest.warns(
            UserWarning, match="sadmoe::dynamic_k_moe has no kernel for cpu and runs in plain torch"
        ):
            y = ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.3)
        torch.testing.assert_close(y, wanted)
        assert y.requires_grad == grad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.3), y)
    ops.masked_activation_(up, None, scores, 0.3, "relu")
    torch.testing.assert_close(up, activated)
    with pytest.raises(RuntimeError, match=r"tau must be in \[0, 1\]"):
        ops.dynamic_k_moe(x, v1, v2, *weights, tau=1.3)


def test_kernels_run_on_gpus_that_are_not_older_than_they(monkeypatch):
    answers = []
    for index, (built, capability) in enumerate(
        itertools.product([True, False], [(7, 5), (8, 0), (12, 0)]), 30
    ):
        monkeypatch.setattr(ops.call, "_built_for_cuda", lambda built=built: built)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        device = torch.device("cuda", index)
        answers.append((ops.runs_kernels(device), ops.call.is_too_old(device)))
    without = (False, False)  # the op has its gradients and FLOPs there, in plain torch
    assert answers == [(False, True), (True, False), (True, False), without, without, without]
    assert min(card.capability for card in crossover.cards().values()) == ops.call.OLDEST
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        fallback._described(torch.device("cuda", 30)) == "a GPU of compute capability 7.5, only from 8.0 on,"
    )
    assert fallback._described(torch.device("cuda", 33)) == "cuda"


def test_an_unknown_instruction_set_lists_what_runs():
    with pytest.raises(RuntimeError, match=r"does not run the 'sse9' kernels; it runs auto, .*portable"):
        ops.use_cpu_isa("sse9")


def test_build_info_says_which_instruction_set_runs():
    fastest = ops.cpu_isas()[0]
    assert f"cpu kernels: {fastest} of {fastest}" in ops.build_info()
    ops.use_cpu_isa("portable")
    try:
        assert f"cpu kernels: portable of {fastest}" in ops.build_info()
    finally:
        ops.use_cpu_isa("auto")
