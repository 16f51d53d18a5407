"""Every family of the registry through the engine: the promised matches, Hugging Face's tokens, its accuracy."""

from collections import Counter
from functools import cache

import pytest
import torch

from fusecomp.backend import StepBackend
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.verify import model_error, pack, within_contract
from models.registry import FAMILIES, WINDOW, build
from tests.serving import (
    BLOCK_SIZES,
    CONFIG,
    EAGER,
    NAMES,
    VARIANTS,
    engine,
    hf_greedy,
    hf_last_logits,
    model,
    serve,
    tokens,
)

pytestmark = pytest.mark.xdist_group("families")
families = pytest.mark.parametrize("name", FAMILIES)
variants = pytest.mark.parametrize(("name", "dtype"), EAGER, ids=lambda value: str(value).removeprefix("torch."))
compiled = pytest.mark.parametrize(("name", "dtype"), VARIANTS, ids=lambda value: str(value).removeprefix("torch."))
low_precision = pytest.mark.parametrize(
    ("name", "dtype"),
    [variant for variant in EAGER if variant.values[1] != torch.float32],
    ids=lambda value: str(value).removeprefix("torch."),
)
MAX_TOKENS = 20
# What Inductor compiles at each change: dense, sparse, norms of q and k, a window in some layers, low precision.
BY_INDUCTOR = [
    ("llama", torch.float32),
    ("mixtral", torch.float32),
    ("qwen3-mixed", torch.float32),
    ("qwen3-moe", torch.bfloat16),
]
# One token, both sides of the window, of every block size and of the longest step, and more than a step.
LENGTHS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 65)


def prompts(name: str) -> list[list[int]]:
    return [tokens(model(name).config.vocab_size, length, seed) for seed, length in enumerate(LENGTHS)]


def served_prompts(name: str) -> list[list[int]]:
    """Those that are completed: a few for families that are not tried in every way."""
    return prompts(name) if FAMILIES[name].core else [*prompts(name)[::4], prompts(name)[-1]]


@variants
def test_matches_are_exactly_those_of_the_registry(name, dtype):
    family, report = FAMILIES[name], engine(name, dtype).report
    assert report.counts() == family.expected_total()
    assert report.count("paged_attention") == report.layers == family.layers
    assert report.near_misses == []
    assert (report.graphs, report.graph_breaks) == (1, 0)


@compiled
def test_the_fuse_stage_matches_and_verifies_everywhere(name, dtype, request):
    """With the eager references of the fused ops; the engine has compared itself with fp32 before serving."""
    if (name, dtype) not in BY_INDUCTOR:
        request.getfixturevalue("without_codegen")
    check_fused(name, dtype, engine(name, dtype, "always"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n, f in FAMILIES.items() for d in f.dtypes if (n, d) not in BY_INDUCTOR], ids=str
)
def test_inductor_compiles_the_others(name, dtype):
    config = CONFIG.replace(block_size=BLOCK_SIZES[name], verify="first", fuse="always", enforce_eager=False)
    served_by = Engine(build(name, dtype), config)
    check_fused(name, dtype, served_by)
    if dtype == torch.float32:
        check_tokens(name, served_by)


def check_fused(name, dtype, served_by):
    family, report = FAMILIES[name], served_by.report
    assert report.counts() == family.expected_total(fused=True, dtype=dtype)
    refusals = family.refusals(dtype)
    assert Counter(miss.pattern for miss in report.near_misses) == dict.fromkeys(refusals, family.layers)
    assert all(refusals[miss.pattern] in miss.reason for miss in report.near_misses)
    assert all(receipt.passed for receipt in report.receipts)


@variants
def test_windows_are_proven_layer_by_layer(name, dtype):
    family = FAMILIES[name]
    for pattern in ("attention", "paged_attention"):
        masks = [m.detail.split(", ")[0] for m in engine(name, dtype).report.matches if m.pattern == pattern]
        assert masks == [f"sliding({window})" if window else "causal" for window in family.windows]


@families
def test_fp32_tokens_are_those_of_generate(name):
    check_tokens(name, engine(name))


@pytest.mark.parametrize("name", NAMES)
def test_fp32_tokens_of_the_fuse_stage_are_those_of_generate(name):
    check_tokens(name, engine(name, fuse="always"))


@cache
def greedy_tokens(name: str) -> list[list[int]]:
    return [hf_greedy(model(name), prompt, MAX_TOKENS).token_ids for prompt in served_prompts(name)]


def check_tokens(name: str, served_by: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    served = serve(served_by, [(prompt, params) for prompt in served_prompts(name)])
    for prompt, got, expected in zip(served_prompts(name), served, greedy_tokens(name), strict=True):
        assert (got.token_ids, got.finish_reason) == (expected, "length"), f"prompt of {len(prompt)} tokens"
    report = served_by.report
    assert (report.graphs, report.graph_breaks, report.recompiles, report.fallbacks) == (1, 0, 0, {})


@low_precision
def test_low_precision_serves_without_recompiling(name, dtype):
    """Rounding may change a token here and there, so nothing but their number is compared."""
    served_by = engine(name, dtype)
    params = SamplingParams(temperature=0, max_tokens=4)
    assert all(len(got.token_ids) == 4 for got in serve(served_by, [(p, params) for p in served_prompts(name)]))
    assert (served_by.report.graphs, served_by.report.recompiles, served_by.report.fallbacks) == (1, 0, {})


@variants
@pytest.mark.parametrize("decode_last", [False, True], ids=["prefill", "decode"])
def test_error_against_fp32_is_within_the_contract(name, dtype, decode_last):
    """At most 1.5 times the stock model's own error in that dtype; in fp32, rounding only."""
    served_by = engine(name, dtype)
    routed = "experts" in FAMILIES[name].expected_matches
    steps = pack(prompts(name)[1:], served_by.config, served_by.num_kv_blocks)  # a decode needs a token before it
    flat = [prompt for step in steps for prompt in step]
    assert len(flat) > 10
    got = torch.cat([served_by.prompt_logits(step, decode_last=decode_last) for step in steps])
    exact = hf_last_logits(model(name), flat)
    assert got.dtype == dtype
    error = model_error(got, exact, routed=routed)
    if dtype == torch.float32:
        assert error < 1e-5
    else:
        stock = model_error(hf_last_logits(model(name, dtype), flat), exact, routed=routed)
        assert within_contract(error, stock), f"{error:.2e} against the stock model's {stock:.2e}"


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "inductor"])
def test_an_engine_of_one_block_serves(inductor):
    """One row whose whole context is one page: a cache of size 1, where graphs for any size would specialize."""
    config = CONFIG.replace(max_num_seqs=1, max_model_len=16, enforce_eager=not inductor)
    served_by = Engine(build("mistral"), config)
    assert served_by.num_kv_blocks == 1
    params = SamplingParams(temperature=0, max_tokens=10)
    requests = [(tokens(173, length, length), params) for length in (1, 5, 12)]
    expected = [hf_greedy(model("mistral"), prompt, min(10, 16 - len(prompt))).token_ids for prompt, _ in requests]
    assert [got.token_ids for got in serve(served_by, requests)] == expected
    assert served_by.report.recompiles == 0


def test_an_engine_is_captured_as_if_it_were_the_first(monkeypatch):
    """Dynamo remembers sizes by source line: another model's must not make this one's heads and pages dynamic."""
    Engine(build("qwen3"), CONFIG.replace(max_model_len=64, max_num_seqs=1, block_size=32))
    call, shapes = StepBackend.__call__, {}

    def look(backend, gm, example_inputs):
        for node in gm.graph.find_nodes(op="placeholder"):
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                shapes[node.name] = [size if isinstance(size, int) else "?" for size in value.shape]
        return call(backend, gm, example_inputs)

    monkeypatch.setattr(StepBackend, "__call__", look)
    Engine(build("mistral"), CONFIG)
    inputs = {name: shape for name, shape in shapes.items() if "self" not in name}
    assert inputs == {
        "l_tokens_": [3, "?"],
        "l_logit_indices_": ["?"],
        "l_cu_q_lens_": ["?"],
        "l_seq_lens_": ["?"],
        "l_block_tables_": ["?", 6],
        "l_host_meta_": [4],
        "l_kv_caches_0_": ["?", 2, 2, 16, 32],
        "l_kv_caches_1_": ["?", 2, 2, 16, 32],
    }
