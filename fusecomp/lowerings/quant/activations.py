"""Activations as codes on a GPU: `quantize`, `fake_quantize`, and `quant_linear` by codes of its activations.

Codes are made by one launch, the norm included. A product of them is one launch more: of tens of tokens by the scaled
tile kernel, of more by a measured choice between the persistent kernel and the library with the epilogue's kernel.
Safe under CUDA-graph capture: scratch comes from `torch.empty`, and choices depend on shapes only.

Legend: T tokens, N output features, K input features, G accumulator groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.epilogue import unit_stride
from fusecomp.lowerings.linear.large_heuristics import MAX_BLOCK_K
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.quant import pieces, rows, scaled_heuristics
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, ScaledConfig, ScaledShape, scaled_config
from fusecomp.lowerings.quant.scaled_launch import run_scaled
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import LAYER, NormSpec
from fusecomp.ops.quant import FP8, INT, TENSOR, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import QuantShape, is_codes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# With fewer tokens a linear whose activations are not codes yet reads codes of its weight alone.
LEAST_TOKENS = 2
# Widest row of a launch that moves in before the kernel before has ended.
MAX_DEPENDENT_K = 16384


def rows_block(target: Target, tokens: int, k: int) -> tuple[int, int]:
    """(columns held at once, warps) of a program: few rows are waited for, so that each has many threads."""
    block_k = min(next_power_of_2(k), MAX_BLOCK_K)
    most = 16 if target.backend == "hip" else 32
    return block_k, max(1, min(most, block_k // (256 if tokens < 1024 else 512)))


def code_kind(spec: ActivationSpec, target: Target, on_gpu: bool) -> int:
    """KIND of the kernels: GPUs that have fp8 convert it themselves; the interpreter stands for those that do not."""
    if spec.kind == INT:
        return pieces.INT8
    native = on_gpu and target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89
    return pieces.NATIVE_FP8 if native else pieces.FP8


def launch_quantize(
    x: Tensor,
    given: Tensor | None,
    spec: ActivationSpec,
    norm: NormSpec | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [T, K] of norm(x) and their fp32 scale: [1], [T, 1] or [T, ceil(K / block)].

    Args:
        x: [T, K] of a float type in `DTYPES`.
        given: the static scale [1], or None.
    """
    tokens, k = x.shape
    blocks = -(-k // spec.block) if spec.block else 1
    codes = torch.empty((tokens, k), dtype=spec.codes_dtype, device=x.device)
    scales = torch.empty((1,) if spec.granularity == TENSOR else (tokens, blocks), dtype=torch.float32, device=x.device)
    if tokens:
        _launch_rows(x, given, spec, norm, norm_weight, norm_bias, codes, scales)
    elif spec.granularity == TENSOR:
        scales.fill_(1.0)
    return codes, scales


def launch_fake_quantize(
    x: Tensor,
    given: Tensor | None,
    spec: ActivationSpec,
    norm: NormSpec | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """norm(x) [T, K] rounded to what its codes stand for, in x's dtype; whatever the spec's least_tokens."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _launch_rows(x, given, spec, norm, norm_weight, norm_bias, out, None)
    return out


def _launch_rows(
    x: Tensor,
    given: Tensor | None,
    spec: ActivationSpec,
    norm: NormSpec | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    x = unit_stride(x)
    tokens, k = x.shape
    kind = code_kind(spec, target_of(x), x.is_cuda)
    block_k, num_warps = rows_block(target_of(x), tokens, k)
    block_k = max(block_k, spec.block)
    use_pdl = uses_pdl(x) and k <= MAX_DEPENDENT_K
    constants: dict[str, Any] = {
        "K": k, "BLOCK_K": block_k, "BLOCK": spec.block or 1, "KIND": kind, "USE_PDL": use_pdl, "num_warps": num_warps,
        "NORM": 0 if norm is None else 2 if norm.kind == LAYER else 1, "PLUS_ONE": norm is not None and norm.plus_one,
    }  # fmt: skip
    if use_pdl:
        constants["launch_pdl"] = True
    eps = 0.0 if norm is None else norm.eps

    def rows_by(scale: int, given: Tensor | None, out: Tensor | None, scales: Tensor | None, fake: bool) -> None:
        launch(
            rows.quantize_kernel, (tokens,),
            x, norm_weight, norm_bias, given, out, scales, eps, tokens, x.stride(0), SCALE=scale, FAKE=fake,
            **constants,
        )  # fmt: skip

    how = rows.GIVEN if not spec.dynamic else rows.OF_BLOCK if spec.block else rows.OF_TOKEN
    if spec.dynamic and spec.granularity == TENSOR:
        maxima = torch.empty(tokens, dtype=torch.float32, device=x.device)
        rows_by(rows.MAXIMA, None, None, maxima, False)
        how, given = rows.OF_MAXIMA, maxima
    fake = scales is None
    codes = out.view(torch.uint8) if kind == pieces.FP8 and not fake else out
    rows_by(how, given, codes, scales, fake)


def rows_refusal(x: Tensor, spec: ActivationSpec) -> str | None:
    """Why no kernel makes codes of x, or None."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is none of fp32, fp16, bf16"
    if spec.granularity != TENSOR and not spec.dynamic:
        return f"activations are {spec.describe()}"
    if spec.block & (spec.block - 1) or spec.block > MAX_BLOCK_K:
        return f"a scale serves {spec.block} columns, no power of 2 up to {MAX_BLOCK_K}"
    return None


def scaled_shape(n: int, k: int, groups: int, dtype: str, spec: WeightSpec, block: int, epilogue: str) -> ScaledShape:
    """What the choice of a product's kernel depends on.

    Args:
        dtype: of the activations before they were quantized.
        block: columns that share a scale of theirs, or 0.
    """
    shared = min(filter(None, (spec.cols, block)), default=0)
    precise = spec.kind == FP8 and not shared and dtype == "float16"
    return ScaledShape(n, k, groups, spec.kind, shared, epilogue, precise)


def refusal(target: Target, k: int, spec: WeightSpec, zero: bool, activation: ActivationSpec) -> str | None:
    """Why no kernel on `target` multiplies such codes, or None."""
    if zero:
        return "the weight has zero points"
    if (spec.kind, spec.bits) != (activation.kind, activation.bits):
        return f"activations are {activation.codes}, the weight {spec.describe()}"
    if spec.kind == FP8 and spec.dtype == "float32":
        return "activations are float32, of which sums of fp8 products on matrix units are not as good"
    if k % 16:
        return f"rows of {k} codes are not aligned to 16 bytes"
    return scaled_heuristics.reason(target, spec.kind, (spec.rows, spec.cols), activation.block)


def library_serves(x_scale: Tensor, w_scale: Tensor, q: Tensor, out_dtype: torch.dtype, spec: WeightSpec) -> bool:
    """Whether the library multiplies such codes: by scales of tokens and rows, or of all values on both sides."""
    if not q.is_cuda or q.shape[0] % 16 or q.shape[1] % 16 or out_dtype != torch.bfloat16:
        return False
    if spec.kind == INT:
        return x_scale.shape[-1] == 1 and spec.rows <= 1 and spec.cols == 0
    by_rows = x_scale.dim() == 2 and x_scale.shape[1] == 1 and w_scale.numel() == q.shape[0]
    return by_rows or (x_scale.numel() == 1 == w_scale.numel())


def choose(
    q: Tensor, x_scale: Tensor, w_scale: Tensor, program: Program, spec: WeightSpec, activation: ActivationSpec,
    tokens: int,
) -> ScaledConfig:  # fmt: skip
    """The measured choice, or our kernel where the library does not serve these scales."""
    (rows_of_weight, k), groups, target = q.shape, program.groups, target_of(q)
    shape = scaled_shape(rows_of_weight // groups, k, groups, spec.dtype, spec, activation.block, program.kind)
    config = scaled_config(target, shape, tokens)
    if config.method == LIBRARY and not library_serves(x_scale, w_scale, q, program.torch_dtype, spec):
        return scaled_heuristics.own_config(target, shape, tokens)
    return config


def launch_scaled_linear(
    x: Tensor,
    x_scale: Tensor | None,
    q: Tensor,
    w_scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    spec: WeightSpec,
    activation: ActivationSpec,
) -> Tensor:
    """`fusecomp::quant_linear` by codes of its activations, which x is or which are made of norm(x): [T, N] contiguous.

    `refusal` must be None, and `rows_refusal` where codes are made.
    """
    if not is_codes(x):
        x, x_scale = launch_quantize(x, x_scale, activation, program.norm, norm_weight, norm_bias)
        program = replace(program, norm=None)
    assert x_scale is not None and program.norm is None
    config = choose(q, x_scale, w_scale, program, spec, activation, max(1, x.shape[0]))
    return run_scaled(config, x, x_scale, q, w_scale, operands, program, spec, activation)


def explain_scaled(target: Target, shape: QuantShape, token_counts: Sequence[int]) -> tuple[list[str], list[int]]:
    """Lines for the token counts whose activations are codes, and the counts that are left to weight-only kernels."""
    spec = WeightSpec(shape.kind, shape.bits, shape.rows, shape.cols, shape.dtype)
    activation = ActivationSpec(shape.kind, 8, shape.granularity, shape.block)
    least = max(shape.least, LEAST_TOKENS)
    counts = sorted(tokens for tokens in set(token_counts) if tokens >= least)
    left = [tokens for tokens in token_counts if tokens < least]
    if reason := refusal(target, shape.k, spec, shape.zero, activation):
        return [f"activations are rounded, their products by codes are refused: {reason}"], list(token_counts)
    scaled = scaled_shape(shape.n, shape.k, shape.groups, shape.dtype, spec, shape.block, shape.epilogue)
    lines = []
    named = [(tokens, scaled_config(target, scaled, tokens)) for tokens in counts]
    for choice, run in itertools.groupby(named, key=lambda pair: pair[1]):
        found = [tokens for tokens, _ in run]
        span = str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
        lines.append(f"{span} tokens: codes by codes, {choice.method}, from {choice.source}")
    return lines, left
