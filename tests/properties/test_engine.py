"""Whatever arrives at an engine, in whatever order, on however small a cache: every request gets Hugging Face's tokens.

Engines are compiled once. An example gives one a scheduler with limits of its own, an empty builder, and a KV cache
full of NaN, so that a read of any slot that the example did not write shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.metrics import Metrics
from fusecomp.runtime.scheduler import Scheduler, SequenceState
from models.registry import build
from tests.serving import Greedy, hf_greedy, tokens

pytestmark = pytest.mark.xdist_group("engine-properties")
MAX_LEN = 64
EOS = 3  # an arbitrary id: the tiny models have none of their own
LENGTHS = (1, 2, 7, 8, 15, 16, 17, 18, 19, 20, 30, 33, 45)
CONFIG = EngineConfig(
    max_model_len=MAX_LEN, max_num_seqs=5, max_num_batched_tokens=64, kv_cache_bytes=4 << 20, enforce_eager=True
)
# Full attention and a sliding window, dense and sparse; pages of one token, of several, and as long as the context.
ENGINES = {"llama": 1, "mistral": 16, "qwen3-moe": 1, "llama-wide": 64}
engines = pytest.mark.parametrize("name", ENGINES)
# Each example serves up to eight requests on a real model: a fraction of the profile's examples is enough.
few = settings(max_examples=max(1, settings().max_examples // 20))


@dataclass(frozen=True)
class Prompt:
    """The first `length` tokens of a stream: prompts are few, so that the oracle is asked once for each."""

    seed: int
    length: int


@dataclass(frozen=True)
class Request:
    prompt: Prompt
    params: SamplingParams
    arrives: int
    aborted: int | None


@dataclass(frozen=True)
class Scenario:
    """Requests with the step before which each arrives and is aborted, and limits that each fits into alone."""

    requests: list[Request]
    max_num_seqs: int
    max_num_batched_tokens: int
    spare_tokens: int
    overlap: bool = False
    prefix_caching: bool = False

    def num_blocks(self, block_size: int) -> int:
        totals = [min(MAX_LEN, r.prompt.length + (r.params.max_tokens or MAX_LEN)) for r in self.requests]
        return max(-(-(total - 1) // block_size) for total in totals) + self.spare_tokens // block_size


STOP_IDS = ((), (), (), (5, 17), tuple(range(20, 40)))
# Of what a row's own tokens decide, also while the host does not know them yet.
WISHES = (
    {},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"bad_words": tuple((a, b) for a in range(0, 150, 8) for b in range(0, 150, 4)), "logit_bias": {7: 3.0}},
    {"min_p": 0.02, "typical_p": 0.9, "min_tokens": 6, "stop_token_ids": tuple(range(0, 150, 3))},
)


@st.composite
def scenarios(draw: st.DrawFn, *, aborts: bool = False, sampled: bool = False) -> Scenario:
    requests = []
    for _ in range(draw(st.sampled_from([1, 3, 5, 6, 8]))):
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.7, 1.5])) if sampled else 0.0,
            top_k=draw(st.sampled_from([0, 5])) if sampled else 0,
            top_p=draw(st.sampled_from([1.0, 0.8])) if sampled else 1.0,
            seed=draw(st.integers(0, 2)) if sampled else None,
            **(draw(st.sampled_from(WISHES)) if sampled else {}),
            max_tokens=12 if sampled else draw(st.sampled_from([None, 1, 7, 16, 20, 24])),
            ignore_eos=draw(st.booleans()),
            **({} if sampled else {"stop_token_ids": draw(st.sampled_from(STOP_IDS))}),
        )
        prompt = Prompt(draw(st.integers(0, 1)), draw(st.sampled_from(LENGTHS)))
        arrives = draw(st.sampled_from([0, 0, 0, 1, 2, 5, 12]))
        aborted = draw(st.none() | st.integers(0, 25)) if aborts else None
        requests.append(Request(prompt, params, arrives, aborted))
    max_num_seqs = draw(st.sampled_from([1, 2, 3, 4, 5, 5]))
    return Scenario(
        requests=requests,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 5, 20, 50])),
        spare_tokens=draw(st.sampled_from([0, 1, 16, 24, 300])),  # mostly so few that sequences preempt
        overlap=draw(st.booleans()),
        prefix_caching=draw(st.booleans()),
    )


@cache
def engine(name: str) -> Engine:
    config = CONFIG.replace(block_size=ENGINES[name])
    return Engine(build(name.removesuffix("-wide")), config, eos_token_ids=(EOS,))


@cache
def stock(family: str):
    model = build(family)
    model.set_attn_implementation("eager")
    return model


@cache
def oracle(name: str, prompt: Prompt) -> Greedy:
    """Hugging Face's eager greedy tokens up to the context's end, with no stop rule."""
    model = stock(name.removesuffix("-wide"))
    return hf_greedy(model, prompt_ids(name, prompt), MAX_LEN - prompt.length)


def prompt_ids(name: str, prompt: Prompt) -> list[int]:
    return tokens(stock(name.removesuffix("-wide")).config.vocab_size, prompt.length, prompt.seed)


def until_stop(ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
    """What the stop rules leave of the tokens of an endless request, which end at the context's end."""
    for index, token in enumerate(ids[: params.max_tokens]):
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            return ids[: index + 1], "stop"
    return ids[: params.max_tokens], "length"


class LoggedStep:
    """The engine's compiled step; keeps the logits that it gave last."""

    def __init__(self, step) -> None:
        self._step, self.logits = step, torch.empty(0)

    def __call__(self, batch):
        self.logits = self._step(batch)
        return self.logits

    def __getattr__(self, name):
        return getattr(self._step, name)


@dataclass
class Run:
    """An example under way: tokens and end of every request, and the logits [V] that each token was chosen from."""

    token_ids: list[list[int]]
    finish_reasons: list[str | None]
    logits: list[list[torch.Tensor]]
    preemptions: int = 0
    computed: Counter = field(default_factory=Counter)
    cached: dict[str, int] = field(default_factory=dict)


def run(name: str, scenario: Scenario) -> Run:
    """Serve the scenario on the family's engine, checking what must hold at every step and at the end."""
    served_by, count = engine(name), len(scenario.requests)
    steps = served_by._step = LoggedStep(getattr(served_by._step, "_step", served_by._step))
    block_size = ENGINES[name]
    num_blocks = min(scenario.num_blocks(block_size), len(served_by._step.kv_caches[0]))
    caching = scenario.prefix_caching
    kv = KVCacheManager(num_blocks, block_size, served_by._step.block_bytes, prefix_caching=caching)
    scheduler = Scheduler(scenario.max_num_seqs, scenario.max_num_batched_tokens, MAX_LEN, kv)
    served_by._scheduler, served_by._metrics = scheduler, Metrics()
    served_by._builder = served_by._new_builder(served_by.config)
    served_by._flight, served_by.overlap = None, scenario.overlap
    for cache_ in served_by._step.kv_caches:
        cache_.fill_(float("nan"))

    done = Run([[] for _ in range(count)], [None] * count, [[] for _ in range(count)])
    update = scheduler.update
    logits_of: dict[int, tuple] = {}  # by identity of the step, which must live as long

    def checked_update(step, sampled, eos) -> list[SequenceState]:
        assert 1 <= len(step.seqs) <= scenario.max_num_seqs
        assert step.num_tokens <= scenario.max_num_batched_tokens
        done.preemptions += step.num_preempted
        for row, entry in enumerate(step.entries):
            done.computed[entry.seq.request_id] += entry.num_new_tokens
            done.cached[entry.seq.request_id] = entry.seq.num_cached_tokens
            if entry.samples:
                done.logits[int(entry.seq.request_id)].append(logits_of[id(step)][1][row].clone())
        return update(step, sampled, eos)

    def logged_launch(step, continues=None):
        flight = Engine._launch(served_by, step, continues)
        logits_of[id(step)] = step, steps.logits
        return flight

    scheduler.update = checked_update  # type: ignore[method-assign]
    served_by._launch = logged_launch  # type: ignore[method-assign]
    number = num_steps = 0
    while number <= max(r.arrives for r in scenario.requests) or served_by.has_unfinished_requests():
        for index, request in enumerate(scenario.requests):
            if request.arrives == number:
                served_by.add_request(str(index), prompt_ids(name, request.prompt), request.params)
        for index, request in enumerate(scenario.requests):
            if request.aborted == number and request.arrives <= number and done.finish_reasons[index] is None:
                served_by.abort_request(str(index))
                done.finish_reasons[index] = "abort"
        had_work = served_by.has_unfinished_requests() or served_by._flight is not None  # launched before an abort
        outputs = served_by.step()
        num_steps += had_work
        for out in outputs:
            index = int(out.request_id)
            assert done.finish_reasons[index] is None, "a request gave something after its end"
            assert out.error is None
            done.token_ids[index] += out.new_token_ids
            done.finish_reasons[index] = out.finish_reason
        number += 1
        assert number < 5000, "it does not end"
    check_end(served_by, scenario, done, num_steps)
    return done


def check_end(served_by: Engine, scenario: Scenario, done: Run, num_steps: int) -> None:
    """All is given back, and the counters say what happened."""
    kv, metrics = served_by._scheduler.kv, served_by.metrics
    assert kv.num_free == kv.num_blocks == served_by.num_kv_blocks
    assert (metrics.kv_usage, metrics.running, metrics.waiting) == (0, 0, 0)
    assert metrics.requests == metrics.finished == len(scenario.requests)
    assert metrics.prompt_tokens == sum(r.prompt.length for r in scenario.requests)
    assert metrics.generation_tokens == sum(map(len, done.token_ids))
    assert metrics.steps == num_steps
    assert metrics.preemptions == done.preemptions
    assert metrics.computed_tokens == done.computed.total()
    assert metrics.prefix_cache_hits == sum(done.cached.values()) <= metrics.prefix_cache_queries
    assert scenario.prefix_caching or metrics.prefix_cache_queries == 0
    for index, (request, ids) in enumerate(zip(scenario.requests, done.token_ids, strict=True)):
        needed = request.prompt.length + len(ids) - 1  # the last token is never fed back
        needed -= done.cached.get(str(index), 0)
        if ids:
            assert done.computed[str(index)] >= needed
        if ids and not done.preemptions and done.finish_reasons[index] != "abort":
            # A step launched ahead may have gone on with a request that the one before it ended.
            assert done.computed[str(index)] <= needed + scenario.overlap
    report = served_by.report
    assert (report.graphs, report.graph_breaks, report.recompiles, report.fallbacks) == (1, 0, 0, {})


def check_greedy(name: str, scenario: Scenario, done: Run) -> None:
    for index, request in enumerate(scenario.requests):
        exact = oracle(name, request.prompt)
        expected, reason = until_stop(exact.token_ids, request.params)
        ids = done.token_ids[index]
        if done.finish_reasons[index] == "abort":
            assert ids == expected[: len(ids)]
        else:
            assert (ids, done.finish_reasons[index]) == (expected, reason)
        for got, wanted in zip(done.logits[index], exact.logits, strict=False):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@engines
@few
@given(scenario=scenarios())
def test_every_request_gets_the_tokens_of_hugging_face(name, scenario):
    done = run(name, scenario)
    check_greedy(name, scenario, done)
    event("preempted" if done.preemptions else "never preempted")
    event("shared" if any(done.cached.values()) else "never shared")


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-moe"])
def test_preempted_requests_get_the_same_tokens(name, overlap):
    """No room for two requests at their longest, budget for less than a prompt: every one but the first comes back."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests = [Request(Prompt(i % 2, length), params, i, None) for i, length in enumerate((16, 15, 17, 16, 15))]
    scenario = Scenario(requests, max_num_seqs=3, max_num_batched_tokens=13, spare_tokens=0, overlap=overlap)
    done = run(name, scenario)
    assert done.preemptions >= (1 if overlap else 2)  # ahead, blocks are given back a step later than they could be
    check_greedy(name, scenario, done)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-moe"])
def test_a_hit_gives_the_tokens_of_a_miss(name, overlap):
    """Twelve samples of a prompt and of its beginnings, five at a time: most of it is computed once."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    requests = [
        Request(Prompt(0, length), params, 0, None) for length in (45, 45, 45, 33, 45, 17, 45, 45, 33, 45, 45, 45)
    ]
    scenario = Scenario(requests, 5, 64, 300, overlap=overlap, prefix_caching=True)
    done = run(name, scenario)
    check_greedy(name, scenario, done)
    block = ENGINES[name]
    for index, request in enumerate(requests[1:], start=1):
        shared = (min(request.prompt.length, 45) - 1) // block * block
        assert done.cached[str(index)] == shared
    assert done.computed.total() == 45 + sum(r.prompt.length for r in requests[1:]) - sum(done.cached.values()) + 12 * 5


@engines
@few
@given(scenario=scenarios(aborts=True))
def test_aborts_leave_the_others_alone(name, scenario):
    check_greedy(name, scenario, run(name, scenario))


@cache
def alone(name: str, prompt: Prompt, params: SamplingParams) -> list[int]:
    return run(name, Scenario([Request(prompt, params, 0, None)], 1, MAX_LEN, 0)).token_ids[0]


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
@few
@given(scenario=scenarios(sampled=True))
def test_a_seeded_request_draws_the_same_tokens_in_any_company(name, scenario):
    done = run(name, scenario)
    for request, ids in zip(scenario.requests, done.token_ids, strict=True):
        assert ids == alone(name, request.prompt, request.params)
