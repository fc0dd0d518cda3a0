"""What only a CUDA device can show: streams, devices, graphs, and that nothing waits."""

import os
import subprocess

import pytest
import torch
from backends import BY_SHAPE, NEVER, poison_memory
from converted import random_rows
from given_costs import choosing_on_cuda, layer_of
from problems import experts_problem, router_problem
from sadmoe import TopK, ops


@pytest.mark.cuda
def test_a_tensor_on_another_device_is_named(cuda):
    args = [a if a is None else a.cuda() for a in experts_problem()]
    args[4] = args[4].cpu()
    with pytest.raises(
        RuntimeError, match="all tensors must be on one device: b_up is on the CPU, x on cuda:0"
    ):
        ops.sparse_experts(*args)


@pytest.mark.cuda
def test_memory_that_an_op_is_given_is_nan(cuda):
    for size in (3, 10_000, 200_000, 4_000_000):
        poison_memory()
        assert torch.empty(size, device="cuda").isnan().all(), size


@pytest.fixture
def crowds(cuda):
    """Tokens that chose a quarter of the experts are a crowd, however few they are, on the way in as on the way out."""
    torch.ops.sadmoe._use_up_all(0.25)
    torch.ops.sadmoe._use_crowd(0.25)
    yield
    torch.ops.sadmoe._use_up_all(BY_SHAPE)
    torch.ops.sadmoe._use_crowd(BY_SHAPE)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [1, 40, 100, 600])
def test_a_captured_graph_replays_with_another_mask(crowds, T):
    args = [a if a is None else a.cuda() for a in experts_problem(T, 64, 8, 16, dtype=torch.bfloat16)]
    ops.sparse_experts(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.sparse_experts(*args)
    for share in (0.0, 0.2, 1.0, 0.1):
        args[1].copy_(torch.rand(T, 8, device="cuda") < share)
        graph.replay()
        assert torch.equal(y, ops.sparse_experts(*args)), share
        torch.ops.sadmoe._use_up_all(NEVER)
        assert torch.equal(y, ops.sparse_experts(*args)), share
        torch.ops.sadmoe._use_up_all(0.25)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [1, 300])
def test_a_captured_layer_replays_with_other_tokens(crowds, T):
    layer = layer_of(torch.bfloat16, d=64, experts=16, expert_size=16).cuda()
    x = random_rows(T, 64).bfloat16().cuda()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for seed in (3, 4):
            x.copy_(random_rows(T, 64, seed))
            graph.replay()
            assert torch.equal(y, layer(x)), seed


@pytest.mark.cuda
def test_a_layer_is_captured_on_the_stream_that_warmed_it_up(cuda):
    layer, x = choosing_on_cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            wanted = layer(x)
        with torch.cuda.graph(graph, stream=stream):
            y = layer(x)
        graph.replay()
        stream.synchronize()
        torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)
        for _ in range(3):
            # Fails where pinned memory was given back while the graph was captured.
            torch.zeros(3).pin_memory()


@pytest.mark.cuda
def test_a_layer_that_counts_its_share_runs_under_another_default_device(cuda):
    layer, x = choosing_on_cuda()
    with torch.no_grad(), torch.device("cuda"):
        assert layer(x).shape == x.shape


@pytest.mark.cuda
def test_a_layer_compiles_and_runs_under_autocast(cuda):
    layer, x = layer_of(d=64, experts=16, expert_size=16).cuda(), random_rows(100, 64).cuda()
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), y)
        with torch.autocast("cuda", torch.bfloat16):
            rough = layer(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - y).abs().mean() < 0.01 * y.abs().mean(), "few of 1,600 pairs are chosen otherwise"


@pytest.mark.cuda
def test_work_is_queued_on_the_current_stream_of_the_tensors_device(cuda):
    args = experts_problem(100, 64, 8, 16)
    for index in range(torch.cuda.device_count()):
        moved = [a if a is None else a.to(f"cuda:{index}") for a in args]
        wanted = ops.sparse_experts(*moved)
        torch.cuda.synchronize(index)
        with torch.cuda.stream(torch.cuda.Stream(index)):
            torch.cuda._sleep(10_000_000)
            late = moved[0] * 2  # queued on the same stream: an op elsewhere would read it too early
            y = ops.sparse_experts(late / 2, *moved[1:])
        torch.cuda.synchronize(index)
        assert y.device == moved[0].device
        assert torch.equal(y, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [1, 100, 1000])
def test_nothing_waits_for_the_device(cuda, T):
    x, _, *weights = (a if a is None else a.cuda() for a in experts_problem(T, 64, 8, 16))
    v1, v2 = (v.cuda() for v in router_problem(64, 8))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.dynamic_k_moe(x, v1, v2, *weights, tau=0.3)
        scores = ops.router_scores(x, v1, v2)
        for mask in (ops.dynamic_k_select(scores, 0.3), TopK(2).mask(scores)):
            ops.sparse_experts(x, mask, *weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_tf32_is_used_where_it_is_allowed(cuda):
    args = [a if a is None else a.cuda() for a in experts_problem(100, 96, 5, 24)]
    exact = ops.sparse_experts(*args)
    ops.allow_tf32(True)
    try:
        assert not torch.equal(ops.sparse_experts(*args), exact)
    finally:
        ops.allow_tf32(False)


@pytest.mark.cuda
def test_the_words_of_kernels_mean_what_the_emulator_takes_them_for(cuda):
    bench = os.environ.get("SADMOE_BENCH_CUDA")
    if bench is None:
        pytest.skip("SADMOE_BENCH_CUDA is not set: bench_cuda was not built")
    try:
        result = subprocess.run([bench, "conformance"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"it hangs after:\n{hung.output}")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif("cuda: yes" in ops.build_info(), reason="built with CUDA kernels")
def test_tf32_without_cuda_kernels_is_an_error():
    with pytest.raises(RuntimeError, match="allow_tf32 is for CUDA kernels, and sadmoe was built without"):
        ops.allow_tf32(True)
