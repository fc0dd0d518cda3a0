"""Loss terms that are taken from the forward passes of the user's own loop."""

from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from sadmoe.forward import is_recomputed

Loss = TypeVar("Loss", bound="PassesLoss")


class PassesLoss(ABC):
    """A loss term of what hooks noted in the passes since it was last called. They are on inside its `with`."""

    _called: ClassVar[str]  # in a message: with ...(model) as what

    def __init__(self) -> None:
        self._entered: AbstractContextManager[Any] | None = None
        self._seen: dict[str, list[Tensor]] = defaultdict(list)

    @abstractmethod
    def _watching(self) -> AbstractContextManager[Any]:
        """Inside, hooks give what they see to `_note`."""

    @abstractmethod
    def __call__(self, batch: Any = None) -> Tensor:
        """The term of the passes since the last call; batch: what the model ran, which tells real tokens."""

    def __enter__(self: Loss) -> Loss:
        name = type(self).__name__
        if self._entered:
            raise RuntimeError(f"this {name} is entered already: one `with` around the loop is enough")
        watching = self._watching()
        watching.__enter__()
        self._entered = watching
        return self

    def __exit__(self, *exc: object) -> None:
        entered, self._entered = self._entered, None
        self._seen.clear()
        if entered:
            entered.__exit__(None, None, None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model whose hooks lead here: not entered, nothing seen."""
        return {**self.__dict__, "_entered": None, "_seen": defaultdict(list)}

    def forget(self) -> None:
        """Drops what passes since the last call left, as after an evaluation."""
        self._seen.clear()

    def _note(self, name: str, value: Tensor) -> None:
        """What a module said. In backward, checkpointing runs it again: the same operations are due, but count once."""
        if not is_recomputed():
            self._seen[name].append(value)

    def _taken(self) -> dict[str, list[Tensor]]:
        """What was noted since the last call, by name. Raises RuntimeError where that is nothing."""
        name = type(self).__name__
        if not self._entered:
            raise RuntimeError(
                f"enter {name} before the model runs: with {name}(model) as {self._called}: ..."
            )
        if not self._seen:
            raise RuntimeError(
                f"{name} has seen no forward pass since it was last called: run the model first, and leave out batches "
                "that run nothing of what it watches"
            )
        seen, self._seen = self._seen, defaultdict(list)
        return seen
