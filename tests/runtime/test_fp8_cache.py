"""Engines over an FP8 KV cache: what its rounding costs is bounded, and nothing else depends on how a step is cut."""

import pytest
import torch
import transformers

from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError
from fusecomp.ops.kv_cache import AUTO, FP8, as_cached
from fusecomp.request import SamplingParams
from fusecomp.runtime import verify
from fusecomp.runtime.engine import Engine
from models.registry import build
from tests.serving import serve, tokens

VOCAB = 99


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    return model


def new_engine(model, **options) -> Engine:
    config = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "enforce_eager": True, "kv_cache_dtype": FP8}
    engine = Engine(model, EngineConfig(**{**config, **options}))
    for cache in engine._step.kv_caches:
        cache.fill_(255 if cache.dtype == torch.uint8 else float("nan"))  # as codes and as scales NaN, too
    return engine


def relative(actual, exact):
    return verify.relative_error(actual, exact)


@torch.no_grad()
def exact_logits(model, prompt):
    return model(torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("block_size", [1, 16])
def test_error_is_that_of_rounded_keys_and_values(model, block_size):
    engine, prompt = new_engine(model, block_size=block_size), tokens(VOCAB, 150)
    logits, rounded, exact = engine.token_logits(prompt), engine.rounded_logits(prompt)[0], exact_logits(model, prompt)
    cost = relative(rounded, exact)
    assert 1e-3 < cost < 0.1
    assert relative(logits, exact) <= 1.5 * cost
    # Rounding of sums may carry a value over to the next code, here and there.
    assert relative(logits, rounded) <= 0.1 * cost


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_logits_do_not_depend_on_chunks(model, chunk):
    prompt = tokens(VOCAB, 90)
    whole = new_engine(model, max_num_batched_tokens=128).token_logits(prompt)
    cut = new_engine(model, max_num_batched_tokens=chunk, max_num_seqs=1).token_logits(prompt)
    assert relative(cut, whole) <= 0.1 * relative(whole, exact_logits(model, prompt))


@pytest.mark.parametrize("blocks", [None, 9], ids=["roomy", "preempting"])
def test_served_tokens_are_maxima_within_the_rounding(model, blocks):
    """Long generations in mixed batches, chunked prefills and preemptions included."""
    engine = new_engine(model, kv_cache_bytes=blocks and blocks * 2 * 2 * 16 * (2 * 32 + 4))
    assert blocks is None or engine.num_kv_blocks == blocks
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [tokens(VOCAB, length, seed) for seed, length in enumerate((1, 2, 15, 16, 17, 40, 60, 5))]
    for prompt, served in zip(prompts, serve(engine, [(p, params) for p in prompts]), strict=True):
        assert served.error is None and len(served.token_ids) == 40
        sequence = [*prompt, *served.token_ids[:-1]]
        exact = exact_logits(model, sequence)[len(prompt) - 1 :]
        rounded = engine.rounded_logits(sequence)[0, len(prompt) - 1 :]
        gaps = exact.amax(-1) - exact.gather(-1, torch.tensor(served.token_ids)[:, None])[:, 0]
        assert float(gaps.max()) <= 2 * 1.5 * float((rounded - exact).abs().max())
    assert (engine.metrics.preemptions > 0) == (blocks is not None)
    assert engine._scheduler.kv.num_free == engine.num_kv_blocks


def test_blocks_are_smaller_and_more(model):
    plain, codes = (new_engine(model, kv_cache_dtype=kind, kv_cache_bytes=1 << 18) for kind in (AUTO, FP8))
    assert plain.kv_bytes_per_token == 2 * 2 * 2 * 32 * 4
    assert codes.kv_bytes_per_token == 2 * 2 * (2 * 32 + 4)
    assert codes.num_kv_blocks > 3.7 * plain.num_kv_blocks
    assert sum(cache.nbytes for cache in codes._step.kv_caches) <= 1 << 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed", "qwen3-moe", "gpt-oss"])
def test_receipts_are_filed_against_the_rounded_original(name, dtype):
    config = EngineConfig(
        max_model_len=96, max_num_seqs=5, max_num_batched_tokens=48, enforce_eager=True, kv_cache_dtype=FP8,
        verify="first",
    )  # fmt: skip
    report = Engine(build(name, dtype), config).report
    assert [receipt.what for receipt in report.receipts if receipt.passed] == ["prefill", "decode"]
    attention = [match for match in report.matches if match.pattern == "paged_attention"]
    assert {match.numerics for match in attention} == {"quantizing"}
    assert all(match.detail.endswith("FP8 KV cache") for match in attention)


def test_an_original_out_of_reach_is_not_verified(model):
    engine = new_engine(model)
    engine._step._probe.calls.clear()
    with pytest.raises(ConfigError, match="cannot be verified"):
        verify.verify_engine(engine, model)


def test_a_rounded_head_is_exact_in_bf16():
    x = torch.randn(200, 64) * torch.randn(200, 1).mul(9).exp()
    once = as_cached(x)
    assert torch.equal(once, once.bfloat16().float())
    error = (once - x).norm(dim=-1) / x.norm(dim=-1)
    assert error.max() < 2.0**-4 and error.mean() < 0.026
    # What is far below the largest of its head keeps its digits, down to 2^-14 of it.
    x[:, 0] = 300 * x.abs().amax(-1)
    kept = x.abs() > 2.0**-13 * x.abs().amax(-1, keepdim=True)
    assert kept.float().mean() > 0.5 and ((as_cached(x) - x).abs() <= 2.0**-4 * x.abs())[kept].all()


def test_a_key_that_is_not_finite_is_a_nan():
    x = torch.ones(3, 16)
    x[0, 3], x[1, 3] = float("inf"), float("nan")
    rounded = as_cached(x)
    assert rounded[:2, 3].isnan().all() and rounded[2].eq(1).all() and rounded[:2, :3].eq(1).all()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        EngineConfig(kv_cache_dtype="int8")
