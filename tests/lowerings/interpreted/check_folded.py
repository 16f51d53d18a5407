"""Kernels of folded 4-bit integers under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.quant import launches
from fusecomp.lowerings.quant.fixed_point import FIRST
from fusecomp.lowerings.quant.folded_digit_rows import launch_folded_digits
from fusecomp.lowerings.quant.heuristics import QuantConfig
from fusecomp.lowerings.quant.launches import launch_dequantize
from fusecomp.ops.linear import FULL
from fusecomp.ops.quant import INT, WeightSpec, dequantize_reference
from fusecomp.patterns.quant_examples import random_weight
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.quant_cases import NORMS, PROGRAMS, folded_specs, layers, run
from tests.lowerings.searches import SETTINGS

multiply_bfloat16()


@settings(SETTINGS, max_examples=60)
@given(
    layers(st.integers(1, 40), folded_specs), st.sampled_from([16, 32]), st.sampled_from([16, 64]), st.integers(1, 4),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_folded(layer, block_t, block_r, splits, early, sums):
    sums &= layer[0].dtype != torch.float32  # which the bias would cost bits, hence `quant_config` does not choose it
    run(layer, QuantConfig("folded", block_t, block_r, splits=splits, early=early, sums=sums))


@settings(SETTINGS, max_examples=40)
@given(
    layers(st.integers(1, 40), folded_specs), st.sampled_from([16, 32]), st.sampled_from([16, 64]),
    st.sampled_from([64, 128, 256]), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_folded_wide(layer, block_t, block_r, block_k, splits, use_tma):
    x, weight, _, operands, program, spec = layer
    layer = (x, weight, None, operands, replace(program, norm=None), spec)
    block_k = min(block_k, 4 * spec.fold)
    run(layer, QuantConfig("folded wide", block_t, block_r, block_k, splits=splits, use_tma=use_tma))


@pytest.mark.parametrize("tokens", [3, 33, 128])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["residual", "swiglu"])
def test_inputs_by_a_descriptor(monkeypatch, tokens, zero, name):
    """The same bits as by pointers, by which inputs are read that TMA does not take."""
    used = []

    def launch(*args, **options):
        used.append(options["USE_TMA"])
        launch_kernel(*args, **options)

    launch_kernel = launches.launch
    monkeypatch.setattr(launches, "launch", launch)
    spec, program = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), replace(PROGRAMS[name], dtype="bfloat16")
    n, k = 40, 512
    weight = random_weight((program.groups * n, k), spec, torch.bfloat16, zero=zero)
    operands = [torch.randn(tokens, n).bfloat16() for _ in program.operands]
    x = torch.randn(tokens, k + 8).bfloat16()[:, :k]
    for block_r, block_k in ((64, 128), (128, 256)):
        config = QuantConfig("folded wide", 64, block_r, block_k, splits=2)
        layer = x, weight, None, operands, program, spec
        found = run(layer, replace(config, use_tma=True))
        assert torch.equal(found, run(layer, config))
        odd = torch.zeros(tokens, k + 9, dtype=x.dtype)[:, 1 : k + 1].copy_(x)
        assert torch.equal(found, run((odd, *layer[1:]), replace(config, use_tma=True)))
    assert used == [True, False, False] * 2


def test_scales_half_a_word_off():
    """They are no words then, and read one by one; the same bits."""
    spec = WeightSpec(INT, 4, 1, 128, "bfloat16", 64)
    q, scale, zero = random_weight((40, 512), spec, torch.bfloat16, zero=True)
    off = torch.empty(scale.numel() + 1, dtype=scale.dtype)[1:].view(scale.shape).copy_(scale)
    layer = (
        torch.randn(5, 512).bfloat16(),
        (q, scale, zero),
        None,
        [],
        replace(PROGRAMS["plain"], dtype="bfloat16"),
        spec,
    )
    config = QuantConfig("folded wide", 64, 64, 128)
    assert torch.equal(run(layer, config), run((layer[0], (q, off, zero), *layer[2:]), config))


@settings(SETTINGS, max_examples=60)
@given(
    layers(st.sampled_from([1, 1, 2, 7, 9, 20]), folded_specs), st.sampled_from([8, 16]), st.sampled_from([16, 32]),
    st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([2, 4]),
)  # fmt: skip
def test_folded_parts(layer, block_t, block_r, splits, early, sums, parts):
    sums &= layer[0].dtype != torch.float32
    config = QuantConfig(
        "folded", block_t, block_r, splits=splits, early=early, sums=sums, parts=parts, num_warps=parts
    )
    run(layer, config)


@st.composite
def held_layers(draw):
    """One or two tokens by whole products of rows, in bf16, with scales of 128 columns."""
    spec, name = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), draw(st.sampled_from([*PROGRAMS]))
    norm = NORMS[draw(st.sampled_from([*NORMS]))]
    program = replace(PROGRAMS[name], dtype=spec.dtype, norm=norm)
    n, k = 16 // program.groups * draw(st.integers(1, 5)), 256 * draw(st.integers(1, 9))
    weight = random_weight((program.groups * n, k), spec, torch.bfloat16, zero=draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 9)))
    tokens = draw(st.integers(1, 2))
    x = torch.randn(tokens, k + 8).bfloat16()[:, :k] * draw(st.sampled_from([0.0, 1e-30, 3.0, 1e6]))
    x *= torch.tensor([1.0, 100.0], dtype=x.dtype)[:tokens, None]
    operands = [torch.randn((tokens, n) if part == FULL else (n,)).bfloat16() for part in program.operands]
    gain = torch.randn(k).bfloat16() if norm and (norm.plus_one or draw(st.booleans())) else None
    return x, tuple(weight), gain, operands, program, spec


@settings(SETTINGS, max_examples=40)
@given(held_layers(), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans())
def test_folded_held(layer, products, parts, early):
    run(layer, QuantConfig("folded held", 1, 16 * products, num_warps=parts, parts=parts, early=early))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_held_inputs_that_are_no_numbers(value):
    """They leave their token no number in any output, as bytes cannot say them, and others theirs."""
    spec, program = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), replace(PROGRAMS["plain"], dtype="bfloat16")
    weight = random_weight((32, 1024), spec, torch.bfloat16, zero=True)
    x = torch.randn(2, 1024).bfloat16()
    x[1, 300] = value
    out = torch.zeros(2, 32, dtype=torch.bfloat16)
    config = QuantConfig("folded held", 1, 16, num_warps=4, parts=4)
    launches.run_quant(config, x, *weight, None, [], program, spec, out, False)
    assert out[1].isnan().all() and out[0].isfinite().all()


@settings(SETTINGS, max_examples=15)
@given(folded_specs(), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.sampled_from([(), (3,)]))
def test_unfold(spec, n, blocks, zero, leading):
    q, scale, zeros = random_weight((*leading, n, 4 * spec.fold * blocks), spec, torch.float32, zero=zero)
    found, exact = launch_dequantize(q, scale, zeros, spec), dequantize_reference(q, scale, zeros, spec.to_text())
    eps = 0.0 if spec.dtype in ("float32", "float16") else torch.finfo(spec.torch_dtype).eps
    assert torch.allclose(found.float(), exact.float(), rtol=eps, atol=0.0)


@st.composite
def digit_specs(draw):
    """Folded codes whose half a tile shares a scale."""
    fold, halves = draw(st.sampled_from([32, 64])), draw(st.sampled_from([0, 1, 2, 4]))
    return WeightSpec(INT, 4, draw(st.sampled_from([1, 1, 0, 3])), 2 * halves * fold, "bfloat16", fold)


@settings(SETTINGS, max_examples=60)
@given(
    layers(st.integers(1, 40), digit_specs), st.sampled_from([8, 16, 32]), st.sampled_from([64, 128]),
    st.integers(1, 4),
)  # fmt: skip
def test_folded_digits(layer, block_t, block_r, splits):
    run(layer, QuantConfig("folded digits", block_t, block_r, splits=splits))


@settings(SETTINGS, max_examples=40)
@given(st.sampled_from([32, 64]), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1e-30, 1.0, 1e30]), st.data())
def test_digits_of_rows(fold, halves, count, size, data):
    """Within 2^-14 of the largest of 2 `fold` neighbours; their sums are exact; what is not finite marks them."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    k = 2 * fold * halves
    wide = (torch.randn(count, k + 3) * torch.exp(3 * torch.randn(count, k + 3)) * size).bfloat16()
    x = wide[:, :k]
    bad = data.draw(st.sampled_from([None, float("inf"), float("nan")]))
    if bad is not None:
        x[0, data.draw(st.integers(0, 2 * fold - 1))] = bad
    digits, sums = launch_folded_digits(x, fold, 0, None, 0.0)
    whole = FIRST.value * digits[:, 0].int() + digits[:, 1].int()
    whole = whole.view(count, halves, fold, 2).transpose(2, 3).reshape(count, halves, 2 * fold)
    assert torch.equal(sums.T >> 8, whole.sum(-1).int())
    exponent, x = sums.T & 255, x.double().view(count, halves, -1)
    finite = x.isfinite().all(-1)
    assert torch.equal(exponent == 255, ~finite) and not whole[~finite].any()
    found = whole * torch.exp2(exponent.double() - 127)[..., None]
    largest = x.abs().amax(-1, keepdim=True)
    assert ((found - x).abs() <= largest * 2.0**-14)[finite].all()
    assert (found == x)[finite][(x.abs() >= largest * 2.0**-6)[finite]].all()
