"""A tau for each layer, all for one budget."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import TypeGuard

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sadmoe.batches import Batch, Batches, check_batches, check_repeats, length, to_device
from sadmoe.calibrate import BudgetError, Calibration, TauSearch, check_budget
from sadmoe.checks import Filter
from sadmoe.cost import CostReport
from sadmoe.dial import converted_layers, set_tau, tau
from sadmoe.hooks import uncompiled
from sadmoe.modules import device_of, evaluating
from sadmoe.padding import answer
from sadmoe.randomness import SEED, seeded
from sadmoe.tables import format_table
from sadmoe.training.objective import Loss

FACTORS = (0.0, 0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # of the one tau, that a layer may get; 0 makes it dense
Factors = Mapping[str, float]  # by layer


@dataclass(frozen=True)
class LayerCalibration:
    """The tau of each layer that was set, and what the model does with them on the batches: see `Calibration`.

    one: what a single tau does at the same budget, with its loss. Where nothing lost less, `taus` are that one.
    """

    taus: dict[str, float]
    share: float
    cost: CostReport
    loss: float
    one: Calibration

    def __str__(self) -> str:
        rows = [(name, f"{value:.4g}") for name, value in self.taus.items()]
        of = f"{self.share:.1%} of the experts, {self.cost.layers_of_dense:.1%} of the FFNs' FLOPs"
        return f"{format_table(('layer', 'tau'), rows)}\n{of}; loss {self.loss:.4g}, by one tau {self.one.loss:.4g}"


def calibrate_layers_(
    model: nn.Module,
    batches: Batches,
    *,
    budget: float,
    loss: Loss | None = None,
    filter: Filter | None = None,
    skip_padding: bool = True,
    progress: bool = False,
) -> LayerCalibration:
    """Finds a tau for each converted layer, or those of the filter, all for one budget as in `calibrate_`, and sets
    them.

    First one tau is found. Then each layer in turn is tried at 0 and at a quarter to four times that tau, and the
    model's loss is noted. Assuming that losses add up, the cheapest combination is chosen at one price per FLOP, scaled
    to use up the budget, and kept only if the model then loses less than with one tau: on these batches it is never
    worse.
    loss(model, batch) -> scalar runs the model itself, as in `calibrate_`; by default |y - y0|² / |y0|² of logits or
    hidden states at real tokens, y0 at tau = 0 (of those of the filter). The model runs over the batches 7 times
    for each layer, and some 30 times more: give few. filter: of a layer's name, as in `calibrate_`. skip_padding: as in
    `cost`. Raises ValueError where no tau meets the budget, or the loss is not finite; then, as in any failure, the
    gates are as they were.
    """
    names = list(converted_layers(model, filter))
    check_batches(batches)
    check_budget(budget)
    measured = Drift(skip_padding, filter) if loss is None else loss

    def search(factors: Factors, runs: Loss | None = loss) -> TauSearch:
        taus = partial(_taus, factors)
        return TauSearch(model, batches, runs, skip_padding, tqdm(disable=True), taus, filter)

    def solved(factors: Factors) -> Calibration:
        found = search(factors).by_cost(budget)
        return (
            found if loss is not None else replace(found, loss=search(factors, measured).at(found.tau).loss)
        )

    equal = dict.fromkeys(names, 1.0)
    one = solved(equal)
    least = one.loss
    if not _finite(least):
        raise ValueError(
            f"loss must be finite on the batches, got {least}: pass another loss, or other batches"
        )
    found, factors = one, equal
    if one.tau > 0:  # else the budget is all there is
        tried = sorted({min(factor, 1 / one.tau) for factor in FACTORS})
        costs = {f: one.cost if f == 1 else search(equal).at(f * one.tau).cost for f in tried}
        losses = _alone(model, batches, one, tried, measured, filter, progress)
        other = _at_price(_options(costs, losses), sum(_flops(one.cost).values()))
        try:
            solution = solved(other)
            if _finite(solution.loss) and solution.loss < least:
                found, factors, least = solution, other, solution.loss
        except BudgetError:  # it leaves too much dense
            pass
    taus = _taus(factors, found.tau)
    set_tau(model, taus, filter=filter)
    return LayerCalibration(taus, found.share, found.cost, least, one)


class Drift:
    """A loss: |y - y0|² / |y0|² of the logits or hidden states of a batch at real tokens, y0 at tau = 0."""

    def __init__(self, skip_padding: bool, filter: Filter | None = None):
        self.skip_padding, self.filter = skip_padding, filter
        self.of: tuple[Batch, Tensor] | None = None  # the last batch, and its y0: it often comes again

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.of is None or self.of[0] is not batch:
            first = self.of is None
            with tau(model, 0.0, filter=self.filter):
                self.of = batch, answer(model, batch, skip_padding=self.skip_padding)
                if first:
                    again = answer(model, batch, skip_padding=self.skip_padding)
                    check_repeats([self.of[1]], [again], "model")
        wanted = self.of[1]
        if not len(wanted):  # all of it is padding
            return wanted.new_zeros(())
        wrong = answer(model, batch, skip_padding=self.skip_padding) - wanted
        size = wanted.square().sum()
        size = size.where(size.isfinite(), torch.nan)  # so that no loss comes of it, which is refused
        return wrong.square().sum() / size


@dataclass(frozen=True)
class _Option:
    """One layer at one factor of the one tau: FLOPs of a sample, and the model's loss with the others at that tau."""

    factor: float
    flops: float
    loss: float


def _taus(factors: Factors, value: float) -> dict[str, float]:
    return {name: min(1.0, factor * value) for name, factor in factors.items()}


def _flops(cost: CostReport) -> dict[str, float]:
    return {layer.name: layer.tokens * layer.executed for layer in cost.layers}


def _finite(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _alone(
    model: nn.Module,
    batches: Batches,
    one: Calibration,
    tried: Sequence[float],
    loss: Loss,
    filter: Filter | None,
    progress: bool,
) -> dict[tuple[str, float], float]:
    """The mean loss of the batches with each layer alone at each of those factors, the others at the one tau."""
    names = [layer.name for layer in one.cost.layers]
    same = dict.fromkeys(names, 1.0)
    found = defaultdict[tuple[str, float], list[float]](list)
    # The batches of the other passes: no bar goes over them, which would begin them twice.
    with (
        uncompiled(),  # what was compiled would be compiled anew for each tau
        seeded(model, SEED),
        evaluating(model),
        tqdm(desc="each layer alone", total=length(batches), disable=not progress) as bar,
    ):
        for batch in batches:
            batch = to_device(batch, device_of(model))
            for name, factor in product(names, tried):
                if factor == 1.0:
                    continue
                with tau(model, _taus({**same, name: factor}, one.tau), filter=filter):
                    found[name, factor].append(float(loss(model, batch)))
            bar.update()
    means = {option: fmean(losses) for option, losses in found.items()}
    means |= {(name, 1.0): one.loss or 0.0 for name in names}
    return {option: mean if math.isfinite(mean) else math.inf for option, mean in means.items()}


def _options(
    costs: Mapping[float, CostReport], losses: Mapping[tuple[str, float], float]
) -> dict[str, list[_Option]]:
    """By layer. What it costs alone at a factor is taken to be what it costs where all are at it."""
    flops = {factor: _flops(cost) for factor, cost in costs.items()}
    return {name: [_Option(f, flops[f][name], losses[name, f]) for f in costs] for name in flops[1.0]}


def _at_price(options: Mapping[str, Sequence[_Option]], flops: float) -> dict[str, float]:
    """The factors that lose least, each FLOP at the lowest price at which all layers together take at most `flops`."""

    def at(price: float) -> dict[str, _Option]:
        return {
            name: min(some, key=lambda one: one.loss + price * one.flops) for name, some in options.items()
        }

    low, high = 1e-12 / flops, 1e12 / flops
    for _ in range(100):
        middle = math.sqrt(low * high)
        if sum(one.flops for one in at(middle).values()) > flops:
            low = middle
        else:
            high = middle
    return {name: one.factor for name, one in at(high).items()}
