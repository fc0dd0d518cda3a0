"""Seconds of the products on the way in: up.cuh and hopper_up.cuh."""

from dataclasses import replace

from sadmoe.crossover.card import Card
from sadmoe.crossover.common import RESIDENT, TILE, slowest_of, tile_rows, waves
from sadmoe.crossover.shape import LayerShape

_HOPPER_ROWS = 256  # of a tile in hopper_up.cuh; 128 of a GLU
_UP_ALL_WORTH = 0.9  # share of all pairs above which computing every neuron gains too little for a launch


def _up_has_warpgroups(layer: LayerShape, card: Card) -> bool:
    """Whether hopper_up.cuh takes the way in, else up.cuh."""
    return bool(card.hopper_16) and layer.bytes_each == 2 and layer.d % 8 == 0


def _hopper_strips(s: int) -> tuple[int, int]:
    """Strips of an expert in hopper_up.cuh, and the columns that each computes."""
    strips = -(-s // 128)
    return strips, -(-s // (strips * 32)) * 32


def _tall(s: int) -> int:
    """Neurons at an expert's end that up.cuh computes in tall tiles: those of half a tile or less."""
    left = s % TILE
    return left if 2 * left <= TILE else 0


def up_all_share(layer: LayerShape, tokens: int, card: Card) -> float:
    """The share from which every neuron is computed, as launch.cu has it for a chunk of tokens; above 1: never."""
    s, hopper = layer.expert_size, _up_has_warpgroups(layer, card)
    blocks = -(-tokens // TILE) * -(-layer.neurons // (128 if hopper else TILE))
    if s % 8 or blocks < 2 * card.processors:
        return 2.0
    if hopper:
        strips, computed = _hopper_strips(s)
        columns = strips * max(computed, 33 + 0.55 * computed if layer.gated else 68 + 0.25 * computed)
    else:
        tall = _tall(s)
        columns = float(-(-(s - tall) // TILE) * TILE)
        if tall:
            few = max(tall, (17 if layer.gated else 31) + 0.25 * tall)
            columns += few if layer.bytes_each == 2 else TILE / 2
    share = s / columns * -(-blocks // card.processors) * card.processors / blocks
    return share if share <= _UP_ALL_WORTH else 2.0


def up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """The products on the way in, and their activation. Of two kernels one finds nothing to do, as on the way out."""
    turn = up_all_share(layer, tokens, card)
    if turn > 1:
        return pairs_up_seconds(layer, tokens, share, card)
    fewest = pairs_up_seconds(layer, tokens, min(share, turn), card)
    one = replace(layer, experts=1, expert_size=layer.neurons)
    every = pairs_up_seconds(one, tokens, 1.0, card) if share >= turn else 0.0
    return max(fewest, every) + card.launch


def pairs_up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """Of pairs alone, expert by expert."""
    seconds = _hopper_up_seconds if _up_has_warpgroups(layer, card) else _tiled_up_seconds
    return seconds(layer, tokens, share, card)


def _tiled_up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """up.cuh: strips of 64 neurons, and the last of an expert, of at most half as many, in tall tiles: launch.cu."""
    tall = _tall(layer.expert_size)
    whole = layer.expert_size - tall
    seconds = 0.0
    if whole:
        seconds += _up_part_seconds(layer, tokens, share, card, whole, (TILE, TILE))
    if tall:
        columns = -(-tall // 8) * 8 if layer.bytes_each == 2 else TILE // 2  # TallFma skips none
        seconds += _up_part_seconds(layer, tokens, share, card, tall, (2 * TILE, columns))
    return seconds


def _up_part_seconds(
    layer: LayerShape, tokens: int, share: float, card: Card, neurons: int, tile: tuple[int, int]
) -> float:
    """So many neurons of every expert, by tiles of so many rows and columns that are computed whole."""
    each, (height, width) = tokens * share, tile
    strips = -(-neurons // width)
    rows = tile_rows(each, 16) * layer.experts * strips
    work = 2 * rows * width * layer.d * layer.inputs
    blocks = max(each / height, min(each, 1.0)) * layer.experts * strips
    gathered = each * layer.experts * layer.d * strips * layer.bytes_each
    weights = blocks * neurons / strips * layer.d * layer.inputs * layer.bytes_each
    # A warp reads all columns of its rows, and 16 of their columns.
    by_warps = (
        (rows * width / 16 + blocks * height / TILE * width) * layer.d * layer.inputs * layer.bytes_each
    )
    waiting = waves(blocks, RESIDENT[1], card) * card.step * min(blocks, 1.0)
    slowest = slowest_of(
        work, gathered + weights, gathered + weights + by_warps, card.ours(layer.bytes_each), card
    )
    return slowest + waiting + card.launch


def _hopper_up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """hopper_up.cuh: rows of an expert's pairs by a strip of at most 128 of its neurons, one block a multiprocessor."""
    each = tokens * share
    strips, columns = _hopper_strips(layer.expert_size)
    products = tile_rows(each, TILE) / TILE * layer.experts * strips  # of 64 rows by a strip
    tiles = max(each / (_HOPPER_ROWS / layer.inputs), min(each, 1.0)) * layer.experts * strips

    def of(products: float, tiles: float, rows: float) -> float:
        depth = layer.d * layer.inputs
        read = (rows * layer.d + tiles * columns * depth) * layer.bytes_each
        shared = read + products * (TILE + columns) * depth * layer.bytes_each
        work = 2 * products * TILE * columns * depth
        return slowest_of(work, read, shared, card.dense_16 * card.hopper_16, card)

    one = of(1, 1, TILE) * card.processors * min(each, 1.0)  # by one multiprocessor
    return (
        max(of(products, tiles, each * layer.experts * strips), one)
        + card.step * min(tiles, 1.0)
        + card.launch
    )
