"""Experts of fp8 codes by digits of their inputs, under Triton's interpreter.

`tests/lowerings/test_interpreted.py` runs this file.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from fusecomp.lowerings import quant_registration
from fusecomp.lowerings.experts import quant_routed
from fusecomp.lowerings.experts.heuristics import DigitTiles, ExpertsConfig, Tiles
from fusecomp.lowerings.experts.quant_routed import launch_routed_quant_experts, takes_digits
from fusecomp.lowerings.linear.sum_norm import Sums, launch_sum_norm
from fusecomp.lowerings.quant import activations, pair
from fusecomp.lowerings.quant.norm_digits import launch_norm_digits, launch_sum_digits
from fusecomp.lowerings.quant.scaled_heuristics import ScaledConfig
from fusecomp.ops.linear_experts import without_norm
from fusecomp.ops.norm import LAYER, RMS, NormSpec
from tests.lowerings.digits_cases import digits_of, numbers
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16, round_to_nearest
from tests.lowerings.interpreted.float8 import fuse_multiply_add, multiply_float8
from tests.lowerings.linear_cases import residual
from tests.lowerings.linear_experts_cases import make_quant_linear_experts
from tests.lowerings.routed_cases import UP, check_mixture, make_quant_mixture, serve_codes_by_lists

multiply_float8()
multiply_bfloat16()
round_to_nearest()
fuse_multiply_add()

DIGITS = {
    "narrow": DigitTiles(Tiles(32, 32, 4, 2, use_tma=True), Tiles(16, 16, 4, 2, use_tma=True)),
    "wide": DigitTiles(Tiles(64, 32, 4, 2, use_tma=True), Tiles(64, 16, 4, 2, use_tma=True)),
}
PLAIN = Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 2)


@pytest.fixture(params=[("narrow", 8), ("wide", 16)], ids=str, autouse=True)
def config(request, monkeypatch):
    name, block_t = request.param
    config = ExpertsConfig("grouped", *PLAIN, block_t, True, digits=DIGITS[name])
    serve_codes_by_lists(monkeypatch, config)
    return config


def sums(rows: int, columns: int) -> Sums:
    g = torch.Generator().manual_seed(rows)
    acc = torch.randn(2, rows, columns, generator=g) * torch.exp2(torch.arange(columns) % 9.0 - 4)
    stream = torch.randn(rows, columns, generator=g).bfloat16()
    return Sums(acc, torch.bfloat16, residual, (stream,), (columns,), 1)


@pytest.mark.parametrize("norm", [NormSpec(RMS, 1e-6), NormSpec(RMS, 1e-6, plus_one=True), NormSpec(LAYER, 1e-5)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 200)])
def test_digits_are_the_norm(norm, rows, columns):
    """Bit for bit what the launch without digits makes; exact but for what is 2^-13 of a row's largest number."""
    torch.manual_seed(rows)
    given, weight = sums(rows, columns), torch.rand(columns).bfloat16()
    bias = torch.randn(columns).bfloat16() if norm.kind == LAYER else None
    total, y, digits = launch_sum_digits(given, norm, weight, bias)
    for actual, wanted in zip((total, y), launch_sum_norm(given, norm, weight, bias), strict=True):
        assert torch.equal(actual, wanted)
    found, y = numbers(digits), y.double()
    largest = y.abs().amax(1, keepdim=True)
    assert torch.equal(found[y.abs() >= largest * 2**-12], y[y.abs() >= largest * 2**-12])
    assert ((found - y).abs() <= largest * 2**-16).all()
    assert (digits.units.log2() % 1 == 0).all()


@pytest.mark.parametrize("norm", [NormSpec(RMS, 1e-6), NormSpec(LAYER, 1e-5), None])
def test_of_rows(norm):
    """What the launch of sums makes of the same rows; without a norm digits of the rows themselves."""
    torch.manual_seed(0)
    given, weight = sums(5, 200), torch.rand(200).bfloat16()
    total, y, digits = launch_sum_digits(given, norm or NormSpec(RMS, 1e-6), weight, None)
    wide = torch.full((5, 232), float("nan"), dtype=torch.bfloat16)
    wide[:, :200] = total
    found = launch_norm_digits(wide[:, :200], norm, None if norm is None else weight, None)
    if norm is None:
        assert torch.equal(found[0], total)
        assert ((numbers(found[1]) - total).abs() <= total.abs().amax(1, keepdim=True) * 2**-16).all()
    else:
        assert torch.equal(found[0], y) and torch.equal(numbers(found[1]), numbers(digits))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_number(bad):
    given = sums(3, 64)
    given.acc[0, 1, 5] = bad
    given.acc[:, 2] = 0
    given.args[0][2] = 0
    _, y, digits = launch_sum_digits(given, NormSpec(RMS, 1e-6), None, None)
    assert digits.units[1].isnan() and not digits.units[[0, 2]].isnan().any()
    assert not numbers(digits)[2].any() and not y[2].any()


@pytest.mark.parametrize(("tokens", "hidden", "width"), [(2, 32, 48), (19, 64, 48), (40, 96, 80)])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "not gated"])
def test_is_the_mixture(name, tokens, hidden, width):
    """Gates of all kinds and biases; experts of none, one and several tiles."""
    (x, *args), (wide, *exact) = make_quant_mixture(name, tokens, C=hidden, width=width, dtype=torch.bfloat16)
    args, exact = ([*without_norm(a[:-1]), a[-1]] for a in (args, exact))
    assert takes_digits(x, args)
    digits = digits_of(x)
    assert torch.equal(numbers(digits).bfloat16(), x)
    found = launch_routed_quant_experts(x, *args, digits=digits)
    check_mixture((x, *args), (wide, *exact), found)
    assert torch.equal(launch_routed_quant_experts(x, *args)[1], found[1])


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_behind_its_norm(name):
    args, exact = make_quant_mixture(name, 19, C=64, width=48, dtype=torch.bfloat16)
    assert takes_digits(args[0], args[1:])
    with mock.patch.object(quant_routed, "launch_norm_digits", wraps=launch_norm_digits) as made:
        check_mixture(args, exact, launch_routed_quant_experts(*args))
    assert made.called


@pytest.mark.parametrize("tokens", [35, 67])
def test_all_tokens_choose_the_same_experts(tokens):
    """Three experts of several units: those of 35 tokens are shared by the other five's programs, of 67 by none."""
    (x, *args), (wide, *exact) = make_quant_mixture("qwen3", tokens, dtype=torch.bfloat16)
    args, exact = ([*without_norm(a[:-1]), a[-1]] for a in (args, exact))
    for rows in (x, wide, args[-1], exact[-1]):
        rows[:] = rows[0].clone()
    found = launch_routed_quant_experts(x, *args, digits=digits_of(x))
    assert torch.equal(found[1], found[1][:1].expand_as(found[1]))
    check_mixture((x, *args), (wide, *exact), found)


@pytest.mark.parametrize("tokens", [4, 19])
def test_behind_a_linear(monkeypatch, tokens):
    """Digits are made where the sums are; of a step that keeps its activations, which leaves none, by the norm."""
    small = ScaledConfig(splits=2, block_t=16, block_n=16, block_k=32, pieces=1, use_tma=False)
    monkeypatch.setattr(activations, "scaled_config", lambda *_: small)
    x, first, rest = make_quant_linear_experts("qwen3", tokens, "fp8", dtype=torch.bfloat16)
    made = mock.patch.object(pair, "launch_sum_digits", wraps=launch_sum_digits)
    normed = mock.patch.object(quant_routed, "launch_norm_digits", wraps=launch_norm_digits)
    with made as by_sums, normed as by_norm:
        found = quant_registration._quant_linear_experts(x, *first, *rest, True)
    assert (by_sums.call_count, by_norm.call_count) == ((1, 0) if tokens == 19 else (0, 1))
    h = quant_registration._quant_linear(x, *first)
    for actual, right in zip(found, (h, *quant_registration._routed_quant_experts(h, *rest[:-1], h)), strict=True):
        torch.testing.assert_close(actual, right, rtol=2**-6, atol=2**-6)


def test_who_takes_digits(monkeypatch, config):
    """Mixtures of bf16 and of fp8 codes in launches by lists whose table has them."""
    (x, *args), _ = make_quant_mixture("qwen3", 3, dtype=torch.bfloat16)
    assert takes_digits(x, args)
    assert not takes_digits(x[:1], args)
    assert not takes_digits(x, [args[0].float(), *args[1:]])
    moved = torch.empty(args[UP].numel() + 8, dtype=args[UP].dtype)[8:].view(args[UP].shape)
    assert not takes_digits(x, [*args[:UP], moved, *args[UP + 1 :]])
    (narrow, *others), _ = make_quant_mixture("qwen3", 3, dtype=torch.float16)
    assert not takes_digits(narrow, others)
    monkeypatch.setattr(quant_routed, "quant_experts_config", lambda *_: replace(config, digits=None))
    assert not takes_digits(x, args)
