"""Kernel of a quantized linear layer with several tokens: codes become numbers on their way to the matrix units.

Weights are on the wide side of the product, as in the skinny tile kernel: the matrix units take that operand from
registers, where the codes were converted.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile,
BN = BR / G, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import load_norm, rms_scale, weight_rows
from fusecomp.lowerings.linear.skinny_tile import (
    add_squares,
    finish_tile,
    load_tokens,
    normalize,
    spread,
    sum_squares_of,
    tile_place,
)
from fusecomp.lowerings.quant.pieces import (
    load_codes,
    load_scales,
    scale_row,
    scaled,
    unscaled,
    values,
    word_order,
    word_values,
)


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def quant_tile_kernel(
    x,  # [T, K], last dim contiguous
    q,  # [G * N, K] codes or [G * N, K / 2] bytes, contiguous, perhaps seen as int32 words
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type or uint8 exponents
    zero,  # as scale, a float type, or None
    out,  # [T, N], last dim contiguous
    norm_weight,  # [K], or None
    partials,  # [programs, BR, BT] fp32, scratch
    part_squares,  # [programs, BT] fp32, scratch
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    per_split,  # weight tiles along K of one split; no split is empty
    eps,
    stride_x,
    stride_out,
    stride_scale,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,  # codes, not inputs, go through the pipeline, which then begins before the wait
    HALVES: tl.constexpr,  # BT is 16, in two products of 8; COLS is 0 and there are no zero points
    KIND: tl.constexpr,
    WORDS: tl.constexpr,  # fp8 is read as words
    ASM: tl.constexpr,  # an NVIDIA GPU, and 16-bit inputs
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EXACT_NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns BN features of BT tokens and one split of K. Programs of the same weights are neighbours.

    COLS is 0, or divides BK, or is a multiple of it. Where a tile's columns share a scale, products are scaled and not
    weights; else weights are dequantized in fp32 and rounded to x's dtype.
    dtypes: x, norm_weight, out one of fp32, fp16, bf16.
    Bytes: G * N * K * bits / 8 and the scales, T * K * itemsize from the L2 per BN features, and the codes again from
    the L2 per BT tokens; 8 * S * G * N * BT of partials if S > 1. FLOPs: 2 * T * G * N * K.

    Measured on an H100 of 3.2 TB/s (benchmarks/quant_linear.py --tune, layers of Llama-8B in chains): fp8 77%, 72%, 52%
    and 35% of it at 8, 16, 32 and 64 tokens. HALVES takes fewer registers: at 16 tokens the compiler else chooses an
    instruction that wants a whole converted tile in them.
    """
    PACK: tl.constexpr = 2 if KIND >= 3 else 4 if WORDS else 1  # codes of an element of q
    BLOCK_N: tl.constexpr = BLOCK_R // G
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, BLOCK_K, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    srow = scale_row(rows, ROWS)
    cols = tl.arange(0, BLOCK_K)
    places = tl.arange(0, BLOCK_K // PACK)[None, :]
    tile_at = q + rows * (k // PACK) + places
    x_at = x + t * stride_x + cols[:, None]

    acc = tl.zeros([BLOCK_R, BLOCK_T // 2 if HALVES else BLOCK_T], tl.float32)
    sums = acc if HALVES else tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_K // 8, BLOCK_T], tl.float32)
    factor = tl.full([1, BLOCK_T], 1.0, tl.float32)
    SUM_SQUARES: tl.constexpr = NORM > 0 and not EXACT_NORM
    start = lo * BLOCK_K
    if USE_PDL:
        gdc_launch_dependents()
    if EARLY:
        v = tl.load(x_at, mask=live & (num_tokens < 0), other=0.0)  # nothing, in the layout of the inputs' loads
        g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
        s, z = _scales(scale, zero, srow, start, k, stride_scale, BLOCK_R, BLOCK_K, COLS, EVEN_K)
        for tile in range(lo, hi):
            # The pipeline asks for the codes of its first stages before the loop, hence the wait is within: it and
            # all loads of inputs stand in branches, which the pipeline leaves in their place.
            start = tile * BLOCK_K
            code = load_codes(tile_at + start // PACK, start + places * PACK < k, EVEN_K)
            if tile == lo:
                if USE_PDL:
                    gdc_wait()
                if EXACT_NORM:
                    factor = rms_scale(sum_squares_of(x_at, cols, live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
                v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            squares = add_squares(squares, v, SUM_SQUARES)
            y = normalize(v, g, factor, NORM)
            s_now, z_now = s, z
            if tile + 1 < hi:
                start += BLOCK_K
                v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
                g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
                if COLS > 0:
                    s, z = _scales(scale, zero, srow, start, k, stride_scale, BLOCK_R, BLOCK_K, COLS, EVEN_K)
            acc, sums = _multiply(
                acc, sums, code, y, s_now, z_now, zero is not None, HALVES, KIND, WORDS, ASM, OFFSET, COLS
            )
    else:
        if USE_PDL:
            _prefetch(q + rows * (k // PACK), start // PACK, k // PACK, BLOCK_K // PACK)
            gdc_wait()
        if EXACT_NORM:
            factor = rms_scale(sum_squares_of(x_at, cols, live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
        s, z = _scales(scale, zero, srow, start, k, stride_scale, BLOCK_R, BLOCK_K, COLS, EVEN_K)
        for tile in range(lo, hi):
            start = tile * BLOCK_K
            code = load_codes(tile_at + start // PACK, start + places * PACK < k, EVEN_K)
            v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            if COLS > 0:
                s, z = _scales(scale, zero, srow, start, k, stride_scale, BLOCK_R, BLOCK_K, COLS, EVEN_K)
            squares = add_squares(squares, v, SUM_SQUARES)
            y = normalize(v, g, factor, NORM)
            acc, sums = _multiply(acc, sums, code, y, s, z, zero is not None, HALVES, KIND, WORDS, ASM, OFFSET, COLS)
    if HALVES:
        acc = tl.reshape(tl.permute(tl.join(acc, sums), [0, 2, 1]), [BLOCK_R, BLOCK_T]) * s
    elif COLS == 0:
        acc = scaled(acc, sums, s, z, acc * 0.0, zero is not None)

    finish_tile(
        acc, squares, out, args, strides, partials, part_squares, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, eps, stride_out, G, SPLITS, SUM_SQUARES, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _multiply(
    acc,
    sums,
    code,
    y,
    s,
    z,
    HAS_ZERO: tl.constexpr,
    HALVES: tl.constexpr,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    ASM: tl.constexpr,
    OFFSET: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds the product of a tile's codes [BR, ...] and inputs y [BK, BT] to acc; to sums those of ones and y."""
    BLOCK_R: tl.constexpr = code.shape[0]
    BLOCK_K: tl.constexpr = y.shape[0]
    BLOCK_T: tl.constexpr = y.shape[1]
    if COLS > 0 and COLS < BLOCK_K:
        w = values(code, KIND, OFFSET)
        if HAS_ZERO:
            w -= z
        acc = tl.dot((w * s).to(y.dtype), y, acc, input_precision="ieee")
    else:
        if WORDS:
            words = tl.reshape(code, [BLOCK_R, BLOCK_K // 64, 16])
            w = tl.reshape(word_values(words, y.dtype, ASM and KIND != 1), [BLOCK_R, BLOCK_K])
            y = tl.reshape(word_order(tl.reshape(y, [BLOCK_K // 64, 64, BLOCK_T])), [BLOCK_K, BLOCK_T])
        else:
            w = unscaled(code, y.dtype, KIND, ASM, OFFSET)
        if HALVES:
            y = tl.permute(tl.reshape(y, [BLOCK_K, 2, BLOCK_T // 2]), [0, 2, 1])
            low, high = tl.split(y)
            acc = tl.dot(w, low, acc, input_precision="ieee")
            sums = tl.dot(w, high, sums, input_precision="ieee")
        elif COLS == 0:
            acc = tl.dot(w, y, acc, input_precision="ieee")
            if HAS_ZERO:
                sums = tl.dot(tl.full([BLOCK_R, BLOCK_K], 1.0, tl.float32).to(y.dtype), y, sums, input_precision="ieee")
        else:
            zeros = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
            part = tl.dot(w, y, zeros, input_precision="ieee")
            if HAS_ZERO:
                sums = tl.dot(
                    tl.full([BLOCK_R, BLOCK_K], 1.0, tl.float32).to(y.dtype), y, zeros, input_precision="ieee"
                )
            acc = scaled(part, sums, s, z, acc, HAS_ZERO)
    return acc, sums


@triton.jit
def _scales(
    scale,
    zero,
    srow,
    start,
    k,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """(scales, zeros) of a tile; without zeros, scales twice."""
    s = _spread_scales(scale, srow, start, k, stride, BLOCK_R, BLOCK_K, COLS, EVEN_K)
    z = s if zero is None else _spread_scales(zero, srow, start, k, stride, BLOCK_R, BLOCK_K, COLS, EVEN_K)
    return s, z


@triton.jit
def _spread_scales(
    scale,
    srow,
    start,
    k,
    stride,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Scales (or zeros) of a tile, [BR, BK] or [BR, 1]."""
    if COLS == 0 or COLS >= BLOCK_K:
        return load_scales(scale, srow, start + tl.zeros([1, 1], tl.int32), k, stride, COLS, EVEN_K)
    else:
        columns = start + tl.arange(0, BLOCK_K // COLS)[None, :] * COLS
        found = load_scales(scale, srow, columns, k, stride, COLS, EVEN_K)
        spread = tl.broadcast_to(found[:, :, None], [BLOCK_R, BLOCK_K // COLS, COLS])
        return tl.reshape(spread, [BLOCK_R, BLOCK_K])


@triton.jit
def _prefetch(row_at, start, width, BYTES: tl.constexpr):
    """Ask the L2 for the lines of a first tile, up to the last byte of a row."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    lines = row_at + tl.minimum(start + tl.arange(0, LINES) * 128, width - 1)[None, :]
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def dequantize_kernel(
    q,  # [B, N, K] codes or [B, N, K / 2] bytes, contiguous
    scale,  # [B, ceil(N / ROWS), ceil(K / COLS)] contiguous, a float type or uint8 exponents
    zero,  # as scale, a float type, or None
    out,  # [B, N, K] contiguous
    n,
    k,
    scale_rows,
    stride_scale,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out = (codes - zero) * scale, in fp32 and rounded once; a program does BR rows by BK columns of one matrix.

    Bytes: the codes, the scales and the result.
    """
    PACK: tl.constexpr = 2 if KIND >= 3 else 1
    matrix = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    start = tl.program_id(1) * BLOCK_K
    cols, places = start + tl.arange(0, BLOCK_K)[None, :], start // PACK + tl.arange(0, BLOCK_K // PACK)[None, :]
    row = tl.minimum(rows, n - 1)
    code = load_codes(q + (matrix * n + row) * (k // PACK) + places, places * PACK < k, EVEN_K)
    srow = matrix * scale_rows + scale_row(row, ROWS)
    w = values(code, KIND, OFFSET)
    if zero is not None:
        w -= _spread_scales(zero, srow, start, k, stride_scale, BLOCK_R, BLOCK_K, COLS, EVEN_K)
    w *= _spread_scales(scale, srow, start, k, stride_scale, BLOCK_R, BLOCK_K, COLS, EVEN_K)
    tl.store(out + (matrix * n + row) * k + cols, w.to(out.dtype.element_ty), mask=(rows < n) & (cols < k))
