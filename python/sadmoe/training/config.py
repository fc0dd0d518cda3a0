"""What can be chosen about a training loop, and what is noted of each of its updates."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from sadmoe.checks import check_fields

Schedule = Literal["constant", "linear", "linear_warmup"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a training loop runs, and by which rates. Give `steps`, which makes the run repeatable, or `seconds`.

    steps: updates of the weights.
    seconds: of wall time for the updates, instead of steps.
    alpha: weight of the penalty.
    schedule: of alpha: "constant", "linear" (from 0, over the whole run) or "linear_warmup" (over its first half).
    lr: AdamW's, at the end of its warm-up; then it falls linearly to 0.
    warmup: share of the run in which lr rises.
    weight_decay: of the matrices, not of biases and norms.
    grad_clip: largest norm of the gradient, as in the paper's code.
    accumulate: batches in each update; processes share them out: a multiple of how many there are.
    seed: of the order of the batches, and of dropout.
    """

    steps: int | None = None
    seconds: float | None = None
    alpha: float = 0.3
    schedule: Schedule = "linear_warmup"
    lr: float = 2e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    accumulate: int = 1
    seed: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Its fields are explained with those of the subclass, too."""
        super().__init_subclass__(**kwargs)
        fields = (cls.__base__.__doc__ or "").partition("\n")[2]
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{fields}"

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.steps is None) == (self.seconds is None):
            self._refuse(
                f"give steps or seconds, one of the two, got steps={self.steps} and seconds={self.seconds}"
            )
        for name in ("steps", "seconds", "lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                self._refuse(f"{name} must be above 0, got {value}")
        for name in ("seconds", "lr", "alpha"):
            if getattr(self, name) == math.inf:
                self._refuse(f"{name} must be finite, got inf")
        if self.accumulate < 1:
            self._refuse(f"accumulate must be at least 1, got {self.accumulate}")
        for name in ("alpha", "weight_decay"):
            if not getattr(self, name) >= 0:
                self._refuse(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            self._refuse(f"warmup must be a share of the run in [0, 1), got {self.warmup}")

    def _refuse(self, why: str) -> None:
        raise ValueError(f"{type(self).__name__}: {why}")

    def alpha_at(self, done: float) -> float:
        """Weight of the penalty when the share `done` of the run, in [0, 1], is over."""
        return (
            self.alpha * {"constant": 1.0, "linear": done, "linear_warmup": min(2 * done, 1.0)}[self.schedule]
        )

    def lr_at(self, done: float) -> float:
        """Learning rate when the share `done` of the run, in [0, 1], is over."""
        return self.lr * (done / self.warmup if done < self.warmup else (1 - done) / (1 - self.warmup))


@dataclass(frozen=True)
class Step:
    """One update: objective and penalty before it (the penalty divided by f, without alpha)."""

    objective: float
    penalty: float
    alpha: float
    lr: float
