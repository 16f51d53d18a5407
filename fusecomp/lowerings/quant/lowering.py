"""CUDA implementations of `dequantize`, `quant_linear` and `quant_experts`: which kernel runs, from shapes alone.

Few tokens: one kernel with the norm, the epilogue and the weight's codes inside. Some tens: the norm's kernel, then the
same kernel. More: the weight is dequantized by a kernel of its own, and `linear` does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import ALIGNMENT, launch
from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides, unit_stride
from fusecomp.lowerings.linear.large_heuristics import tma_reads
from fusecomp.lowerings.linear.lowering import DTYPES, launch_linear, launch_norm_op
from fusecomp.lowerings.linear.skinny import cdiv, split_scratch, split_steps
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant import heuristics, pieces
from fusecomp.lowerings.quant.activations import explain_scaled
from fusecomp.lowerings.quant.digits import digits_kernel
from fusecomp.lowerings.quant.folded import folded_kernel, unfold_kernel
from fusecomp.lowerings.quant.folded_parts import folded_parts_kernel
from fusecomp.lowerings.quant.folded_wide import folded_wide_kernel
from fusecomp.lowerings.quant.held_launch import in_bf16, run_held
from fusecomp.lowerings.quant.heuristics import (
    DEQUANTIZE,
    DIGITS,
    FOLDED,
    FOLDED_HELD,
    FOLDED_WIDE,
    VECTOR,
    WORD_VECTOR,
    QuantConfig,
    quant_config,
)
from fusecomp.lowerings.quant.tile import dequantize_kernel, quant_tile_kernel
from fusecomp.lowerings.quant.vector import quant_vector_kernel
from fusecomp.lowerings.quant.word_vector import word_vector_kernel
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import LAYER
from fusecomp.ops.quant import FP4, FP8, INT, INT4_OFFSET, NF4, WeightSpec, fits_fold
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


def code_kind(kind: str, bits: int, target: Target) -> int:
    """KIND of the kernels for a `WeightSpec`'s codes: the GPUs that have fp8 convert it themselves."""
    native = target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89
    fp8 = pieces.NATIVE_FP8 if native else pieces.FP8
    return {(INT, 8): pieces.INT8, (INT, 4): pieces.INT4, (FP4, 4): pieces.FP4, (NF4, 4): pieces.NF4}.get(
        (kind, bits), fp8
    )


def zero_points(zero: Tensor | None) -> Tensor | None:
    """Zero points as a kernel reads them: those in fp8 are bytes where a GPU does not convert it."""
    if zero is None or zero.dtype != torch.float8_e4m3fn:
        return zero
    native = zero.is_cuda and code_kind(FP8, 8, target_of(zero)) == pieces.NATIVE_FP8
    return zero if native else zero.view(torch.int8)


def _layout(q: Tensor, zero: Tensor | None, spec: WeightSpec) -> tuple[Tensor, dict[str, Any]]:
    """The codes as a kernel reads them, and its KIND, OFFSET, ROWS and COLS."""
    kind = code_kind(spec.kind, spec.bits, target_of(q))
    if kind == pieces.NATIVE_FP8 and not q.is_cuda:
        kind = pieces.FP8  # the interpreter, which stands for GPUs without a conversion of fp8
    offset = float(INT4_OFFSET) if kind == pieces.INT4 and zero is None else 0.0
    constants = {"KIND": kind, "OFFSET": offset, "ROWS": spec.rows, "COLS": spec.cols}
    return (q.view(torch.uint8) if kind == pieces.FP8 else q), constants


def _words(config: QuantConfig, codes: Tensor, shape: QuantShape) -> tuple[Tensor, dict[str, Any]]:
    """The codes as words where they are read so, and the kernel's WORDS and ASM."""
    words = heuristics.reads_words(config, shape)
    return (codes.view(torch.int32) if words else codes), {"WORDS": words, "ASM": _asm(codes, shape)}


def _asm(codes: Tensor, shape: QuantShape) -> bool:
    """Whether a kernel's assembly serves: on NVIDIA's GPUs, of 16-bit inputs."""
    return codes.is_cuda and target_of(codes).backend == "cuda" and shape.dtype != "float32"


def input_tiles(x: Tensor, config: QuantConfig) -> TensorDescriptor | None:
    """x [T, K] in blocks of a program's tokens by a step's words; None where TMA cannot or shall not read it."""
    words = config.block_k // 4
    if not (config.use_tma and target_of(x).has_tma and tma_reads(x)):
        return None
    if x.dtype == torch.float32 or words * x.element_size() < ALIGNMENT:
        return None
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [config.block_t, words])


def _quads(x: Tensor) -> Tensor:
    """One token, or a norm's weight, [K] as words of four 16-bit numbers."""
    x = x.reshape(-1)
    return (x if x.storage_offset() % 4 == 0 else x.clone()).view(torch.int64)


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
    inside = tokens <= heuristics.norm_limit(spec.fold)
    if norm is not None and (norm.kind == LAYER or norm_bias is not None or not inside):
        x = launch_norm_op(x, norm_weight, norm_bias, norm)
        program, norm_weight = replace(program, norm=None), None
    out = torch.empty((tokens, shape.n), dtype=program.torch_dtype, device=x.device)
    if tokens:
        run_quant(config, x, q, scale, zero, norm_weight, operands, program, spec, out, uses_pdl(x))
    return out


def run_quant(
    config: QuantConfig,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    spec: WeightSpec,
    out: Tensor,
    use_pdl: bool,
) -> None:
    """out[T, N] = epilogue(norm(x) @ dequantize(q)^T) as `config` says, in one launch; of norms only an RMSNorm.

    Launches on one device must be ordered, as those of one stream or graph are: they share counters.
    """
    x = unit_stride(x)
    args = full_rows(operands, program)
    strides, norm = operand_strides(program, args), program.norm
    (tokens, k), n, groups = x.shape, out.shape[1], program.groups
    shape = quant_shape(x.dtype, q, zero, program, spec)
    scheme = 0 if norm is None else 1 if norm_weight is None else 3 if norm.plus_one else 2
    codes, layout = _layout(q, zero, spec)
    zero = zero_points(zero)
    common = {
        "G": groups, "BLOCK_R": config.block_r, "NORM": scheme, "EPILOGUE": epilogue_hook(program),
        "USE_PDL": use_pdl, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if use_pdl:
        common["launch_pdl"] = True
    norm_weight, eps = norm_weight if scheme >= 2 else None, 0.0 if norm is None else norm.eps
    if config.kernel == FOLDED_HELD:
        run_held(config, x, q, scale, zero, norm_weight, args, strides, out, eps, common | {"ASM": _asm(q, shape)})
        return
    blocks, columns = cdiv(n, config.block_r // groups), spec.scales(groups * n, k)[1]
    exact_norm = scheme > 0 and x.dtype == torch.float16
    teams = blocks * cdiv(tokens, config.block_t)
    step = 4 * spec.fold * config.parts if config.kernel == FOLDED else config.block_k
    per_split, splits = split_steps(cdiv(k, step), config.splits)
    scratch = split_scratch(x, teams, splits, config.block_r, config.block_t)
    if config.kernel == FOLDED_WIDE:
        assert scheme == 0, "so many tokens are normed by a launch of its own"
        del common["NORM"]
        alike = all(part is None or part.dtype == x.dtype for part in (scale, zero))
        packed = alike and heuristics.packs_scales(shape)
        both = [part.view(torch.int32) if packed and part is not None else part for part in (scale, zero)]
        x_tiles = input_tiles(x, config)
        launch(
            folded_wide_kernel, (teams * splits,),
            x, x_tiles, q.view(torch.int16), *both, out, scratch[0], scratch[2], args, strides, tokens, n, k,
            per_split, x.stride(0), out.stride(0), columns, BLOCK_T=config.block_t, FOLD=spec.fold,
            WORDS=config.block_k // 4, SPLITS=splits, AHEAD=config.ahead, PACKED=packed, ASM=_asm(q, shape),
            ROWS=spec.rows, COLS=spec.cols, USE_TMA=x_tiles is not None, **common,
        )  # fmt: skip
        return
    if config.kernel == FOLDED:
        if config.parts > 1:
            common |= {"PARTS": config.parts, "EVEN_K": k % step == 0, "ONE": tokens == 1}
        launch(
            folded_kernel if config.parts == 1 else folded_parts_kernel, (teams * splits,),
            x, q.view(torch.int16), scale, zero, out, norm_weight, *scratch, args, strides, tokens, n, k,
            per_split, eps, x.stride(0), out.stride(0), columns, BLOCK_T=config.block_t, FOLD=spec.fold, SPLITS=splits,
            SUMS=config.sums, EARLY=config.early, AHEAD=config.ahead, ASM=_asm(q, shape), ROWS=spec.rows,
            COLS=spec.cols, EXACT_NORM=exact_norm, **common,
        )  # fmt: skip
        return
    common |= {"BLOCK_K": config.block_k, "EVEN_K": k % config.block_k == 0, **layout}
    if config.kernel == WORD_VECTOR:
        launch(
            word_vector_kernel, (blocks,),
            _quads(x), codes.view(torch.int32), scale, out, None if norm_weight is None else _quads(norm_weight), args,
            strides, n, k, eps, columns, DTYPE=getattr(tl, shape.dtype), WARPS=config.num_warps,
            AHEAD=config.ahead if _asm(q, shape) and k % 16 == 0 else 0,
            **{name: value for name, value in common.items() if name not in ("OFFSET", "COLS")},
        )  # fmt: skip
        return
    if config.kernel == VECTOR:
        launch(
            quant_vector_kernel, (blocks,),
            x, codes, scale, zero, out, norm_weight, args, strides, n, k, eps, columns,
            UNIT=heuristics.unit(shape), **common,
        )  # fmt: skip
        return
    if config.kernel == DIGITS:
        tiles = TensorDescriptor(codes, list(codes.shape), [k, 1], [config.block_r // groups, config.block_k])
        launch(
            digits_kernel, (teams * splits,),
            x, tiles, scale, out, norm_weight, *scratch, args, strides, tokens, n, k, per_split, eps, x.stride(0),
            out.stride(0), columns, BLOCK_T=config.block_t, SPLITS=splits,
            **{name: value for name, value in common.items() if name != "OFFSET"},
        )  # fmt: skip
        return
    codes, words = _words(config, codes, shape)
    launch(
        quant_tile_kernel, (teams * splits,),
        x, codes, scale, zero, out, norm_weight, *scratch, args, strides, tokens, n, k,
        per_split, eps, x.stride(0), out.stride(0), columns, BLOCK_T=config.block_t, SPLITS=splits,
        EARLY=config.early, HALVES=config.halves, EXACT_NORM=exact_norm, **words, **common,
    )  # fmt: skip


def launch_dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> Tensor:
    """`fusecomp::dequantize` [..., N, K], contiguous; `refusal` must be None."""
    *leading, n, k = spec.shape(q.shape)
    out = torch.empty((*leading, n, k), dtype=spec.torch_dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows, columns = spec.scales(n, k)
    if spec.fold:
        launch(
            unfold_kernel, (cdiv(n, 16), k // (4 * spec.fold), out.numel() // (n * k)),
            q.view(torch.int16), scale, zero_points(zero), out, n, k, rows, columns, BLOCK_R=16, FOLD=spec.fold,
            ROWS=spec.rows, COLS=spec.cols, num_warps=4,
        )  # fmt: skip
        return out
    codes, layout = _layout(q, zero, spec)
    zero = zero_points(zero)
    block_r, block_k = 16, heuristics.fitting_columns(256, spec.cols)
    launch(
        dequantize_kernel, (cdiv(n, block_r), cdiv(k, block_k), out.numel() // (n * k)),
        codes, scale, zero, out, n, k, rows, columns, BLOCK_R=block_r, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
        num_warps=4, **layout,
    )  # fmt: skip
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
