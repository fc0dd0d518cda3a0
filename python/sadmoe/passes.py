"""Loss terms that are taken from the forward passes of the user's own loop."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from sadmoe.forward import is_recomputed
from sadmoe.hooks import LatestCall

Loss = TypeVar("Loss", bound="PassesLoss")


@dataclass(frozen=True)
class Noted:
    """What a module said in one pass, and what the model was given in it, see `LatestCall`."""

    value: Tensor
    given: Mapping[str, Any] | None


class PassesLoss(ABC):
    """A loss term of what hooks noted in the passes since it was last called. They are on inside its `with`."""

    _called: ClassVar[str]  # in a message: with ...(model) as what

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._entered: AbstractContextManager[Any] | None = None
        self._seen: dict[str, list[Noted]] = defaultdict(list)
        self._call = LatestCall(model)

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
        with ExitStack() as stack:
            stack.enter_context(self._watching())
            stack.enter_context(self._call)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        entered, self._entered = self._entered, None
        self._seen.clear()
        if entered:
            entered.__exit__(None, None, None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model whose hooks lead here: not entered, nothing seen."""
        return {
            **self.__dict__,
            "_entered": None,
            "_seen": defaultdict(list),
            "_call": LatestCall(self.model),
        }

    def forget(self) -> None:
        """Drops what passes since the last call left, as after an evaluation."""
        self._seen.clear()

    def _note(self, name: str, value: Tensor) -> None:
        """What a module said. In backward, checkpointing runs it again: the same operations are due, but count once."""
        if not is_recomputed():
            self._seen[name].append(Noted(value, self._call.given))

    def _taken(self) -> dict[str, list[Noted]]:
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
