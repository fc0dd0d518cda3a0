"""The path of a layer on a CUDA device: what decides, with a card that is not there, and that both compute the same."""

import copy
import dataclasses
import itertools
import pickle
import weakref
from functools import partial

import pytest
import torch
from backends import emulator, set_options
from converted import random_rows
from given_costs import ALWAYS_DENSE, HALF, by_hand, choosing_on_cuda, give, layer_of
from problems import assert_as_good_as_torch, in_double
from sadmoe import crossover, ops, paths, reference
from sadmoe.crossover import way_in, way_out
from sadmoe.gates import DynamicK
from sadmoe.measured import Costs


def test_the_dense_path_is_what_the_cuda_kernels_compute(gpu):
    layer = layer_of(torch.bfloat16)
    x = random_rows(70).bfloat16()
    with torch.no_grad():
        theirs = gpu.dynamic_k_moe(
            x, layer.router.v1, layer.router.v2, *layer.expert_weights(), tau=0.3, act=layer.act
        )
        args = [x, layer.mask(x), *layer.expert_weights()]
        truth = reference.sparse_experts(*in_double(args), act=layer.act)
        assert_as_good_as_torch(theirs, layer.masked_dense(x, layer.mask(x)), truth)


@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("name", crossover.cards())
def test_the_model_knows_the_blocks_that_the_kernels_pick(name, bytes_each):
    card, native = crossover.cards()[name], emulator()
    for d_out, tokens in itertools.product(
        (64, 384, 768, 2048, 2560, 4096), (65, 100, 256, 512, 1000, 4096, 8192, 65536)
    ):
        layer = crossover.LayerShape(512, d_out, 64, 32, 64, bytes_each=bytes_each)
        picked = native.sadmoe_down_tiles(tokens, d_out, bytes_each, card.processors, card.shared_bytes)
        assert way_out.down_tiles(layer, tokens, card) == picked, (d_out, tokens)


@pytest.mark.parametrize("bytes_each", [2, 4])
def test_a_block_of_so_many_tiles_as_asked_for_is_smaller_where_it_does_not_fit(native, bytes_each):
    kib, most = 1024, {2: 4, 4: 2}[bytes_each]
    for asked, on_h100, on_rtx in ((1, 1, 1), (2, 2, 2), (4, most, 2)):
        set_options(native, down_tiles=asked)
        picked = [native.sadmoe_down_tiles(100, 768, bytes_each, 100, kb * kib) for kb in (228, 164, 100)]
        assert picked == [on_h100, on_h100, on_rtx]


@pytest.mark.parametrize("s", [1, 8, 16, 24, 32, 40, 60, 64, 80, 88, 104, 128, 172, 176, 512])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("name", crossover.cards())
def test_the_model_knows_where_the_kernels_compute_every_neuron(name, bytes_each, gated, s):
    card, native = crossover.cards()[name], emulator()
    for experts, tokens, d in itertools.product((1, 24, 96, 512), (65, 256, 1000, 8192, 65536), (512, 514)):
        layer = crossover.LayerShape(d, 512, experts, s, 64, gated, bytes_each)
        warpgroups = bool(card.hopper_16) and bytes_each == 2 and d % 8 == 0
        args = tokens, experts, s, bytes_each, gated, warpgroups, card.processors
        share = native.sadmoe_up_all_share(*args)
        assert way_in.up_all_share(layer, tokens, card) == pytest.approx(share), (experts, tokens, d)


@pytest.mark.parametrize("s", [1, 8, 16, 17, 24, 32, 33, 64, 65, 88, 128, 172, 300])
@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("name", crossover.cards())
def test_the_model_knows_which_tokens_the_kernels_take_for_a_crowd(name, bytes_each, s):
    card, native = crossover.cards()[name], emulator()
    for d_out, tokens in itertools.product((60, 64, 768, 2048, 4096), (256, 300, 1000, 8192, 65536)):
        layer = crossover.LayerShape(512, d_out, 64, s, 64, bytes_each=bytes_each)
        warpgroups = bool(card.hopper_16) and bytes_each == 2 and d_out % 8 == 0
        share = native.sadmoe_crowd_share(tokens, d_out, s, bytes_each, warpgroups, card.processors)
        assert way_out.crowd_share(layer, tokens, card) == pytest.approx(share), (d_out, tokens)


class Card:
    """A CUDA device as far as the choice sees it; what is queued arrives when the test says so."""

    def __init__(self, monkeypatch):
        self.capturing, self.counted = False, []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
        monkeypatch.setattr(ops, "runs_kernels", lambda device: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(paths, "_on_its_way", self.send)
        paths.device_name.cache_clear()

    def send(self, mask):
        self.counted.append(None)
        index, share = len(self.counted) - 1, mask.float().mean().item()
        self.arrive = lambda: self.counted.__setitem__(index, share)
        return lambda: self.counted[index]


@pytest.fixture
def card(monkeypatch):
    paths.device_name.cache_clear()
    yield Card(monkeypatch)
    paths.device_name.cache_clear()


CUDA = torch.device("cuda", 0)
WIDE = crossover.LayerShape(2048, 2048, 128, 128, 128, gated=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_cuda_the_cost_model_answers_and_measurements_take_its_place(card, dtype):
    paths.use_costs([])
    shape = dataclasses.replace(WIDE, bytes_each=dtype.itemsize)
    h100 = crossover.card_for((9, 0))
    for tokens in (1, 64, 512, 8192):
        until = paths.sparse_until(shape, tokens, CUDA, dtype, 1.0)
        assert until == crossover.crossover(shape, tokens, h100, masked=True)
        assert 0 < until < 1
    paths.use_costs([Costs(paths.device_name(CUDA), paths.dtype_name(dtype), shape, 1, HALF)])
    assert paths.sparse_until(shape, 8192, CUDA, dtype, 1.0) == pytest.approx(0.5)


def test_slack_widens_what_the_cost_model_leaves_to_the_op():
    h100 = crossover.card_for((9, 0))
    until = [crossover.crossover(WIDE, 8192, h100, True, slack) for slack in (0.9, 1.0, 1.1)]
    assert until == sorted(until)
    assert until[0] < until[2]


class OnCuda:
    """As much of 50 tokens on a CUDA device as the choice looks at."""

    device, dtype, shape = CUDA, torch.float32, (50, 8)


def choices(layer, calls):
    """What `_choose` says for calls of 50 tokens on a CUDA device that is not there: dense, and whether it counted."""
    x, found = OnCuda(), []
    for _ in range(calls):
        dense, mask = layer._choose(x)
        found.append((dense, mask is not None))
    return found


@pytest.fixture
def on_cuda(card, monkeypatch):
    """A layer whose costs turn at a half, its share 0.25; the mask is computed on the CPU."""
    layer = layer_of()
    layer.batch_invariant = False
    give(layer, HALF, CUDA)
    monkeypatch.setattr("sadmoe.layer.moe.runs_plainly", lambda x: True)
    mask = torch.arange(8).expand(50, 8) < 2
    monkeypatch.setattr(layer, "mask", lambda x: mask)
    return layer, card


def test_on_cuda_the_share_of_an_earlier_call_decides_once_it_has_arrived(on_cuda):
    layer, card = on_cuda
    assert choices(layer, 3) == [(True, True), (True, False), (True, False)], (
        "nothing is known: dense is safe"
    )
    card.arrive()
    every = paths.ShareHint.EVERY
    later = choices(layer, 2 * every)
    assert not any(dense for dense, _ in later)
    assert [counted for _, counted in later].count(True) == 1, "and one is on its way, not to be waited for"


def test_on_cuda_another_tau_has_another_share(on_cuda):
    layer, card = on_cuda
    choices(layer, 1)
    card.arrive()
    assert choices(layer, 1) == [(False, False)]
    layer.gate = DynamicK(0.6)
    assert choices(layer, 1) == [(True, True)]


def test_on_cuda_taus_that_take_turns_are_each_remembered(on_cuda):
    layer, card = on_cuda
    for tau in (0.3, 0.6):
        layer.gate = DynamicK(tau)
        assert choices(layer, 1) == [(True, True)]
        card.arrive()
    for tau in (0.3, 0.6, 0.3):
        layer.gate = DynamicK(tau)
        assert choices(layer, 1) == [(False, False)]
    for tau in torch.linspace(0.1, 0.9, paths.ShareHint.GATES).tolist():
        layer.gate = DynamicK(tau)
        choices(layer, 1)
    layer.gate = DynamicK(0.3)
    assert choices(layer, 1) == [(True, True)], "of long ago"


def test_an_expected_share_takes_the_place_of_earlier_calls(on_cuda):
    layer, card = on_cuda
    for share, dense in ((0.4, False), (0.6, True)):
        layer.expected_share = share
        assert choices(layer, 2) == [(dense, False)] * 2
    assert card.counted == []


def test_under_graph_capture_nothing_is_counted_and_what_arrived_is_seen(on_cuda):
    layer, card = on_cuda
    card.capturing = True
    assert choices(layer, 2) == [(True, False)] * 2
    card.capturing = False
    choices(layer, 1)
    card.arrive()
    card.capturing = True
    assert choices(layer, 1) == [(False, False)]


def test_under_graph_capture_no_pinned_memory_is_given_back(on_cuda):
    """torch would record an event in the graph for it, and later fail to ask for it."""
    layer, card = on_cuda
    choices(layer, 1)
    arriving = weakref.ref(layer._share_hint._counts[0].arriving)
    card.arrive()
    card.arrive = None
    card.capturing = True
    for tau in torch.linspace(0.1, 0.9, 2 * paths.ShareHint.GATES).tolist():
        layer.gate = DynamicK(tau)
        choices(layer, 1)
    layer.gate = DynamicK(0.3)
    assert choices(layer, 2) == [(False, False)] * 2
    assert arriving() is not None
    card.capturing = False
    assert choices(layer, 1) == [(False, False)]
    assert arriving() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_cuda_the_default_needs_an_expected_share_where_shares_matter(card, monkeypatch, dtype):
    layer = layer_of(dtype)
    monkeypatch.setattr("sadmoe.layer.moe.runs_plainly", lambda x: True)
    x = OnCuda()
    x.dtype = dtype
    until = partial(layer._sparse_until, x)
    never = 1.0 if dtype == torch.float32 else 0.0
    give(layer, ALWAYS_DENSE, CUDA)
    assert until() == never, "dense wins at any share"
    give(layer, {1: ((0.125, 0.9), (0.25, 1.2), (1.0, 2.0))}, CUDA)  # the op wins with one expert of eight
    assert until() == 1.0
    give(layer, HALF, CUDA)
    layer.expected_share = 0.3
    assert until() == 1.0 if dtype == torch.float32 else 0.4 < until() < 0.6
    layer.batch_invariant, layer.expected_share = False, None
    assert until() == pytest.approx(0.5)


def test_on_cuda_the_default_is_dense_with_few_tokens_of_a_small_layer(card):
    paths.use_costs([])
    small = crossover.LayerShape(768, 768, 128, 24, 128)
    worth = paths.WORTH["cuda"]
    for tokens in (65, 200, 512):
        assert paths.sparse_until(small, tokens, CUDA, torch.bfloat16, worth) < 1 / small.experts
    assert paths.sparse_until(WIDE, 1, CUDA, torch.bfloat16, worth) > 0.5


def test_a_copied_or_pickled_layer_learns_its_own_share(on_cuda):
    layer, card = on_cuda
    choices(layer, 1)
    card.arrive()
    hint = layer._share_hint
    assert hint.read(layer.gate) == 0.25
    for other in (copy.deepcopy(hint), pickle.loads(pickle.dumps(hint))):
        assert other.read(layer.gate) is None


@pytest.mark.cuda
def test_on_a_real_card_nothing_waits_and_both_paths_agree(cuda):
    layer, x = choosing_on_cuda()
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [layer(x) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        share = layer.mask(x).float().mean().item()
        assert layer.takes_dense_path(x) == (share > 0.5)
        for y in found:
            torch.testing.assert_close(y, by_hand(layer, x), rtol=0.05, atol=0.05)
