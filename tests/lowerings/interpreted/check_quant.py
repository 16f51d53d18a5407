"""Kernels of quantized linears under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.quant import lowering
from fusecomp.lowerings.quant.heuristics import QuantConfig
from fusecomp.lowerings.quant.launches import launch_dequantize, run_quant
from fusecomp.lowerings.quant.lowering import launch_quant_linear
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference
from fusecomp.patterns.quant_examples import random_weight
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.interpreted.float8 import multiply_float8
from tests.lowerings.quant_cases import NORMS, PROGRAMS, check, layers, run, specs
from tests.lowerings.searches import SETTINGS

multiply_bfloat16()
multiply_float8()


@settings(SETTINGS, max_examples=20)
@given(layers(st.just(1)), st.sampled_from([2, 8]), st.sampled_from([32, 64, 256]))
def test_one_token(layer, block_r, block_k):
    run(layer, QuantConfig("vector", 1, block_r, block_k))


@st.composite
def byte_layers(draw, counts):
    """8-bit codes with a scale a row or one for all, rows of a multiple of four columns, and 16-bit inputs."""
    x, weight, norm_weight, operands, program, spec = draw(
        layers(counts).filter(lambda layer: layer[-1].bits == 8 and layer[-1].cols == 0 and layer[1][2] is None)
    )
    k = x.shape[1] // 4 * 4 or 4
    dtype = draw(st.sampled_from(["float16", "bfloat16"]))
    spec, program = replace(spec, dtype=dtype), replace(program, dtype=dtype)
    q, scale, _ = random_weight((weight[0].shape[0], k), spec, torch.float32, seed=draw(st.integers(0, 9)))
    x = torch.randn(x.shape[0], k + 9, dtype=spec.torch_dtype)[:, draw(st.sampled_from([0, 1, 4])) :][:, :k] * 3
    norm_weight = None if norm_weight is None else torch.randn(k).to(spec.torch_dtype)
    return x, (q, scale, None), norm_weight, [o.to(spec.torch_dtype) for o in operands], program, spec


@settings(SETTINGS, max_examples=15)
@given(byte_layers(st.just(1)), st.sampled_from([2, 8]), st.sampled_from([32, 64, 256]))
def test_one_token_by_words(layer, block_r, block_k):
    run(layer, QuantConfig("words", 1, block_r, block_k))


@settings(SETTINGS, max_examples=20)
@given(
    layers(st.integers(1, 40)), st.sampled_from([16, 32]), st.sampled_from([16, 64]),
    st.sampled_from([16, 64, 128, 256]), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_tokens(layer, block_t, block_r, block_k, splits, early):
    run(layer, QuantConfig("tile", block_t, block_r, block_k, splits=splits, early=early))


@settings(SETTINGS, max_examples=15)
@given(
    byte_layers(st.integers(1, 40)), st.sampled_from([16, 64]), st.sampled_from([16, 64, 128]), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
def test_tokens_in_halves(layer, block_r, block_k, splits, early):
    run(layer, QuantConfig("tile", 16, block_r, block_k, splits=splits, early=early, halves=True))


@st.composite
def digit_layers(draw):
    """fp8 by rows, tensors or blocks, and bf16 inputs of tokens whose sizes are far apart, one of them zero."""
    rows, cols = draw(st.sampled_from([(1, 0), (0, 0), (128, 128), (1, 256)]))
    name, count, k = draw(st.sampled_from([*PROGRAMS])), draw(st.integers(1, 20)), 16 * draw(st.integers(1, 40))
    spec = WeightSpec(FP8, 8, rows, cols, "bfloat16")
    norm = NORMS[draw(st.sampled_from([*NORMS]))]
    program = replace(PROGRAMS[name], dtype=spec.dtype, norm=norm)
    n = draw(st.integers(1, 50))
    q, scale, _ = random_weight((program.groups * n, k), spec, torch.float32, seed=draw(st.integers(0, 9)))
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 1e-30, 0.0, 1e15, 3e-3])[torch.arange(count) % 5, None]
    x = (torch.randn(count, k + 8)[:, :k] * torch.logspace(-6, 0, k) * sizes).bfloat16()
    operands = [torch.randn((count, n) if part == FULL else (n,)).bfloat16() for part in program.operands]
    norm_weight = torch.randn(k).bfloat16() if norm and (norm.plus_one or draw(st.booleans())) else None
    return x, (q, scale, None), norm_weight, operands, program, spec


@settings(SETTINGS, max_examples=30)
@given(
    digit_layers(), st.sampled_from([8, 16]), st.sampled_from([16, 64]), st.sampled_from([32, 128]), st.integers(1, 4)
)
def test_digits(layer, block_t, block_r, block_k, splits):
    """By token, for sums over tokens would be those of the largest."""
    x, weight, norm_weight, operands, program, spec = layer
    config = QuantConfig("digits", block_t, block_r, block_k, splits=splits)
    found = run(layer, config)
    for t in range(len(x)):
        rows = [o[t : t + 1] if part == FULL else o for o, part in zip(operands, program.operands, strict=True)]
        check(found[t : t + 1], (x[t : t + 1], weight, norm_weight, rows, program, spec))


def test_digits_hold_every_input():
    """Every bf16 number within 2^12 of the largest, exactly; none that is no number becomes one."""
    bits = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    weight = (torch.eye(128).to(torch.float8_e4m3fn), torch.ones(128, 1), None)
    spec, program = WeightSpec(FP8, 8, 1, 0, "bfloat16"), PROGRAMS["plain"]
    for largest in (1.0, 1e-20, 1e20):
        near = bits[(bits.abs() <= largest) & (bits.abs() > largest * 2.0**-12)].float()
        x = torch.cat([near, torch.zeros(-len(near) % 127)]).view(-1, 127)
        x = torch.cat([torch.full((len(x), 1), largest), x], 1).bfloat16()
        found = torch.empty(len(x), 128)
        run_quant(QuantConfig("digits", 8, 64, 128), x, *weight, None, [], program, spec, found, False)
        assert torch.equal(found, x.float())
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 128).bfloat16()
        x[1, 5] = bad
        found = torch.empty(3, 128)
        run_quant(QuantConfig("digits", 8, 64, 128), x, *weight, None, [], program, spec, found, False)
        assert found[1].isnan().all() and torch.equal(found[::2], x[::2].float())


@settings(SETTINGS, max_examples=15)
@given(specs(), st.integers(1, 40), st.integers(1, 150), st.booleans(), st.sampled_from([(), (3,)]))
def test_dequantize(spec, n, half_k, zero, leading):
    q, scale, zeros = random_weight((*leading, n, 2 * half_k), spec, torch.float32, zero=zero and spec.kind == INT)
    found = launch_dequantize(q, scale, zeros, spec)
    exact = dequantize_reference(q, scale, zeros, spec.to_text())
    # The interpreter truncates where a GPU rounds to nearest.
    eps = 0.0 if spec.dtype in ("float32", "float16") else torch.finfo(spec.torch_dtype).eps
    assert torch.allclose(found.float(), exact.float(), rtol=eps, atol=0.0)


@pytest.mark.parametrize("kind", [INT, FP8, FP4, NF4])
def test_every_code(kind):
    """All codes, NaN among them, stand for what the reference says; and so do all e8m0 exponents."""
    bits = 8 if kind in (INT, FP8) else 4
    spec = WeightSpec(kind, bits, 1, 0, "float32")
    codes = torch.arange(256, dtype=torch.uint8)[None]
    q = codes if bits == 4 else codes.view(spec.codes_dtype)
    scale = torch.ones(1, 1)
    found, exact = launch_dequantize(q, scale, None, spec), dequantize_reference(q, scale, None, spec.to_text())
    assert torch.equal(found.nan_to_num(7777.0), exact.nan_to_num(7777.0))
    assert int(found.isnan().sum()) == (2 if kind == FP8 else 0)


@pytest.mark.parametrize("kind", [INT, FP8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_code_of_a_word(kind, dtype):
    """Each row has one code in one column, whose input alone is not zero."""
    spec = WeightSpec(kind, 8, 1, 0, dtype)
    column = torch.arange(256) % 8
    codes = torch.zeros(256, 8, dtype=torch.uint8)
    codes[torch.arange(256), column] = torch.arange(256, dtype=torch.uint8)
    for at in range(8):
        x, out = torch.zeros(1, 8, dtype=spec.torch_dtype), torch.empty(1, 256, dtype=spec.torch_dtype)
        x[0, at] = -2.0
        q, scale = codes.view(spec.codes_dtype), torch.ones(256, 1)
        run_quant(
            QuantConfig("words", 1, 8, 32), x, q, scale, None, None, [], Program(1, (), (), dtype), spec, out, False
        )
        exact = torch.where(column == at, -2.0 * q.float()[torch.arange(256), column], 0.0)
        numbers = ~q.float().isnan().any(1)
        assert torch.equal(out[0].float()[numbers], exact[numbers])
        assert out[0, ~numbers].isnan().all()  # NaN times zero is none either


def test_every_exponent():
    spec = WeightSpec(FP4, 4, 1, 0, "float32")
    q, scale = torch.full((256, 8), 0x22, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)[:, None]
    found, exact = launch_dequantize(q, scale, None, spec), dequantize_reference(q, scale, None, spec.to_text())
    assert torch.equal(found.nan_to_num(7777.0), exact.nan_to_num(7777.0)) and found[255].isnan().all()


@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("fold", [0, 32])
def test_launch(monkeypatch, tokens, norm, fold):
    """Norm, choice and kernel together."""
    monkeypatch.setattr(lowering, "quant_config", _small(lowering.quant_config))
    spec = WeightSpec(INT, 4, 1, 32, "bfloat16", fold)
    chosen = {"none": None, "rms": NORMS["rms"], "layer": NormSpec("layer", 1e-5)}[norm]
    program = replace(PROGRAMS["residual"], dtype="bfloat16", norm=chosen)
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 256).bfloat16(), random_weight((40, 256), spec, torch.bfloat16, zero=True)
    operands, gain = [torch.randn(tokens, 40).bfloat16()], torch.randn(256).bfloat16()
    found = launch_quant_linear(x, *weight, gain if chosen else None, None, operands, program, spec)
    assert found.shape == (tokens, 40)
    if tokens:
        check(found, (x, weight, gain if chosen else None, operands, program, spec))


def _small(original):
    def config(*args):
        found = original(*args)
        return replace(found, block_r=min(found.block_r, 16), block_k=min(found.block_k, 32))

    return config
