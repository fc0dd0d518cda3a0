"""What the model believes of a CUDA device: constants of gpu_constants.json, each with its source."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

CONSTANTS = Path(__file__).with_name("gpu_constants.json")


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
def card_for(capability: tuple[int, int]) -> Card:
    """The card of that compute capability, or the one before it, less the products that only its generation has.

    Raises ValueError below the first.
    """
    known = sorted(cards().values(), key=lambda card: card.capability)
    fitting = [card for card in known if card.capability <= capability]
    if not fitting:
        raise ValueError(
            f"capability must be at least {known[0].capability}, that of {known[0].name}, got {capability}"
        )
    card = fitting[-1]
    return card if card.capability[0] == capability[0] else replace(card, hopper_16=0.0)
