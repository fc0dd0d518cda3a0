"""What can be chosen about making a model sparse."""

from dataclasses import dataclass
from typing import Literal

from sadmoe.checks import check_range
from sadmoe.sparsify.penalty import Penalty
from sadmoe.training import LoopConfig

Goal = Literal["task", "distill_hidden", "distill_logits"]


@dataclass(frozen=True, kw_only=True)
class SparsifyConfig(LoopConfig):
    """How a model is made sparse. Give `steps`, which makes the run repeatable, or `seconds`.

    alpha weighs the penalty per f (see `SparsityLoss`): 0.3 makes 80 % zeros in MiniLM within minutes.

    objective: "distill_hidden" needs no labels, nor does "distill_logits"; "task" is the model's own loss, the paper's.
    penalty: "hoyer", the paper's choice for ReLU models, or "l1", its older one.
    relu_swap: activations but ReLU and its square become ReLU first: only they make exact zeros.
    displacement: where GELU and SiLU are pushed to when they are kept; -10 as in the paper's code.
    kept_bytes: of what the dense model gives, kept for when the same batch comes again, of a list, a tuple, or another
        sequence whose attribute `same_again` is True.
    """

    objective: Goal = "distill_hidden"
    penalty: Penalty = "hoyer"
    relu_swap: bool = True
    displacement: float = -10.0
    kept_bytes: int = 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "kept_bytes", least=0)
