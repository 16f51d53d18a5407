"""Binds GPU kernels to the canonical ops of codes, as `registration.py` does for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusecomp.lowerings.launch import computed
from fusecomp.lowerings.registration import run_linear, run_norm, run_router, unit_stride
from fusecomp.ops.library import implement, record_fallback, require_any_order
from fusecomp.ops.linear import Program
from fusecomp.ops.linear_experts import NORM, NORM_WEIGHT, QUANT_RESIDUAL, mixture_args, without_norm
from fusecomp.ops.linear_pair import QUANT_ARGS
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import (
    ActivationSpec,
    WeightSpec,
    dequantize_reference,
    fake_quantize_reference,
    quantize_reference,
)
from fusecomp.ops.quant_linear import is_codes
from fusecomp.ops.routed_quant_experts import ROUTER_ARGS

if TYPE_CHECKING:
    from fusecomp.lowerings.quant.digit_rows import Digits
    from fusecomp.lowerings.quant.pair import ScaledCall


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    from fusecomp.lowerings.quant.launches import launch_dequantize
    from fusecomp.lowerings.quant.lowering import refusal

    parsed = WeightSpec.from_text(spec)
    if reason := refusal(q, scale, zero, parsed):
        record_fallback("dequantize", reason)
        return dequantize_reference(q, scale, zero, spec)
    return computed(launch_dequantize(q, scale, zero, parsed))


def _quant_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    spec: str,
    x_scale: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    from fusecomp.lowerings.quant.lowering import launch_quant_linear, supports

    require_any_order("quant_linear")
    parsed, layout = Program.from_text(program), WeightSpec.from_text(spec)
    if activation:
        done = _scaled_linear(x, q, scale, zero, norm_weight, norm_bias, operands, program, spec, x_scale, activation)
        if isinstance(done, Tensor):
            return done
        x, parsed = done
        if parsed.norm is None:
            norm_weight = norm_bias = None
    if reason := supports(x, q, scale, zero, operands, parsed, layout):
        record_fallback("quant_linear", reason)
        weight = dequantize_reference(q, scale, zero, spec)
        return run_linear(x, weight, norm_weight, norm_bias, operands, parsed.to_text())
    return computed(launch_quant_linear(x, q, scale, zero, norm_weight, norm_bias, operands, parsed, layout))


def _scaled_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    spec: str,
    x_scale: Tensor | None,
    activation: str,
) -> Tensor | tuple[Tensor, Program]:
    """A quantized linear by codes of its activations; or what is left for a weight-only one: its input and program.

    That is so in steps of fewer tokens than the spec's, which keep their activations; of one token, whose codes are
    rounded to here; and where codes cannot be multiplied, which is counted.
    """
    from fusecomp.lowerings.quant import activations

    parsed, layout, codes = Program.from_text(program), WeightSpec.from_text(spec), ActivationSpec.from_text(activation)
    coded = is_codes(x)
    if not coded and x.shape[0] < codes.least_tokens:
        return x, parsed
    if coded or x.shape[0] >= activations.LEAST_TOKENS:
        if not (reason := _codes_refusal(x, q, scale, zero, operands, parsed, layout, codes)):
            args = (x, x_scale, q, scale, norm_weight, norm_bias, operands, parsed, layout, codes)
            return computed(activations.launch_scaled_linear(*args))
        record_fallback("quant_linear", f"codes of activations are not multiplied: {reason}")
    if coded:
        assert x_scale is not None
        return _dequantize(x, x_scale, None, codes.dequantized(layout.dtype).to_text()), parsed
    if reason := activations.rows_refusal(x, codes):
        record_fallback("quant_linear", f"no kernel makes codes of activations: {reason}")
        x = x if parsed.norm is None else run_norm(x, norm_weight, norm_bias, parsed.norm.to_text())
        return fake_quantize_reference(x, x_scale, activation), replace(parsed, norm=None)
    rounded = activations.launch_fake_quantize(x, x_scale, codes, parsed.norm, norm_weight, norm_bias)
    return computed(rounded), replace(parsed, norm=None)


def _codes_refusal(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    layout: WeightSpec,
    codes: ActivationSpec,
) -> str | None:
    """Why no kernel multiplies codes of x, or x if it is codes, by those of a weight; or None."""
    from fusecomp.lowerings.device import target_of
    from fusecomp.lowerings.quant import activations
    from fusecomp.lowerings.quant.lowering import supports

    reason = activations.refusal(target_of(q), q.shape[1], layout, zero is not None, codes)
    reason = reason or (None if is_codes(x) else activations.rows_refusal(x, codes))
    stand_in = q.new_empty(0, dtype=layout.torch_dtype) if is_codes(x) else x
    return reason or supports(stand_in, q, scale, zero, operands, program, layout)


def _quant_linear_pair(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from fusecomp.lowerings.quant.pair import launch_scaled_pair

    require_any_order("quant_linear_pair")
    first, then = args[:QUANT_ARGS], args[QUANT_ARGS:]
    h = x.new_empty((x.shape[0], 0), dtype=Program.from_text(first[6]).torch_dtype)
    one, two = _scaled_call(x, *first), _scaled_call(h, *then)
    if x.shape[0] and one and two:
        h, z = launch_scaled_pair(x, one, two)
        return computed(h), computed(z)
    h = _quant_linear(x, *first)
    return h, _quant_linear(h, *then)


def _scaled_call(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    spec: str,
    x_scale: Tensor | None,
    activation: str,
) -> ScaledCall | None:
    """A quantized linear as one by codes of its activations, or None where it is not that."""
    from fusecomp.lowerings.quant.activations import LEAST_TOKENS
    from fusecomp.lowerings.quant.pair import ScaledCall

    if not activation:
        return None
    parsed, layout, codes = Program.from_text(program), WeightSpec.from_text(spec), ActivationSpec.from_text(activation)
    if not is_codes(x) and x.shape[0] < max(codes.least_tokens, LEAST_TOKENS):
        return None
    if _codes_refusal(x, q, scale, zero, operands, parsed, layout, codes):
        return None
    return ScaledCall(q, scale, norm_weight, norm_bias, operands, parsed, layout, x_scale, codes)


def _quantize(x: Tensor, scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    from fusecomp.lowerings.quant.activations import launch_quantize, rows_refusal

    require_any_order("quantize")
    parsed = ActivationSpec.from_text(spec)
    if parsed.least_tokens or (scale is None) != parsed.dynamic:
        return quantize_reference(x, scale, spec)  # which raises
    if reason := rows_refusal(x, parsed):
        record_fallback("quantize", reason)
        return quantize_reference(x, scale, spec)
    rows = x.reshape(-1, x.shape[-1])
    codes, scales = launch_quantize(rows, scale, parsed)
    scales = scales if scales.dim() == 1 else scales.view(*x.shape[:-1], scales.shape[-1])
    return computed(codes).view(x.shape), computed(scales)


def _fake_quantize(x: Tensor, scale: Tensor | None, spec: str) -> Tensor:
    from fusecomp.lowerings.quant.activations import launch_fake_quantize, rows_refusal

    require_any_order("fake_quantize")
    parsed, rows = ActivationSpec.from_text(spec), x.reshape(-1, x.shape[-1])
    if rows.shape[0] < parsed.least_tokens:
        return x.clone(memory_format=torch.contiguous_format)
    if reason := rows_refusal(x, parsed):
        record_fallback("fake_quantize", reason)
        return fake_quantize_reference(x, scale, spec)
    return computed(launch_fake_quantize(rows, scale, parsed)).view(x.shape)


def _quant_experts(*args: Any) -> Tensor:
    from fusecomp.lowerings.experts.quant_lowering import launch_quant_experts

    require_any_order("quant_experts")
    return computed(launch_quant_experts(*args))


def _routed_quant_experts(x: Tensor, *args: Any, digits: Digits | None = None) -> tuple[Tensor, Tensor]:
    from fusecomp.lowerings.experts.quant_routed import launch_routed_quant_experts

    require_any_order("routed_quant_experts")
    x, router, experts = unit_stride(x), args[:ROUTER_ARGS], args[ROUTER_ARGS:]
    if (found := launch_routed_quant_experts(x, *args, digits=digits)) is not None:
        return computed(found[0]), computed(found[1])
    y, ids, weights = run_router(x, *router)
    return y, _quant_experts(y if router[NORM] else x, ids, weights, *experts)


def _quant_linear_experts(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `registration._linear_experts`, by products of codes; where sums are made, digits of y may be too."""
    from fusecomp.lowerings.experts.quant_routed import takes_digits
    from fusecomp.lowerings.quant.pair import launch_scaled_norm

    require_any_order("quant_linear_experts")
    first, norm, found = args[:QUANT_ARGS], args[QUANT_ARGS + NORM], None
    call = _scaled_call(x, *first) if norm and x.shape[0] else None
    if call is None:
        h = _quant_linear(x, *first)
    else:
        weight, bias = args[QUANT_ARGS + NORM_WEIGHT :][:2]
        rows = x.new_empty((x.shape[0], args[QUANT_ARGS].shape[1]), dtype=call.program.torch_dtype)

        def by_digits() -> bool:
            return takes_digits(rows, without_norm(mixture_args(args, QUANT_ARGS, QUANT_RESIDUAL, rows)))

        h, found = launch_scaled_norm(x, call, NormSpec.from_text(norm), weight, bias, by_digits)
        h = computed(h)
    rest = mixture_args(args, QUANT_ARGS, QUANT_RESIDUAL, h)
    if found is None:
        return h, *_routed_quant_experts(h, *rest)
    y = computed(found.y)
    return h, y, _routed_quant_experts(y, *without_norm(rest), digits=found.digits)[1]


@cache
def register() -> None:
    """Bind what this file has, once per process."""
    implement("dequantize", _dequantize, "CUDA")
    implement("quantize", _quantize, "CUDA")
    implement("fake_quantize", _fake_quantize, "CUDA")
    implement("quant_linear", _quant_linear, "CUDA")
    implement("quant_linear_pair", _quant_linear_pair, "CUDA")
    implement("quant_experts", _quant_experts, "CUDA")
    implement("routed_quant_experts", _routed_quant_experts, "CUDA")
    implement("quant_linear_experts", _quant_linear_experts, "CUDA")
