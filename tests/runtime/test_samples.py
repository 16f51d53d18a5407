"""Samples of one prompt through an engine: the prompt is computed once, and who shares it does not change a token."""

import pytest

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from models.registry import build
from tests.serving import serve, tokens

CONFIG = EngineConfig(max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, enforce_eager=True)
PROMPT = tokens(90, 150)


def samples(engine, count, **params):
    """Completion i has seed 100 + i."""
    requests = [(PROMPT, SamplingParams(max_tokens=8, seed=100 + i, ignore_eos=True, **params)) for i in range(count)]
    before = engine.metrics
    outputs = [served.token_ids for served in serve(engine, requests)]
    after = engine.metrics
    computed = after.computed_tokens - before.computed_tokens
    return outputs, computed, after.prefix_cache_hits - before.prefix_cache_hits


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_eight_samples_compute_their_prompt_once(family, block_size):
    model = build(family)
    alone = Engine(model, CONFIG.replace(enable_prefix_caching=False, block_size=block_size))
    singles = [
        serve(alone, [(PROMPT, SamplingParams(max_tokens=8, seed=100 + i, ignore_eos=True))])[0] for i in range(8)
    ]
    expected = [single.token_ids for single in singles]
    assert len({tuple(ids) for ids in expected}) > 4, "samples differ"

    engine = Engine(model, CONFIG.replace(block_size=block_size))
    outputs, computed, hits = samples(engine, 8, temperature=1.0)
    assert outputs == expected
    shared = (len(PROMPT) - 1) // block_size * block_size
    assert hits == 7 * shared
    assert computed == len(PROMPT) + 7 * (len(PROMPT) - shared) + 8 * 7

    again, computed, hits = samples(engine, 3, temperature=1.0)
    assert again == expected[:3]
    assert hits == 3 * shared
    assert computed == 3 * (len(PROMPT) - shared) + 3 * 7

    without, computed, hits = samples(alone, 8, temperature=1.0)
    assert without == expected
    assert (computed, hits) == (8 * len(PROMPT) + 8 * 7, 0)


@pytest.mark.parametrize("outside", ["prompt_logits", "token_logits"])
def test_logits_outside_of_requests_do_not_spoil_what_is_cached(outside):
    """They are computed in blocks that nobody holds, which may be those that keep a prefix."""
    engine = Engine(build("llama"), CONFIG)
    first = samples(engine, 1, temperature=0.0)[0]
    other = tokens(90, 60, seed=7)
    getattr(engine, outside)([other] if outside == "prompt_logits" else other)
    outputs, _, hits = samples(engine, 1, temperature=0.0)
    assert outputs == first
    assert hits == 0
