"""The rules that turn scores [T, E] into a mask [T, E]: which experts run for which token."""

import operator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sadmoe import ops
from sadmoe.checks import check_number


class Gate(Protocol):
    """A rule on scores; with `true_norms` the scores are the experts' output norms, not the router's prediction."""

    @property
    def true_norms(self) -> bool: ...

    def mask(self, scores: Tensor) -> Tensor:
        """scores [T, E] float32 >= 0 -> bool [T, E]."""
        ...


@dataclass(frozen=True)
class DynamicK:
    """Expert e runs iff scores[t, e] >= tau * max(scores[t]) (arXiv 2310.04361, section 3): the rule of the method.

    tau in [0, 1]: 0 runs every expert, 1 the top one and its ties; where all scores are 0 every expert runs. With
    `true_norms` it is the oracle of the same rule: it computes every expert to know its norm, so it is for study, not
    for speed.
    """

    tau: float
    true_norms: bool = False

    def __post_init__(self) -> None:
        check_number("tau", self.tau, " in [0, 1]")
        object.__setattr__(self, "tau", float(self.tau))  # JSON takes no NumPy scalars and no tensors
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau must be in [0, 1] (0: every expert, 1: the top expert), got {self.tau}")

    def mask(self, scores: Tensor) -> Tensor:
        return ops.dynamic_k_select(scores, self.tau)


@dataclass(frozen=True)
class TopK:
    """The k experts of the largest score for every token (MoEfication's rule); ties as torch.topk breaks them. A NaN is
    never selected."""

    k: int
    true_norms: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not hasattr(self.k, "__index__"):
            raise TypeError(f"k must be a whole number, got {self.k!r}")
        object.__setattr__(self, "k", operator.index(self.k))
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def mask(self, scores: Tensor) -> Tensor:
        if self.k > scores.shape[-1]:
            raise ValueError(f"k must be at most the number of experts, {scores.shape[-1]}, got {self.k}")
        mask = torch.zeros_like(scores, dtype=torch.bool)
        ranked = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        chosen = ranked.topk(self.k, dim=-1, sorted=False).indices  # in order it takes up to twice as long
        return mask.scatter_(-1, chosen, ~scores.gather(-1, chosen).isnan())
