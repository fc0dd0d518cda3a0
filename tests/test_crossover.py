"""The model that says which way through a layer a CUDA device takes least time."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
from sadmoe import crossover
from sadmoe.crossover import (
    LayerShape,
    card_for,
    cards,
    dense_seconds,
    masked_seconds,
    sparse_seconds,
    way_in,
    way_out,
)

BERT = {s: LayerShape(768, 768, 3072 // s, s, 128) for s in (24, 64, 128)}
GEMMA = LayerShape(2048, 2048, 128, 128, 128, gated=True)
TOKENS = (1, 8, 64, 65, 512, 8192, 65536)
SHARES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0)
CARDS = list(cards().values())
BY_CARD = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)


@BY_CARD
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", [*BERT.values(), GEMMA], ids=str)
def test_the_choice_is_never_slower_than_dense_by_the_model(layer, masked, card):
    answers = set()
    for tokens, share in itertools.product(TOKENS, SHARES[1:]):
        sparsely = share <= crossover.crossover(layer, tokens, card, masked)
        dense = (masked_seconds if masked else dense_seconds)(layer, tokens, card)
        sparse = sparse_seconds(layer, tokens, share, card)
        assert (sparse if sparsely else dense) <= 1.0001 * min(dense, sparse), (tokens, share)
        answers.add(sparsely)
    assert False in answers


@BY_CARD
def test_time_grows_with_the_share_the_tokens_and_the_layer(card):
    for tokens in TOKENS:
        times = [sparse_seconds(GEMMA, tokens, share, card) for share in SHARES]
        assert times == sorted(times)
    assert sparse_seconds(GEMMA, 8192, 0.1, card) > sparse_seconds(GEMMA, 4096, 0.1, card)
    assert dense_seconds(GEMMA, 8192, card) > dense_seconds(BERT[64], 8192, card)
    for tokens in TOKENS:
        assert masked_seconds(GEMMA, tokens, card) > dense_seconds(GEMMA, tokens, card)


@BY_CARD
def test_what_is_known_of_the_kernels_shows(card):
    limits = [crossover.crossover(BERT[s], 8192, card) for s in BERT]
    assert limits == sorted(limits), "larger experts pay sooner"
    assert crossover.crossover(GEMMA, 1, card) > 0.1, "a tenth of the weights is read"
    assert crossover.crossover(GEMMA, 32, card) < 0.5, "32 tokens of a half each need all weights"
    assert crossover.crossover(BERT[24], 512, card) < 0.9


def test_blocks_of_the_down_projection_grow_with_the_tokens_as_far_as_shared_memory_goes():
    layer = LayerShape(2048, 2048, 128, 64, 128)
    tiles = {
        name: [way_out.down_tiles(layer, tokens, card) for tokens in (65, 256, 1024, 8192)]
        for name, card in cards().items()
    }
    assert tiles["H100"] == sorted(tiles["H100"])
    assert tiles["H100"][0] == 1
    assert tiles["H100"][-1] == 4
    assert max(tiles["A100"]) == 2, "two blocks of 256 tokens do not fit one multiprocessor"


@pytest.mark.parametrize("layer", [*BERT.values(), GEMMA], ids=lambda layer: f"{layer.expert_size}")
@pytest.mark.parametrize("name", ["A100", "H100"])
def test_a_wrong_hint_costs_less_where_crowds_go_through_all_experts(name, layer):
    """All experts of every token, taken for few."""
    card = cards()[name]
    alone = way_out.compact_down_seconds(layer, 8192, 1.0, card)
    assert way_out.down_seconds(layer, 8192, 1.0, card) < (0.55 if card.hopper_16 else 0.85) * alone
    for tokens in (256, 512, 1024, 2048, 8192, 65536):
        turn = way_out.crowd_share(layer, tokens, card)
        alone = way_out.compact_down_seconds(layer, tokens, min(turn, 1.0), card)
        crowd = way_out.crowd_down_seconds(layer, tokens, min(turn, 1.0), card)
        assert turn > 1 or crowd < 1.25 * alone, tokens
    assert crowd == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize("bytes_each", [2, 4])
@pytest.mark.parametrize("gated", [False, True])
@BY_CARD
def test_experts_of_few_neurons_turn_where_computing_every_neuron_takes_no_longer(card, gated, bytes_each):
    for s, d in itertools.product((8, 16, 24, 32, 40, 48, 80, 104), (768, 2048)):
        layer = LayerShape(d, d, 4 * d // s, s, 128, gated, bytes_each)
        one = dataclasses.replace(layer, experts=1, expert_size=layer.neurons)
        for tokens in (1024, 2048, 8192, 65536):
            turn = way_in.up_all_share(layer, tokens, card)
            every = way_in.pairs_up_seconds(one, tokens, 1.0, card)
            if turn > 1:
                assert every > 0.8 * way_in.pairs_up_seconds(layer, tokens, 1.0, card), (s, d, tokens)
                continue
            of_pairs = way_in.pairs_up_seconds(layer, tokens, turn, card)
            assert 0.8 < every / of_pairs < 1.25, (s, d, tokens)
            assert way_in.up_seconds(layer, tokens, 1.0, card) < 1.25 * every + card.launch
    bert = dataclasses.replace(BERT[24], bytes_each=bytes_each)
    alone = way_in.pairs_up_seconds(bert, 8192, 1.0, card)
    assert way_in.up_seconds(bert, 8192, 1.0, card) < 0.8 * alone, "a wrong hint costs less"


def test_fp32_has_its_own_rates():
    h100 = cards()["H100"]
    wide = dataclasses.replace(GEMMA, bytes_each=4)
    assert dense_seconds(wide, 8192, h100) > 5 * dense_seconds(GEMMA, 8192, h100)


def test_the_limit_is_where_both_take_as_long():
    h100 = cards()["H100"]
    limit = crossover.crossover(GEMMA, 1, h100)
    assert 0.1 < limit < 1
    assert sparse_seconds(GEMMA, 1, limit, h100) == pytest.approx(dense_seconds(GEMMA, 1, h100), rel=1e-4)


def test_every_constant_has_a_unit_a_source_and_says_whether_it_was_measured():
    for name, table in json.loads(crossover.CONSTANTS.read_text()).items():
        if name == "_":
            continue
        for constant, entry in table.items():
            assert entry.keys() == {"value", "unit", "source", "measured"}, (name, constant)
            assert all((entry["unit"], entry["source"])), (name, constant)
        unmeasured = {constant for constant, entry in table.items() if not entry["measured"]}
        assert set(cards()[name].unmeasured) == unmeasured


def test_a_file_of_measured_constants_is_read(tmp_path):
    table = json.loads(crossover.CONSTANTS.read_text())
    table["H100"]["launch"] |= {"value": 1e-3, "measured": True}
    path = tmp_path / "constants.json"
    path.write_text(json.dumps(table))
    card = cards(path)["H100"]
    assert card.launch == 1e-3
    assert "launch" not in card.unmeasured
    assert sparse_seconds(BERT[64], 1, 0.1, card) > 5e-3


def test_bench_cuda_writes_what_the_model_asks():
    source = (Path(__file__).parent.parent / "bench/cuda/constants.cu").read_text()
    written = set(re.findall(r'\\"(\w+)\\":', source))
    by_torch = {"dense_16", "dense_32", "ours_16", "ours_32", "hopper_16"}
    wanted = {field.name for field in dataclasses.fields(crossover.Card)} - by_torch - {"unmeasured"}
    assert wanted <= written
    assert {"products_16", "products_32"} <= written


def test_a_missing_constant_is_named(tmp_path):
    table = json.loads(crossover.CONSTANTS.read_text())
    del table["A100"]["l2"]
    path = tmp_path / "constants.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="card A100 lacks l2"):
        cards(path)


def test_a_card_is_found_by_its_capability():
    assert card_for((8, 0)).name == "A100"
    assert card_for((8, 6)).name == "A100"
    assert card_for((9, 0)).name == card_for((12, 0)).name == "H100"
    assert card_for((9, 0)).hopper_16 > card_for((12, 0)).hopper_16 == 0, (
        "products that only capability 9 has"
    )
    with pytest.raises(ValueError, match=r"capability must be at least \(8, 0\), that of A100, got \(7, 5\)"):
        card_for((7, 5))
