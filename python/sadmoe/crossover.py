"""Which way through a layer takes a CUDA device least time: sparsely or densely, from the shape and the executed share.

A model and not a measurement: rooflines of the kernels in csrc/cuda, whose constants are in gpu_constants.json, each
with its source and whether it was measured. Letters as everywhere: T tokens, d width, E experts, s neurons of one,
r router width. Times in seconds. Nothing here runs on the device or waits for it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

Way = Literal["dense", "decode", "sparse"]

CONSTANTS = Path(__file__).with_name("gpu_constants.json")
DECODE_TOKENS = 64  # the op takes its decode kernels up to here
_TILE = 64  # tokens and columns of a tile in csrc/cuda/tile.cuh
_RESIDENT = {1: 4, 2: 3, 4: 2}  # blocks of so many tiles that registers allow at once on a multiprocessor
_DOWN_BLOCK, _DOWN_TILE = 40_512, 18_432  # bytes of shared memory of a block of down.cuh, and for each tile
_DOWN_ONE = 44_144  # of one tile, with fewer stages
_HOPPER_ROWS = 256  # of a tile in hopper_up.cuh; 128 of a GLU
_UP_ALL_WORTH = 0.9  # share of all pairs above which computing every neuron gains too little for a launch
_CROWD = 256  # tokens that go through all experts together
_CROWD_ROWS = {2: 128, 4: 64}  # of them in a block of crowd.cuh, by bytes a weight; hopper_down.cuh has all
_CONFLICTS = 2  # tokens of a warp in the same banks of shared memory where sums are added, by simulation


@dataclass(frozen=True)
class Card:
    """What the model believes of a device; units in gpu_constants.json."""

    name: str
    capability: tuple[int, int]
    processors: int
    clock: float
    dense_16: float
    dense_32: float
    ours_16: float
    ours_32: float
    hopper_16: float  # 0: has none
    memory: float
    streamed: float
    l2: float
    shared: float
    shared_bytes: int
    step: float
    launch: float
    unmeasured: tuple[str, ...] = ()  # the constants that no run on such a card has shown

    def dense(self, bytes_each: int) -> float:
        return self.dense_16 if bytes_each == 2 else self.dense_32

    def ours(self, bytes_each: int) -> float:
        return self.dense(bytes_each) * (self.ours_16 if bytes_each == 2 else self.ours_32)


@dataclass(frozen=True)
class LayerShape:
    """The shape of a converted layer; bytes_each of its weights: 2 or 4."""

    d: int
    d_out: int
    experts: int
    expert_size: int
    router_width: int
    gated: bool = False
    bytes_each: int = 2

    @property
    def neurons(self) -> int:
        return self.experts * self.expert_size

    @property
    def inputs(self) -> int:
        """Products on the way in: 2 of a GLU."""
        return 2 if self.gated else 1

    @property
    def neuron_width(self) -> int:
        """Weights of a neuron."""
        return self.inputs * self.d + self.d_out

    @property
    def router_weights(self) -> int:
        return self.router_width * (self.d + self.experts)


Layer = LayerShape  # its name in pickles of before


def cards(path: Path = CONSTANTS) -> dict[str, Card]:
    """The cards of a file of constants, by name. Raises ValueError that names a constant that is missing."""
    wanted = [field.name for field in fields(Card) if field.name not in ("name", "unmeasured")]
    found = {}
    for name, table in json.loads(path.read_text()).items():
        if not isinstance(table, Mapping):
            continue
        missing = [constant for constant in wanted if constant not in table]
        if missing:
            raise ValueError(f"{path}: card {name} lacks {', '.join(missing)}")
        values = {constant: table[constant]["value"] for constant in wanted}
        values["capability"] = tuple(values["capability"])
        unmeasured = tuple(constant for constant in wanted if not table[constant]["measured"])
        found[name] = Card(name, **values, unmeasured=unmeasured)
    return found


def oldest(path: Path = CONSTANTS) -> tuple[int, int]:
    """The least compute capability of a card that is known, below which there are no kernels."""
    return min(card.capability for card in cards(path).values())


@lru_cache
def card_for(capability: tuple[int, int], path: Path = CONSTANTS) -> Card:
    """The card of that compute capability, or the one before it, less the products that only its generation has.

    Raises ValueError below the first.
    """
    known = sorted(cards(path).values(), key=lambda card: card.capability)
    fitting = [card for card in known if card.capability <= capability]
    if not fitting:
        raise ValueError(
            f"capability must be at least {known[0].capability}, that of {known[0].name}, got {capability}"
        )
    card = fitting[-1]
    return card if card.capability[0] == capability[0] else replace(card, hopper_16=0.0)


def dense_seconds(layer: LayerShape, tokens: int, card: Card) -> float:
    """The FFN by the library's dense products, activation apart."""
    work = 2 * tokens * layer.neurons * layer.neuron_width / card.dense(layer.bytes_each)
    weights = layer.neurons * layer.neuron_width * layer.bytes_each
    rows = tokens * (layer.d + layer.d_out + 4 * layer.neurons * layer.inputs) * layer.bytes_each
    return max(work, (weights + rows) / card.memory) + (2 * layer.inputs + 1) * card.launch


def masked_seconds(layer: LayerShape, tokens: int, card: Card) -> float:
    """The same function as the sparse op, by dense products: router, and the rule on its scores with the activation.

    That is one pass, of a GLU too: ops.masked_activation_. What it saves there in memory is left out.
    """
    scores = 4 * tokens * layer.experts / card.memory
    passes_less = (layer.inputs - 1) * card.launch
    return dense_seconds(layer, tokens, card) + _router_seconds(layer, tokens, card) + scores - passes_less


def sparse_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """The op `dynamic_k_moe`, router included, at an executed share of pairs that are independent of each other."""
    if tokens <= DECODE_TOKENS:
        return _decode_seconds(layer, tokens, share, card)
    plan = 3 * card.launch + 6 * tokens * layer.experts / card.memory
    router = _router_seconds(layer, tokens, card)
    return router + plan + _up_seconds(layer, tokens, share, card) + _down_seconds(layer, tokens, share, card)


@lru_cache(maxsize=4096)
def crossover(layer: LayerShape, tokens: int, card: Card, masked: bool = False, slack: float = 1.0) -> float:
    """The largest executed share at which the sparse op is no slower than dense; 0 where it always is.

    masked: against dense products that leave out what the mask does, instead of the plain FFN.
    slack: how many times what dense takes the sparse op may take.
    """
    dense = slack * (masked_seconds if masked else dense_seconds)(layer, tokens, card)
    if sparse_seconds(layer, tokens, 0.0, card) > dense:
        return 0.0
    if sparse_seconds(layer, tokens, 1.0, card) <= dense:
        return 1.0
    low, high = 0.0, 1.0  # the time grows with the share
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sparse_seconds(layer, tokens, middle, card) <= dense else (low, middle)
    return low


def choose(layer: LayerShape, tokens: int, share: float, card: Card, masked: bool = False) -> Way:
    """The way that takes least time, so by the model never slower than dense.

    share: what is expected to be executed, in [0, 1], such as calibration found; an overestimate is safe. Raises
    ValueError for a share outside.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be the executed share, in [0, 1], got {share}")
    limit = crossover(layer, tokens, card, masked)
    if limit == 0 or share > limit:
        return "dense"
    return "decode" if tokens <= DECODE_TOKENS else "sparse"


def _router_seconds(layer: LayerShape, tokens: int, card: Card) -> float:
    work = 2 * tokens * layer.router_weights / card.ours(layer.bytes_each)
    read = (tokens * layer.d + layer.router_weights) * layer.bytes_each + 8 * tokens * layer.experts
    return max(work, read / card.memory) + 2 * card.launch


def _decode_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """decode.cuh: every weight that some token needs once, all tokens along; x again for every block's neurons."""
    union = (1 - (1 - share) ** tokens) * layer.neurons
    read = (union * layer.neuron_width + layer.router_weights) * layer.bytes_each
    rows, neurons = (16, 16) if tokens <= 16 else (_TILE, 32)
    work = 2 * rows * union * layer.neuron_width / card.ours(layer.bytes_each)
    again = tokens * union * (layer.d / neurons + layer.d_out / 32) * layer.bytes_each
    fastest = max(read / (card.memory * card.streamed), work, (read + again) / card.l2)
    return fastest + 5 * card.launch


def _tiles(pairs_each: float, steps: int) -> float:
    """Rows of tensor cores for so many pairs of an expert: the last of its tiles is filled up to `steps`."""
    return pairs_each + min(pairs_each, 1.0) * (steps - 1) / 2


def _waves(blocks: float, resident: int, card: Card) -> float:
    """How often all multiprocessors must be filled, not below a part of once."""
    return max(blocks / (card.processors * resident), 1.0)


def _slowest(work: float, l2: float, shared: float, rate: float, card: Card) -> float:
    """work in FLOP at that rate; bytes from L2, and through shared memory."""
    by_shared = shared / (card.shared * card.processors * card.clock)
    return max(work / rate, l2 / card.l2, by_shared)


def _up_has_warpgroups(layer: LayerShape, card: Card) -> bool:
    """Whether hopper_up.cuh takes the way in, else up.cuh."""
    return bool(card.hopper_16) and layer.bytes_each == 2 and layer.d % 8 == 0


def _up_all_share(layer: LayerShape, tokens: int, card: Card) -> float:
    """The share from which every neuron is computed, as launch.cu has it for a chunk of tokens; above 1: never."""
    s, hopper = layer.expert_size, _up_has_warpgroups(layer, card)
    blocks = -(-tokens // _TILE) * -(-layer.neurons // (128 if hopper else _TILE))
    if s % 8 or blocks < 2 * card.processors:
        return 2.0
    if hopper:
        strips = -(-s // 128)
        computed = -(-s // (strips * 32)) * 32
        columns = strips * max(computed, 33 + 0.55 * computed if layer.gated else 68 + 0.25 * computed)
    else:
        tall = s % _TILE if 2 * (s % _TILE) <= _TILE else 0
        columns = float(-(-(s - tall) // _TILE) * _TILE)
        if tall:
            few = max(tall, (17 if layer.gated else 31) + 0.25 * tall)
            columns += few if layer.bytes_each == 2 else _TILE / 2
    share = s / columns * -(-blocks // card.processors) * card.processors / blocks
    return share if share <= _UP_ALL_WORTH else 2.0


def _up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """The products on the way in, and their activation. Of two kernels one finds nothing to do, as on the way out."""
    turn = _up_all_share(layer, tokens, card)
    if turn > 1:
        return _pairs_up_seconds(layer, tokens, share, card)
    fewest = _pairs_up_seconds(layer, tokens, min(share, turn), card)
    one = replace(layer, experts=1, expert_size=layer.neurons)
    every = _pairs_up_seconds(one, tokens, 1.0, card) if share >= turn else 0.0
    return max(fewest, every) + card.launch


def _pairs_up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """Of pairs alone, expert by expert."""
    seconds = _hopper_up_seconds if _up_has_warpgroups(layer, card) else _tiled_up_seconds
    return seconds(layer, tokens, share, card)


def _tiled_up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """up.cuh: strips of 64 neurons, and the last of an expert, of at most half as many, in tall tiles: launch.cu."""
    left = layer.expert_size % _TILE
    tall = left if 2 * left <= _TILE else 0
    whole = layer.expert_size - tall
    seconds = 0.0
    if whole:
        seconds += _up_part_seconds(layer, tokens, share, card, whole, (_TILE, _TILE))
    if tall:
        columns = -(-tall // 8) * 8 if layer.bytes_each == 2 else _TILE // 2  # TallFma skips none
        seconds += _up_part_seconds(layer, tokens, share, card, tall, (2 * _TILE, columns))
    return seconds


def _up_part_seconds(
    layer: LayerShape, tokens: int, share: float, card: Card, neurons: int, tile: tuple[int, int]
) -> float:
    """So many neurons of every expert, by tiles of so many rows and columns that are computed whole."""
    each, (height, width) = tokens * share, tile
    strips = -(-neurons // width)
    rows = _tiles(each, 16) * layer.experts * strips
    work = 2 * rows * width * layer.d * layer.inputs
    blocks = max(each / height, min(each, 1.0)) * layer.experts * strips
    gathered = each * layer.experts * layer.d * strips * layer.bytes_each
    weights = blocks * neurons / strips * layer.d * layer.inputs * layer.bytes_each
    # A warp reads all columns of its rows, and 16 of their columns.
    by_warps = (
        (rows * width / 16 + blocks * height / _TILE * width) * layer.d * layer.inputs * layer.bytes_each
    )
    waiting = _waves(blocks, _RESIDENT[1], card) * card.step * min(blocks, 1.0)
    slowest = _slowest(
        work, gathered + weights, gathered + weights + by_warps, card.ours(layer.bytes_each), card
    )
    return slowest + waiting + card.launch


def _hopper_up_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """hopper_up.cuh: rows of an expert's pairs by a strip of at most 128 of its neurons, one block a multiprocessor."""
    each = tokens * share
    strips = -(-layer.expert_size // 128)
    columns = -(-layer.expert_size // (strips * 32)) * 32  # of a strip
    products = _tiles(each, _TILE) / _TILE * layer.experts * strips  # of 64 rows by a strip
    tiles = max(each / (_HOPPER_ROWS / layer.inputs), min(each, 1.0)) * layer.experts * strips

    def of(products: float, tiles: float, rows: float) -> float:
        depth = layer.d * layer.inputs
        read = (rows * layer.d + tiles * columns * depth) * layer.bytes_each
        shared = read + products * (_TILE + columns) * depth * layer.bytes_each
        work = 2 * products * _TILE * columns * depth
        return _slowest(work, read, shared, card.dense_16 * card.hopper_16, card)

    one = of(1, 1, _TILE) * card.processors * min(each, 1.0)  # by one multiprocessor
    return (
        max(of(products, tiles, each * layer.experts * strips), one)
        + card.step * min(tiles, 1.0)
        + card.launch
    )


def _down_tiles(layer: LayerShape, tokens: int, card: Card) -> int:
    """Tiles of tokens in a block of down.cuh, as launch.cu picks them."""

    def read(n: int) -> int:
        blocks = -(-tokens // (n * _TILE)) * -(-layer.d_out // _TILE)
        return -(-blocks // card.processors) * (_TILE + n * _TILE // 4)

    most = 4 if layer.bytes_each == 2 else 2
    fit = [
        n
        for n in _RESIDENT
        if n == 1 or (n <= most and 2 * (_DOWN_BLOCK + n * _DOWN_TILE) <= card.shared_bytes)
    ]
    return min(fit, key=read)


def _crowd_share(layer: LayerShape, tokens: int, card: Card) -> float:
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
    return -(-tokens // rows) * -(-layer.d_out // _TILE)


def _crowd_depth(layer: LayerShape, card: Card) -> int:
    s = layer.expert_size
    if _down_has_warpgroups(layer, card):
        return 16 if s <= 16 else 32 if s <= 32 else -(-s // 64) * 64
    staged = 32 if layer.bytes_each == 2 else 16
    return -(-s // staged) * staged


def _down_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """The products on the way out. Where there are two kernels both are launched, and one finds nothing to do.

    The time grows with the share, as crossover() needs it, though by the model the second may begin below the first.
    """
    turn = _crowd_share(layer, tokens, card)
    if turn > 1:
        return _compact_down_seconds(layer, tokens, share, card)
    fewest = _compact_down_seconds(layer, tokens, min(share, turn), card)
    crowds = _crowd_down_seconds(layer, tokens, share, card) if share >= turn else 0.0
    return max(fewest, crowds) + card.launch


def _crowd_down_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """hopper_down.cuh or crowd.cuh: a block's tokens by 64 columns through all experts, their sums in registers."""
    blocks, depth = _crowd_blocks(layer, tokens, card), _crowd_depth(layer, card) * layer.experts
    waves = -(-blocks // card.processors) * card.processors / blocks
    warpgroups = _down_has_warpgroups(layer, card)
    rows = blocks * (_CROWD if warpgroups else _CROWD_ROWS[layer.bytes_each])  # that go through all experts
    work = 2 * rows * _TILE * depth
    l2 = (share * rows + blocks * _TILE) * layer.neurons * layer.bytes_each
    # Zeros are written, too. Of each, once to write it; rows are read by one warpgroup or four warps, columns by two.
    operands = (2 if warpgroups else 5) * rows + 3 * blocks * _TILE
    shared = operands * depth * layer.bytes_each
    adding = 1.5 * rows * _TILE * layer.experts / (128 * card.processors * card.clock)
    rate = card.dense_16 * card.hopper_16 if warpgroups else card.ours(layer.bytes_each)
    return waves * (_slowest(work, l2, shared, rate, card) + adding) + card.launch


def _compact_down_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """down.cuh: tokens by 64 columns, every expert added to float32 sums in shared memory, all in one pipeline."""
    n = _down_tiles(layer, tokens, card)
    each, blocks, strips = n * _TILE * share, -(-tokens // (n * _TILE)), -(-layer.d_out // _TILE)
    depth = -(-layer.expert_size // 32) * 32
    active = (1 - (1 - share) ** (n * _TILE)) * layer.experts  # of a block
    products = active * max(each / max(active / layer.experts, 1e-9) / _TILE, 1.0)  # of 64 rows
    rows = _tiles(each, 16) * layer.experts * blocks
    work = 2 * rows * depth * strips * _TILE
    pairs = each * layer.experts * blocks
    l2 = (pairs * strips + products * blocks * layer.d_out) * layer.expert_size * layer.bytes_each
    sums = pairs * layer.d_out * 8 * _CONFLICTS
    shared = l2 + sums + (rows * 4 + products * blocks * _TILE) * strips * depth * layer.bytes_each
    # A step waits for a part of what L2 takes, others being on their way.
    ahead = 3 if n == 1 else 4
    resident = _RESIDENT[n] - (layer.bytes_each == 4)  # of float32 there are twice the sums
    taken = _DOWN_ONE if n == 1 else _DOWN_BLOCK + n * _DOWN_TILE
    resident = min(resident, card.shared_bytes // taken)
    waiting = _waves(blocks * strips, resident, card) * products * (depth / 32) * card.step / ahead
    slowest = _slowest(work, l2, shared, card.ours(layer.bytes_each), card)
    return max(slowest, waiting) + card.launch
