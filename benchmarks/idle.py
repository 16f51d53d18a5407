"""When the GPU did nothing: the intervals of all kernels in a profile, and what lies between them.

A kernel that starts before the one it follows has ended (programmatic dependent launch) leaves no gap. Copies are no
kernels. The profiler lengthens steps a little, so shares are of the profiled time itself. It also prepares each CUDA
graph at its first launch under it, several hundred us in which the GPU has nothing to do: the first steps run under the
profiler and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

# Gaps that are longer lie between steps, or where a kernel waited for its launch; shorter ones between two kernels of
# a graph.
LONG_GAP_US = 3.0
LISTED_GAPS, NAME_LENGTH = 12, 60
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Idle:
    """Of a profile: all in us.

    Attributes:
        wall: from the first kernel's start to the last one's end.
        busy: in which some kernel ran.
        long_gaps: the gaps longer than `LONG_GAP_US`, together.
        longest: the longest gap.
        longest_at: where it begins, from the first kernel's start.
        kernels: how many.
        pairs: (kernel before, kernel after) -> how many gaps there are between them, and their sum.
    """

    wall: float
    busy: float
    long_gaps: float
    longest: float
    longest_at: float
    kernels: int
    pairs: dict[tuple[str, str], tuple[int, float]]

    @property
    def share(self) -> float:
        return 1.0 - self.busy / self.wall

    def to_dict(self, steps: int) -> dict[str, Any]:
        """Shares, and microseconds of a step."""
        return {
            "share": round(self.share, 5),
            "long_gaps_share": round(self.long_gaps / self.wall, 5),
            "longest_us": round(self.longest, 1),
            "longest_at_step": round(self.longest_at / self.wall * steps, 1),
            "step_us": round(self.wall / steps, 1),
            "idle_us_per_step": round((self.wall - self.busy) / steps, 1),
            "kernels_per_step": round(self.kernels / steps, 1),
            "steps": steps,
            "gaps": [
                {"before": before, "after": after, "per_step": round(n / steps, 2), "us_per_step": round(us / steps, 2)}
                for (before, after), (n, us) in self.largest_gaps(LISTED_GAPS)
            ],
        }

    def largest_gaps(self, count: int) -> list[tuple[tuple[str, str], tuple[int, float]]]:
        """The pairs between which most time passes."""
        return sorted(self.pairs.items(), key=lambda item: -item[1][1])[:count]

    @classmethod
    def of(cls, intervals: Iterable[tuple[float, float, str]]) -> Idle:
        """Of (start, end, name) of every kernel, in any order."""
        ordered = sorted(intervals)
        if not ordered:
            raise ValueError("the profile holds no kernel")
        begin, until, last = ordered[0]
        idle = long_gaps = longest = longest_at = 0.0
        pairs: dict[tuple[str, str], tuple[int, float]] = {}
        for start, end, name in ordered:
            gap = start - until
            if gap > 0:
                idle += gap
                if gap > longest:
                    longest, longest_at = gap, until - begin
                long_gaps += gap if gap > LONG_GAP_US else 0.0
                count, total = pairs.get((last, name), (0, 0.0))
                pairs[last, name] = count + 1, total + gap
            if end > until:
                until, last = end, name
        wall = until - begin
        return cls(wall, wall - idle, long_gaps, longest, longest_at, len(ordered), pairs)


def profile_idle(run: Callable[[], Any], calls: int, warm_up: int = WARM_UP_CALLS) -> Idle:
    """Profile `calls` calls of `run`, which may leave work on the device, after `warm_up` not counted. GPU only."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, schedule

    found: list[tuple[float, float, str]] = []

    def collect(trace: profile) -> None:
        found.extend(
            (e.time_range.start, e.time_range.end, e.name[:NAME_LENGTH])
            for e in trace.events()
            if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset", "ProfilerStep"))
        )

    plan = schedule(wait=0, warmup=warm_up, active=calls, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=plan, on_trace_ready=collect) as trace:
        for call in range(warm_up + calls):
            run()
            if call + 1 in (warm_up, warm_up + calls):
                torch.cuda.synchronize()  # what was launched is counted where it was
            trace.step()
    return Idle.of(found)
