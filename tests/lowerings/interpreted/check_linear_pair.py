"""Two linears as one op under Triton's interpreter: bit for bit what they are in turn, in a launch less.

`tests/lowerings/test_interpreted.py` runs this file.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.errors import FallbackError
from fusecomp.lowerings import quant_registration, registration
from fusecomp.lowerings.linear import large_heuristics, lowering
from fusecomp.lowerings.linear.epilogue import epilogue_hook, operand_strides
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.linear.norm import launch_norm
from fusecomp.lowerings.linear.pointwise import launch_pointwise
from fusecomp.lowerings.linear.sum_norm import Sums, launch_sum_norm
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant import activations, pair
from fusecomp.lowerings.quant.activations import launch_quantize
from fusecomp.lowerings.quant.pair import explain_pair
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, TILE, ScaledConfig
from fusecomp.lowerings.quant.sum_rows import launch_sum_quantize
from fusecomp.ops.library import take_fallbacks
from fusecomp.ops.linear import COLUMN, FULL, ROW, LinearShape, Program
from fusecomp.ops.linear_pair import PairShape
from fusecomp.ops.mode import batch_invariance
from fusecomp.ops.norm import LAYER, RMS, NormSpec
from fusecomp.ops.quant import BLOCK, FP8, INT, TENSOR, TOKEN, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import quant_shape
from fusecomp.patterns.quant_examples import random_weight
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.interpreted.float8 import fuse_multiply_add, multiply_float8
from tests.lowerings.searches import SETTINGS as SEARCH

SETTINGS = settings(SEARCH, max_examples=25)
SWIGLU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
PROGRAMS = {
    "plain": Program(1, (), (), "float32"),
    "residual": Program(1, (FULL,), (("add", "i0", "a0"),), "float32"),
    "biases": Program(1, (ROW, COLUMN), (("add", "a0", "i0"), ("mul", "t0", "i1")), "float32"),
    "swiglu": Program(2, (), SWIGLU, "float32"),
}
NORMS = [NormSpec(RMS, 1e-5), NormSpec(RMS, 1e-5, True), NormSpec(LAYER, 1e-5)]
ACTIVATIONS = [
    ActivationSpec(INT, 8, TOKEN),
    ActivationSpec(FP8, 8, TOKEN),
    ActivationSpec(FP8, 8, BLOCK, 32),
    ActivationSpec(INT, 8, TENSOR, 0, False),
]
T, K, N, M = 19, 64, 48, 24
STATIC = torch.tensor([0.02])

multiply_float8()
multiply_bfloat16()
fuse_multiply_add()


@pytest.fixture(autouse=True)
def no_fallbacks_before():
    take_fallbacks()


@st.composite
def sums(draw):
    """(sums of a product, norm, its weight and bias)."""
    dtype, splits = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), draw(st.integers(0, 3))
    program = PROGRAMS[draw(st.sampled_from(sorted(PROGRAMS)))]
    tokens, n = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 64, 100]))
    torch.manual_seed(0)
    width = program.groups * n
    acc = torch.randn(splits, tokens, width) if splits else torch.randn(tokens, width).to(dtype)
    wide = {FULL: torch.randn(tokens, n + 3).to(dtype)[:, :n], ROW: torch.randn(n), COLUMN: torch.randn(tokens)}
    args = tuple(wide[layout] for layout in program.operands)
    norm = draw(st.sampled_from(NORMS))
    weight = torch.randn(n).to(dtype) if norm.plus_one or draw(st.booleans()) else None
    bias = torch.randn(n).to(dtype) if draw(st.booleans()) else None
    hook = epilogue_hook(program)
    return Sums(acc, dtype, hook, args, operand_strides(program, args), program.groups), norm, weight, bias


def summed(found: Sums) -> torch.Tensor:
    out = torch.empty(found.shape, dtype=found.dtype)
    return launch_pointwise(found.acc, out, found.epilogue, found.args, found.strides, found.groups)


@SETTINGS
@given(sums())
def test_sum_and_norm(case):
    found, norm, weight, bias = case
    total, y = launch_sum_norm(found, norm, weight, bias)
    assert torch.equal(total, summed(found))
    assert torch.equal(y, launch_norm(total, weight, bias, norm.eps, norm.kind, norm.plus_one))


@SETTINGS
@given(sums(), st.sampled_from(ACTIVATIONS))
def test_sum_and_codes(case, spec):
    (found, norm, weight, bias), given_scale = case, None if spec.dynamic else STATIC
    total, codes, scales = launch_sum_quantize(found, norm, weight, bias, given_scale, spec)
    assert torch.equal(total, summed(found))
    wanted, wanted_scales = launch_quantize(total, given_scale, spec, norm, weight, bias)
    assert codes.dtype == wanted.dtype and torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(scales, wanted_scales)


def test_refusals():
    program = PROGRAMS["plain"]
    found = Sums(torch.randn(3, 8), torch.float32, epilogue_hook(program), (), (), 1)
    for bad in (found._replace(acc=torch.randn(8, 3).t()), found._replace(acc=torch.randn(1, 1, 3, 8))):
        with pytest.raises(ValueError, match="epilogue"):
            launch_sum_norm(bad, NORMS[0], None, None)
    with pytest.raises(ValueError, match="weight"):
        launch_sum_norm(found, NORMS[0], torch.ones(7), None)
    with pytest.raises(ValueError, match="norm kind"):
        launch_sum_norm(found, NormSpec("batch", 1e-5), None, None)


APART = [LargeConfig(splits=2), LargeConfig(method="cublas")]  # which leave their sums
WHOLE = [LargeConfig(), LargeConfig(method="cublas_addmm")]


@pytest.mark.parametrize("norm", NORMS, ids=["rms", "plus one", "layer"])
@pytest.mark.parametrize("before", [False, True], ids=["", "norm before"])
@pytest.mark.parametrize("config", [*APART, *WHOLE], ids=["splits", "library", "persistent", "addmm"])
@pytest.mark.parametrize("tokens", [0, 3, T])
def test_linears(monkeypatch, norm, before, config, tokens):
    """Few tokens have the norm in the second product: then nothing is made for it before."""
    small = replace(config, block_t=16, block_n=16, block_k=16, use_tma=False, pieces=1)
    monkeypatch.setattr(lowering, "SKINNY_LIMIT", 4)

    def choice(*_: object, kind: str, **__: int) -> LargeConfig:
        return small if kind == "residual" else replace(small, method="cublas")

    monkeypatch.setattr(lowering, "large_config", choice)
    monkeypatch.setattr(large_heuristics, "large_config", choice)
    lowering.choose.cache_clear()
    torch.manual_seed(0)
    x, residual, gain, bias = torch.randn(tokens, K), torch.randn(tokens, N), torch.randn(N), torch.randn(N)
    first = replace(PROGRAMS["residual"], norm=NORMS[0] if before else None)
    one = torch.randn(N, K), torch.randn(K) if before else None, None, [residual], first.to_text()
    two = torch.randn(M, N), gain, bias if norm.kind == LAYER else None, [], replace(PROGRAMS["plain"], norm=norm)
    two = (*two[:-1], two[-1].to_text())
    with mock.patch.object(lowering, "launch_sum_norm", wraps=launch_sum_norm) as made:
        h, z = registration._linear_pair(x, *one, *two)
    assert made.call_count == (tokens == T and config in APART)
    if tokens:
        pair_shape = PairShape(LinearShape(N, K, 1, "residual", "float32"), LinearShape(M, N, 1, "identity", "float32"))
        assert ("in one launch" in explain_pair(SM90, pair_shape, [tokens])[0]) == made.called
    wanted = registration.run_linear(x, *one)
    assert torch.equal(h, wanted) and torch.equal(z, registration.run_linear(wanted, *two))
    assert not take_fallbacks()
    lowering.choose.cache_clear()


def test_batch_invariant_linears():
    """A row's bits must not follow the number of rows, as splits of K do: the two in turn, by kernels of their own."""
    torch.manual_seed(0)
    x, residual, gain = torch.randn(T, K), torch.randn(T, N), torch.randn(N)
    one = torch.randn(N, K), None, None, [residual], PROGRAMS["residual"].to_text()
    two = torch.randn(M, N), gain, None, [], replace(PROGRAMS["plain"], norm=NORMS[0]).to_text()
    with batch_invariance(), mock.patch.object(lowering, "launch_sum_norm") as made:
        h, z = registration._linear_pair(x, *one, *two)
        assert torch.equal(h, registration.run_linear(x, *one))
        assert torch.equal(z, registration.run_linear(h, *two)) and not made.called
        with pytest.raises(FallbackError, match="quant_linear_pair has no batch-invariant kernel"):
            quant_registration._quant_linear_pair(x, *[None] * 20)


def test_linears_that_no_kernel_runs():
    """They run by their references, counted, and the one that a kernel runs by it."""
    x = torch.randn(5, K)
    one = torch.randn(N, K), None, None, [], replace(PROGRAMS["plain"], dtype="float64").to_text()
    two = torch.randn(M, N).double(), None, None, [], replace(PROGRAMS["plain"], norm=NORMS[0]).to_text()
    h, z = registration._linear_pair(x, *one, *two)
    assert (h.dtype, z.dtype) == (torch.float64, torch.float32) and z.isfinite().all()
    assert sorted(take_fallbacks().values()) == [1, 1]


SPLIT, FUSED = ScaledConfig(splits=2), ScaledConfig(TILE, splits=2)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda spec: spec.describe())
@pytest.mark.parametrize("config", [SPLIT, ScaledConfig(), FUSED], ids=["splits", "persistent", "tile"])
@pytest.mark.parametrize("tokens", [0, 1, 4, T])
def test_quantized_linears(monkeypatch, activation, config, tokens):
    """Steps of fewer tokens than the second quantizes in have weights' codes alone, and the norm in its product."""
    small = replace(config, block_t=16, block_n=16, block_k=32, pieces=1, use_tma=False)
    for module in (activations, pair):
        monkeypatch.setattr(module, "scaled_config", lambda *_: small)
    spec = WeightSpec(activation.kind, 8, 1, 0, "bfloat16")
    if activation.block:
        spec = replace(spec, rows=32, cols=32)
    torch.manual_seed(0)
    x, residual, gain = (torch.randn(*size).bfloat16() for size in ((tokens, K), (tokens, N), (N,)))
    given_scale, text = None if activation.dynamic else STATIC, replace(activation, least_tokens=8).to_text()
    calls = []
    for program, k, n, norm_weight, operands in (
        (PROGRAMS["residual"], K, N, None, [residual]),
        (replace(PROGRAMS["plain"], norm=NORMS[0]), N, M, gain, []),
    ):
        q, scale, _ = random_weight((n, 64), spec, torch.float32)
        q, program_text = q[:, :k].contiguous(), replace(program, dtype="bfloat16").to_text()
        scale = scale[:, : spec.scales(n, k)[1]].contiguous()
        calls.append((q, scale, None, norm_weight, None, operands, program_text, spec.to_text(), given_scale, text))
    with mock.patch.object(pair, "launch_sum_quantize", wraps=launch_sum_quantize) as made:
        h, z = quant_registration._quant_linear_pair(x, *calls[0], *calls[1])
    assert made.call_count == (tokens == T and config is SPLIT)
    if tokens:
        programs = [Program.from_text(call[6]) for call in calls]
        quantizing = replace(activation, least_tokens=8)
        shapes = [
            quant_shape(torch.bfloat16, call[0], None, program, spec, quantizing)
            for call, program in zip(calls, programs, strict=True)
        ]
        assert ("in one launch" in explain_pair(SM90, PairShape(*shapes), [tokens])[0]) == made.called
    wanted = quant_registration._quant_linear(x, *calls[0])
    assert torch.equal(h, wanted) and torch.equal(z, quant_registration._quant_linear(wanted, *calls[1]))
    assert not take_fallbacks()


def test_library_of_codes_leaves_its_sums():
    assert pair.leaves_sums(ScaledConfig(LIBRARY)) and not pair.leaves_sums(FUSED)
