"""A product of codes by codes whose result is read through a norm, mostly by another one.

Where the first leaves its sums to another kernel, that one makes the norm, or the second's codes, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides
from fusecomp.lowerings.linear.lowering import shape_leaves_sums, sums_with_norm
from fusecomp.lowerings.linear.sum_norm import Sums, fits_a_row, launch_sum_norm
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant.activations import (
    LEAST_TOKENS,
    choose,
    launch_quantize,
    launch_scaled_linear,
    refusal,
    scaled_shape,
)
from fusecomp.lowerings.quant.digit_rows import Digits
from fusecomp.lowerings.quant.norm_digits import launch_sum_digits
from fusecomp.lowerings.quant.scaled_heuristics import scaled_config
from fusecomp.lowerings.quant.scaled_launch import leaves_sums, run_product
from fusecomp.lowerings.quant.sum_rows import launch_sum_quantize, one_launch
from fusecomp.ops.linear import LinearShape, Program
from fusecomp.ops.linear_experts import NormedShape
from fusecomp.ops.linear_pair import PairShape
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import QuantShape, is_codes


class ScaledCall(NamedTuple):
    """Arguments of `quant_linear` by codes of its activations, without x and the zero points that it has none of."""

    q: Tensor
    w_scale: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    operands: Sequence[Tensor]
    program: Program
    spec: WeightSpec
    x_scale: Tensor | None
    activation: ActivationSpec


class Normed(NamedTuple):
    """Rows y [T, N] of a norm, and digits of them or None."""

    y: Tensor
    digits: Digits | None


def launch_scaled_pair(x: Tensor, first: ScaledCall, then: ScaledCall) -> tuple[Tensor, Tensor]:
    """(h, z): h = `launch_scaled_linear` of x, or of codes x, by `first`, z = that of h by `then`; there are tokens."""
    norm = then.program.norm
    x, first = _coded(x, first)
    sums = None if norm is None or not one_launch(then.activation) else _sums(x, first)
    if norm is None or sums is None:
        h = _launch(x, first)
        return h, _launch(h, then)
    h, codes, scales = launch_sum_quantize(sums, norm, then.norm_weight, then.norm_bias, then.x_scale, then.activation)
    rest = then._replace(norm_weight=None, norm_bias=None, program=replace(then.program, norm=None), x_scale=scales)
    return h, _launch(codes, rest)


def launch_scaled_norm(
    x: Tensor,
    call: ScaledCall,
    norm: NormSpec,
    weight: Tensor | None,
    bias: Tensor | None,
    takes_digits: Callable[[], bool],
) -> tuple[Tensor, Normed | None]:
    """(h, norm(h)) of h = `launch_scaled_linear` of x; None for the norm where the product ends in h. Of some tokens.

    Args:
        weight, bias: the norm's, [N] contiguous, or None.
        takes_digits: whether digits are made of the norm too; asked only where a norm is made.
    """
    x, call = _coded(x, call)
    if (sums := _sums(x, call)) is None:
        return _launch(x, call), None
    if takes_digits():
        h, y, made = launch_sum_digits(sums, norm, weight, bias)
        return h, Normed(y, made)
    h, y = launch_sum_norm(sums, norm, weight, bias)
    return h, Normed(y, None)


def _coded(x: Tensor, call: ScaledCall) -> tuple[Tensor, ScaledCall]:
    """Codes of what the call multiplies, and the rest of it."""
    if is_codes(x):
        return x, call
    program = call.program
    x, scale = launch_quantize(x, call.x_scale, call.activation, program.norm, call.norm_weight, call.norm_bias)
    return x, call._replace(x_scale=scale, norm_weight=None, norm_bias=None, program=replace(program, norm=None))


def _sums(x: Tensor, call: ScaledCall) -> Sums | None:
    """The product of codes x; None, and nothing is launched, where it ends in the epilogue, or a row is too long."""
    program, q = call.program, call.q
    assert call.x_scale is not None
    config = choose(q, call.x_scale, call.w_scale, program, call.spec, call.activation, x.shape[0])
    if not leaves_sums(config) or not fits_a_row(q.shape[0] // program.groups):
        return None
    acc = run_product(config, x, call.x_scale, q, call.w_scale, program.groups, call.spec, call.activation)
    args = full_rows(call.operands, program)
    strides = operand_strides(program, args)
    return Sums(acc, program.torch_dtype, epilogue_hook(program), args, strides, program.groups)


def explain_pair(target: Target, pair: PairShape, token_counts: Sequence[int]) -> list[str]:
    """One line for each run of token counts: whether the sum and the norm are made in one launch."""
    made = "the sum, the norm and its codes" if isinstance(pair.then, QuantShape) else "the sum and the norm"
    return _lines(made, lambda tokens: _in_one(target, pair, tokens), token_counts)


def explain_normed(target: Target, shape: NormedShape, token_counts: Sequence[int]) -> list[str]:
    """The same of a linear and the norm of the router behind it, which the experts read too."""
    return _lines(
        "the sum and the router's norm", lambda tokens: _leaves_sums(target, shape.first, tokens), token_counts
    )


def _lines(made: str, together: Callable[[int], bool], token_counts: Sequence[int]) -> list[str]:
    lines = []
    named = [(tokens, together(tokens)) for tokens in sorted(set(token_counts)) if tokens]
    for one, run in itertools.groupby(named, key=lambda found: found[1]):
        counts = [tokens for tokens, _ in run]
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(f"{span} tokens: {f'{made} in one launch' if one else 'one after the other'}")
    return lines


def _in_one(target: Target, pair: PairShape, tokens: int) -> bool:
    first, then = pair.first, pair.then
    if isinstance(first, LinearShape) and isinstance(then, LinearShape):
        return sums_with_norm(target, first, then, tokens)
    assert isinstance(then, QuantShape)
    return _multiplies_codes(target, then, tokens) and _leaves_sums(target, first, tokens)


def _leaves_sums(target: Target, shape: LinearShape | QuantShape, tokens: int) -> bool:
    """Whether a linear's product is summed by another kernel."""
    if isinstance(shape, LinearShape):
        return shape_leaves_sums(target, shape, tokens)
    if not fits_a_row(shape.n) or not _multiplies_codes(target, shape, tokens):
        return False
    spec = WeightSpec(shape.kind, shape.bits, shape.rows, shape.cols, shape.dtype)
    scaled = scaled_shape(shape.n, shape.k, shape.groups, shape.dtype, spec, shape.block, shape.epilogue)
    return leaves_sums(scaled_config(target, scaled, tokens))


def _multiplies_codes(target: Target, shape: QuantShape, tokens: int) -> bool:
    """Whether a linear multiplies codes of its activations."""
    if not shape.granularity or tokens < max(shape.least, LEAST_TOKENS):
        return False
    spec = WeightSpec(shape.kind, shape.bits, shape.rows, shape.cols, shape.dtype)
    codes = ActivationSpec(shape.kind, 8, shape.granularity, shape.block)
    return refusal(target, shape.k, spec, shape.zero, codes) is None


def _launch(x: Tensor, call: ScaledCall) -> Tensor:
    q, w_scale, norm_weight, norm_bias, operands, program, spec, x_scale, activation = call
    return launch_scaled_linear(x, x_scale, q, w_scale, norm_weight, norm_bias, operands, program, spec, activation)
