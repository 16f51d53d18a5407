"""CUDA implementations of `dequantize`, `quant_linear` and `quant_experts`: which kernel runs, from shapes alone.

Few tokens: one kernel with the norm, the epilogue and the weight's codes inside. Some tens: the norm's kernel, then the
same kernel. More: the weight is dequantized by a kernel of its own, and `linear` does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import ALIGNMENT
from fusecomp.lowerings.linear.lowering import DTYPES, launch_linear, launch_norm_op
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant import heuristics
from fusecomp.lowerings.quant.activations import explain_scaled
from fusecomp.lowerings.quant.held_launch import in_bf16
from fusecomp.lowerings.quant.heuristics import DEQUANTIZE, FOLDED_HELD, quant_config
from fusecomp.lowerings.quant.launches import launch_dequantize, run_quant
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import LAYER
from fusecomp.ops.quant import WeightSpec, fits_fold
from fusecomp.ops.quant_linear import QuantShape, quant_shape

ZERO_DTYPES = (*DTYPES, torch.float8_e4m3fn)  # 0 to 16 are exact in each


def refusal(q: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> str | None:
    """Why no kernel reads this weight, or None."""
    if q.dtype != spec.codes_dtype or not q.is_contiguous():
        return f"codes are {q.dtype} with strides {q.stride()}"
    if scale.dtype not in (*DTYPES, torch.uint8) or (zero is not None and zero.dtype not in ZERO_DTYPES):
        return f"scales are {scale.dtype}, zero points {None if zero is None else zero.dtype}"
    if q.is_cuda and q.data_ptr() % ALIGNMENT:
        return f"codes do not begin at a multiple of {ALIGNMENT} bytes"
    if not scale.is_contiguous() or (zero is not None and not zero.is_contiguous()):
        return "scales or zero points are not contiguous"
    if spec.torch_dtype not in DTYPES:
        return f"the dequantized weight is {spec.dtype}"
    if spec.fold and (scale.dtype == torch.uint8 or not fits_fold(spec.shape(q.shape)[-1], spec.cols, spec.fold)):
        return f"codes folded by {spec.fold} columns, {spec.cols} of {spec.shape(q.shape)[-1]} share a {scale.dtype}"
    if spec.cols % heuristics.LEAST_COLUMNS:
        return f"a scale serves {spec.cols} columns, no multiple of {heuristics.LEAST_COLUMNS}"
    return None


def supports(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    spec: WeightSpec,
) -> str | None:
    """Why the kernels cannot run this quantized linear, or None if they can."""
    for tensor in (x, *operands):
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} is none of fp32, fp16, bf16"
    if program.torch_dtype not in DTYPES:
        return f"output dtype {program.dtype} is none of fp32, fp16, bf16"
    if x.dtype != spec.torch_dtype:
        return f"activations are {x.dtype}, the weight is dequantized to {spec.dtype}"
    return refusal(q, scale, zero, spec)


def launch_quant_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    spec: WeightSpec,
) -> Tensor:
    """epilogue(norm(x)[T, K] @ dequantize(q)[G * N, K]^T): [T, N] contiguous. `supports` must hold.

    Safe under CUDA-graph capture: what runs depends on shapes only.
    """
    shape = quant_shape(x.dtype, q, zero, program, spec)
    tokens = x.shape[0]
    config = quant_config(target_of(x), shape, max(1, tokens))
    if config.kernel == FOLDED_HELD and not in_bf16(scale, zero):
        config = quant_config(target_of(x), shape, tokens, held=False)
    if config.kernel == DEQUANTIZE:
        weight = launch_dequantize(q, scale, zero, spec)
        return launch_linear(x, weight, norm_weight, norm_bias, operands, program)
    norm = program.norm
    inside = heuristics.norms_inside(config, spec.fold, tokens)
    if norm is not None and (norm.kind == LAYER or norm_bias is not None or not inside):
        x = launch_norm_op(x, norm_weight, norm_bias, norm)
        program, norm_weight = replace(program, norm=None), None
    out = torch.empty((tokens, shape.n), dtype=program.torch_dtype, device=x.device)
    if tokens:
        run_quant(config, x, q, scale, zero, norm_weight, operands, program, spec, out, uses_pdl(x))
    return out


def explain_choices(target: Target, shape: QuantShape, token_counts: Sequence[int]) -> list[str]:
    """One line for each run of token counts that one choice serves: "8 to 16 tokens: tile 16 x 64 x 128, ..."."""
    lines: list[str] = []
    if shape.granularity:
        lines, token_counts = explain_scaled(target, shape, token_counts)
    if reason := heuristics.reason(shape):
        return [*lines, f"any{' other' if lines else ''} tokens: dequantized by the reference: {reason}"]
    named = [(tokens, quant_config(target, shape, tokens)) for tokens in sorted(set(token_counts)) if tokens]
    for choice, run in itertools.groupby(named, key=lambda pair: pair[1]):
        counts = [tokens for tokens, _ in run]
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        name = f"quantized {choice.kernel}" if choice.kernel != DEQUANTIZE else "dequantize, then linear"
        if choice.kernel == FOLDED_HELD:
            name += " where scales are bf16"  # which a shape does not say
        lines.append(f"{span} tokens: {name}, from {choice.source}")
    return lines
