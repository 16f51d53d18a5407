"""What the engine counts: totals since start, gauges of the latest step, and how times and sizes are distributed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusecomp.runtime.prometheus import Histogram, exposition
from fusecomp.runtime.scheduler import ScheduledStep, Scheduler, SequenceState

# Upper bounds of buckets: vLLM's, which dashboards expect.
SECONDS_TO_FIRST: tuple[float, ...] = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5)
SECONDS_TO_FIRST += (5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
SECONDS_BETWEEN: tuple[float, ...] = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
SECONDS_BETWEEN += (7.5, 10.0, 20.0, 40.0, 80.0)
SECONDS_OF_REQUEST: tuple[float, ...] = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0)
SECONDS_OF_REQUEST += (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
TOKENS_OF_STEP = (1.0, *(float(2**power) for power in range(3, 15)))
BOUNDS = {
    "time_to_first_token_seconds": SECONDS_TO_FIRST,
    "inter_token_latency_seconds": SECONDS_BETWEEN,
    "e2e_request_latency_seconds": SECONDS_OF_REQUEST,
    "request_queue_time_seconds": SECONDS_OF_REQUEST,
    "request_prefill_time_seconds": SECONDS_OF_REQUEST,
    "request_decode_time_seconds": SECONDS_OF_REQUEST,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "iteration_tokens_total": TOKENS_OF_STEP,
}
REASONS = ("stop", "length", "abort", "error")


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
        swapped: those of the waiting whose keys and values are in host memory.
        swap_usage: share of host blocks in use, in [0, 1].
        swapped_out_blocks, swapped_in_blocks: moved to host memory, and back.
        sampling_bytes: device memory of tables for penalties, bias and bans, made when first needed.
        finish_reasons: requests ended, by reason.
        histograms: by vLLM's name without its prefix.
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
    swapped: int = 0
    swap_usage: float = 0.0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    sampling_bytes: int = 0
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    def prometheus(self, model_name: str = "") -> str:
        """The snapshot in Prometheus' text format, under the names that dashboards for vLLM read (`vllm:...`)."""
        return exposition(self, model_name)


class Metrics:
    """Collects; `snapshot` reads. One engine thread writes."""

    def __init__(self) -> None:
        self._totals = MetricsSnapshot()
        self._reasons = dict.fromkeys(REASONS, 0)
        self._counts = {name: [0] * (len(bounds) + 1) for name, bounds in BOUNDS.items()}
        self._sums = dict.fromkeys(BOUNDS, 0.0)

    def on_add(self, seq: SequenceState) -> None:
        """A request was accepted."""
        totals = self._totals
        self._totals = replace(
            totals, requests=totals.requests + 1, prompt_tokens=totals.prompt_tokens + len(seq.prompt_ids)
        )

    def on_abort(self, seq: SequenceState, reason: str, now: float) -> None:
        """A live request was ended from outside."""
        self._totals = replace(self._totals, finished=self._totals.finished + 1)
        self._ended(seq, reason, now)

    def on_launch(self, step: ScheduledStep, now: float) -> None:
        """A step is about to be launched: rows that never ran leave the queue."""
        for seq in step.seqs[step.num_decodes :]:
            metrics = seq.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
                self._observe("request_queue_time_seconds", now - metrics.arrival_time)

    def on_tokens(self, advanced: Sequence[SequenceState], now: float) -> None:
        """Tokens of a step reached the host. `advanced` is what `Scheduler.update` returned."""
        previous: Counter[float] = Counter()
        for seq in advanced:
            metrics = seq.metrics
            if seq.finish_reason != "error":
                metrics.num_generation_tokens += 1
                if metrics.last_token_time is None:
                    metrics.first_token_time = now
                    self._observe("time_to_first_token_seconds", now - metrics.arrival_time)
                else:
                    previous[metrics.last_token_time] += 1
                metrics.last_token_time = now
            if seq.finish_reason is not None:
                self._ended(seq, seq.finish_reason, now)
        for time, rows in previous.items():  # nearly all rows had their last token at the same step
            self._observe("inter_token_latency_seconds", now - time, rows)

    def on_step(self, step: ScheduledStep, advanced: Sequence[SequenceState], host_seconds: float) -> None:
        """A step ended. `advanced` is what `Scheduler.update` returned."""
        totals = self._totals
        ended = sum(seq.finish_reason is not None for seq in advanced)
        failed = sum(seq.finish_reason == "error" for seq in advanced)
        self._observe("iteration_tokens_total", step.num_tokens)
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

    def snapshot(self, scheduler: Scheduler, sampling_bytes: int = 0) -> MetricsSnapshot:
        """Totals with the scheduler's present gauges."""
        return replace(
            self._totals,
            prefix_cache_queries=scheduler.prefix.queries,
            prefix_cache_hits=scheduler.prefix.hits,
            kv_usage=scheduler.kv.usage,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            swapped=scheduler.swap.num_sequences,
            swap_usage=scheduler.swap.usage,
            swapped_out_blocks=scheduler.swap.moved_out,
            swapped_in_blocks=scheduler.swap.moved_in,
            sampling_bytes=sampling_bytes,
            finish_reasons=dict(self._reasons),
            histograms={
                name: Histogram(bounds, tuple(self._counts[name]), self._sums[name]) for name, bounds in BOUNDS.items()
            },
        )

    def _ended(self, seq: SequenceState, reason: str, now: float) -> None:
        metrics = seq.metrics
        metrics.finished_time, metrics.num_preemptions = now, seq.num_preemptions
        self._reasons[reason] = self._reasons.get(reason, 0) + 1
        self._observe("e2e_request_latency_seconds", now - metrics.arrival_time)
        self._observe("request_prompt_tokens", len(seq.prompt_ids))
        self._observe("request_generation_tokens", metrics.num_generation_tokens)
        if metrics.first_token_time is not None and metrics.first_scheduled_time is not None:
            self._observe("request_prefill_time_seconds", metrics.first_token_time - metrics.first_scheduled_time)
            self._observe("request_decode_time_seconds", now - metrics.first_token_time)

    def _observe(self, name: str, value: float, times: int = 1) -> None:
        self._counts[name][bisect_left(BOUNDS[name], value)] += times
        self._sums[name] += value * times
