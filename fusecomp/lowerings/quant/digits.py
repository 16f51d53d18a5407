"""Kernel of a linear layer of fp8 codes with few bf16 tokens: codes go to the matrix units as they are in memory.

What is converted are the inputs, which are few: each becomes two fp8 digits of a power of two that a step's inputs of a
token share, digit + digit / 16. Two e4m3 digits of four bits and a sign hold the eight bits of bf16. Both products are
made at once, for a digit is a column of the narrow operand; it and the codes come from shared memory, where TMA puts
them, so that no register holds a weight or its address.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile,
BN = BR / G, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import load_norm, norm_factor
from fusecomp.lowerings.linear.skinny_tile import add_squares, finish_tile, load_tokens, spread, tile_place
from fusecomp.lowerings.quant.pieces import load_scales, scale_row
from fusecomp.lowerings.quant.rows import fp8_bytes

SECOND = tl.constexpr(16.0)  # a second digit is of a unit that many times smaller


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def digits_kernel(
    x,  # [T, K] bf16, last dim contiguous
    q_tiles,  # descriptor of codes [G * N, K], e4m3fn or their bytes, in blocks of BN by BK
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

    Measured on an H200 of 4.60 TB/s (benchmarks/quant_linear.py, layers of Llama-8B in a chain): 74% and 66% of it at 8
    and 16 tokens; alone, gate and up 82% and 75%.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, BLOCK_K, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    first = first.to(tl.int32)
    rows = tl.minimum(first + tl.arange(0, BLOCK_N), n - 1)[:, None]  # the group's; features past N are not stored
    cols = tl.arange(0, BLOCK_K)
    x_at = x + t * stride_x + cols[:, None]
    LAST: tl.constexpr = G - 1

    acc = tl.zeros([BLOCK_N, 2 * BLOCK_T], tl.float32)
    other = acc  # of the second group, if there is one
    squares = tl.zeros([BLOCK_K // 8, BLOCK_T], tl.float32)
    start = lo * BLOCK_K
    if USE_PDL:
        gdc_launch_dependents()
    v = tl.load(x_at, mask=live & (num_tokens < 0), other=0.0)  # nothing, in the layout of the inputs' loads
    g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
    s = _scales(scale, rows, start, k, stride_scale, ROWS, COLS)
    other_s = _scales(scale, rows + LAST * n, start, k, stride_scale, ROWS, COLS)
    for tile in range(lo, hi):
        # The pipeline asks for the codes of its first stages before the loop, hence the wait is within: it and all
        # loads of inputs stand in branches, which the pipeline leaves in their place.
        start = tile * BLOCK_K
        code = q_tiles.load([first, start])
        if G == 2:
            other_code = q_tiles.load([first + n, start])
        if tile == lo:
            if USE_PDL:
                gdc_wait()
            v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
        squares = add_squares(squares, v, NORM > 0)
        y = v.to(tl.float32)
        if NORM > 0:
            y *= norm_factor(g, NORM)
        both, unit = two_digits(y, KIND)
        s_now, other_now = s, other_s
        if tile + 1 < hi:
            start += BLOCK_K
            v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            if COLS > 0:
                s = _scales(scale, rows, start, k, stride_scale, ROWS, COLS)
            if COLS > 0 and G == 2:
                other_s = _scales(scale, rows + LAST * n, start, k, stride_scale, ROWS, COLS)
        part = tl.dot(code.to(tl.float8e4nv, bitcast=True), both, out_dtype=tl.float32)
        acc += part * (unit * s_now if COLS > 0 else unit)
        if G == 2:
            part = tl.dot(other_code.to(tl.float8e4nv, bitcast=True), both, out_dtype=tl.float32)
            other += part * (unit * other_now if COLS > 0 else unit)
    acc = _sum_of_digits(acc)
    if COLS == 0:
        acc *= s
    if G == 2:
        other = _sum_of_digits(other)
        if COLS == 0:
            other *= other_s
        acc = tl.reshape(tl.permute(tl.join(acc, other), [0, 2, 1]), [BLOCK_R, BLOCK_T])

    finish_tile(
        acc, squares, out, args, strides, partials, part_squares, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, eps, stride_out, G, SPLITS, NORM > 0, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _scales(scale, rows, start, k, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[BN, 1] scales of a step's columns, which share them."""
    return load_scales(scale, scale_row(rows, ROWS), start + tl.zeros([1, 1], tl.int32), k, stride, COLS, True)


@triton.jit
def _sum_of_digits(acc):
    """[BN, BT] of [BN, 2 BT]."""
    high, low = tl.split(tl.reshape(acc, [acc.shape[0], acc.shape[1] // 2, 2]))
    return high + low


@triton.jit
def two_digits(y, KIND: tl.constexpr):
    """fp8 digits [BK, 2 BT], two neighbours of each token, and their units [1, 2 BT] in fp32, of inputs y [BK, BT].

    A token's largest input is 128 to 256 units; bf16 numbers are exact from 2^-13 of it on, and smaller ones are off by
    less than 2^-16 of it. An infinity or NaN makes the units NaN.
    """
    BLOCK_T: tl.constexpr = y.shape[1]
    high, low, unit = digits_along(y, 0, KIND)
    units = tl.reshape(tl.join(unit, unit * (1.0 / SECOND)), [1, 2 * BLOCK_T])
    # As bytes: of fp8 numbers Triton (3.6, 3.7) moves the reshape behind the copy to shared memory and fails there.
    both = tl.reshape(tl.join(high, low), [y.shape[0], 2 * BLOCK_T])
    return both.to(tl.float8e4nv, bitcast=True), units


@triton.jit
def digits_along(y, AXIS: tl.constexpr, KIND: tl.constexpr):
    """(first, second, unit) of fp32 y that share a unit along an axis: bytes of fp8 digits, and the first's unit.

    The unit is a power of two, and of an axis with an infinity or NaN it is NaN.
    """
    # As integers, so that NaN is the largest.
    largest = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS, keep_dims=True)
    exponent = tl.maximum(largest >> 23, 8)
    y *= ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    # Rounded to four bits here: ptxas 12.8 loses codes that are both stored and converted back (`machine_code.py`).
    high = ((y.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)
    low = (y - high) * SECOND
    unit = tl.where(exponent == 255, 0x7FC00000, (exponent - 7) << 23).to(tl.float32, bitcast=True)
    return _fp8_bytes(high, KIND), _fp8_bytes(low, KIND), unit


@triton.jit
def _fp8_bytes(y, KIND: tl.constexpr):
    return fp8_bytes(y) if KIND == 1 else y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
