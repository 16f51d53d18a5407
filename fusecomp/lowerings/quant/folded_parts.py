"""Kernel of a linear layer by folded 4-bit integers whose warps share rows of the weight, each with a part of K.

For few tokens and small layers: a program's features are few, so that one program to a multiprocessor has all of K,
and sums meet in shared memory instead of a second round through the L2. Warps need not wait for one another before.

Legend: as in `folded.py`; W parts of K, one to a warp; X tokens of the inputs, 1 or BT.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import rms_scale, weight_rows
from fusecomp.lowerings.linear.skinny_tile import finish_tile, sum_squares_of, tile_place
from fusecomp.lowerings.quant.folded_pieces import (
    less_of,
    multiply,
    norms,
    operands,
    prefetch_codes,
    prefetch_small,
    quarters,
    tile_scales,
)
from fusecomp.lowerings.quant.pieces import scale_numbers, scale_row, scaled


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def folded_parts_kernel(
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
    per_split,  # steps of W tiles along K of one split; no split is empty
    eps,
    stride_x,
    stride_out,
    stride_scale,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,  # P; 4 P divides K
    PARTS: tl.constexpr,  # W
    EVEN_K: tl.constexpr,  # 4 P W divides K
    ONE: tl.constexpr,  # T is 1, and inputs are loaded once for all columns of the product
    SPLITS: tl.constexpr,
    SUMS: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NORM: tl.constexpr,
    EXACT_NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """As `folded_kernel`, whose constants these are: a program owns BN features of BT tokens and one split of K.

    In a step each warp multiplies a tile of its own; the W tiles are neighbours along K.
    dtypes, bytes and FLOPs: as there.

    Measured on an H100 of 3.2 TB/s (benchmarks/quant_linear.py --tune): at one token 6.9 us instead of 7.8 for 8.7 MB,
    10.5 instead of 11.1 for 13 MB and 16.4 instead of 16.7 for 30 MB, all alone; over 58.7 MB slower (32 and 27 us).
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    TILE: tl.constexpr = 4 * FOLD
    BLOCK_K: tl.constexpr = PARTS * TILE
    X: tl.constexpr = 1 if ONE else BLOCK_T
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, BLOCK_K, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    token = tl.minimum(t_block * BLOCK_T + tl.arange(0, X), num_tokens - 1).to(tl.int64)[None, None, :]
    rows = weight_rows(first, n, BLOCK_R, G)[None, :, None]
    part = tl.arange(0, PARTS)[:, None, None]
    cols = tl.arange(0, FOLD)[None, :, None]
    srow = scale_row(rows, ROWS)
    tile_row = q + rows * tl.multiple_of(k // 4, FOLD)
    words = tl.arange(0, FOLD)[None, None, :]

    acc = tl.zeros([PARTS, BLOCK_R, BLOCK_T], tl.float32)
    sums = tl.zeros([PARTS, BLOCK_R, BLOCK_T], tl.float32)
    squares = tl.zeros([PARTS, FOLD, X], tl.float32)
    factor = tl.full([1, 1, X], 1.0, tl.float32)
    SUM_SQUARES: tl.constexpr = NORM > 0 and not EXACT_NORM
    if USE_PDL:
        gdc_launch_dependents()
        prefetch_small(
            scale, zero, norm_weight, srow, lo * BLOCK_K, tl.minimum(hi * BLOCK_K, k), stride_scale, COLS, NORM
        )
        row_at = tl.reshape(tile_row, [BLOCK_R, 1])
        prefetch_codes(row_at, lo * PARTS, tl.minimum(hi * PARTS, k // TILE), AHEAD, FOLD)
    tile = _tiles(lo, part, k, TILE, PARTS, EVEN_K)
    s, z = tile_scales(scale, zero, srow, tile * TILE, k, stride_scale, FOLD, COLS)
    g = norms(norm_weight, tile * TILE + cols + token * 0, k, FOLD, NORM)
    x_at = x + token * stride_x + cols
    if EARLY:
        v = quarters(x_at + tile * TILE, (num_tokens < 0) & (cols + token >= 0), FOLD, True)  # nothing
    else:
        if USE_PDL:
            gdc_wait()
        if EXACT_NORM:
            factor = _factor(x, token, stride_x, k, eps, X, FOLD)
    for i in range(lo, hi):
        # As in `folded_kernel`: what shall not go through the pipeline of copies stands in branches.
        tile = _tiles(i, part, k, TILE, PARTS, EVEN_K)
        after = _tiles(tl.minimum(i + 1, hi - 1), part, k, TILE, PARTS, EVEN_K)
        inside = EVEN_K or (i * PARTS + part) * TILE + cols + token * 0 < k
        word = tl.load(tile_row + tile * FOLD + words, eviction_policy="evict_first")
        s_now, z_now = s, z
        if COLS > 0:
            s, z = tile_scales(scale, zero, srow, after * TILE, k, stride_scale, FOLD, COLS)
        if EARLY:
            if i == lo:
                if USE_PDL:
                    gdc_wait()
                if EXACT_NORM:
                    factor = _factor(x, token, stride_x, k, eps, X, FOLD)
                v = quarters(x_at + tile * TILE, inside, FOLD, not EVEN_K)
        else:
            v = quarters(x_at + tile * TILE, inside, FOLD, not EVEN_K)
        y, squares = operands(v, g, factor, squares, NORM, SUM_SQUARES)
        if i + 1 < hi:
            if EARLY:
                beyond = EVEN_K or ((i + 1) * PARTS + part) * TILE + cols + token * 0 < k
                v = quarters(x_at + after * TILE, beyond, FOLD, not EVEN_K)
            g = norms(norm_weight, after * TILE + cols + token * 0, k, FOLD, NORM)
        if ONE:
            y = (_spread(y[0], BLOCK_T), _spread(y[1], BLOCK_T), _spread(y[2], BLOCK_T), _spread(y[3], BLOCK_T))
        acc, sums = multiply(acc, sums, word, y, s_now, z_now, FOLD, COLS, zero is not None, SUMS, ASM)
    if COLS == 0:
        less = less_of(z[0], zero is not None, x.dtype.element_ty)
        acc = scaled(acc, sums, scale_numbers(s[0]), less, acc * 0.0, SUMS)

    sum_squares = tl.broadcast_to(tl.sum(tl.sum(squares, 0), 0)[None, :], [1, BLOCK_T])
    finish_tile(
        tl.sum(acc, 0), sum_squares, out, args, strides, partials, part_squares, counters, block, t_block,
        t_blocks, split, first, t, live, n, k, eps, stride_out, G, SPLITS, SUM_SQUARES, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _within(tile, k, TILE: tl.constexpr):
    return tl.minimum(tile, k // TILE - 1)


@triton.jit
def _tiles(i, part, k, TILE: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr):
    """[W, 1, 1] tiles of step i; of those past K the last."""
    tile = i * PARTS + part
    return tile if EVEN_K else _within(tile, k, TILE)


@triton.jit
def _factor(x, token, stride_x, k, eps, X: tl.constexpr, FOLD: tl.constexpr):
    """[1, 1, X] of the norm's scale."""
    at, cols = tl.reshape(token, [1, X]), tl.arange(0, FOLD)
    squares = sum_squares_of(x + at * stride_x + cols[:, None], cols, at >= 0, k, X, FOLD)
    return rms_scale(squares, k, eps)[None, None, :]


@triton.jit
def _spread(y, BLOCK_T: tl.constexpr):
    """The only token's inputs for every column of the product."""
    return tl.broadcast_to(y, [y.shape[0], y.shape[1], BLOCK_T])
