"""What the engine counts: totals since start and gauges of the latest step. Plain integers, updated once a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusecomp.runtime.scheduler import ScheduledStep, Scheduler, SequenceState


@dataclass(frozen=True)
class MetricsSnapshot:
    """Totals since the engine started, and the state after the latest step.

    Attributes:
        requests: requests accepted.
        finished: requests ended, for whatever reason.
        prompt_tokens: prompt tokens of accepted requests.
        generation_tokens: tokens generated.
        computed_tokens: tokens that went through the model; more than the two above when preemption recomputes.
        steps: steps run.
        preemptions: times a sequence lost its blocks.
        prefix_cache_queries: tokens of requests admitted under prefix caching, each request counted once.
        prefix_cache_hits: those of them whose keys and values were found.
        host_seconds: time the host spent on scheduling, filling buffers and bookkeeping, all steps.
        last_host_seconds: the same, latest step.
        kv_usage: share of KV blocks in use, in [0, 1].
        running, waiting: sequences.
    """

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    computed_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    host_seconds: float = 0.0
    last_host_seconds: float = 0.0
    kv_usage: float = 0.0
    running: int = 0
    waiting: int = 0


class Metrics:
    """Collects; `snapshot` reads. One engine thread writes."""

    def __init__(self) -> None:
        self._totals = MetricsSnapshot()

    def on_add(self, seq: SequenceState) -> None:
        """A request was accepted."""
        totals = self._totals
        self._totals = replace(
            totals, requests=totals.requests + 1, prompt_tokens=totals.prompt_tokens + len(seq.prompt_ids)
        )

    def on_abort(self) -> None:
        """A live request was aborted."""
        self._totals = replace(self._totals, finished=self._totals.finished + 1)

    def on_step(self, step: ScheduledStep, advanced: list[SequenceState], host_seconds: float) -> None:
        """A step ended. `advanced` is what `Scheduler.update` returned."""
        totals = self._totals
        ended = sum(seq.finish_reason is not None for seq in advanced)
        failed = sum(seq.finish_reason == "error" for seq in advanced)
        self._totals = replace(
            totals,
            finished=totals.finished + ended,
            generation_tokens=totals.generation_tokens + len(advanced) - failed,
            computed_tokens=totals.computed_tokens + step.num_tokens,
            steps=totals.steps + 1,
            preemptions=totals.preemptions + step.num_preempted,
            host_seconds=totals.host_seconds + host_seconds,
            last_host_seconds=host_seconds,
        )

    def snapshot(self, scheduler: Scheduler) -> MetricsSnapshot:
        """Totals with the scheduler's present gauges."""
        return replace(
            self._totals,
            prefix_cache_queries=scheduler.prefix.queries,
            prefix_cache_hits=scheduler.prefix.hits,
            kv_usage=scheduler.kv.usage,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
        )
