"""What the kernels of both products have in common."""

from sadmoe.crossover.card import Card

TILE = 64  # tokens and columns of a tile in csrc/cuda/tile.cuh
RESIDENT = {1: 4, 2: 3, 4: 2}  # blocks of so many tiles that registers allow at once on a multiprocessor


def tile_rows(pairs_each: float, steps: int) -> float:
    """Rows of tensor cores for so many pairs of an expert: the last of its tiles is filled up to `steps`."""
    return pairs_each + min(pairs_each, 1.0) * (steps - 1) / 2


def waves(blocks: float, resident: int, card: Card) -> float:
    """How often all multiprocessors must be filled, not below a part of once."""
    return max(blocks / (card.processors * resident), 1.0)


def slowest_of(work: float, l2: float, shared: float, rate: float, card: Card) -> float:
    """work in FLOP at that rate; bytes from L2, and through shared memory."""
    by_shared = shared / (card.shared * card.processors * card.clock)
    return max(work / rate, l2 / card.l2, by_shared)
