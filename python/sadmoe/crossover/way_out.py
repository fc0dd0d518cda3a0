"""Seconds of the products on the way out: down.cuh, crowd.cuh and hopper_down.cuh."""

from sadmoe.crossover.card import Card
from sadmoe.crossover.common import RESIDENT, TILE, slowest_of, tile_rows, waves
from sadmoe.crossover.shape import LayerShape

_DOWN_BLOCK, _DOWN_TILE = 40_512, 18_432  # bytes of shared memory of a block of down.cuh, and for each tile
_DOWN_ONE = 44_144  # of one tile, with fewer stages
_CROWD = 256  # tokens that go through all experts together
_CROWD_ROWS = {2: 128, 4: 64}  # of them in a block of crowd.cuh, by bytes a weight; hopper_down.cuh has all
_CONFLICTS = 2  # tokens of a warp in the same banks of shared memory where sums are added, by simulation


def down_tiles(layer: LayerShape, tokens: int, card: Card) -> int:
    """Tiles of tokens in a block of down.cuh, as launch.cu picks them."""

    def read(n: int) -> int:
        blocks = -(-tokens // (n * TILE)) * -(-layer.d_out // TILE)
        return -(-blocks // card.processors) * (TILE + n * TILE // 4)

    most = 4 if layer.bytes_each == 2 else 2
    fit = [
        n
        for n in RESIDENT
        if n == 1 or (n <= most and 2 * (_DOWN_BLOCK + n * _DOWN_TILE) <= card.shared_bytes)
    ]
    return min(fit, key=read)


def crowd_share(layer: LayerShape, tokens: int, card: Card) -> float:
    """The share from which all experts are run takes the place of down.cuh, as launch.cu has it; above 1: never."""
    if tokens < _CROWD:
        return 2.0
    blocks, depth = _crowd_blocks(layer, tokens, card), _crowd_depth(layer, card)
    if _down_has_warpgroups(layer, card):
        full = (13 + depth) / (168 + 2.45 * layer.expert_size)
    else:
        products = depth * (0.0019 if layer.bytes_each == 2 else 0.042)
        full = (0.0117 + products) / (0.147 + products)
    return full * -(-blocks // card.processors) * card.processors / blocks


def _down_has_warpgroups(layer: LayerShape, card: Card) -> bool:
    """Whether hopper_down.cuh takes crowds, else crowd.cuh."""
    return bool(card.hopper_16) and layer.bytes_each == 2 and layer.d_out % 8 == 0


def _crowd_blocks(layer: LayerShape, tokens: int, card: Card) -> int:
    rows = _CROWD if _down_has_warpgroups(layer, card) else _CROWD_ROWS[layer.bytes_each]
    return -(-tokens // rows) * -(-layer.d_out // TILE)


def _crowd_depth(layer: LayerShape, card: Card) -> int:
    s = layer.expert_size
    if _down_has_warpgroups(layer, card):
        return 16 if s <= 16 else 32 if s <= 32 else -(-s // 64) * 64
    staged = 32 if layer.bytes_each == 2 else 16
    return -(-s // staged) * staged


def down_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """The products on the way out. Where there are two kernels both are launched, and one finds nothing to do.

    The time grows with the share, as crossover() needs it, though by the model the second may begin below the first.
    """
    turn = crowd_share(layer, tokens, card)
    if turn > 1:
        return compact_down_seconds(layer, tokens, share, card)
    fewest = compact_down_seconds(layer, tokens, min(share, turn), card)
    crowds = crowd_down_seconds(layer, tokens, share, card) if share >= turn else 0.0
    return max(fewest, crowds) + card.launch


def crowd_down_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """hopper_down.cuh or crowd.cuh: a block's tokens by 64 columns through all experts, their sums in registers."""
    blocks, depth = _crowd_blocks(layer, tokens, card), _crowd_depth(layer, card) * layer.experts
    unfilled = -(-blocks // card.processors) * card.processors / blocks  # the last wave is not full
    warpgroups = _down_has_warpgroups(layer, card)
    rows = blocks * (_CROWD if warpgroups else _CROWD_ROWS[layer.bytes_each])  # that go through all experts
    work = 2 * rows * TILE * depth
    l2 = (share * rows + blocks * TILE) * layer.neurons * layer.bytes_each
    # Zeros are written, too. Of each, once to write it; rows are read by one warpgroup or four warps, columns by two.
    operands = (2 if warpgroups else 5) * rows + 3 * blocks * TILE
    shared = operands * depth * layer.bytes_each
    adding = 1.5 * rows * TILE * layer.experts / (128 * card.processors * card.clock)
    rate = card.dense_16 * card.hopper_16 if warpgroups else card.ours(layer.bytes_each)
    return unfilled * (slowest_of(work, l2, shared, rate, card) + adding) + card.launch


def compact_down_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """down.cuh: tokens by 64 columns, every expert added to float32 sums in shared memory, all in one pipeline."""
    n = down_tiles(layer, tokens, card)
    each, blocks, strips = n * TILE * share, -(-tokens // (n * TILE)), -(-layer.d_out // TILE)
    depth = -(-layer.expert_size // 32) * 32
    active = (1 - (1 - share) ** (n * TILE)) * layer.experts  # of a block
    products = active * max(each / max(active / layer.experts, 1e-9) / TILE, 1.0)  # of 64 rows
    rows = tile_rows(each, 16) * layer.experts * blocks
    work = 2 * rows * depth * strips * TILE
    pairs = each * layer.experts * blocks
    l2 = (pairs * strips + products * blocks * layer.d_out) * layer.expert_size * layer.bytes_each
    sums = pairs * layer.d_out * 8 * _CONFLICTS
    shared = l2 + sums + (rows * 4 + products * blocks * TILE) * strips * depth * layer.bytes_each
    # A step waits for a part of what L2 takes, others being on their way.
    ahead = 3 if n == 1 else 4
    resident = RESIDENT[n] - (layer.bytes_each == 4)  # of float32 there are twice the sums
    taken = _DOWN_ONE if n == 1 else _DOWN_BLOCK + n * _DOWN_TILE
    resident = min(resident, card.shared_bytes // taken)
    waiting = waves(blocks * strips, resident, card) * products * (depth / 32) * card.step / ahead
    slowest = slowest_of(work, l2, shared, card.ours(layer.bytes_each), card)
    return max(slowest, waiting) + card.launch
