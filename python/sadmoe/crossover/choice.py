"""Seconds of each way through a layer, and which takes the fewest."""

from functools import lru_cache

from sadmoe.crossover.card import Card
from sadmoe.crossover.common import TILE
from sadmoe.crossover.shape import LayerShape
from sadmoe.crossover.way_in import up_seconds
from sadmoe.crossover.way_out import down_seconds

DECODE_TOKENS = 64  # the op takes its decode kernels up to here


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
    return router + plan + up_seconds(layer, tokens, share, card) + down_seconds(layer, tokens, share, card)


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


def _router_seconds(layer: LayerShape, tokens: int, card: Card) -> float:
    work = 2 * tokens * layer.router_weights / card.ours(layer.bytes_each)
    read = (tokens * layer.d + layer.router_weights) * layer.bytes_each + 8 * tokens * layer.experts
    return max(work, read / card.memory) + 2 * card.launch


def _decode_seconds(layer: LayerShape, tokens: int, share: float, card: Card) -> float:
    """decode.cuh: every weight that some token needs once, all tokens along; x again for every block's neurons."""
    union = (1 - (1 - share) ** tokens) * layer.neurons
    read = (union * layer.neuron_width + layer.router_weights) * layer.bytes_each
    rows, neurons = (16, 16) if tokens <= 16 else (TILE, 32)
    work = 2 * rows * union * layer.neuron_width / card.ours(layer.bytes_each)
    again = tokens * union * (layer.d / neurons + layer.d_out / 32) * layer.bytes_each
    fastest = max(read / (card.memory * card.streamed), work, (read + again) / card.l2)
    return fastest + 5 * card.launch
