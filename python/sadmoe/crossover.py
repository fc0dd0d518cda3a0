"""Which way through a layer takes a CUDA device least time: sparsely or densely, from the shape and the executed share.

A model and not a measurement: rooflines of the kernels in csrc/cuda, whose constants are in gpu_constants.json, each
with its source and whether it was measured. Letters as everywhere: T tokens, d width, E experts, s neurons of one,
r router width. Times in seconds. Nothing here runs on the device or waits for it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

Way = Literal["dense", "decode", "sparse"]

CONSTANTS = Path(__file__).with_name("gpu_constants.json")
DECODE_TOKENS = 64  # the op takes its decode kernels up to here
_TILE = 64  # tokens and columns of a tile in csrc/cuda/tile.cuh
_RESIDENT = 4  # blocks of a tile at once on a multiprocessor


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
    memory: float
    streamed: float
    l2: float
    shared: float
    step: float
    launch: float
    unmeasured: tuple[str, ...] = ()  # the constants that no run on such a card has shown

    def dense(self, bytes_each: int) -> float:
        return self.dense_16 if bytes_each == 2 else self.dense_32

    def ours(self, bytes_each: int) -> float:
        return self.dense(bytes_each) * (self.ours_16 if bytes_each == 2 else self.ours_32)


@dataclass(frozen=True)
class Layer:
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


@lru_cache
def card_for(capability: tuple[int, int], path: Path = CONSTANTS) -> Card:
    """The card of that compute capability, or the one before it. Raises ValueError below the first."""
    known = sorted(cards(path).values(), key=lambda card: card.capability)
    fitting = [card for card in known if card.capability <= capability]
    if not fitting:
        raise ValueError(
            f"capability must be at least {known[0].capability}, that of {known[0].name}, got {capability}"
        )
    return fitting[-1]


def dense_seconds(layer: Layer, tokens: int, card: Card) -> float:
    """The FFN by the library's dense products, activation apart."""
    work = 2 * tokens * layer.neurons * layer.neuron_width / card.dense(layer.bytes_each)
    weights = layer.neurons * layer.neuron_width * layer.bytes_each
    rows = tokens * (layer.d + layer.d_out + 4 * layer.neurons * layer.inputs) * layer.bytes_each
    return max(work, (weights + rows) / card.memory) + (2 * layer.inputs + 1) * card.launch


def masked_seconds(layer: Layer, tokens: int, card: Card) -> float:
    """The same function as the sparse op, by dense products: the router, and a mask over all activations."""
    mask = 2 * tokens * layer.neurons * layer.bytes_each / card.memory + 2 * card.launch
    return dense_seconds(layer, tokens, card) + _router_seconds(layer, tokens, card) + mask


def sparse_seconds(layer: Layer, tokens: int, share: float, card: Card) -> float:
    """The op `dynamic_k_moe`, router included, at an executed share of pairs that are independent of each other."""
    if tokens <= DECODE_TOKENS:
        return _decode_seconds(layer, tokens, share, card)
    plan = 3 * card.launch + 6 * tokens * layer.experts / card.memory
    router = _router_seconds(layer, tokens, card)
    return router + plan + _up_seconds(layer, tokens, share, card) + _down_seconds(layer, tokens, share, card)


@lru_cache(maxsize=4096)
def crossover(layer: Layer, tokens: int, card: Card, masked: bool = False, slack: float = 1.0) -> float:
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


def choose(layer: Layer, tokens: int, share: float, card: Card, masked: bool = False) -> Way:
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


def _router_seconds(layer: Layer, tokens: int, card: Card) -> float:
    work = 2 * tokens * layer.router_weights / card.ours(layer.bytes_each)
    read = (tokens * layer.d + layer.router_weights) * layer.bytes_each + 8 * tokens * layer.experts
    return max(work, read / card.memory) + 2 * card.launch


def _decode_seconds(layer: Layer, tokens: int, share: float, card: Card) -> float:
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


def _waves(blocks: float, card: Card) -> float:
    """How often all multiprocessors must be filled, not below a part of once."""
    return max(blocks / (card.processors * _RESIDENT), 1.0)


def _slowest(layer: Layer, work: float, l2: float, shared: float, card: Card) -> float:
    by_shared = shared / (card.shared * card.processors * card.clock)
    return max(work / card.ours(layer.bytes_each), l2 / card.l2, by_shared)


def _up_seconds(layer: Layer, tokens: int, share: float, card: Card) -> float:
    """up.cuh: a tile of an expert's pairs by 64 of its neurons, computed whole."""
    each = tokens * share
    strips = -(-layer.expert_size // _TILE)
    rows = _tiles(each, 16) * layer.experts * strips
    work = 2 * rows * _TILE * layer.d * layer.inputs
    blocks = max(each / _TILE, min(each, 1.0)) * layer.experts * strips
    gathered = each * layer.experts * layer.d * strips * layer.bytes_each
    weights = blocks * layer.expert_size / strips * layer.d * layer.inputs * layer.bytes_each
    # Four warps read all rows and a quarter of the columns each.
    shared = gathered + weights + (rows * 4 + blocks * _TILE) * layer.d * layer.inputs * layer.bytes_each
    waiting = _waves(blocks, card) * card.step * min(blocks, 1.0)
    return _slowest(layer, work, gathered + weights, shared, card) + waiting + card.launch


def _down_seconds(layer: Layer, tokens: int, share: float, card: Card) -> float:
    """down.cuh: 64 tokens by 64 columns, every expert added to float32 sums in shared memory, all in one pipeline."""
    each, tiles, strips = _TILE * share, -(-tokens // _TILE), -(-layer.d_out // _TILE)
    depth = -(-layer.expert_size // 32) * 32
    active = (1 - (1 - share) ** _TILE) * layer.experts  # of a tile of tokens
    rows = _tiles(each, 16) * layer.experts * tiles
    work = 2 * rows * depth * strips * _TILE
    pairs = each * layer.experts * tiles
    l2 = (pairs * strips + active * tiles * layer.d_out) * layer.expert_size * layer.bytes_each
    shared = (
        l2 + pairs * layer.d_out * 8 + (rows * 4 + active * tiles * _TILE) * strips * depth * layer.bytes_each
    )
    # A step waits for a third of what L2 takes, two being on their way.
    waiting = _waves(tiles * strips, card) * active * (depth / 32) * card.step / 3
    return max(_slowest(layer, work, l2, shared, card), waiting) + card.launch
