"""Solving for the one tau of a model: by what it may cost, or by what it may lose."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import NOTHING_AGAIN, Batch, Batches, check_batches, run, samples_in, to_device
from sadmoe.checks import Filter, check_number
from sadmoe.cost import CostReport, cost_of_masks, cost_of_shares
from sadmoe.dial import Taus, converted_layers, set_tau, tau
from sadmoe.masks import record_masks
from sadmoe.modules import device_of, evaluating
from sadmoe.randomness import SEED, seeded
from sadmoe.training.objective import Loss, own_loss

SMALLEST_TAU = 1e-6  # the working points of the paper lie between 1e-3 and 0.1
EVALUATIONS = 12  # of the model on the batches, at most: by halves, leaves tau known to 1 %
TOLERANCE = 0.002  # a cost this close under the budget, as a share of the dense cost, ends the search


@dataclass(frozen=True)
class Calibration:
    """The tau that was found and set, and what the model does with it on the batches.

    share: executed (token, expert) pairs over all pairs. cost: its `layers_of_dense` is what a budget bounds. loss, and
    loss_at_zero at tau = 0, are means over the batches, None where no loss was asked for.
    """

    tau: float
    share: float
    cost: CostReport
    loss: float | None
    loss_at_zero: float | None
    evaluations: int

    def __str__(self) -> str:
        of = f"{self.share:.1%} of the experts, {self.cost.layers_of_dense:.1%} of the FFNs' FLOPs"
        losses = "" if self.loss is None else f"; loss {self.loss:.4g}, at tau = 0 {self.loss_at_zero:.4g}"
        return f"tau {self.tau:.4g}: {of}{losses}; {self.evaluations} evaluations"


def calibrate_(
    model: nn.Module,
    batches: Batches,
    *,
    budget: float | None = None,
    max_loss_increase: float | None = None,
    loss: Loss | None = None,
    filter: Filter | None = None,
    skip_padding: bool = True,
    progress: bool = False,
) -> Calibration:
    """Finds one tau for all converted layers, or those of the filter, and sets it.

    The tau is in [1e-6, 1], or 0 where every expert may run.

    budget: the smallest tau found whose layers execute at most this share of their dense FLOPs, in (0, 1]. The search
    ends less than 0.002 below it, or after 12 passes.
    max_loss_increase: the largest tau found whose loss is at most this much above the loss at tau = 0, every expert on,
    relatively (0.01: one percent more), >= 0; 0 where no tau so found costs less than the dense FFNs. What training
    changed is not in it. One of the two must be given.
    loss(model, batch) -> scalar runs the model itself; by default the output's `.loss`, so batches need
    labels. It may compare with the dense model, run under `tau(model, 0.0)`: as 1 plus a distance,
    for max_loss_increase needs a loss above 0 at tau = 0. It is averaged over batches.
    With a budget it is only measured, and only where it is given. The model runs in eval mode without gradients, at
    most 12 times over the batches. filter: of a layer's name; False leaves its gate as it is, also in
    `loss_at_zero`, and its cost out. skip_padding: as in `cost`.
    Raises ValueError where no tau meets the budget, or the loss gives nothing to compare with; then the gates
    are as they were.
    """
    converted_layers(model, filter)
    check_batches(batches)
    _check_goal(budget, max_loss_increase)
    with tqdm(desc="calibrate", total=EVALUATIONS, unit="pass", disable=not progress) as bar:
        search = TauSearch(model, batches, loss, skip_padding, bar, filter=filter)
        if budget is not None:
            found = search.by_cost(budget)
        elif max_loss_increase is not None:
            found = search.by_loss(max_loss_increase)
    set_tau(model, found.tau, filter=filter)
    return found


def _check_goal(budget: float | None, max_loss_increase: float | None) -> None:
    if (budget is None) == (max_loss_increase is None):
        raise ValueError("give calibrate_ a budget or a max_loss_increase, exactly one of them")
    if budget is not None:
        check_budget(budget)
    if max_loss_increase is not None:
        check_number("max_loss_increase", max_loss_increase)
    if max_loss_increase is not None and not max_loss_increase >= 0:
        raise ValueError(f"max_loss_increase must not be negative, got {max_loss_increase}")


def check_budget(budget: float) -> None:
    """Raises TypeError unless it is a number, ValueError unless it is a share of the dense FLOPs."""
    check_number("budget", budget)
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget must be in (0, 1], executed over dense FLOPs of the converted layers, got {budget}"
        )


class BudgetError(ValueError):
    """No tau meets the budget."""


def check_reachable(budget: float, report: CostReport) -> None:
    """Raises BudgetError where one expert a token costs more than the budget."""
    floor = report.floor / report.dense
    if budget < floor:
        raise BudgetError(
            f"budget {budget} is below what one expert per token costs in this model, {floor:.4f} of "
            "the dense FLOPs: ask for more, or convert with narrower routers or smaller experts"
        )


class TauSearch:
    """Evaluations of one model on one set of batches, and the two ways to choose the next tau.

    taus: what the layers get for the number that is searched for; by default that number.   filter: of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss | None,
        skip_padding: bool,
        bar: Any,
        taus: Callable[[float], Taus] = lambda value: value,
        filter: Filter | None = None,
    ):
        self.model, self.batches, self.loss = model, batches, loss
        self.skip_padding, self.bar, self.taus, self.filter = skip_padding, bar, taus, filter
        self.evaluations = 0

    def by_cost(self, budget: float) -> Calibration:
        """The smallest tau within the budget; cost falls as tau grows."""
        if budget == 1:
            dense = self.at(0.0)
            return self._result(dense, dense.loss)
        loss_at_zero = None if self.loss is None else self.at(0.0).loss
        bracket, best = self._bracket(budget), None
        while self.evaluations < EVALUATIONS - 1:
            if best is not None and budget - best.cost.layers_of_dense <= TOLERANCE:
                break
            guess = bracket.guess()
            found = self.at(guess)
            check_reachable(budget, found.cost)
            bracket.narrow(guess, found.cost.layers_of_dense)
            best = found if found.cost.layers_of_dense <= budget else best
        return self._result(self._top_expert(budget) if best is None else best, loss_at_zero)

    def by_loss(self, max_increase: float) -> Calibration:
        """The largest tau found within the increase; tau = 0 always is, and costs less where most experts run."""
        self.loss = _output_loss if self.loss is None else self.loss
        best = dense = self.at(0.0)
        loss_at_zero = dense.loss
        if loss_at_zero is None or not 0 < loss_at_zero < math.inf:
            raise ValueError(
                f"max_loss_increase is relative to the loss at tau = 0, which must be positive and finite, "
                f"got {loss_at_zero}: pass another loss, or a budget"
            )
        low, high = math.log(SMALLEST_TAU), 0.0
        while self.evaluations < EVALUATIONS:
            middle = (low + high) / 2
            found = self.at(math.exp(middle))
            if found.loss is not None and found.loss <= loss_at_zero * (1 + max_increase):
                low, best = middle, found
            else:
                high = middle
        return self._result(best if best.cost.executed < dense.cost.executed else dense, loss_at_zero)

    def at(self, value: float) -> Calibration:
        """Runs the batches with that tau; the gates come back."""
        device, samples, losses = device_of(self.model), 0, []
        with (
            seeded(self.model, SEED),  # a DataLoader gives all passes the same
            tau(self.model, self.taus(value), filter=self.filter),
            evaluating(self.model),
        ):
            with record_masks(self.model, skip_padding=self.skip_padding, same_gates=True) as record:
                for batch in self.batches:
                    batch = to_device(batch, device)
                    samples += samples_in(batch)
                    with record.batch(batch):
                        if self.loss is None:
                            run(self.model, batch)
                        else:
                            losses.append(_scalar(self.loss(self.model, batch)))
            if samples == 0:
                raise ValueError(NOTHING_AGAIN)
            report = cost_of_masks(self.model, record.layers, samples, filter=self.filter)
        self.evaluations += 1
        self.bar.update()
        mean = sum(losses) / len(losses) if losses else None
        return Calibration(value, report.share, report, mean, None, self.evaluations)

    def _bracket(self, budget: float) -> "_Bracket":
        ends = cost_of_shares(self.model, 1.0, filter=self.filter)
        return _Bracket(budget - TOLERANCE / 2, ends.all_experts / ends.dense, ends.floor / ends.dense)

    def _top_expert(self, budget: float) -> Calibration:
        found = self.at(1.0)
        if found.cost.layers_of_dense > budget:
            raise BudgetError(
                f"budget {budget} cannot be met: even tau = 1 executes {found.cost.layers_of_dense:.4f} of dense, "
                "because the routers predict the same norm for several experts; fit them, see fit_routers_"
            )
        return found

    def _result(self, found: Calibration, loss_at_zero: float | None) -> Calibration:
        return replace(found, loss_at_zero=loss_at_zero, evaluations=self.evaluations)


class _Bracket:
    """Where tau must lie, closed in on by false position (the Illinois rule), in fewer steps than by halves.

    It works on tau ** 0.25, of which the cost is nearly a straight line in between. At the ends the cost
    follows from the closed forms: of all experts at the left, of one at the right.
    """

    def __init__(self, target: float, left: float, right: float):
        self.target, self.ends = target, [SMALLEST_TAU**0.25, 1.0]
        self.excess = [left - target, right - target]
        self.last: int | None = None

    def guess(self) -> float:
        """A tau inside the bracket, at least a fiftieth of its width away from the ends."""
        (low, high), (above, below) = self.ends, self.excess
        part = above / (above - below) if above > 0 > below else 0.5
        return float((low + (high - low) * min(max(part, 0.02), 0.98)) ** 4)

    def narrow(self, guess: float, executed: float) -> None:
        """The cost at `guess` is known: it becomes one of the ends."""
        end = 1 if executed <= self.target else 0
        self.ends[end], self.excess[end] = guess**0.25, executed - self.target
        if end == self.last:
            self.excess[1 - end] /= 2  # else one end would never move
        self.last = end


def _scalar(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss must return a number for each batch, got {what}") from error


def _output_loss(model: nn.Module, batch: Batch) -> Tensor:
    output = run(model, batch)
    loss = own_loss(output)
    if loss is None:
        raise ValueError(
            f"the model returned a {type(output).__name__} without a loss: put labels into the batches, "
            "or pass loss="
        )
    return loss
