"""Kernel of a linear layer of fp8 codes with few bf16 tokens: codes go to the matrix units as they are in memory.

What is converted are the inputs, which are few: each becomes two fp8 digits of a power of two that a step's inputs of a
token share, digit + digit / 16. Two e4m3 digits of four bits and a sign hold the eight bits of bf16. Both products are
made at once, for a digit is a column of the narrow operand; it and the codes come from shared memory, so that no
register holds a weight.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile,
BN = BR / G, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import load_norm, norm_factor, weight_rows
from fusecomp.lowerings.linear.skinny_tile import add_squares, finish_tile, load_tokens, spread, tile_place
from fusecomp.lowerings.quant.pieces import load_codes, load_scales, scale_row
from fusecomp.lowerings.quant.rows import fp8_bytes

SECOND = tl.constexpr(16.0)  # a second digit is of a unit that many times smaller


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def digits_kernel(
    x,  # [T, K] bf16, last dim contiguous
    q,  # [G * N, K] e4m3fn, or its bytes, contiguous
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type
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
    KIND: tl.constexpr,  # 1 or 2, as in `pieces.py`
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # 0, or a multiple of BK
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns BN features of BT tokens and one split of K. Programs of the same weights are neighbours.

    The matrix units add fp8 products with 13 to 14 bits, so their sums are of one step, and steps are added in fp32.
    A token with an input that is no number has none in its output.
    Bytes: G * N * K and the scales, 2 * T * K from the L2 per BN features, 8 * S * G * N * BT of partials if S > 1.
    FLOPs: 4 * T * G * N * K, of fp8.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, BLOCK_K, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    srow = scale_row(rows, ROWS)
    cols = tl.arange(0, BLOCK_K)
    tile_at = q + rows * k + cols[None, :]
    x_at = x + t * stride_x + cols[:, None]

    acc = tl.zeros([BLOCK_R, 2 * BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_K // 8, BLOCK_T], tl.float32)
    start = lo * BLOCK_K
    if USE_PDL:
        gdc_launch_dependents()
    v = tl.load(x_at, mask=live & (num_tokens < 0), other=0.0)  # nothing, in the layout of the inputs' loads
    g = _norm_of(norm_weight, k, cols, k, BLOCK_T, NORM)
    v1, v2, g1, g2 = v, v, g, g
    s = load_scales(scale, srow, start + tl.zeros([1, 1], tl.int32), k, stride_scale, COLS, True)
    for tile in range(lo, hi):
        # The pipeline asks for the codes of its first stages before the loop, hence the wait is within: it and all
        # loads of inputs stand in branches, which the pipeline leaves in their place.
        start = tile * BLOCK_K
        code = load_codes(tile_at + start, start + cols[None, :] < k, EVEN_K)
        if tile == lo:
            if USE_PDL:
                gdc_wait()
            v = load_tokens(x_at + start, start + cols[:, None], live, k, False)
            v1 = load_tokens(x_at + (start + BLOCK_K), start + BLOCK_K + cols[:, None], live, k, False)
            v2 = load_tokens(x_at + (start + 2 * BLOCK_K), start + 2 * BLOCK_K + cols[:, None], live, k, False)
            g = _norm_of(norm_weight, start, cols, k, BLOCK_T, NORM)
            g1 = _norm_of(norm_weight, start + BLOCK_K, cols, k, BLOCK_T, NORM)
            g2 = _norm_of(norm_weight, start + 2 * BLOCK_K, cols, k, BLOCK_T, NORM)
        squares = add_squares(squares, v, NORM > 0)
        y = v.to(tl.float32)
        if NORM > 0:
            y *= norm_factor(g, NORM)
        both, unit = two_digits(y, KIND)
        s_now = s
        v, g = v1, g1
        v1, g1 = v2, g2
        start += BLOCK_K
        if tile + 3 < hi:
            v2 = load_tokens(x_at + (start + 2 * BLOCK_K), start + 2 * BLOCK_K + cols[:, None], live, k, EVEN_K)
            g2 = _norm_of(norm_weight, start + 2 * BLOCK_K, cols, k, BLOCK_T, NORM)
        if COLS > 0:
            if tile + 1 < hi:
                s = load_scales(scale, srow, start + tl.zeros([1, 1], tl.int32), k, stride_scale, COLS, True)
        part = tl.dot(code.to(tl.float8e4nv, bitcast=True), both, out_dtype=tl.float32)
        acc += part * (unit * s_now if COLS > 0 else unit)
    high, low = tl.split(tl.reshape(acc, [BLOCK_R, BLOCK_T, 2]))
    acc = high + low
    if COLS == 0:
        acc *= s

    finish_tile(
        acc, squares, out, args, strides, partials, part_squares, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, eps, stride_out, G, SPLITS, NORM > 0, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _norm_of(norm_weight, start, cols, k, BLOCK_T: tl.constexpr, NORM: tl.constexpr):
    """The norm's weight in a step, as `load_norm`; past K what is multiplied is zero."""
    return load_norm(norm_weight, spread(start + cols, BLOCK_T), k, False, NORM)


@triton.jit
def two_digits(y, KIND: tl.constexpr):
    """fp8 digits [BK, 2 BT], two neighbours of each token, and their units [1, 2 BT] in fp32, of inputs y [BK, BT].

    A token's largest input is 128 to 256 units; bf16 numbers are exact from 2^-13 of it on, and smaller ones are off by
    2^-17 of it at most. An infinity or NaN makes the units NaN.
    """
    BLOCK_T: tl.constexpr = y.shape[1]
    largest = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)[None, :]  # as integers, so that NaN is the largest
    exponent = tl.maximum(largest >> 23, 8)
    y *= ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    # Rounded to four bits here: ptxas 12.8 loses codes that are both stored and converted back (`machine_code.py`).
    high = ((y.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)
    low = (y - high) * SECOND
    unit = tl.where(exponent == 255, 0x7FC00000, (exponent - 7) << 23).to(tl.float32, bitcast=True)
    units = tl.reshape(tl.join(unit, unit * (1.0 / SECOND)), [1, 2 * BLOCK_T])
    # As bytes: of fp8 numbers Triton (3.6, 3.7) moves the reshape behind the copy to shared memory and fails there.
    both = tl.reshape(tl.join(_fp8_bytes(high, KIND), _fp8_bytes(low, KIND)), [y.shape[0], 2 * BLOCK_T])
    return both.to(tl.float8e4nv, bitcast=True), units


@triton.jit
def _fp8_bytes(y, KIND: tl.constexpr):
    return fp8_bytes(y) if KIND == 1 else y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
