"""Kernels of a linear layer by folded 4-bit integers for a few tokens, whose inputs become two digits of a byte each.

A product of bytes takes codes as they are stored: a mask, and for every second one a shift, make four operands of them,
where 16-bit floats take as much work for two. Inputs are 16-bit fixed-point numbers, with a scale for each half of a
block of columns and token. That is finer than a 16-bit float of the largest of them, and sums of products are exact.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR rows of a weight tile, BN = BR / G,
P columns of a quarter of a block of codes, H = 2 P of a half, BT tokens of a program, W parts of K, one to a warp,
S splits of K. Digits of token t are rows 2 t (of 256) and 2 t + 1 (of 1).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import norm_factor, rms_scale, weight_rows
from fusecomp.lowerings.linear.skinny_tile import finish_tile, tile_place
from fusecomp.lowerings.quant.folded import prefetch_codes
from fusecomp.lowerings.quant.pieces import raw_scales, scale_numbers, scale_row
from fusecomp.lowerings.quant.rows import largest
from fusecomp.ops.quant import INT4_OFFSET

MIDDLE = tl.constexpr(float(INT4_OFFSET))
# 1.5 * 2^23 as fp32: integers added to its bits add to its value, so sums need no conversion.
BASE, BASE_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
LARGEST = tl.constexpr(127.0 * 256.0)  # of a number, so that both digits are signed bytes


@triton.jit
def digit_rows_kernel(
    x,  # [T, K], last dim contiguous
    norm_weight,  # [K], or None
    digits,  # [2 BT * blocks, K] int8: of each half first both quarters' first columns, then both second ones, ...
    scales,  # [K / H, BT * blocks] fp32: what a last digit counts
    sums,  # as scales: of the half's inputs, as their digits say
    eps,
    k,
    stride_x,
    rows,  # BT * blocks
    ALL: tl.constexpr,  # a power of two from K on
    FOLD: tl.constexpr,
    HALVES: tl.constexpr,  # halves of blocks that a program does
    NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Digits of norm(x), rounded to even; program (t, i) does the i-th HALVES halves of token t.

    dtypes: x, norm_weight one of fp16, bf16; all else in fp32. NaN and infinity make their half's scale no number.
    Bytes: T * K * (itemsize + 2); with a norm a program reads the whole row. Registers hold ALL inputs then.
    """
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    at = x + t * stride_x
    factor = tl.full([1, 1], 1.0, tl.float32)
    if NORM > 0:
        every = tl.arange(0, ALL)
        value = tl.load(at + every, mask=every < k, other=0.0).to(tl.float32)
        factor = tl.reshape(rms_scale(tl.sum(value * value, keep_dims=True), k, eps), [1, 1])
    half = tl.program_id(1) * HALVES + tl.arange(0, HALVES)[:, None]
    column = half * (2 * FOLD) + tl.arange(0, FOLD)[None, :]
    within = column < k
    a = _inputs(at, norm_weight, column, within, factor, NORM)
    b = _inputs(at, norm_weight, column + FOLD, within, factor, NORM)
    size = tl.maximum(largest(a, 1), largest(b, 1), propagate_nan=tl.PropagateNan.ALL)
    scale = size / LARGEST
    inverse = tl.where(size > 0.0, LARGEST / size, 0.0)
    a_high, a_low = _digits(a, inverse)
    b_high, b_low = _digits(b, inverse)
    total = tl.sum((a_high + b_high) * 256 + a_low + b_low, 1, keep_dims=True).to(tl.float32) * scale
    place = half * rows + t
    tl.store(scales + place, scale, mask=half * (2 * FOLD) < k)
    tl.store(sums + place, total, mask=half * (2 * FOLD) < k)
    position = half * (2 * FOLD) + tl.arange(0, 2 * FOLD)[None, :]
    out = digits + 2 * t * k + position
    tl.store(out, _pairs(a_high, b_high), mask=position < k)
    tl.store(out + k, _pairs(a_low, b_low), mask=position < k)


@triton.jit
def _inputs(at, norm_weight, column, within, factor, NORM: tl.constexpr):
    """Normed inputs in fp32."""
    value = tl.load(at + column, mask=within, other=0.0).to(tl.float32) * factor
    if NORM >= 2:
        value *= norm_factor(tl.load(norm_weight + column, mask=within, other=0.0), NORM)
    return value


@triton.jit
def _digits(value, inverse):
    """int32 (high, low), low from -128 to 127."""
    bits = (value * inverse + BASE).to(tl.int32, bitcast=True) - BASE_BITS
    high = (bits + 128) >> 8
    return high, bits - (high << 8)


@triton.jit
def _pairs(a, b):
    """[R, C] and [R, C] -> int8 [R, 2 C], taken in turn."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]]).to(tl.int8)


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def digits_kernel(
    x,  # [2 BT * blocks, K] int8 of `digit_rows_kernel`
    x_scale,  # [K / H, BT * blocks] fp32
    x_sum,  # [K / H, BT * blocks] fp32
    q,  # [G * N, K / 2] int8, contiguous: folded codes
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type
    zero,  # as scale, integers 0 to 16 of a float type, or None
    out,  # [T, N], last dim contiguous
    partials,  # [programs, BR, BT] fp32, scratch
    part_squares,  # [programs, BT] fp32, scratch
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    per_split,  # steps of W tiles along K of one split; no split is empty
    stride_out,
    stride_scale,
    rows,  # BT * blocks
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,  # P; 4 P divides K
    PARTS: tl.constexpr,  # W: warps share rows, each with a tile of its own; 1: they share tiles
    EVEN_K: tl.constexpr,  # 4 P W divides K
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,  # codes, not inputs, go through the pipeline, which then begins before the wait
    AHEAD: tl.constexpr,  # tiles of which the L2 is asked for the codes before the wait
    ASM: tl.constexpr,  # an NVIDIA GPU
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # 0 or a multiple of H
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns BN features of BT tokens and one split of K. Programs of the same weights are neighbours.

    dtypes: out one of fp32, fp16, bf16; sums of a half exact, of halves fp32.
    Bytes: G * N * K / 2 and the scales, 2 * T * K from the L2 per BN features; 8 * S * G * N * BT of partials if S > 1.
    Integer operations: 4 * T * G * N * K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    HALF: tl.constexpr = 2 * FOLD
    TILE: tl.constexpr = 2 * HALF
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, PARTS * TILE, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    feature, byte = weight_rows(first, n, BLOCK_R, G), tl.arange(0, HALF)
    token, digit = t_block * BLOCK_T + tl.arange(0, BLOCK_T), 2 * t_block * BLOCK_T + tl.arange(0, 2 * BLOCK_T)
    if PARTS == 1:
        part = 0
        row, token, digit = feature[:, None], token[None, :], digit[None, :].to(tl.int64)
        code, column = byte[None, :], byte[:, None]
        acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    else:
        part = tl.arange(0, PARTS)[:, None, None]
        row, token, digit = feature[None, :, None], token[None, None, :], digit[None, None, :].to(tl.int64)
        code, column = byte[None, None, :], byte[None, :, None]
        acc = tl.zeros([PARTS, BLOCK_R, BLOCK_T], tl.float32)
    srow = scale_row(row, ROWS)
    row_at = q + row * tl.multiple_of(k // 2, HALF)
    code_at = row_at + code
    x_at = x + digit * tl.multiple_of(k, HALF) + column
    if USE_PDL:
        gdc_launch_dependents()
        words = tl.reshape(row_at, [BLOCK_R, 1]).to(tl.pointer_type(tl.int16), bitcast=True)
        prefetch_codes(words, lo * PARTS, tl.minimum(hi * PARTS, k // TILE), AHEAD, FOLD)
    tile = _tiles(lo, part, k, TILE, PARTS, EVEN_K)
    s, z = _weights(scale, zero, srow, tile, k, stride_scale, HALF, COLS)
    if EARLY:
        low, high = _digits_of(x_at, tile, num_tokens < 0, HALF, True)  # nothing
        u = _numbers(x_scale, x_sum, token, tile, rows, num_tokens < 0, True)
    else:
        if USE_PDL:
            gdc_wait()
        u = _numbers(x_scale, x_sum, token, tile, rows, True, False)
    for i in range(lo, hi):
        # As in `folded_kernel`: what shall not go through the pipeline of copies stands in branches.
        tile = _tiles(i, part, k, TILE, PARTS, EVEN_K)
        after = _tiles(tl.minimum(i + 1, hi - 1), part, k, TILE, PARTS, EVEN_K)
        codes = tl.load(code_at + tile * HALF, eviction_policy="evict_first")
        s_now, z_now = s, z
        s, z = _weights(scale, zero, srow, after, k, stride_scale, HALF, COLS)
        if EARLY:
            if i == lo:
                if USE_PDL:
                    gdc_wait()
                low, high = _digits_of(x_at, tile, True, HALF, False)
                u = _numbers(x_scale, x_sum, token, tile, rows, True, False)
            low_now, high_now = low, high
        else:
            low_now, high_now = _digits_of(x_at, tile, True, HALF, False)
        u_now = u
        if i + 1 < hi:
            if EARLY:
                low, high = _digits_of(x_at, after, True, HALF, False)
            u = _numbers(x_scale, x_sum, token, after, rows, True, False)
        if not EVEN_K:
            inside = (i * PARTS + part) * TILE < k
            u_now = (tl.where(inside, u_now[0], 0.0), tl.where(inside, u_now[1], 0.0),
                     tl.where(inside, u_now[2], 0.0), tl.where(inside, u_now[3], 0.0))  # fmt: skip
        acc = _add(acc, _low(codes, ASM), low_now, s_now[0], z_now[0], u_now[0], u_now[1], zero is not None)
        acc = _add(acc, _high(codes, ASM), high_now, s_now[1], z_now[1], u_now[2], u_now[3], zero is not None)
    if PARTS > 1:
        acc = tl.sum(acc, 0)
    finish_tile(
        acc, tl.zeros([1, BLOCK_T], tl.float32), out, args, strides, partials, part_squares, counters, block, t_block,
        t_blocks, split, first, t, live, n, k, 0.0, stride_out, G, SPLITS, False, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _tiles(i, part, k, TILE: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr):
    """Tiles of step i, one to a part; of those past K the last."""
    tile = i * PARTS + part
    return tile if EVEN_K else tl.minimum(tile, k // TILE - 1)


@triton.jit
def _weights(scale, zero, srow, tile, k, stride, HALF: tl.constexpr, COLS: tl.constexpr):
    """Stored (scales, zeros) of both halves of tiles; without zeros, scales twice."""
    column = tile * (2 * HALF)
    s = _both(scale, srow, column, k, stride, HALF, COLS)
    return s, s if zero is None else _both(zero, srow, column, k, stride, HALF, COLS)


@triton.jit
def _both(scale, srow, column, k, stride, HALF: tl.constexpr, COLS: tl.constexpr):
    one = raw_scales(scale, srow, column, k, stride, COLS, True)
    if COLS == HALF:  # one address
        return one, raw_scales(scale + 1, srow, column, k, stride, COLS, True)
    else:
        return one, one


@triton.jit
def _numbers(x_scale, x_sum, token, tile, rows, mask, MASKED: tl.constexpr):
    """(scale, sum) of the inputs of both halves of tiles."""
    at = 2 * tile * rows + token
    return (
        _number(x_scale + at, mask, MASKED), _number(x_sum + at, mask, MASKED),
        _number(x_scale + at + rows, mask, MASKED), _number(x_sum + at + rows, mask, MASKED),
    )  # fmt: skip


@triton.jit
def _number(at, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(at, eviction_policy="evict_last")


@triton.jit
def _digits_of(x_at, tile, mask, HALF: tl.constexpr, MASKED: tl.constexpr):
    """Digits [..., H, 2 BT] of the first half of tiles, and of the second."""
    at = x_at + tile * (2 * HALF)
    if MASKED:
        return tl.load(at, mask=mask, other=0), tl.load(at + HALF, mask=mask, other=0)
    else:
        return tl.load(at, eviction_policy="evict_last"), tl.load(at + HALF, eviction_policy="evict_last")


@triton.jit
def _low(codes, ASM: tl.constexpr):
    """int8 of the low nibbles of bytes: codes of a block's first half."""
    if ASM:
        asm: tl.constexpr = "and.b32 $0, $1, 0x0f0f0f0f;"
        return tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return codes & 15


@triton.jit
def _high(codes, ASM: tl.constexpr):
    """int8 of the high nibbles of bytes: codes of a block's second half."""
    if ASM:
        asm: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }"
        return tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return (codes >> 4) & 15


@triton.jit
def _add(acc, codes, digits, s, z, u, total, HAS_ZERO: tl.constexpr):
    """acc [..., BR, BT] + (codes - zero) @ inputs * scale, inputs being digits times u, whose sum is total."""
    COLUMNS: tl.constexpr = digits.shape[-1]
    if len(acc.shape) == 2:
        both = _products(codes, digits, [acc.shape[0], COLUMNS], [acc.shape[0], COLUMNS // 2, 2])
    else:
        sizes: tl.constexpr = [acc.shape[0], acc.shape[1], COLUMNS]
        both = _products(codes, digits, sizes, [acc.shape[0], acc.shape[1], COLUMNS // 2, 2])
    high, low = tl.split(both)
    product = high * 256.0 + low
    if HAS_ZERO:
        product = product * u - scale_numbers(z) * total
    else:
        product = product * u - total * MIDDLE
    return acc + product * scale_numbers(s)


@triton.jit
def _products(codes, digits, SHAPE: tl.constexpr, PAIRS: tl.constexpr):
    """codes @ digits of SHAPE, exact in fp32, with the digits of a token apart."""
    sums = tl.dot(codes, digits, tl.full(SHAPE, BASE_BITS, tl.int32), out_dtype=tl.int32)
    return tl.reshape(sums.to(tl.float32, bitcast=True) - BASE, PAIRS)
