"""The one timer of the benches on a CUDA device: graphs of several calls, whose replays take turns."""

import statistics
import time
from collections.abc import Callable

import torch
from sadmoe.timing import Timing


def captured(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of call(0), ..., call(calls - 1), after three calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


WARM, REPLAYS, LEAST = 20, 100, 10  # replays not timed, timed, and timed at least
AHEAD = 200_000  # cycles at first, in which the host asks for all that is timed: else it would be waited for
PATIENCE = 0.2  # seconds a variant, after which there are no more than at least


def graph_seconds(variants: dict[str, Callable[[int], object]], calls: int = 8) -> dict[str, Timing]:
    """Seconds of one call of each variant: median, and the distance of the first and last tenth as a share of it.

    Variants take turns, so that the card's clock falls on all of them alike. Where replays are long there are fewer.
    """
    graphs = {name: captured(call, calls) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started, patience = time.perf_counter(), PATIENCE * len(graphs)
    ahead = AHEAD
    for i in range(-WARM, REPLAYS):
        late = time.perf_counter() - started > patience
        if late and (i >= LEAST or i < -1):  # the last of warming up is always done
            continue
        for name, graph in graphs.items():
            torch.cuda._sleep(ahead)
            begin.record()
            graph.replay()
            end.record()
            if i < 0 and begin.query():  # the host was not done asking
                ahead *= 2
            end.synchronize()
            if i >= 0:
                samples[name].append(begin.elapsed_time(end) * 1e-3 / calls)
    timings = {}
    for name, values in samples.items():
        tenths, median = statistics.quantiles(values, n=10), statistics.median(values)
        timings[name] = Timing(median, (tenths[-1] - tenths[0]) / median, len(values))
    return timings
