"""What can be chosen about making a model sparse."""

from dataclasses import dataclass
from typing import Literal, get_args

from sadmoe.sparsify.penalty import PENALTIES, Penalty
from sadmoe.training import LoopConfig

Goal = Literal["task", "distill_hidden", "distill_logits"]


@dataclass(frozen=True)
class SparsifyConfig(LoopConfig):
    """How a model is made sparse. Give `steps`, which makes the run repeatable, or `seconds`.

    alpha weighs the penalty per f (see SparsityLoss): 0.3 makes 80 % zeros in MiniLM within minutes.
    """

    objective: Goal = "distill_hidden"  # needs no labels; the task's loss is what the paper trains on
    penalty: Penalty = "hoyer"  # the paper's choice for ReLU models; "l1" is its older one
    relu_swap: bool = (
        True  # activations but ReLU and its square become ReLU first: only they make exact zeros
    )
    displacement: float = (
        -10.0
    )  # where GELU and SiLU are pushed to when they are kept; the paper's code has -10
    kept_bytes: int = (
        2**30
    )  # of what the dense model gives, kept for when the same batch of a list comes again

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("objective", get_args(Goal)), ("penalty", tuple(PENALTIES))):
            if getattr(self, name) not in choices:
                self._refuse(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.kept_bytes < 0:
            self._refuse(f"kept_bytes must be at least 0, got {self.kept_bytes}")
