"""What can be chosen about a training loop, and what is noted of each of its updates."""

from dataclasses import dataclass
from typing import Any, Literal

from sadmoe.checks import check_fields, check_range

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
        check_range(self, "steps", "accumulate", least=1)
        check_range(self, "seconds", "lr", above=0)
        check_range(self, "alpha", "weight_decay", least=0)
        if not self.grad_clip > 0:  # inf: none are clipped
            self._refuse(f"grad_clip must be above 0, got {self.grad_clip}")
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
    """One update: objective and penalty before it (the penalty per f or E, see the configs, without alpha)."""

    objective: float
    penalty: float
    alpha: float
    lr: float
