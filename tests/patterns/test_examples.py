"""Every pattern against its own examples: exact match counts, reasons of refusal, numerics."""

import pytest
import torch

from fusecomp.backend import CANONICALIZE, PAGE, STATELESS
from fusecomp.patterns.attention import remove_step_marker
from fusecomp.patterns.base import PassContext, count_ops
from fusecomp.patterns.masks import MaskSpec, unknown
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import check_pattern, new_context, run_rewritten

PATTERNS = {p.name: p for p in (*CANONICALIZE, *PAGE, *STATELESS)}
# What is refused has no numerics: at each change it is refused in fp32.
CASES = [
    pytest.param(
        p, e, dtype, id=f"{p.name}-{e.name}-{dtype}",
        marks=() if e.matches or dtype == torch.float32 else pytest.mark.slow,
    )
    for p in (*CANONICALIZE, *PAGE)
    for e in p.examples()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]  # fmt: skip


def context() -> PassContext:
    return new_context(masks={0: MaskSpec("causal", 0, 64), 1: unknown("made up for the test")}, proof_length=64)


@pytest.mark.filterwarnings("error:erase_node")  # of a node that was erased
@pytest.mark.parametrize(("pattern", "example", "dtype"), CASES)
def test_example(pattern, example, dtype):
    check_pattern(pattern, example, context(), dtype, remove_step_marker)


def test_dtype_outside_the_contract_is_refused():
    pattern, example = PATTERNS["sdpa_attention"], PATTERNS["sdpa_attention"].examples()[0]
    ctx = context()
    run_rewritten(example.function, example.inputs(torch.float64), lambda gm: pattern.apply(gm, ctx))
    assert ctx.report.count(pattern.name) == 0 and "float64" in ctx.report.near_misses[0].reason


def test_ops_before_and_after():
    pattern, example = PATTERNS["softmax_attention"], PATTERNS["softmax_attention"].examples()[0]
    counts = []

    def rewrite(gm):
        counts.append(count_ops(gm.graph))
        pattern.apply(gm, context())
        counts.append(count_ops(gm.graph))

    run_rewritten(example.function, example.inputs(torch.float32), rewrite)
    before, after = counts
    assert before["softmax"] == 1 and before["matmul"] == 2
    assert sum(after.values()) == 1 and "attention" in next(iter(after))


@pytest.mark.parametrize("name", ["sdpa_attention", "softmax_attention"])
def test_second_application_finds_nothing(name):
    pattern, example, found = PATTERNS[name], PATTERNS[name].examples()[0], []
    run_rewritten(
        example.function,
        example.inputs(torch.float32),
        lambda gm: found.extend(pattern.apply(gm, context()) for _ in range(2)),
    )
    assert found == [1, 0]


def test_key_is_a_hash_of_the_source():
    keys = {p.name: p.key() for p in PATTERNS.values()}
    assert keys["experts"] != keys["paged_attention"] != keys["sdpa_attention"]


@pytest.mark.parametrize("spelling", [0, 2])
def test_stateless_attention_becomes_sdpa(spelling):
    example, ctx = PATTERNS["softmax_attention"].examples()[spelling], context()
    inputs = example.inputs(torch.float32)

    def rewrite(gm):
        PATTERNS["softmax_attention"].apply(gm, ctx)
        PATTERNS["fused_sdpa"].apply(gm, ctx)

    output, _ = run_rewritten(example.function, inputs, rewrite)
    assert ctx.report.counts() == {"softmax_attention": 1, "fused_sdpa": 1}
    assert relative_error(output, example.function(*inputs)) < 2e-6
