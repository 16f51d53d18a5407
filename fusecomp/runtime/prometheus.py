"""A metrics snapshot in Prometheus' text format, version 0.0.4.

The names are vLLM's, its `vllm:` prefix kept: dashboards and alerts are written for them, and what is counted is the
same. What vLLM has no name for has the prefix `fusecomp:`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusecomp.runtime.metrics import MetricsSnapshot

# Name, kind, help, field of the snapshot.
SCALARS = (
    ("vllm:num_requests_running", "gauge", "Number of requests in model execution batches.", "running"),
    ("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed.", "waiting"),
    ("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", "kv_usage"),
    ("vllm:num_requests_swapped", "gauge", "Number of requests swapped to CPU.", "swapped"),
    ("vllm:cpu_cache_usage_perc", "gauge", "CPU KV-cache usage. 1 means 100 percent usage.", "swap_usage"),
    ("fusecomp:swapped_out_blocks_total", "counter", "KV blocks moved to host memory.", "swapped_out_blocks"),
    ("fusecomp:swapped_in_blocks_total", "counter", "KV blocks moved back from host memory.", "swapped_in_blocks"),
    ("vllm:num_preemptions_total", "counter", "Cumulative number of preemptions.", "preemptions"),
    ("vllm:prompt_tokens_total", "counter", "Number of prompt tokens of accepted requests.", "prompt_tokens"),
    ("vllm:generation_tokens_total", "counter", "Number of tokens generated.", "generation_tokens"),
    ("fusecomp:computed_tokens_total", "counter", "Tokens that went through the model.", "computed_tokens"),
    ("fusecomp:steps_total", "counter", "Engine steps.", "steps"),
    ("fusecomp:host_seconds_total", "counter", "Seconds of scheduling and bookkeeping on the host.", "host_seconds"),
    ("fusecomp:sampling_table_bytes", "gauge", "Device memory of sampling tables.", "sampling_bytes"),
)
HISTOGRAMS = {
    "time_to_first_token_seconds": "Time from arrival to the first token.",
    "inter_token_latency_seconds": "Time from one token to the next.",
    "e2e_request_latency_seconds": "Time from arrival to the end.",
    "request_queue_time_seconds": "Time from arrival to the first step.",
    "request_prefill_time_seconds": "Time from the first step to the first token.",
    "request_decode_time_seconds": "Time from the first token to the end.",
    "request_prompt_tokens": "Number of prompt tokens of a request.",
    "request_generation_tokens": "Number of tokens generated for a request.",
    "iteration_tokens_total": "Number of tokens per engine step.",
}


@dataclass(frozen=True)
class Histogram:
    """Observations by bucket: `counts` has one more entry than `bounds`, for what lies above the last."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


def exposition(snapshot: MetricsSnapshot, model_name: str) -> str:
    """The whole text, ending with a newline."""
    return "".join(line + "\n" for line in _lines(snapshot, model_name))


def _lines(snapshot: MetricsSnapshot, model_name: str) -> Iterator[str]:
    labels = f'engine="0",model_name="{_escaped(model_name)}"'
    for name, kind, text, field in SCALARS:
        yield from _head(name, kind, text)
        yield f"{name}{{{labels}}} {_number(getattr(snapshot, field))}"
    yield from _head("vllm:request_success_total", "counter", "Count of finished requests.")
    for reason, count in snapshot.finish_reasons.items():
        yield f'vllm:request_success_total{{{labels},finished_reason="{_escaped(reason)}"}} {count}'
    for short, histogram in snapshot.histograms.items():
        name = f"vllm:{short}"
        yield from _head(name, "histogram", HISTOGRAMS[short])
        bounds = [*map(_number, histogram.bounds), "+Inf"]
        for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        yield f"{name}_sum{{{labels}}} {_number(histogram.sum)}"
        yield f"{name}_count{{{labels}}} {histogram.count}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _number(value: float) -> str:
    return repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
