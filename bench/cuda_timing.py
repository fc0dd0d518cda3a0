"""The one timer of the benches on a CUDA device: graphs of several calls, whose replays take turns."""

import statistics
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


def graph_seconds(
    variants: dict[str, Callable[[int], object]], calls: int = 8, replays: int = 25
) -> dict[str, Timing]:
    """Seconds of one call of each variant; variants take turns, so that the card's clock falls on all of them alike."""
    graphs = {name: captured(call, calls) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for i in range(-3, replays):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 0:
                samples[name].append(begin.elapsed_time(end) * 1e-3 / calls)
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, (high - low) / median)
    return timings
