"""Kernel of a linear layer by folded 4-bit integers, for one to some tens of tokens.

Codes are folded when the weight is loaded (`WeightSpec.fold`): one nibble of each of the 16-bit words of a tile is a
code of the same quarter of its columns. A shift and a mask then give two neighbours of a quarter at once, in the places
where the matrix units want them; inputs keep their order, and nothing is exchanged between threads.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR rows of a weight tile, BN = BR / G,
P columns of a quarter, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import rms_scale, weight_rows
from fusecomp.lowerings.linear.skinny_tile import finish_tile, spread, sum_squares_of, tile_place
from fusecomp.lowerings.quant.folded_pieces import (
    less_of,
    multiply,
    norms,
    operands,
    prefetch_codes,
    prefetch_small,
    quarter,
    quarters,
    tile_scales,
)
from fusecomp.lowerings.quant.pieces import load_scales, raw_scales, scale_numbers, scale_row, scaled


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def folded_kernel(
    x,  # [T, K], last dim contiguous
    q,  # [G * N, K / 4] int16, contiguous: folded codes
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type
    zero,  # as scale, integers 0 to 16 of a float type, or None
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
    FOLD: tl.constexpr,  # P; 4 P divides K
    SPLITS: tl.constexpr,
    SUMS: tl.constexpr,  # codes are multiplied plus a bias, which sums of inputs take off
    EARLY: tl.constexpr,  # codes, not inputs, go through the pipeline, which then begins before the wait
    AHEAD: tl.constexpr,  # tiles of which the L2 is asked for the codes before the wait
    ASM: tl.constexpr,  # an NVIDIA GPU, and 16-bit inputs
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NORM: tl.constexpr,
    EXACT_NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns BN features of BT tokens and one split of K. Programs of the same weights are neighbours.

    COLS is 0 or a multiple of P. Codes less zero points are exact in x's dtype; sums of their products are scaled.
    dtypes: x, norm_weight, out one of fp32, fp16, bf16; sums fp32.
    Bytes: G * N * K / 2 and the scales, T * K * itemsize from the L2 per BN features, and the codes again from the L2
    per BT tokens; 8 * S * G * N * BT of partials if S > 1. FLOPs: 2 * T * G * N * K.

    Measured on an H100 of 3.2 TB/s (benchmarks/quant_linear.py --tune, layers of Llama-8B in chains, norms included):
    58%, 53%, 48%, 34% and 21% of it at 8, 16, 32, 64 and 128 tokens; 68%, 65% and 57% alone over 58.7 MB at 8, 16 and
    32. With zero points 47%, 40% and 28% in chains at 16, 32 and 64. Launches that do not wait for one another reach
    70% at 8 tokens: most of the rest is their own.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    BLOCK_K: tl.constexpr = 4 * FOLD
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, BLOCK_K, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    srow, column = scale_row(rows, ROWS), tl.zeros([1, 1], tl.int32)
    cols = tl.arange(0, FOLD)
    tile_row = q + rows * tl.multiple_of(k // 4, FOLD)
    tile_at = tile_row + cols[None, :]
    # Inputs past T are the last token's; their sums are not stored.
    token = tl.minimum(t_block * BLOCK_T + tl.arange(0, BLOCK_T), num_tokens - 1).to(tl.int64)[None, :]
    x_at = x + token * stride_x + cols[:, None]

    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    squares = tl.zeros([FOLD, BLOCK_T], tl.float32)
    factor = tl.full([1, BLOCK_T], 1.0, tl.float32)
    SUM_SQUARES: tl.constexpr = NORM > 0 and not EXACT_NORM
    if USE_PDL:
        gdc_launch_dependents()
    s, z = tile_scales(scale, zero, srow, column + lo * BLOCK_K, k, stride_scale, FOLD, COLS)
    g = norms(norm_weight, spread(lo * BLOCK_K + cols, BLOCK_T), k, FOLD, NORM)
    if USE_PDL:
        prefetch_small(
            scale, zero, norm_weight, srow, lo * BLOCK_K, tl.minimum(hi * BLOCK_K, k), stride_scale, COLS, NORM
        )
        prefetch_codes(tile_row, lo, hi, AHEAD, FOLD)
    if EARLY:
        v = quarters(x_at, (num_tokens < 0) & (token >= 0), FOLD, True)  # nothing, in the layout of the inputs' loads
    else:
        if USE_PDL:
            gdc_wait()
        if EXACT_NORM:
            factor = rms_scale(sum_squares_of(x_at, cols, token >= 0, k, BLOCK_T, FOLD), k, eps)[None, :]
    for tile in range(lo, hi):
        # The pipeline asks for what it loads in its first stages before the loop. What comes after the wait of EARLY,
        # and the norm's weight, of which it would store BT copies, stand in branches, which it leaves in their place.
        start = tile * BLOCK_K
        after = tl.minimum(tile + 1, hi - 1) * BLOCK_K
        word = tl.load(tile_at + tile * FOLD, eviction_policy="evict_first")
        s_now, z_now = s, z
        if COLS > 0:
            s, z = tile_scales(scale, zero, srow, column + after, k, stride_scale, FOLD, COLS)
        if EARLY:
            if tile == lo:
                if USE_PDL:
                    gdc_wait()
                if EXACT_NORM:
                    factor = rms_scale(sum_squares_of(x_at, cols, token >= 0, k, BLOCK_T, FOLD), k, eps)[None, :]
                v = quarters(x_at + start, True, FOLD, False)
        else:
            v = quarters(x_at + start, True, FOLD, False)
        y, squares = operands(v, g, factor, squares, NORM, SUM_SQUARES)
        if tile + 1 < hi:
            if EARLY:
                v = quarters(x_at + after, True, FOLD, False)
            g = norms(norm_weight, spread(after + cols, BLOCK_T), k, FOLD, NORM)
        acc, sums = multiply(acc, sums, word, y, s_now, z_now, FOLD, COLS, zero is not None, SUMS, ASM)
    if COLS == 0:
        less = less_of(z[0], zero is not None, x.dtype.element_ty)
        acc = scaled(acc, sums, scale_numbers(s[0]), less, acc * 0.0, SUMS)

    finish_tile(
        acc, squares, out, args, strides, partials, part_squares, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, eps, stride_out, G, SPLITS, SUM_SQUARES, EPILOGUE,
    )  # fmt: skip


@triton.jit
def unfold_kernel(
    q,  # [B, N, K / 4] int16, contiguous: folded codes
    scale,  # [B, ceil(N / ROWS), ceil(K / COLS)] contiguous, a float type
    zero,  # as scale, a float type, or None
    out,  # [B, N, K] contiguous
    n,
    k,
    scale_rows,
    stride_scale,
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = (codes - zero) * scale, in fp32 and rounded once; a program does BR rows of one block of 4 FOLD columns.

    Bytes: the codes, the scales and the result.
    """
    matrix = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    cols, row, start = tl.arange(0, FOLD)[None, :], tl.minimum(rows, n - 1), tl.program_id(1) * (4 * FOLD)
    word = tl.load(q + (matrix * n + row) * tl.multiple_of(k // 4, FOLD) + tl.program_id(1) * FOLD + cols)
    srow = matrix * scale_rows + scale_row(row, ROWS)
    out_at = out + (matrix * n + row) * k + start + cols
    for i in tl.static_range(4):
        column = start + i * FOLD + tl.zeros([1, 1], tl.int32)
        s = load_scales(scale, srow, column, k, stride_scale, COLS, True)
        z = s if zero is None else raw_scales(zero, srow, column, k, stride_scale, COLS, True)
        w = quarter(word, z, i, tl.float32, zero is not None, False, False) * s
        tl.store(out_at + i * FOLD, w.to(out.dtype.element_ty), mask=rows < n)
