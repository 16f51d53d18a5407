"""The bundled checkpoints through the whole product, Inductor included: the same tokens, and the card's perplexity."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusecomp import LLM, SamplingParams
from models import perplexity
from models.corpus import parse_heldout
from models.registry import FAMILIES
from tests.serving import hf_greedy

MODELS = Path(__file__).resolve().parent.parent / "models"
LAYERS = {
    name: json.loads((MODELS / name / "config.json").read_text())["num_hidden_layers"]
    for name in ("pico-llama", "pico-moe")
}
FAMILY = {"pico-llama": FAMILIES["llama"], "pico-moe": FAMILIES["qwen3-moe"]}
# One process a model: what it compiles is used by all of the model's tests.
checkpoints = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILY]
)
CHUNK = 256  # tokens in a step: a window is scored in four chunks, each on the cached keys of those before it
NUM_PROMPTS, LONGEST, MAX_TOKENS = 32, 400, 16


@cache
def llm(name: str, dtype: str = "float32", fuse: str = "auto", kv_cache_dtype: str = "auto") -> LLM:
    return LLM(
        MODELS / name,
        dtype=dtype,
        device="cpu",
        max_num_seqs=16,
        max_num_batched_tokens=CHUNK,
        kv_cache_bytes=1 << 27,
        fuse=fuse,
        kv_cache_dtype=kv_cache_dtype,
    )


def expected(name: str, fused: bool = False) -> dict[str, int]:
    """Matches that a model of this family and depth must report."""
    return dataclasses.replace(FAMILY[name], windows=(0,) * LAYERS[name]).expected_total(fused)


@cache
def tokenizer(name: str):
    return AutoTokenizer.from_pretrained(MODELS / name, local_files_only=True)


def heldout_prompts(name: str) -> list[list[int]]:
    """32 slices of the held-out files, of 1 to 400 tokens; some are the end of a file, where `eos` is due."""
    text = perplexity.HELDOUT.read_text(encoding="utf-8")
    files = [
        tokenizer(name)(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        for document in parse_heldout(text)
    ]
    prompts = []
    for index in range(NUM_PROMPTS):
        length = 1 + round(index * (LONGEST - 1) / (NUM_PROMPTS - 1))
        file = files[index % len(files)]
        start = len(file) - length if index % 4 == 3 else 977 * index % max(1, len(file) - length)
        prompts.append(file[max(0, start) :][:length])
    return prompts


@checkpoints
def test_greedy_tokens_are_those_of_generate(name):
    prompts = heldout_prompts(name)
    assert {min(map(len, prompts)), max(map(len, prompts))} == {1, LONGEST}
    outputs = llm(name).generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    stock = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32, local_files_only=True).eval()
    eos = stock.generation_config.eos_token_id
    for prompt, output in zip(prompts, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.token_ids == hf_greedy(stock, prompt, MAX_TOKENS).token_ids, f"prompt of {len(prompt)} tokens"
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == eos else "length")
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}
    report = llm(name).fusion_report
    assert report.counts() == expected(name)
    assert (report.graphs, report.graph_breaks, report.recompiles, report.fallbacks) == (1, 0, 0, {})
    assert llm(name).metrics.kv_usage == 0


@checkpoints
def test_the_fuse_stage_changes_no_token(name):
    """Every fused op by its eager reference: the rewrites themselves, without the kernels."""
    prompts, params = heldout_prompts(name)[::2], SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    fused = llm(name, fuse="always").generate(prompts, params, use_tqdm=False)
    plain = llm(name).generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in fused] == [o.outputs[0].token_ids for o in plain]
    report = llm(name, fuse="always").fusion_report
    assert report.counts() == expected(name, fused=True)
    # The head normalises the rows that it reads, and no others.
    before_head = {m.pattern: m.detail.split(", ")[-1] for m in report.matches if m.where == "model.norm"}
    assert before_head == {
        "selected_rows": "rows chosen before the rms norm eps 1e-06",
        "norm": "folded into the linear that reads it",
    }


def score(name: str, served_by: LLM, count: int) -> perplexity.Score:
    """Over the first windows of the held-out text."""
    windows, _ = perplexity.heldout_windows(tokenizer(name), perplexity.HELDOUT.read_text(encoding="utf-8"))
    return perplexity.Score(*perplexity.score_engine(served_by._session.engine, windows[:count]), 0)


@cache
def card(name: str) -> dict:
    return json.loads((MODELS / name / "figures.json").read_text(encoding="utf-8"))["heldout_txt_first_windows"]


@checkpoints
def test_fp32_perplexity_is_the_cards(name):
    found = score(name, llm(name), card(name)["windows"])
    assert found.tokens == card(name)["tokens"]
    assert found.perplexity == pytest.approx(card(name)["perplexity"], rel=1e-4)


@checkpoints
def test_bf16_costs_at_most_half_a_percent_of_perplexity(name):
    """Against fp32, whose perplexity is the card's, over a quarter of its windows: bf16 is slow on a CPU."""
    served_by, few = llm(name, "bfloat16"), card(name)["windows"] // 4
    assert score(name, served_by, few).perplexity == pytest.approx(score(name, llm(name), few).perplexity, rel=5e-3)
    report = served_by.fusion_report
    assert report.counts() == expected(name)
    assert (report.graphs, report.graph_breaks, report.recompiles) == (1, 0, 0)


@checkpoints
def test_fp8_keys_and_values_cost_at_most_half_a_percent_of_perplexity(name):
    served_by = llm(name, kv_cache_dtype="fp8")
    assert score(name, served_by, card(name)["windows"]).perplexity == pytest.approx(card(name)["perplexity"], rel=5e-3)
    assert {m.numerics for m in served_by.fusion_report.matches if m.pattern == "paged_attention"} == {"quantizing"}
    assert served_by._session.engine.kv_bytes_per_token * 3 < llm(name)._session.engine.kv_bytes_per_token
