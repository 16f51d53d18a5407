"""Codes of activations and their products under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import device, quant_registration
from fusecomp.lowerings.quant import activations
from fusecomp.lowerings.quant.activations import launch_fake_quantize, launch_quantize
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, PERSISTENT, TILE, ScaledConfig
from fusecomp.lowerings.quant.scaled_launch import run_scaled
from fusecomp.ops.library import take_fallbacks
from fusecomp.ops.linear import FULL, linear_reference
from fusecomp.ops.norm import NormSpec, norm_reference
from fusecomp.ops.quant import (
    BLOCK,
    FP8,
    INT,
    TENSOR,
    TOKEN,
    ActivationSpec,
    WeightSpec,
    dequantize_reference,
    fake_quantize_reference,
    quantize_reference,
)
from fusecomp.ops.quant_linear import quant_linear_reference
from fusecomp.patterns.quant_examples import random_weight
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.interpreted.float8 import fuse_multiply_add, multiply_float8
from tests.lowerings.quant_cases import PROGRAMS
from tests.lowerings.searches import SETTINGS

NORMS = [None, NormSpec("rms", 1e-5), NormSpec("rms", 1e-5, True), NormSpec("layer", 1e-5)]
STATIC = torch.tensor([0.02])

multiply_float8()
multiply_bfloat16()
fuse_multiply_add()


@pytest.fixture(autouse=True)
def no_fallbacks_before():
    take_fallbacks()


@st.composite
def activation_specs(draw):
    kind, granularity = draw(st.sampled_from([INT, FP8])), draw(st.sampled_from([TENSOR, TENSOR, TOKEN, BLOCK]))
    block = draw(st.sampled_from([32, 64])) if granularity == BLOCK else 0
    return ActivationSpec(kind, 8, granularity, block, granularity != TENSOR or draw(st.booleans()))


@settings(SETTINGS, max_examples=40)
@given(
    spec=activation_specs(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 6), st.sampled_from([1, 7, 64, 100, 300])),
    norm=st.sampled_from(NORMS),
    most=st.sampled_from([64, 16384]),
    parts=st.tuples(st.booleans(), st.booleans()),
)
def test_codes(spec, dtype, shape, norm, most, parts):
    """Codes, scales and what codes stand for: the reference's, and next to it where a norm sums in another order."""
    torch.manual_seed(0)
    tokens, k = shape
    x = (torch.randn(tokens, k + 3) * 3).to(dtype)[:, :k]
    x[0] = 0.0
    weight = torch.randn(k).to(dtype) if norm and (parts[0] or norm.plus_one) else None
    bias = torch.randn(k).to(dtype) if norm and parts[1] else None
    given_scale = None if spec.dynamic else STATIC
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "MAX_BLOCK_K", most)
        codes, scale = launch_quantize(x, given_scale, spec, norm, weight, bias)
        fake = launch_fake_quantize(x, given_scale, spec, norm, weight, bias)
    y = x.float() if norm is None else norm_reference(x.float(), weight, bias, norm.to_text())
    exact, exact_scale = quantize_reference(y, given_scale, spec.to_text())
    assert codes.dtype == exact.dtype and scale.shape == exact_scale.shape
    back = dequantize_reference(codes, scale, None, spec.dequantized("float32").to_text())
    wanted = fake_quantize_reference(y, given_scale, spec.to_text())
    if norm is None:
        assert torch.equal(scale, exact_scale) and torch.equal(codes.view(torch.uint8), exact.view(torch.uint8))
    else:
        assert torch.allclose(scale, exact_scale, rtol=1e-5)
        steps = exact_scale.amax() if spec.kind == INT else (wanted.abs() / 8).clamp(min=float(exact_scale.amax()))
        assert ((back - wanted).abs() <= 1.01 * steps).all()
        assert (back == wanted).float().mean() > 0.5 or (back - wanted).norm() <= 1e-2 * wanted.norm()
    eps = 0.0 if dtype != torch.bfloat16 else torch.finfo(dtype).eps  # the interpreter truncates
    assert torch.allclose(fake.float(), back.to(dtype).float(), rtol=eps, atol=0.0)


@pytest.mark.parametrize("kind", [INT, FP8])
def test_every_code_is_rounded_to_even(kind):
    """Values half-way between neighbours, codes themselves, and those beyond the last."""
    top = 127.0 if kind == INT else 448.0
    codes = torch.arange(-127, 128).float() if kind == INT else torch.arange(256, dtype=torch.uint8).view(
        torch.float8_e4m3fn
    ).float()  # fmt: skip
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, middles, middles * (1 + 1e-6), torch.tensor([-2 * top, 2 * top])))[None]
    spec = ActivationSpec(kind, 8, TENSOR, 0, False)
    found, _ = launch_quantize(x, torch.ones(1), spec)
    assert torch.equal(found.float(), quantize_reference(x, torch.ones(1), spec.to_text())[0].float())


def test_a_nan_reaches_its_row_alone():
    for spec in (ActivationSpec(FP8), ActivationSpec(INT), ActivationSpec(FP8, 8, BLOCK, 32)):
        x = torch.randn(3, 64)
        x[1, 5] = float("nan")
        found = launch_fake_quantize(x, None, spec)
        assert found[1, :32].isnan().all() and found[[0, 2]].isfinite().all()
        assert found[1, 32:].isnan().all() == (spec.block == 0)
        codes, scale = launch_quantize(x, None, spec)
        back = dequantize_reference(codes, scale, None, spec.dequantized("float32").to_text())
        assert back[1, :32].isnan().all() and back[[0, 2]].isfinite().all()


@st.composite
def products(draw):
    """(codes, scale, weight, operands, program, weight's spec, activations' spec)."""
    kind, name = draw(st.sampled_from([FP8, INT])), draw(st.sampled_from([*PROGRAMS]))
    granularity = draw(st.sampled_from([TOKEN, TENSOR, BLOCK]))
    block = 32 if granularity == BLOCK else 0
    rows, cols = draw(st.sampled_from([(1, 0), (0, 0), (8, 0), (16, 64), (1, 32)]))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    spec, activation = WeightSpec(kind, 8, rows, cols, dtype), ActivationSpec(kind, 8, granularity, block)
    tokens, n, k = (
        draw(st.integers(1, 40)),
        draw(st.sampled_from([1, 8, 40, 56])),
        draw(st.sampled_from([32, 112, 192])),
    )
    program = replace(PROGRAMS[name], dtype=dtype)
    q, scale, _ = random_weight((program.groups * n, k), spec, torch.float32, seed=draw(st.integers(0, 9)))
    scale = scale.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    torch.manual_seed(0)
    codes, x_scale = quantize_reference(torch.randn(tokens, k), None, activation.to_text())
    codes = torch.cat((codes.view(torch.uint8), torch.zeros(tokens, 16, dtype=torch.uint8)), 1).view(codes.dtype)[:, :k]
    operands = [
        torch.randn((tokens, n + 3) if part == FULL else (n,)).to(spec.torch_dtype) for part in program.operands
    ]
    operands = [o[:, :n] if o.dim() == 2 else o for o in operands]
    return codes, x_scale, q, scale, operands, program, spec, activation


def check(found, product, slack=0.0) -> None:
    """Error against fp64 of at most 1.5 times the unfused one, or a rounding of the output."""
    codes, x_scale, q, scale, operands, program, spec, activation = product
    back = activation.dequantized("float64").to_text()
    x = dequantize_reference(codes, x_scale, None, back)
    w = dequantize_reference(q, scale, None, replace(spec, dtype="float64").to_text())
    exact = linear_reference(
        x, w, None, None, [o.double() for o in operands], replace(program, dtype="float64").to_text()
    )
    assert found.isfinite().all()
    eps = 1e-6 if program.dtype == "float32" else torch.finfo(torch.bfloat16).eps  # the interpreter truncates
    assert (found.double() - exact).norm() <= (eps + slack) * exact.norm() + eps * x.norm() / x.shape[1] ** 0.5


@settings(SETTINGS, max_examples=30)
@given(
    products(), st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([32, 64]), st.integers(1, 4),
    st.integers(0, 1),
)  # fmt: skip
def test_tile(product, block_t, block_n, block_k, splits, chunk):
    *_, spec, activation = product
    block_k = min(filter(None, (block_k, spec.cols, activation.block)))
    chunk = chunk if spec.kind == FP8 and not (spec.cols or activation.block) else 0
    config = ScaledConfig(TILE, block_t, block_n, block_k, splits=splits, chunk=chunk)
    check(run_scaled(config, *product), product)
    for counters in device._arrival_counters.values():
        assert not counters.any(), "a launch left its counters raised"


@settings(SETTINGS, max_examples=40)
@given(
    products(), st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([32, 64]),
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.booleans(), st.booleans(), st.integers(0, 2)),
    st.integers(1, 3),
)  # fmt: skip
def test_persistent(product, block_t, block_n, block_k, choices, group_t):
    splits, pieces, swap, use_tma, chunk = choices
    *_, program, spec, activation = product
    block_k = min(filter(None, (block_k, spec.cols, activation.block)))
    chunk = chunk if spec.kind == FP8 and not (spec.cols or activation.block) else 0
    config = ScaledConfig(
        PERSISTENT, block_t, block_n, block_k, swap=swap and program.groups == 1, splits=splits, pieces=pieces,
        chunk=chunk, use_tma=use_tma, group_t=group_t,
    )  # fmt: skip
    check(run_scaled(config, *product), product, slack=6e-4 if chunk else 0.0)


def small(original):
    def config(*args):
        found = original(*args)
        return replace(found, block_t=16, block_n=16, block_k=32, pieces=1)

    return config


@pytest.mark.parametrize("tokens", [0, 1, 4, 33])
@pytest.mark.parametrize("norm", [None, NORMS[1], NORMS[3]], ids=["none", "rms", "layer"])
@pytest.mark.parametrize("least", [0, 5])
def test_linear_that_quantizes(monkeypatch, tokens, norm, least):
    """Norm, codes, choice and kernel together, as the op on a GPU runs them; few tokens keep their activations."""
    for name in ("scaled_config", "own_config"):
        monkeypatch.setattr(activations.scaled_heuristics, name, small(getattr(activations.scaled_heuristics, name)))
    monkeypatch.setattr(activations, "scaled_config", activations.scaled_heuristics.scaled_config)
    spec, activation = WeightSpec(FP8, 8, 1, 0, "bfloat16"), ActivationSpec(FP8, 8, TOKEN, least_tokens=least)
    program = replace(PROGRAMS["residual"], dtype="bfloat16", norm=norm)
    torch.manual_seed(0)
    x, residual = torch.randn(tokens, 96).bfloat16(), torch.randn(tokens, 40).bfloat16()
    q, scale, _ = random_weight((40, 96), spec, torch.float32)
    gain = torch.randn(96).bfloat16() if norm else None
    texts = (program.to_text(), spec.to_text())
    found = quant_registration._quant_linear(
        x, q, scale, None, gain, None, [residual], *texts, None, activation.to_text()
    )
    assert found.shape == (tokens, 40) and not take_fallbacks()
    wide = (replace(program, dtype="float32").to_text(), spec.to_text())
    operands = [residual.float()]
    exact = quant_linear_reference(x.float(), q, scale, None, gain, None, operands, *wide, None, activation.to_text())
    assert torch.allclose(found.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().amax()) if tokens else 0.0)


def test_codes_and_refusals():
    """Codes as input; what has no kernel runs with rounded activations, counted."""
    torch.manual_seed(0)
    program = PROGRAMS["plain"]
    for kind, dtype, zero, reason in (
        (INT, "float32", False, ""),
        (FP8, "bfloat16", False, ""),
        (FP8, "float32", False, "activations are float32"),
        (INT, "float32", True, "zero points"),
    ):
        spec, activation = WeightSpec(kind, 8, 1, 0, dtype), ActivationSpec(kind)
        q, scale, zeros = random_weight((40, 96), spec, torch.float32, zero=zero)
        x = torch.randn(5, 96).to(spec.torch_dtype)
        codes, x_scale = quantize_reference(x, None, activation.to_text())
        texts = (replace(program, dtype=dtype).to_text(), spec.to_text())
        exact = quant_linear_reference(codes, q, scale, zeros, None, None, [], *texts, x_scale, activation.to_text())
        for given_x, given_scale in ((codes, x_scale), (x, None)):
            found = quant_registration._quant_linear(
                given_x, q, scale, zeros, None, None, [], *texts, given_scale, activation.to_text()
            )
            counted = list(take_fallbacks())
            assert ([op for op, _ in counted] == ["quant_linear"]) == bool(reason)
            assert all(reason in text for _, text in counted)
            assert torch.allclose(found.float(), exact.float(), rtol=2e-2, atol=2e-2 * float(exact.abs().amax()))


def test_quantize_and_fake_quantize_are_kernels():
    x = torch.randn(2, 5, 64)
    for spec in (ActivationSpec(INT), ActivationSpec(FP8, 8, BLOCK, 32), ActivationSpec(FP8, 8, TENSOR)):
        codes, scale = quant_registration._quantize(x, None, spec.to_text())
        exact, exact_scale = quantize_reference(x, None, spec.to_text())
        assert torch.equal(codes.float(), exact.float()) and torch.equal(scale, exact_scale)
        assert torch.equal(
            quant_registration._fake_quantize(x, None, spec.to_text()), fake_quantize_reference(x, None, spec.to_text())
        )
    few = replace(spec, least_tokens=11)
    assert torch.equal(quant_registration._fake_quantize(x, None, few.to_text()), x) and not take_fallbacks()
    odd = ActivationSpec(INT, 8, BLOCK, 24)
    exact = fake_quantize_reference(x, None, odd.to_text())
    assert torch.equal(quant_registration._fake_quantize(x, None, odd.to_text()), exact)
    assert ["24 columns" in reason for _, reason in take_fallbacks()] == [True]
    with pytest.raises(ValueError, match="quantize"):
        quant_registration._quantize(x, None, few.to_text())


def test_the_library_is_asked_only_for_what_it_does():
    product = (torch.ones(4, 1), torch.ones(32, 1), torch.zeros(32, 64, dtype=torch.float8_e4m3fn))
    assert not activations.library_serves(*product, torch.bfloat16, WeightSpec(FP8, 8, 1, 0, "bfloat16"))  # on a CPU
    assert ScaledConfig(LIBRARY).constants() == {"method": LIBRARY}
