"""Metrics in Prometheus' text format, read back by the grammar of that format."""

from __future__ import annotations

import re

import pytest

from fusecomp.request import SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.metrics import BOUNDS, Metrics
from fusecomp.runtime.scheduler import Scheduler, SequenceState

SAMPLE = re.compile(r'^([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\} (\S+)$')


def parsed(text):
    """{(name, labels): value}, and the kinds; fails on a line that is neither comment nor sample."""
    samples, kinds = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            found = SAMPLE.match(line)
            assert found, line
            labels = tuple(sorted(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', found[2])))
            assert (found[1], labels) not in samples
            samples[found[1], labels] = float(found[3])
    return samples, kinds


@pytest.fixture
def served():
    """Two requests of two tokens, half a second from step to step, and an aborted one."""
    scheduler, metrics = Scheduler(4, 64, 64, KVCacheManager(64, 1)), Metrics()
    for i, name in enumerate("abc"):
        seq = SequenceState(name, [1, 2, 3], SamplingParams(max_tokens=2))
        seq.metrics.arrival_time = 10.0 + i
        scheduler.add(seq)
        metrics.on_add(seq)
    metrics.on_abort(scheduler.abort("c"), "abort", 13.0)
    for now in (20.0, 20.5):
        step = scheduler.schedule()
        metrics.on_launch(step, now)
        advanced = scheduler.update(step, [5, 6], ())
        metrics.on_tokens(advanced, now + 0.25)
        metrics.on_step(step, advanced, 0.001)
    return metrics.snapshot(scheduler, sampling_bytes=77)


def test_every_sample_is_well_formed_and_right(served):
    samples, kinds = parsed(served.prometheus('a "name"\\\n'))
    named = {name: value for (name, labels), value in samples.items() if len(labels) == 2}
    assert all(dict(labels)["model_name"] == r"a \"name\"\\\n" for _, labels in samples)
    assert named["vllm:prompt_tokens_total"] == 9 and named["vllm:generation_tokens_total"] == 4
    assert (named["vllm:num_requests_running"], named["vllm:num_requests_waiting"]) == (0, 0)
    assert named["vllm:kv_cache_usage_perc"] == 0 and named["fusecomp:sampling_table_bytes"] == 77
    by_reason = {
        dict(labels)["finished_reason"]: value
        for (name, labels), value in samples.items()
        if name == "vllm:request_success_total"
    }
    assert by_reason == {"stop": 0, "length": 2, "abort": 1, "error": 0}
    assert all(kind in ("counter", "gauge", "histogram") for kind in kinds.values())
    assert all(
        name.endswith("_total") == (kind == "counter") for name, kind in kinds.items() if "iteration" not in name
    )


def test_histograms_are_cumulative_and_add_up(served):
    samples, kinds = parsed(served.prometheus())
    assert {name.removeprefix("vllm:") for name, kind in kinds.items() if kind == "histogram"} == set(BOUNDS)
    for short, bounds in BOUNDS.items():
        buckets = {
            dict(labels)["le"]: value for (name, labels), value in samples.items() if name == f"vllm:{short}_bucket"
        }
        assert list(buckets) == [*(repr(float(b)) for b in bounds), "+Inf"]
        values = list(buckets.values())
        assert values == sorted(values)
        plain = {name: value for (name, labels), value in samples.items() if len(labels) == 2}
        assert values[-1] == plain[f"vllm:{short}_count"]
    plain = {name: value for (name, labels), value in samples.items() if len(labels) == 2}
    assert plain["vllm:time_to_first_token_seconds_sum"] == 20.25 - 10 + 20.25 - 11
    assert (plain["vllm:inter_token_latency_seconds_count"], plain["vllm:inter_token_latency_seconds_sum"]) == (2, 1.0)
    assert plain["vllm:request_queue_time_seconds_sum"] == 19
    assert plain["vllm:request_prefill_time_seconds_sum"] == 0.5
    assert plain["vllm:request_decode_time_seconds_sum"] == 1.0
    assert (plain["vllm:e2e_request_latency_seconds_count"], plain["vllm:request_generation_tokens_sum"]) == (3, 4)
    assert plain["vllm:iteration_tokens_total_sum"] == 8


def test_observations_on_a_bound_belong_to_its_bucket(served):
    assert served.histograms["inter_token_latency_seconds"].counts[9] == 2  # 0.5 s, at most 0.5
