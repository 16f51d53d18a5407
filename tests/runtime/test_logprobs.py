"""Log-probabilities: packed and unpacked against log_softmax, and through the engine against the model itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.config import EngineConfig
from fusecomp.request import MAX_LOGPROBS, SamplingParams
from fusecomp.runtime import logprobs
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.logprobs import WIDTHS, pack, unpack, width_for
from models.registry import build

PROMPTS = [[5, 17, 42, 99, 7, 3, 8], [33], [150, 61, 61, 4, 19, 120, 11, 14, 15, 16, 100]]


@given(st.integers(1, 5), st.sampled_from([2, 5, 300]), st.sampled_from([0, 1, 2, 8, 20, 128]), st.integers(0, 999))
def test_packed_rows_are_log_softmax(rows, vocab, count, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 5
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    packed = pack(logits, tokens, width_for(count))
    assert packed.dtype == torch.int32 and packed.shape == (rows, 2 * min(width_for(count), vocab) + 3)
    exact = logits.double().log_softmax(-1)
    for line, token, row in zip(exact, tokens.tolist(), packed.numpy(), strict=True):
        found = unpack(row, min(count, vocab))
        first = next(iter(found))
        assert first == token
        order = line.sort(descending=True, stable=True)
        for at, (i, value) in enumerate(found.items()):
            assert value.logprob == pytest.approx(line[i].item(), abs=1e-4)
            assert value.rank == (line >= line[i]).sum()
            assert value.decoded_token is None
            if at:
                assert line[i] >= order.values[min(count, vocab) - 1]
        assert len(found) in (min(count, vocab), min(count, vocab) + 1)


def test_widths_reach_what_requests_may_ask_for():
    assert WIDTHS[-1] == MAX_LOGPROBS and width_for(MAX_LOGPROBS) == MAX_LOGPROBS
    assert [width_for(n) for n in (0, 1, 2, 8, 9, 33)] == [1, 1, 8, 8, 32, 128]


def test_low_precision_logits_are_scored_in_float32():
    logits = (torch.randn(3, 400) * 8).bfloat16()
    tokens = torch.tensor([1, 2, 3])
    assert pack(logits, tokens, 8)[:, :2].equal(pack(logits.float(), tokens, 8)[:, :2])


@pytest.fixture(scope="module")
def model():
    return build("llama")


def serve(engine, requests):
    """Scores of outputs and prompts, by request."""
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    tokens: list[list[int]] = [[] for _ in requests]
    outputs: list[list] = [[] for _ in requests]
    prompts: list[dict] = [{} for _ in requests]
    while engine.has_unfinished_requests():
        for out in engine.step():
            index = int(out.request_id)
            tokens[index] += out.new_token_ids
            if out.scores is not None:
                outputs[index].append(out.scores.copy())
            for offset, row in enumerate(() if out.prompt_scores is None else out.prompt_scores):
                prompts[index][out.prompt_start + offset] = row.copy()
    return tokens, outputs, prompts


def check(row, line, token, count):
    found = unpack(row, count)
    assert next(iter(found)) == token
    assert found[token].logprob == pytest.approx(line[token].item(), abs=2e-4)
    best = line.topk(count)
    assert sorted((v.logprob for k, v in found.items()), reverse=True)[:count] == pytest.approx(
        best.values.tolist(), abs=2e-4
    )


@pytest.mark.parametrize("budget", [5, 64], ids=["chunks", "whole"])
@pytest.mark.parametrize("blocks", [None, 4], ids=["roomy", "preempting"])
@pytest.mark.parametrize("overlap", [False, True])
def test_engine_scores_are_the_models(model, monkeypatch, budget, blocks, overlap):
    """Penalised and sampled tokens too: log-probabilities are those of the model's own logits."""
    monkeypatch.setattr(logprobs, "PASS_ROWS", 4)  # a step's prompt tokens take several passes
    monkeypatch.setattr(logprobs, "SOFTMAX_ROWS", 3)
    shape = model.config
    block_bytes = shape.num_hidden_layers * 2 * shape.num_key_value_heads * 16 * shape.head_dim * 4
    config = EngineConfig(
        max_num_seqs=3,
        max_num_batched_tokens=budget,
        max_model_len=64,
        enforce_eager=True,
        kv_cache_bytes=blocks and blocks * block_bytes,
    )
    engine = Engine(model, config)
    engine.overlap = overlap
    params = [
        SamplingParams(temperature=0, max_tokens=20, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=1.0, seed=1, max_tokens=20, logprobs=0, repetition_penalty=1.5, prompt_logprobs=0),
        SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=1, ignore_eos=True),
        SamplingParams(temperature=0.5, seed=2, max_tokens=20, logprobs=9),
    ]
    prompts = [*PROMPTS, PROMPTS[0]]
    tokens, outputs, scored = serve(engine, list(zip(prompts, params, strict=True)))
    assert blocks is None or engine.metrics.preemptions > 0
    for prompt, wish, ids, rows, own in zip(prompts, params, tokens, outputs, scored, strict=True):
        with torch.no_grad():
            lines = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        assert len(rows) == (0 if wish.logprobs is None else len(ids))
        for at, row in enumerate(rows):
            check(row, lines[len(prompt) - 1 + at], ids[at], wish.logprobs)
        assert sorted(own) == ([] if wish.prompt_logprobs is None else list(range(1, len(prompt))))
        for at, row in own.items():
            check(row, lines[at - 1], prompt[at], wish.prompt_logprobs)
