"""`deterministic=True`: a request's tokens and log-probabilities are the same to the bit, alone and in any company.

Engines are compiled once; an example gives one a scheduler and a cache of its own, as in `test_engine.py`. What must
not matter is drawn: the other requests, when they arrive, rows and tokens of a step, blocks (so that some are preempted
and computed again), prefix caching, and steps launched ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.config import EngineConfig
from fusecomp.errors import VerificationError
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.loading import load_model
from fusecomp.runtime.metrics import Metrics
from fusecomp.runtime.packing import check_invariance
from fusecomp.runtime.scheduler import Scheduler
from fusecomp.runtime.swap import HostBlocks
from fusecomp.runtime.swap_space import SwapSpace
from models.registry import build
from tests.serving import tokens

pytestmark = pytest.mark.xdist_group("deterministic")
PICO = Path(__file__).parents[2] / "models"
MAX_LEN = 48
CONFIG = EngineConfig(
    max_model_len=MAX_LEN, max_num_seqs=5, max_num_batched_tokens=64, kv_cache_bytes=4 << 20, device="cpu",
    deterministic=True, enforce_eager=True,
)  # fmt: skip
ENGINES = {
    "llama": (torch.float32, 16, {}),
    "qwen3-moe": (torch.bfloat16, 1, {}),
    "gpt-oss": (torch.float32, 16, {"kv_cache_dtype": "fp8"}),
    "pico-llama": (torch.float32, 16, {"enforce_eager": False}),
    "pico-moe": (torch.bfloat16, 16, {"enforce_eager": False, "fuse": "always"}),
}
few = settings(max_examples=max(2, settings().max_examples // 30))
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=6, logprobs=5),
    SamplingParams(temperature=0.0, max_tokens=9, logprobs=0, repetition_penalty=1.3),
    SamplingParams(temperature=1.2, seed=7, max_tokens=6, logprobs=2),
    SamplingParams(temperature=0.8, seed=3, top_p=0.9, top_k=40, typical_p=0.9, max_tokens=6, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=2, logprobs=1, prompt_logprobs=3),
)


@cache
def engine(name: str) -> Engine:
    dtype, block_size, options = ENGINES[name]
    if name.startswith("pico"):
        model, _ = load_model(PICO / name, str(dtype).removeprefix("torch."), "cpu", None, None)
    else:
        model = build(name, dtype)
    return Engine(model, CONFIG.replace(block_size=block_size, **options))


@dataclass
class Outcome:
    """All that a request gave, as bits."""

    token_ids: list[int] = field(default_factory=list)
    scores: list[bytes] = field(default_factory=list)
    prompt_scores: dict[int, bytes] = field(default_factory=dict)  # by index in the prompt
    reason: str | None = None


@dataclass(frozen=True)
class Load:
    max_num_seqs: int = 5
    max_num_batched_tokens: int = 64
    spare_blocks: int = 100
    prefix_caching: bool = False
    overlap: bool = False
    swap: bool = False


Asked = tuple[list[int], SamplingParams, int]  # prompt, parameters, step of its arrival


def serve(name: str, requests: list[Asked], load: Load) -> tuple[list[Outcome], int]:
    """What each request gave, and how many were preempted."""
    served_by = engine(name)
    block_size = served_by.config.block_size
    longest = max(len(prompt) + (params.max_tokens or 0) - 1 for prompt, params, _ in requests)
    num_blocks = min(-(-longest // block_size) + load.spare_blocks, len(served_by._step.kv_caches[0]))
    kv = KVCacheManager(num_blocks, block_size, prefix_caching=load.prefix_caching)
    swap = SwapSpace(40 if load.swap else 0, block_size, lambda tokens, blocks: True)
    served_by._scheduler = Scheduler(load.max_num_seqs, load.max_num_batched_tokens, MAX_LEN, kv, swap)
    served_by._host_blocks = HostBlocks(served_by._step.kv_caches, 40)
    served_by._metrics, served_by._builder = Metrics(), served_by._new_builder(served_by.config)
    served_by._flight, served_by.overlap = None, load.overlap
    outcomes = [Outcome() for _ in requests]
    step, preempted, waiting = 0, 0, dict(enumerate(requests))
    while waiting or served_by.has_unfinished_requests():
        for index, (prompt, params, arrives) in list(waiting.items()):
            if arrives <= step or not served_by.has_unfinished_requests():
                served_by.add_request(str(index), prompt, params)
                del waiting[index]
        for out in served_by.step():
            outcome, params = outcomes[int(out.request_id)], requests[int(out.request_id)][1]
            assert out.error is None
            outcome.token_ids += out.new_token_ids
            if out.scores is not None:
                outcome.scores.append(meaning(out.scores, params.logprobs))
            if out.prompt_scores is not None:
                rows = [meaning(row, params.prompt_logprobs) for row in out.prompt_scores]
                for at, row in enumerate(rows, out.prompt_start):  # a prompt that is computed again is scored again
                    assert outcome.prompt_scores.setdefault(at, row) == row
            outcome.reason = out.finish_reason
        step += 1
    preempted = served_by.metrics.preemptions
    assert kv.num_free == num_blocks
    return outcomes, preempted


def meaning(row: np.ndarray, count: int | None) -> bytes:
    """What a request asked for of its packed scores, whose width follows what others asked for: see `logprobs.py`."""
    assert count is not None
    half, own = (len(row) - 1) // 2, count + 1
    return row[:own].tobytes() + row[half : half + own].tobytes() + row[-1:].tobytes()


@cache
def alone(name: str, prompt: tuple[int, ...], params: SamplingParams) -> Outcome:
    return serve(name, [(list(prompt), params, 0)], Load())[0][0]


LENGTHS = (1, 2, 15, 16, 17, 30)


@pytest.mark.parametrize("name", ENGINES)
@few
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.sampled_from(LENGTHS), st.sampled_from(range(len(PARAMS))), st.integers(0, 6)
        ), min_size=2, max_size=6,
    ),
    st.builds(
        Load, st.integers(1, 5), st.sampled_from([5, 7, 16, 64]), st.sampled_from([0, 1, 3, 40]), st.booleans(),
        st.booleans(), st.booleans(),
    ),
)  # fmt: skip
def test_company_does_not_matter(name, asked, load):
    vocab = engine(name).vocab_size
    requests = [(tokens(vocab, length, seed), PARAMS[which], arrives) for seed, length, which, arrives in asked]
    outcomes, _ = serve(name, requests, load)
    for (prompt, params, _), outcome in zip(requests, outcomes, strict=True):
        assert outcome == alone(name, tuple(prompt), params)


@pytest.mark.parametrize("swap", [False, True], ids=["computed again", "moved"])
def test_preempted_sequences_give_the_same_bits(swap):
    requests = [(tokens(engine("llama").vocab_size, 15, seed), PARAMS[1], 0) for seed in range(4)]
    outcomes, preempted = serve("llama", requests, Load(spare_blocks=2, swap=swap))
    assert preempted
    assert bool(engine("llama").metrics.swapped_in_blocks) == swap
    for (prompt, params, _), outcome in zip(requests, outcomes, strict=True):
        assert outcome == alone("llama", tuple(prompt), params)


def test_start_up_tries_the_promise(monkeypatch):
    """As on a GPU: one unit in the last place is found out."""
    served_by = engine("llama")
    assert check_invariance(served_by) > 0
    logits = served_by.prompt_logits

    def other(prompts, *, decode_last=False):
        found = logits(prompts, decode_last=decode_last)
        return found if len(prompts) > 1 and not decode_last else torch.nextafter(found, found + 1)

    monkeypatch.setattr(served_by, "prompt_logits", other)
    with pytest.raises(VerificationError, match="one by one"):
        check_invariance(served_by)
