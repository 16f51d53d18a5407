"""Clocks and statistics: device events on a GPU, the host's clock elsewhere; medians with their spread."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing; `values` in milliseconds, in the order taken."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def quantile(self, share: float) -> float:
        """The value below which `share` of the samples lie."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    def to_dict(self) -> dict[str, Any]:
        """Median, mean and the 10th and 90th percentiles."""
        return {
            "median_ms": round(self.median, 5),
            "mean_ms": round(statistics.fmean(self.values), 5),
            "p10_ms": round(self.quantile(0.1), 5),
            "p90_ms": round(self.quantile(0.9), 5),
            "samples": len(self.values),
        }


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Names of the Triton kernels that are compiled, or taken from the cache on disk, meanwhile."""
    import triton

    names: list[str] = []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda *, src, **_: names.append(src.name)
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = before


def time_in_turns(
    runs: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int = 20, calls: int = 2
) -> list[Samples]:
    """Mean time in ms of `calls` calls of each, behind one that is not timed, one after the other, again and again.

    GPU only. So all share what the card's clock does meanwhile: at its power limit that changes within a second.
    """
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, pairs in zip(runs, events, strict=True):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            run()
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            pairs.append((start, stop))
        synchronize(device)
    return [Samples.of([a.elapsed_time(b) / calls for a, b in pairs]) for pairs in events]


def time_replays(run: Callable[[], Any], replays: int = 15) -> float:
    """Median seconds of one replay of `run`, captured in a CUDA graph; run it once before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def time_chain(run: Callable[[int], Any], launches: int, replays: int = 7) -> float:
    """Median seconds of one of `launches` calls run(0), run(1), ..., captured in one CUDA graph."""

    def chain() -> None:  # each result is freed before the next is made, as in a model
        for i in range(launches):
            run(i)

    run(0)
    return time_replays(chain, replays) / launches


def time_calls(run: Callable[[], Any], device: torch.device, *, calls: int, warm_up: int = 3) -> Samples:
    """Time of each of `calls` calls, in ms.

    On a GPU the calls are queued back to back with an event between them and waited for once, so launch overhead
    shows only where the host cannot keep ahead of the device.
    """
    for _ in range(warm_up):
        run()
    synchronize(device)
    if device.type != "cuda":
        return Samples.of([_host_ms(run) for _ in range(calls)])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return Samples.of([a.elapsed_time(b) for a, b in itertools.pairwise(events)])


def kernel_times(run: Callable[[], Any], *, calls: int = 5, top: int = 25) -> list[dict[str, Any]]:
    """Device time in us by kernel of one call, longest first, from the profiler. GPU only."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {
            "kernel": e.key[:100],
            "us": round(e.self_device_time_total / calls, 1),
            "launches": round(e.count / calls, 1),
        }
        for e in events[:top]
    ]


def _host_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
