"""Receipts pass for what is right and fail for what is wrong; NaN ends the requests it reaches, and no others."""

import dataclasses
import math

import pytest
import torch

import fusecomp.ops.attention as attention_ops
import fusecomp.ops.experts as experts_ops
from fusecomp.errors import RequestError, UnsupportedModelError, VerificationError
from fusecomp.patterns.attention import PagedAttention
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.verify import ALLOWED_RATIO, FLOOR, LENGTHS, model_error, pack, relative_error, within_contract
from models.registry import FAMILIES, WINDOW, build
from tests.serving import CONFIG, VARIANTS, engine, hf_greedy, model, serve, tokens

pytestmark = pytest.mark.xdist_group("families")
variants = pytest.mark.parametrize(("name", "dtype"), VARIANTS, ids=lambda value: str(value).removeprefix("torch."))
VERIFIED = CONFIG.replace(verify="first")


@variants
def test_every_family_files_passing_receipts(name, dtype):
    report = engine(name, dtype).report
    assert [receipt.what for receipt in report.receipts] == ["prefill", "decode"]
    for receipt in report.receipts:
        assert receipt.passed
        assert receipt.error <= max(ALLOWED_RATIO * receipt.reference_error, FLOOR)
        assert (receipt.reference_error == 0) == (dtype == torch.float32)
    assert "receipt decode: passed" in report.summary()


def test_verification_is_off_unless_asked_for():
    assert Engine(build("mistral"), CONFIG).report.receipts == []


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 2, "max_num_batched_tokens": 6},
        {"max_model_len": 10},
        {"max_model_len": 2, "block_size": 1},
        {"kv_cache_bytes": 2 * 2 * 2 * 16 * 32 * 4},
    ],
    ids=["one row", "few tokens", "short context", "two tokens of context", "one block"],
)
def test_an_engine_of_any_size_can_verify_itself(limits):
    report = Engine(build("mistral"), VERIFIED.replace(**limits)).report
    assert report.receipts
    assert all(receipt.passed for receipt in report.receipts)


def wrong_paging(monkeypatch, **wrong):
    """The paging pass, rewritten to emit another attention than the one it found."""
    emit = PagedAttention.emit
    monkeypatch.setattr(PagedAttention, "emit", lambda self, call, *rest: emit(self, change(call), *rest))

    def change(call):
        return dataclasses.replace(call, **{key: value(getattr(call, key)) for key, value in wrong.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": lambda scale: 1.1 * scale},
        {"window": lambda window: 0},
        {"window": lambda window: window + 1},
        {"softcap": lambda softcap: 2.0},
    ],
    ids=["scale", "no window", "window one too wide", "softcap"],
)
def test_a_wrong_rewrite_is_refused(monkeypatch, wrong, dtype):
    assert FAMILIES["mistral"].windows[0] == WINDOW < max(LENGTHS)
    wrong_paging(monkeypatch, **wrong)
    with pytest.raises(VerificationError, match=r"MistralForCausalLM: .* in prefill.*Remedy: run the model with stock"):
        Engine(build("mistral", dtype), VERIFIED)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_wrong_decode_is_refused(monkeypatch, name):
    decode = attention_ops._decode_rows
    monkeypatch.setattr(attention_ops, "_decode_rows", lambda q, *rest: decode(q * 1.1, *rest))
    with pytest.raises(VerificationError, match="in decode"):
        Engine(build(name, torch.bfloat16), VERIFIED)


def test_rows_that_see_their_neighbours_are_refused(monkeypatch):
    """A prompt alone would pass: only packing shows it."""
    prefill = attention_ops._prefill_row

    def first_table(q, kv_cache, length, table, *rest):
        first = table if first_table.seen is None else first_table.seen
        first_table.seen = first
        return prefill(q, kv_cache, length, first, *rest)

    first_table.seen = None
    monkeypatch.setattr(attention_ops, "_prefill_row", first_table)
    with pytest.raises(UnsupportedModelError, match="packed in one step influence each other"):
        Engine(build("llama"), CONFIG.replace(block_size=64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [torch.relu, torch.nn.functional.gelu], ids=["relu", "gelu"])
def test_wrong_experts_are_refused(monkeypatch, wrong, dtype):
    def activate(up, act, gated, interleaved):
        gate, up = up.chunk(2, -1)
        return wrong(gate) * up

    monkeypatch.setattr(experts_ops, "_activate", activate)
    with pytest.raises(VerificationError):
        Engine(build("qwen3-moe", dtype), VERIFIED)


def with_nan(name, *, token=None):
    broken = build(name)
    with torch.no_grad():
        broken.model.embed_tokens.weight[slice(None) if token is None else token] = float("nan")
    return broken


def test_a_model_that_gives_nan_is_refused_though_the_original_gives_it_too():
    with pytest.raises(VerificationError, match="inf in prefill, the original's inf"):
        Engine(with_nan("llama"), VERIFIED)


def test_nan_ends_every_request_of_a_broken_model_and_nothing_leaks():
    broken = Engine(with_nan("mistral"), CONFIG)
    outputs = serve(broken, [([1, 2, 3], SamplingParams(temperature=t, max_tokens=3)) for t in (0, 0, 1)])
    for output in outputs:
        assert (output.token_ids, output.finish_reason) == ([], "error")
        assert "not finite" in output.error
    assert broken.metrics.kv_usage == 0
    assert (broken.metrics.finished, broken.metrics.generation_tokens) == (3, 0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-moe"])
def test_nan_stays_in_the_request_it_began_in(name):
    """Neither its neighbours in the step nor those that get its blocks later see any of it."""
    poison = 42
    served_by = Engine(with_nan(name, token=poison), CONFIG)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    healthy = [[t for t in tokens(150, n + 8, seed=n) if t != poison][:n] for n in (3, 20, 41)]
    expected = [hf_greedy(model(name), prompt, 8).token_ids for prompt in healthy]
    assert all(poison not in ids for ids in expected)
    for _ in range(3):  # later rounds run on blocks that hold NaN
        requests = [(healthy[0], greedy), ([*healthy[1][:15], poison], greedy), (healthy[1], greedy)]
        requests += [([poison], greedy), (healthy[2], greedy)]
        outputs = serve(served_by, requests)
        assert [outputs[index].token_ids for index in (0, 2, 4)] == expected
        for index in (1, 3):
            assert (outputs[index].token_ids, outputs[index].finish_reason) == ([], "error")
            assert "not finite" in outputs[index].error
    assert served_by.metrics.kv_usage == 0


def test_a_request_that_meets_nan_while_decoding_keeps_the_tokens_it_has():
    prompt = tokens(150, 9, seed=5)
    expected = hf_greedy(model("llama"), prompt, 8).token_ids
    at = next(i for i in range(2, 8) if expected[i] not in [*prompt, *expected[:i]])
    broken = Engine(with_nan("llama", token=expected[at]), CONFIG)
    (output,) = serve(broken, [(prompt, SamplingParams(temperature=0, max_tokens=8))])
    assert (output.token_ids, output.finish_reason) == (expected[: at + 1], "error")


def test_errors_that_are_not_numbers_never_pass():
    exact = torch.ones(3, 4)
    for value in (float("nan"), float("inf")):
        bad = exact.clone()
        bad[1, 2] = value
        assert relative_error(bad, exact) == model_error(bad, exact, routed=True) == math.inf
    for error in (math.inf, math.nan):
        assert not within_contract(error, 0.1)
        assert not within_contract(error, math.inf)
        assert not within_contract(error, math.nan)
    assert within_contract(0.15, 0.1)
    assert not within_contract(0.16, 0.1)
    assert not within_contract(0.1, math.nan)


def test_one_flipped_route_is_forgiven_and_a_general_error_is_not():
    exact = torch.ones(7, 4)
    flipped = exact + 0.001
    flipped[2] = 3.0
    assert model_error(flipped, exact, routed=True) == pytest.approx(0.001, rel=1e-2)
    assert model_error(flipped, exact, routed=False) > 0.5
    flipped[1:5] = 3.0
    assert model_error(flipped, exact, routed=True) > 1


def test_prompts_are_packed_in_order_into_steps_that_fit():
    prompts = [[1] * n for n in (1, 17, 5, 12, 21, 9, 14)]
    config = CONFIG.replace(max_num_seqs=3, max_num_batched_tokens=30, max_model_len=20)
    assert [[len(p) for p in step] for step in pack(prompts, config, 100)] == [[1, 17, 5], [12, 9], [14]]
    assert [[len(p) for p in step] for step in pack(prompts, config, 1)] == [[1], [5], [12], [9], [14]]
    assert pack(prompts, config.replace(block_size=1), 0) == []


@pytest.mark.parametrize(
    ("prompts", "decode_last", "message"),
    [
        ([], False, "too few tokens"),
        ([[1], []], False, "too few tokens"),
        ([[1, 2], [1]], True, "too few tokens"),
        ([[1]] * 6, False, "do not fit one step"),
        ([[1] * 25] * 2, False, "do not fit one step"),
    ],
    ids=["none", "empty", "nothing before the decode", "rows", "tokens"],
)
def test_prompt_logits_refuses_what_does_not_fit(prompts, decode_last, message):
    with pytest.raises(RequestError, match=message):
        engine("mistral").prompt_logits(prompts, decode_last=decode_last)
