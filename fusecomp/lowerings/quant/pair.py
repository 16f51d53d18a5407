"""Two linears of codes, of which the second reads what the first gives through a norm.

Products of codes by codes: where the first leaves its sums to another kernel, that one makes the second's codes too.
One token: the first linear does the half of the norm that each of the second's programs would do again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides
from fusecomp.lowerings.linear.lowering import sums_with_norm
from fusecomp.lowerings.linear.sum_norm import Sums, fits_a_row
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant.activations import (
    LEAST_TOKENS,
    choose,
    launch_quantize,
    launch_scaled_linear,
    refusal,
    scaled_shape,
)
from fusecomp.lowerings.quant.heuristics import WORD_VECTOR, QuantConfig, between_config, quant_config
from fusecomp.lowerings.quant.launches import run_quant
from fusecomp.lowerings.quant.scaled_heuristics import scaled_config
from fusecomp.lowerings.quant.scaled_launch import leaves_sums, run_product, run_scaled
from fusecomp.lowerings.quant.sum_rows import launch_sum_quantize, one_launch
from fusecomp.lowerings.quant.word_launch import Between, norm_scheme
from fusecomp.ops.linear import LinearShape, Program
from fusecomp.ops.linear_pair import PairShape
from fusecomp.ops.norm import LAYER
from fusecomp.ops.quant import ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import QuantShape, is_codes, quant_shape


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


def launch_scaled_pair(x: Tensor, first: ScaledCall, then: ScaledCall) -> tuple[Tensor, Tensor]:
    """(h, z): h = `launch_scaled_linear` of x, or of codes x, by `first`, z = that of h by `then`; there are tokens."""
    x_scale, program, norm = first.x_scale, first.program, then.program.norm
    if not is_codes(x):
        x, x_scale = launch_quantize(x, x_scale, first.activation, program.norm, first.norm_weight, first.norm_bias)
        program = replace(program, norm=None)
    assert x_scale is not None and program.norm is None
    q, w_scale, spec, activation = first.q, first.w_scale, first.spec, first.activation
    config = choose(q, x_scale, w_scale, program, spec, activation, x.shape[0])
    fits = leaves_sums(config) and fits_a_row(q.shape[0] // program.groups)
    if norm is None or not fits or not one_launch(then.activation):
        h = run_scaled(config, x, x_scale, q, w_scale, first.operands, program, spec, activation)
        return h, _launch(h, then)
    acc = run_product(config, x, x_scale, q, w_scale, program.groups, spec, activation)
    args = full_rows(first.operands, program)
    strides = operand_strides(program, args)
    sums = Sums(acc, program.torch_dtype, epilogue_hook(program), args, strides, program.groups)
    h, codes, scales = launch_sum_quantize(sums, norm, then.norm_weight, then.norm_bias, then.x_scale, then.activation)
    rest = then._replace(norm_weight=None, norm_bias=None, program=replace(then.program, norm=None), x_scale=scales)
    return h, _launch(codes, rest)


class OneTokenCall(NamedTuple):
    """Arguments of `quant_linear` of one token whose activations stay numbers, without x; see there."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    operands: Sequence[Tensor]
    program: Program
    spec: WeightSpec


def launch_one_token_pair(x: Tensor, first: OneTokenCall, then: OneTokenCall) -> tuple[Tensor, Tensor] | None:
    """(h, z) of x [1, K]: h = `quant_linear` by `first`, z = that of h by `then`, with the norm between them shared.

    z is not bit for bit what the two in turn give: x times the norm's weight is rounded once, where they do not. None
    where the kernel does not serve both, or the GPU has no launch for it; `supports` must hold for each.
    """
    norm, target = then.program.norm, target_of(x)
    one, two = _shape_of(x.dtype, first), _shape_of(first.program.torch_dtype, then)
    if norm is None or norm.kind == LAYER or then.norm_bias is not None:
        return None
    if first.program.norm is not None and (first.program.norm.kind == LAYER or first.norm_bias is not None):
        return None
    if (configs := _sharing(target, one, two)) is None:
        return None
    config, other = configs
    programs = -(-one.n // (config.block_r // one.groups))
    h, next_x = (torch.empty((1, one.n), dtype=x.dtype, device=x.device) for _ in range(2))
    squares = torch.empty(programs, dtype=torch.float32, device=x.device)
    z = torch.empty((1, two.n), dtype=then.program.torch_dtype, device=x.device)
    use_pdl = uses_pdl(x)
    left = Between(None, then.norm_weight, next_x, squares, norm_scheme(norm, then.norm_weight))
    run_quant(
        config, x, first.q, first.scale, None, first.norm_weight, first.operands, first.program, first.spec, h, use_pdl,
        left,
    )  # fmt: skip
    run_quant(
        other, next_x, then.q, then.scale, None, None, then.operands, then.program, then.spec, z, use_pdl,
        Between(squares),
    )  # fmt: skip
    return h, z


def _shape_of(dtype: torch.dtype, call: OneTokenCall) -> QuantShape:
    return quant_shape(dtype, call.q, call.zero, call.program, call.spec)


def _sharing(target: Target, first: QuantShape, then: QuantShape) -> tuple[QuantConfig, QuantConfig] | None:
    """How two linears of one token share the norm between. fp16 may not hold x times a weight."""
    config, other = quant_config(target, first, 1), between_config(target, then)
    if first.dtype != "bfloat16" or config.kernel != WORD_VECTOR or other is None:
        return None
    return config, other


def explain_pair(target: Target, pair: PairShape, token_counts: Sequence[int]) -> list[str]:
    """One line for each run of token counts: whether the sum and the norm are made in one launch."""
    lines = []
    named = [(tokens, _in_one(target, pair, tokens)) for tokens in sorted(set(token_counts)) if tokens]
    alone = _shares_one(target, pair)
    for (together, _), run in itertools.groupby(named, key=lambda found: (found[1], alone and found[0] == 1)):
        counts = [tokens for tokens, _ in run]
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        made = "the sum, the norm and its codes" if isinstance(pair.then, QuantShape) else "the sum and the norm"
        how = f"{made} in one launch" if together else "one after the other"
        if counts == [1] and alone:
            how += ", the norm's weight and squares by the first"
        lines.append(f"{span} tokens: {how}")
    return lines


def _shares_one(target: Target, pair: PairShape) -> bool:
    first, then = pair.first, pair.then
    if not isinstance(first, QuantShape) or not isinstance(then, QuantShape):
        return False
    numbers = all(s.least > 1 or not s.granularity for s in (first, then))
    return numbers and _sharing(target, first, then) is not None


def _in_one(target: Target, pair: PairShape, tokens: int) -> bool:
    first, then = pair.first, pair.then
    if isinstance(first, LinearShape) and isinstance(then, LinearShape):
        return sums_with_norm(target, first, then, tokens)
    assert isinstance(first, QuantShape) and isinstance(then, QuantShape)
    shapes = [s for s in (first, then) if s.granularity and tokens >= max(s.least, LEAST_TOKENS)]
    if len(shapes) < 2 or not fits_a_row(first.n):
        return False
    for s in shapes:
        spec = WeightSpec(s.kind, s.bits, s.rows, s.cols, s.dtype)
        if refusal(target, s.k, spec, s.zero, ActivationSpec(s.kind, 8, s.granularity, s.block)):
            return False
    spec = WeightSpec(first.kind, first.bits, first.rows, first.cols, first.dtype)
    scaled = scaled_shape(first.n, first.k, first.groups, first.dtype, spec, first.block, first.epilogue)
    return leaves_sums(scaled_config(target, scaled, tokens))


def _launch(x: Tensor, call: ScaledCall) -> Tensor:
    q, w_scale, norm_weight, norm_bias, operands, program, spec, x_scale, activation = call
    return launch_scaled_linear(x, x_scale, q, w_scale, norm_weight, norm_bias, operands, program, spec, activation)
