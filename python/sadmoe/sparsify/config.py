"""What can be chosen about a training, and what is noted of each of its updates."""

from dataclasses import dataclass
from typing import Literal, get_args

from sadmoe.checks import check_fields
from sadmoe.sparsify.penalty import PENALTIES, Penalty

Schedule = Literal["constant", "linear", "linear_warmup"]
Goal = Literal["task", "distill_hidden", "distill_logits"]


@dataclass(frozen=True)
class SparsifyConfig:
    """How a model is made sparse. Give `steps`, which makes the run repeatable, or `seconds`."""

    steps: int | None = None  # updates of the weights
    seconds: float | None = None  # of wall time for the updates, instead of steps
    objective: Goal = "distill_hidden"  # needs no labels; the task's loss is what the paper trains on
    penalty: Penalty = "hoyer"  # the paper's choice for ReLU models; "l1" is its older one
    alpha: float = 0.3  # weight of the penalty per f (see SparsityLoss): 80 % zeros in MiniLM within minutes
    schedule: Schedule = (
        "linear_warmup"  # of alpha: over the first half, then flat; "linear" over the whole run
    )
    relu_swap: bool = (
        True  # activations but ReLU and its square become ReLU first: only they make exact zeros
    )
    displacement: float = (
        -10.0
    )  # where GELU and SiLU are pushed to when they are kept; the paper's code has -10
    lr: float = 2e-4  # AdamW's, at the end of its warm-up; then it falls linearly to 0
    warmup: float = 0.1  # share of the run in which lr rises
    weight_decay: float = 0.01  # of the matrices, not of biases and norms
    grad_clip: float = 1.0  # largest norm of the gradient, as in the paper's code
    accumulate: int = 1  # batches in each update; processes share them out: a multiple of how many there are
    seed: int = 0  # of the order of the batches and of dropout
    kept_bytes: int = (
        2**30
    )  # of what the dense model gives, kept for when the same batch of a list comes again

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                f"give steps or seconds, one of the two, got steps={self.steps} and seconds={self.seconds}"
            )
        for name, choices in (
            ("objective", get_args(Goal)),
            ("penalty", tuple(PENALTIES)),
            ("schedule", get_args(Schedule)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("steps", "seconds", "lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        for name in ("alpha", "weight_decay", "kept_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the run in [0, 1), got {self.warmup}")

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
