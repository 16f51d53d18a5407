"""Where the time of a run goes: its steps by how many sequences they served, those that end a prompt apart.

A log keeps when each step ended and to whom it gave how much; the rest is worked out afterwards. It does not keep the
outputs: hundreds of thousands of objects that stay make Python look through all there are in the middle of a run, which
takes 0.2 to 0.5 s. A step that reads a part of a prompt and ends none counts by its decodes: prompts longer than a step
are rare.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusecomp.runtime.outputs import StepOutput

MOST = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256)  # sequences of a group; beyond, steps of `WIDTH`
WIDTH = 64


@dataclass(frozen=True)
class Group:
    """Steps of like size.

    Attributes:
        rows: the fewest and the most sequences that one of them served; None for steps that end prompts.
        seconds: of all of them.
        median_ms: of one.
        tokens: mean tokens that its sequences had when it began.
    """

    rows: tuple[int, int] | None
    steps: int
    seconds: float
    median_ms: float
    tokens: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows and list(self.rows), "steps": self.steps, "seconds": round(self.seconds, 4),
            "median_ms": round(self.median_ms, 4), "tokens": round(self.tokens, 1),
        }  # fmt: skip


class StepLog:
    """Of one run."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, list[str], list[int]]] = []  # seconds, requests, tokens of each

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def advanced(self) -> int:
        """Rows that got a token, over all steps."""
        return sum(len(requests) for _, requests, _ in self._steps)

    def add(self, seconds: float, outputs: Sequence[StepOutput]) -> None:
        """What a step took, from the end of the one before, and what it gave."""
        self._steps.append((seconds, [out.request_id for out in outputs], [len(out.new_token_ids) for out in outputs]))

    def groups(self, prompts: Mapping[str, int]) -> list[Group]:
        """Those that there are, the largest steps first.

        Args:
            prompts: tokens of each request's prompt.
        """
        lengths: dict[str, int] = {}
        found: dict[tuple[int, int] | None, list[tuple[float, int]]] = {}
        for seconds, requests, made in self._steps:
            ends_prompt = not requests or any(request not in lengths for request in requests)
            tokens = sum(lengths.get(request, 0) for request in requests)
            for request, count in zip(requests, made, strict=True):
                lengths[request] = lengths.get(request, prompts[request]) + count
            found.setdefault(None if ends_prompt else _bounds(len(requests)), []).append((seconds, tokens))
        ordered = sorted(found.items(), key=lambda item: item[0] or (1 << 31, 0), reverse=True)
        return [
            Group(
                rows, len(steps), sum(seconds for seconds, _ in steps),
                statistics.median(seconds for seconds, _ in steps) * 1e3,
                statistics.fmean(tokens for _, tokens in steps),
            )
            for rows, steps in ordered
        ]  # fmt: skip


def _bounds(rows: int) -> tuple[int, int]:
    """The fewest and the most sequences of the group that has this many."""
    if rows > MOST[-1]:
        first = (rows - 1) // WIDTH * WIDTH + 1
        return first, first + WIDTH - 1
    at = bisect.bisect_left(MOST, rows)
    return (MOST[at - 1] if at else 0) + 1, MOST[at]
