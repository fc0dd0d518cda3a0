"""What a recipe is run on, and what is measured of a model on it."""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from sadmoe import TopK, moe_layers
from sadmoe.batches import Batch, run, samples_in, to_device
from sadmoe.cost import cost_of_masks
from sadmoe.demo.rows import added_to, kept_in_controls, masked
from sadmoe.ffn import find_ffns
from sadmoe.flops import FlopCount
from sadmoe.gates import Gate
from sadmoe.masks import record_masks
from sadmoe.modules import device_of, evaluating
from sadmoe.report import Heat
from sadmoe.timing import measure, waiting
from sadmoe.training.objective import OutputLoss
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LOST = 0.75  # of a curve's best: where less is kept, it ends
OF_USE = 0.9  # of the dense metric: where less is kept, nobody asks how fast it is


@dataclass
class Workload:
    """One model, its data, and what is asked of it. metric: of the pairs (output, batch) of all tests, or all picks."""

    title: str
    dense: nn.Module
    train: list[Any]  # batches, labels unused
    picks: list[Any]  # neither trained on nor reported: on them a setting is chosen
    tests: list[Any]
    metric: Callable[[Iterable[tuple[Any, Any]]], float]
    metric_name: str
    higher_is_better: bool
    heat: Callable[[nn.Module], Heat]
    timers: dict[str, Callable[[nn.Module], object]]  # name -> what is timed
    output_loss: OutputLoss | Literal["logits"] | None = None
    # (output, batch) -> bool, of each sample; metric is then the share that is right.
    right: Callable[[Any, Any], Tensor] | None = None
    also: dict[str, Callable[[nn.Module], float]] = field(default_factory=dict)  # of dense and of ours, once
    notes: tuple[str, ...] = ()

    def kept(self, value: float, dense: float) -> float:
        """Share of the dense metric that is left; above 1 where it got better."""
        return value / dense if self.higher_is_better else dense / value

    def value(
        self,
        model: nn.Module,
        batches: list[Any],
        during: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
        rights: list[Tensor] | None = None,
    ) -> float:
        """The metric of a model. during: a context for each batch, in which the model runs and the metric does not.
        rights: takes what is right."""

        def outputs() -> Iterator[tuple[Any, Any]]:
            for batch in batches:
                batch = to_device(batch, device_of(model))
                with during(batch):
                    output = run(model, inputs(batch))
                if rights is not None and self.right is not None:
                    rights.append(self.right(output, batch))
                yield output, batch

        with evaluating(model):
            return self.metric(outputs())

    def dense_values(self) -> "Dense":
        """The metric of the dense model, and its FLOPs."""
        rights, count = list[Tensor](), FlopCount(self.dense)
        on_tests = self.value(self.dense, self.tests, lambda batch: count, rights)
        return Dense(self.value(self.dense, self.picks), on_tests, count.flops, rights)


class Dense(NamedTuple):
    """The metric of the dense model, on both. flops, and rights, see `Workload.value`: of the tests."""

    picks: float
    tests: float
    flops: int = 0
    rights: Sequence[Tensor] = ()


@dataclass
class Point:
    """One gate of one curve, on the tests, or a model that has none. share: executed pairs; spread: standard deviation
    of a token's share, mean over layers. ffn_flops, flops: of the converted layers, and of the whole model, over
    dense. picked: what is kept of the dense metric on the picks. error: one standard error of kept, where the metric
    is a share of the samples; the same samples are right or wrong by both models. gains: by timer; spreads: of the
    times, distance of the quartiles over the median (0.1 is 10 %), the wider of dense and ours; calls: timed."""

    setting: str
    share: float
    spread: float
    ffn_flops: float
    flops: float
    metric: float
    kept: float
    picked: float
    error: float | None = None
    gains: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def sweep(
    work: Workload,
    model: nn.Module,
    gates: Sequence[tuple[str, Gate]],
    dense: Dense,
    timed: float,
    prepare: Callable[[nn.Module], None] | None = None,
) -> list[Point]:
    """The model under one gate after the other, which all layers get, until most is lost.

    timed: seconds of timing at each point of use, 0 for none.   prepare: what is done to it at each gate.
    """
    points = []
    for setting, gate in gates:
        for layer in moe_layers(model).values():
            layer.gate = (
                gate if not isinstance(gate, TopK) else TopK(max(1, round(gate.k / 1000 * layer.experts)))
            )
        if prepare is not None:
            prepare(model)
        point = measured(work, model, setting, dense, gate.k / 1000 if isinstance(gate, TopK) else 1.0)
        for name, call in work.timers.items() if timed and point.kept >= OF_USE else ():
            with evaluating(model):
                both = {"dense": partial(call, work.dense), "ours": partial(call, model)}
                on = device_of(model)
                times = measure({who: waiting(one, on) for who, one in both.items()}, timed, least=5)
            point.gains[name] = times["dense"].median / times["ours"].median
            point.spreads[name] = max(time.spread for time in times.values())
            point.calls[name] = times["ours"].calls
        points.append(point)
        gains = [f", {name} {gain:.2f}x ± {point.spreads[name]:.0%}" for name, gain in point.gains.items()]
        print(
            f"  {setting}: share {point.share:.1%}, FLOPs {point.flops:.1%}, {work.metric_name} {point.metric:.4f}"
            + "".join(gains),
            flush=True,
        )
        if point.kept < LOST * max(p.kept for p in points):
            break
    return points


def measured(work: Workload, model: nn.Module, setting: str, dense: Dense, width: float = 1.0) -> Point:
    """Cost and metric of the model as its gates stand, or of one in which nothing is converted, but FFNs may have that
    share of their neurons alone."""
    count, samples, rights = FlopCount(model), sum(map(samples_in, work.tests)), list[Tensor]()
    if moe_layers(model):
        with record_masks(model) as record:

            @contextmanager
            def counted(batch: Any) -> Iterator[None]:
                with count, record.batch(batch):
                    yield

            value = work.value(model, work.tests, counted, rights)
        report = cost_of_masks(model, record.layers, samples, count.flops / samples)
        spread = statistics.mean(_spread(counts.histogram) for counts in record.layers.values())
        shares = {
            "share": report.share,
            "spread": spread,
            "ffn_flops": report.layers_of_dense,
            "flops": report.of_dense,
        }
    else:
        value = work.value(model, work.tests, lambda batch: count, rights)
        shares = {"share": width, "spread": 0.0, "ffn_flops": width, "flops": count.flops / dense.flops}
    kept, picked = work.kept(value, dense.tests), work.kept(work.value(model, work.picks), dense.picks)
    error = error_of_ratio(torch.cat(rights), torch.cat(tuple(dense.rights))) if rights else None
    return Point(setting, metric=value, kept=kept, picked=picked, error=error, **shares)


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy in bfloat16 that takes and gives float32."""

    def cast(values: Any, dtype: torch.dtype) -> Any:
        return tree_map(
            lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values
        )

    model = copy.deepcopy(model).bfloat16()
    model.register_forward_pre_hook(lambda _, *given: cast(given, torch.bfloat16), with_kwargs=True)
    model.register_forward_hook(lambda _, args, output: cast(output, torch.float32))
    return model


def error_of_ratio(ours: Tensor, dense: Tensor) -> float:
    """One standard error of mean(ours) / mean(dense), both [N], of the same samples."""
    ours, dense = ours.double(), dense.double()
    left = ours - ours.mean() / dense.mean() * dense
    return (left.std() / dense.mean() / len(left) ** 0.5).item()


def inputs(batch: Batch) -> Batch:
    """A batch without its labels."""
    return {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch


def _spread(histogram: Tensor) -> float:
    shares = torch.arange(len(histogram)) / (len(histogram) - 1)
    weights = histogram / histogram.sum()
    mean = (weights * shares).sum()
    return ((weights * (shares - mean).square()).sum() ** 0.5).item()


def controls(work: Workload, dense: float) -> dict[str, float]:
    """What the metric says of the dense model without FFNs, with the best half of each token's neurons, and with the
    half that is best on average, over the picks."""
    sites, found = find_ffns(work.dense), {"dense": dense}
    sums: dict[str, Tensor] = {}
    with masked(sites, added_to(sums)):
        work.value(work.dense, work.picks)
    for name, keep in kept_in_controls(sums).items():
        with masked(sites, keep):
            found[name] = work.value(work.dense, work.tests)
    return found
