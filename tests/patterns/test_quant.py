"""Quantized weights and activations: the ops' own meaning, and folds of any layout; examples are in test_fusion.py."""

import uuid
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp._compat import inductor_compile
from fusecomp.fusion import FUSE, FusePass
from fusecomp.ops import OPS
from fusecomp.ops.cost import op_cost
from fusecomp.ops.quant import (
    BLOCK,
    FP4,
    FP4_VALUES,
    FP8,
    INT,
    NF4,
    NF4_VALUES,
    TENSOR,
    TOKEN,
    ActivationSpec,
    WeightSpec,
    dequantize_reference,
    quantize_reference,
)
from fusecomp.patterns.quant_examples import random_weight, texts
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import new_context, run_fused

DTYPES = ["float32", "float16", "bfloat16"]
KINDS = [(INT, 4), (INT, 8), (FP8, 8), (FP4, 4), (NF4, 4)]


@st.composite
def specs(draw):
    kind, bits = draw(st.sampled_from(KINDS))
    rows, cols = draw(st.sampled_from([0, 1, 2, 7, 16])), draw(st.sampled_from([0, 2, 16, 24, 128]))
    return WeightSpec(kind, bits, rows, cols, draw(st.sampled_from(DTYPES)))


@settings(deadline=None, max_examples=40)
@given(specs(), st.integers(1, 9), st.integers(1, 20), st.booleans(), st.sampled_from([(), (2,)]))
def test_dequantize_by_its_definition(spec, n, half_k, with_zero, leading):
    """Element by element, in fp64."""
    k = 2 * half_k
    q, scale, zero = random_weight((*leading, n, k), spec, torch.float32, zero=with_zero)
    found = dequantize_reference(q, scale, zero, spec.to_text())
    assert found.dtype == spec.torch_dtype and found.shape == (*leading, n, k)
    for matrix in [(0,), (1,)] if leading else [()]:
        for i in range(n):
            for j in range(k):
                at = (*matrix, i // spec.rows if spec.rows else 0, j // spec.cols if spec.cols else 0)
                if spec.bits == 8:
                    code = float(q[(*matrix, i, j)])
                else:
                    nibble = int(q[(*matrix, i, j // 2)]) >> (4 * (j % 2)) & 15
                    code = {INT: float(nibble), FP4: FP4_VALUES[nibble], NF4: NF4_VALUES[nibble]}[spec.kind]
                offset = float(zero[at]) if with_zero else 8.0 * ((spec.kind, spec.bits) == (INT, 4))
                wanted = (torch.tensor(code) - offset) * scale[at]
                assert float(found[(*matrix, i, j)]) == float(wanted.to(spec.torch_dtype))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([INT, FP8]), st.sampled_from([TENSOR, TOKEN, BLOCK]), st.integers(1, 5), st.integers(1, 40),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_quantized_activations_are_near(kind, granularity, tokens, k, dtype):
    spec = ActivationSpec(kind, 8, granularity, 16 if granularity == BLOCK else 0)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(k)).to(getattr(torch, dtype))
    x[0] = 0.0
    codes, scale = quantize_reference(x, None, spec.to_text())
    assert codes.dtype == spec.codes_dtype and scale.dtype == torch.float32
    back = dequantize_reference(codes, scale, None, spec.dequantized("float32").to_text())
    largest = x.float().abs().amax() if granularity == TENSOR else x.float().abs().amax(1, keepdim=True)
    step = largest / 254 if kind == INT else torch.maximum(x.float().abs() / 16, largest / 448 / 512)
    assert ((back - x.float()).abs() <= 1.01 * step + 1e-30).all()


def test_specs_refuse_what_they_cannot_mean():
    assert WeightSpec.from_text(WeightSpec(INT, 4, 1, 128, "bfloat16").to_text()) == WeightSpec(
        INT, 4, 1, 128, "bfloat16"
    )
    assert ActivationSpec.from_text(ActivationSpec(FP8).to_text()) == ActivationSpec(FP8)
    for facts in (
        (FP8, 4, 1, 0, "float32"),
        ("int3", 8, 1, 0, "float32"),
        (INT, 8, -1, 0, "float32"),
        (INT, 8, 1, 0, "x"),
    ):
        with pytest.raises(ValueError, match="weight spec"):
            WeightSpec(*facts)
    for facts in ((FP4, 8), (INT, 4), (INT, 8, BLOCK), (INT, 8, TOKEN, 16), (INT, 8, "row")):
        with pytest.raises(ValueError, match="activation spec"):
            ActivationSpec(*facts)
    q, scale, _ = random_weight((8, 16), WeightSpec(INT, 8, 1, 0, "float32"), torch.float32)
    with pytest.raises(ValueError, match="scales"):
        dequantize_reference(q, scale[:4], None, WeightSpec(INT, 8, 1, 0, "float32").to_text())
    with pytest.raises(ValueError, match="quantize"):
        quantize_reference(torch.ones(2, 4), torch.ones(1), ActivationSpec(INT).to_text())


@settings(deadline=None, max_examples=20)
@given(specs(), st.integers(2, 6), st.integers(2, 24), st.integers(8, 20), st.booleans(), st.booleans())
def test_any_layout_folds_into_its_linear(spec, tokens, n, half_k, with_zero, gated):
    """One fold, no dequantize left, and the numerics contract; Inductor takes products of single rows apart."""
    k, dtype = 2 * half_k, spec.torch_dtype
    q, scale, zero = random_weight((2 * n if gated else n, k), spec, dtype, zero=with_zero and spec.kind == INT)
    by_dtype = texts(spec)

    def function(x, q, scale, zero):
        y = F.linear(x, OPS.dequantize(q, scale, zero, by_dtype[x.dtype]))
        return F.silu(y[..., :n]) * y[..., n:] if gated else y * 2

    x = torch.randn(1, tokens, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    context = new_context()
    output, graph = run_fused(function, (x, q, scale, zero), lambda gm: [p.apply(gm, context) for p in FUSE])
    assert context.report.count("quant_linear") == 1 and context.report.count("linear") == 1
    assert not context.report.near_misses
    assert not any(n.target is OPS.dequantize.default for n in graph.graph.nodes)
    exact = function(x.float(), q, scale.float(), None if zero is None else zero.float())
    # Of a handful of outputs the graph's roundings may happen to cancel: one rounding of the output is allowed.
    limit = max(1.5 * relative_error(function(x, q, scale, zero), exact), torch.finfo(dtype).eps / 2, 2e-6)
    assert relative_error(output, exact) <= limit


def test_inductor_runs_what_is_not_folded_once():
    """A dequantize with another reader stays, is neither copied nor computed ahead, and is in the report."""
    spec = WeightSpec(INT, 4, 1, 16, "float32")
    q, scale, _ = random_weight((32, 48), spec, torch.float32)
    text, x, context = spec.to_text(), torch.randn(1, 5, 48), new_context()
    seen = []

    def function(x, q, scale):
        w = OPS.dequantize(q, scale, None, text)
        return F.linear(x, w), w.sum(0)

    class Stage(FusePass):
        def __call__(self, graph):
            super().__call__(graph)
            seen.extend(str(node.target) for node in graph.nodes)

    def backend(gm, inputs):
        stage = Stage(FUSE, context)
        stage.nonce = uuid.uuid4().hex  # a graph from Inductor's cache would not run the stage
        return inductor_compile(gm, inputs, {"post_grad_custom_pre_pass": stage})

    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(function, backend=backend, fullgraph=True)(x, q, scale)
    assert seen.count("fusecomp.dequantize.default") == 1
    assert [m.pattern for m in context.report.near_misses] == ["quant_linear"]
    assert "is read by sum" in context.report.near_misses[0].reason
    for found, wanted in zip(output, function(x, q, scale), strict=True):
        assert relative_error(found, wanted) < 2e-6


def test_cost_counts_codes_and_scales():
    spec = WeightSpec(INT, 4, 1, 16, "bfloat16")
    q, scale, _ = random_weight((32, 64), spec, torch.bfloat16)
    program = '{"dtype":"bfloat16","groups":1,"norm":null,"operands":[],"steps":[]}'
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    moved, flops = op_cost("quant_linear", (x, q, scale, None, None, None, [], program, spec.to_text())).at(3, 3, 0)
    assert moved == 32 * 64 / 2 + 2 * 32 * 4 + 2 * 3 * (64 + 32) and flops == 2 * 3 * 32 * 64
    assert op_cost("dequantize", (q, scale, None, replace(spec, dtype="float32").to_text())).at(1, 1, 0)[0] == (
        32 * 32 + 2 * 32 * 4 + 4 * 32 * 64
    )
