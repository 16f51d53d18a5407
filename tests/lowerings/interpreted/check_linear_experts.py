"""A linear and a mixture as one op under Triton's interpreter: what they are in turn, the norm where sums are made.

`tests/lowerings/test_interpreted.py` runs this file.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from fusecomp.errors import FallbackError
from fusecomp.lowerings import quant_registration, registration
from fusecomp.lowerings.linear import large_heuristics, lowering, sum_norm
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.linear.sum_norm import launch_sum_norm
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant import activations, pair
from fusecomp.lowerings.quant.pair import explain_normed
from fusecomp.lowerings.quant.scaled_heuristics import TILE, ScaledConfig
from fusecomp.ops.library import take_fallbacks
from fusecomp.ops.linear import LinearShape, Program
from fusecomp.ops.linear_experts import QUANT_RESIDUAL, RESIDUAL, NormedShape
from fusecomp.ops.mode import batch_invariance
from fusecomp.ops.norm import RMS, NormSpec, norm_reference
from fusecomp.ops.quant import ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import quant_shape
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.interpreted.float8 import fuse_multiply_add, multiply_float8
from tests.lowerings.linear_experts_cases import make_linear_experts, make_quant_linear_experts, norm_of

multiply_float8()
multiply_bfloat16()
fuse_multiply_add()

C, T = 64, 19
APART = [LargeConfig(splits=2), LargeConfig(method="cublas")]  # which leave their sums
WHOLE = [LargeConfig(), LargeConfig(method="cublas_addmm")]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def no_fallbacks_before():
    take_fallbacks()


@pytest.fixture
def choose(monkeypatch):
    """Linears of more than four tokens run by one configuration."""

    def by(config: LargeConfig) -> None:
        small = replace(config, block_t=16, block_n=16, block_k=16, use_tma=False, pieces=1)
        monkeypatch.setattr(lowering, "SKINNY_LIMIT", 4)
        monkeypatch.setattr(lowering, "large_config", lambda *_, **__: small)
        monkeypatch.setattr(large_heuristics, "large_config", lambda *_, **__: small)
        lowering.choose.cache_clear()

    yield by
    lowering.choose.cache_clear()


@pytest.mark.parametrize("adds", [True, False], ids=["residual stream", "another residual"])
@pytest.mark.parametrize("config", [*APART, *WHOLE], ids=["splits", "library", "persistent", "addmm"])
@pytest.mark.parametrize("tokens", [0, 3, T])
def test_linear_and_experts(choose, adds, config, tokens):
    """Few tokens have the residual in the product, as have launches without splits: the router makes its norm then."""
    choose(config)
    x, first, rest = make_linear_experts("qwen3", tokens)
    residual = None if adds else x
    with mock.patch.object(sum_norm, "launch_sum_norm", wraps=launch_sum_norm) as made:
        h, y, out = registration._linear_experts(x, *first, *rest[:-1], residual, adds)
    assert made.call_count == (tokens == T and config in APART)
    if tokens:
        shape = LinearShape(C, C, 1, "residual", "float32")
        assert ("in one launch" in explain_normed(SM90, NormedShape(shape), [tokens])[0]) == made.called
    wanted = registration.run_linear(x, *first)
    assert torch.equal(h, wanted)
    y_alone, out_alone = registration._routed_experts(wanted, *rest[:-1], wanted if adds else x)
    torch.testing.assert_close(y, y_alone, **CLOSE)
    torch.testing.assert_close(out, out_alone, **CLOSE)
    weight, norm = norm_of(rest)
    torch.testing.assert_close(y, norm_reference(wanted, weight, None, norm.to_text()), **CLOSE)
    assert not take_fallbacks()


@pytest.mark.parametrize("config", [APART[0], WHOLE[0]], ids=["splits", "persistent"])
def test_with_the_linear_behind_the_experts(choose, config):
    choose(config)
    x, first, rest = make_linear_experts("qwen3", T)
    g = torch.Generator().manual_seed(2)
    program = replace(registration.Program.from_text(first[-1]), operands=(), steps=(), norm=NormSpec(RMS, 1e-5))
    last = torch.randn(24, C, generator=g), torch.randn(C, generator=g), None, [], program.to_text()
    found = registration._linear_experts_linear(x, *first, *rest, *last, True)
    wanted = registration._linear_experts(x, *first, *rest, True)
    for actual, right in zip(found[:3], wanted, strict=True):
        assert torch.equal(actual, right)
    torch.testing.assert_close(found[3], registration.run_linear(wanted[2], *last), **CLOSE)


@pytest.mark.parametrize("adds", [True, False], ids=["residual stream", "another residual"])
@pytest.mark.parametrize("layout", ["fp8", "int8"])
@pytest.mark.parametrize("config", [ScaledConfig(splits=2), ScaledConfig(TILE, splits=2)], ids=["splits", "tile"])
@pytest.mark.parametrize("tokens", [0, 4, T])
def test_codes(monkeypatch, adds, layout, config, tokens):
    """Steps of fewer tokens than the linear quantizes in have its weight's codes alone, and no sums of their own."""
    small = replace(config, block_t=16, block_n=16, block_k=32, pieces=1, use_tma=False)
    for module in (activations, pair):
        monkeypatch.setattr(module, "scaled_config", lambda *_: small)
    x, first, rest = make_quant_linear_experts("qwen3", tokens, layout, dtype=torch.bfloat16)
    residual = None if adds else x
    with mock.patch.object(pair, "launch_sum_norm", wraps=launch_sum_norm) as made:
        h, y, out = quant_registration._quant_linear_experts(x, *first, *rest[:-1], residual, adds)
    assert made.call_count == (tokens == T and config.method != TILE)
    if tokens:
        texts = Program.from_text(first[6]), WeightSpec.from_text(first[7]), ActivationSpec.from_text(first[9])
        shape = quant_shape(torch.bfloat16, first[0], None, *texts)
        assert ("in one launch" in explain_normed(SM90, NormedShape(shape), [tokens])[0]) == made.called
    wanted = quant_registration._quant_linear(x, *first)
    assert torch.equal(h, wanted)
    alone = quant_registration._routed_quant_experts(wanted, *rest[:-1], wanted if adds else x)
    for actual, right in zip((y, out), alone, strict=True):
        torch.testing.assert_close(actual, right, rtol=2**-6, atol=2**-6)
    assert not take_fallbacks()


def test_batch_invariant_experts():
    """A row's bits must not follow the number of rows, as splits of K do: linear and experts in turn."""
    x, first, rest = make_linear_experts("qwen3", T)
    with batch_invariance(), mock.patch.object(sum_norm, "launch_sum_norm") as made:
        h, y, out = registration._linear_experts(x, *first, *rest, True)
        assert torch.equal(h, registration.run_linear(x, *first)) and not made.called
        alone = registration._routed_experts(h, *rest[:-1], h)
        assert torch.equal(y, alone[0]) and torch.equal(out, alone[1])
        with pytest.raises(FallbackError, match="quant_linear_experts has no batch-invariant kernel"):
            quant_registration._quant_linear_experts(x, *[None] * 34)


def test_what_no_kernel_runs_is_in_turn():
    """The linear by its reference, counted; a router without a norm leaves nothing to be made."""
    x, first, rest = make_linear_experts("qwen3", T)
    odd = (*first[:3], [first[3][0].double()], first[4])
    h, _, out = registration._linear_experts(x, *odd, *rest, True)
    assert list(take_fallbacks().values()) == [1]
    assert torch.equal(out, registration._routed_experts(h, *rest[:-1], h)[1])
    x, first, rest = make_linear_experts("gpt-oss", T)
    h, y, out = registration._linear_experts(x, *first, *rest, True)
    assert y.numel() == 0 and torch.equal(out, registration._routed_experts(h, *rest[:-1], h)[1])


def test_residuals_are_where_the_ops_say():
    assert len(make_linear_experts("qwen3", 2)[2]) == RESIDUAL + 1
    assert len(make_quant_linear_experts("qwen3", 2, "fp8")[2]) == QUANT_RESIDUAL + 1
