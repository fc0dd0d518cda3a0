"""How long calls take, for `sadmoe bench` and the benches, and steps.

Variants take turns, so that the machine's drift falls on all of them alike, and in a new order every round, for what
one leaves in the caches makes the next one faster or slower.
"""

import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from sadmoe import ops

Name = TypeVar("Name")
LONG = 1.0  # seconds of a call, beside which what the first one waits for is little


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of so many calls, and the spread as a share of it: the distance between the
    quartiles, unless the timer says otherwise."""

    median: float
    spread: float
    calls: int = 0


def measure(
    variants: dict[Name, Callable[[], object]],
    seconds: float = 0.6,
    least: int = 7,
    patience: float = math.inf,
    before: Callable[[Name], object] | None = None,
) -> dict[Name, Timing]:
    """Calls the variants in turn for about `seconds` each, at least `least` times.

    Before that twice to warm up, or once where a call is long. What has taken `patience` seconds in all is not called
    again: of one so long call that is all. before: called with a variant's name ahead of each of its calls, and not
    timed.
    """
    samples: dict[Name, list[float]] = {name: [] for name in variants}

    def timed(name: Name) -> float:
        if before is not None:
            before(name)
        return _seconds(variants[name])

    for name in variants:
        took = timed(name)
        if took >= patience:
            samples[name].append(took)
        elif took < LONG:
            timed(name)
    order, shuffle = list(variants), random.Random(0).shuffle
    started, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - started < seconds * len(variants):
        shuffle(order)
        waited_for = [name for name in order if sum(samples[name]) < patience]
        if not waited_for:
            break
        for name in waited_for:
            samples[name].append(timed(name))
        rounds += 1
    return {name: _timing(values) for name, values in samples.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def waiting(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call, and on an accelerator the wait for what it queued."""
    if device.type == "cpu":
        return call

    wait = torch.cuda.synchronize if device.type == "cuda" else torch.accelerator.synchronize

    def waited() -> None:
        call()
        wait(device)

    return waited


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return Timing(median, (high - low) / median, len(values))


class Clock:
    """Seconds spent on each step, in the order in which the steps began. Prints as one line."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s in all: {steps}"


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, and its numbers: clouds give all of a maker's one name."""
    pairs = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    told = {key.strip(): value.strip() for key, _, value in reversed(pairs)}  # of the first one

    if "model name" in told:
        which = [
            f"{name} {told[key]}"
            for name, key in (("family", "cpu family"), ("model", "model"))
            if key in told
        ]
        return told["model name"] + (f" ({', '.join(which)})" if which else "")
    arm = " ".join(told[key] for key in ("CPU implementer", "CPU part") if key in told)
    return f"{platform.processor() or platform.machine()} {arm}".strip()


def machine() -> str:
    """Processor, threads, torch and kernels, for the first line of every table."""
    count = torch.get_num_threads()
    threads = f"{count} thread{'' if count == 1 else 's'}"
    return f"{processor()}, {threads}, torch {torch.__version__}, kernels {ops.cpu_isa()}"
