"""Kernel of a linear layer by folded 4-bit integers with inputs as two signed bytes: a mask makes codes bytes, too.

A mask, and for every second code a shift, puts four codes in the place where the matrix units want them, and their sums
of bytes are exact. Inputs are made fixed-point numbers once for all programs (`folded_digit_rows.py`), with a power of
two for each half of a tile, in the order that bytes of folded codes have columns in.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR rows of a weight tile, BN = BR / G,
P columns of a quarter of a folded tile, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_tile import finish_tile, tile_place
from fusecomp.lowerings.quant.fixed_point import FIRST
from fusecomp.lowerings.quant.folded_pieces import tile_scales
from fusecomp.lowerings.quant.pieces import half_of, scale_numbers, scale_row
from fusecomp.ops.quant import INT4_OFFSET

LESS = tl.constexpr(-INT4_OFFSET)  # what is added to codes without zero points
EXPONENT, EXPONENT_MASK = tl.constexpr(8), tl.constexpr(255)  # bits of a word of `sums`


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def folded_digits_kernel(
    digit_tiles,  # descriptor of digits [2 T, K], int8, in blocks [2 BT, 2 P]
    sums,  # [K / 2P, T] int32: of the inputs of each half of a tile, and behind it the exponent of their unit
    q_tiles,  # descriptor of folded codes [G * N, K / 2], bytes, in blocks [BN, 2 P]
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type; if PACKED words of two
    zero,  # as scale, integers 0 to 16 of a float type; if PACKED words of two; or None
    out,  # [T, N], last dim contiguous
    partials,  # [programs, BR, BT] fp32, scratch
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    per_split,  # tiles of one split; no split is empty
    stride_out,
    stride_scale,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,  # P; 4 P divides K
    SPLITS: tl.constexpr,
    PACKED: tl.constexpr,  # COLS is 2 P, scales and zeros bf16: a word has those of a tile
    ASM: tl.constexpr,  # an NVIDIA GPU
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # 0, or a multiple of 2 P
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns BN features of BT tokens and one split of K. Programs of the same weights are neighbours.

    Sums of half a tile less their zero points are exact; those are scaled and added in fp32. A token with an input that
    is no number has none in its output.
    Bytes: G * N * K / 2 and the scales; from the L2 2 * T * K per BN features, and the codes again per BT tokens;
    8 * S * G * N * BT of partials if S > 1. Operations: 4 * T * G * N * K, of bytes.

    Measured on an H200 of 4.60 TB/s (benchmarks/step_tune.py, eight layers of Llama-8B, zero points): a step of 16 rows
    takes 798 us, by `folded_kernel` 889. With fp8 in place of bytes a chain of layers read 40% of it, gate and up 56%.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, 4 * FOLD, SPLITS
    )
    first_row, first_digit = first.to(tl.int32), t_block * (2 * BLOCK_T)
    row = tl.minimum(first_row + tl.arange(0, BLOCK_N), n - 1)[:, None]  # the group's; features past N are not stored
    srow, other_srow = scale_row(row, ROWS), scale_row(row + (G - 1) * n, ROWS)
    token = tl.minimum(t_block * BLOCK_T + tl.arange(0, BLOCK_T), num_tokens - 1)[None, :]
    stored = _stored(scale, zero, srow, lo, k, stride_scale, FOLD, COLS, PACKED)
    other_stored = _stored(scale, zero, other_srow, lo, k, stride_scale, FOLD, COLS, PACKED) if G == 2 else stored
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    other = acc  # of the second group, if there is one
    given = _sums(sums, token, lo, num_tokens)
    for tile in range(lo, hi):
        after = tl.minimum(tile + 1, hi - 1)
        code = q_tiles.load([first_row, tile * (2 * FOLD)])
        low = digit_tiles.load([first_digit, tile * (4 * FOLD)]).T
        high = digit_tiles.load([first_digit, tile * (4 * FOLD) + 2 * FOLD]).T
        # No product needs them when it begins, so the compiler's pipeline leaves them out: they are a step ahead.
        now, words = stored, given
        if COLS > 0:
            stored = _stored(scale, zero, srow, after, k, stride_scale, FOLD, COLS, PACKED)
        given = _sums(sums, token, after, num_tokens)
        acc = _add(acc, code, low, words, now, 0, zero is not None, PACKED, ASM)
        acc = _add(acc, code, high, words, now, 1, zero is not None, PACKED, ASM)
        if G == 2:
            code = q_tiles.load([first_row + n, tile * (2 * FOLD)])
            now = other_stored
            if COLS > 0:
                other_stored = _stored(scale, zero, other_srow, after, k, stride_scale, FOLD, COLS, PACKED)
            other = _add(other, code, low, words, now, 0, zero is not None, PACKED, ASM)
            other = _add(other, code, high, words, now, 1, zero is not None, PACKED, ASM)
    if G == 2:
        acc = tl.reshape(tl.permute(tl.join(acc, other), [0, 2, 1]), [BLOCK_R, BLOCK_T])
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    squares = tl.zeros([1, BLOCK_T], tl.float32)
    finish_tile(
        acc, squares, out, args, strides, partials, partials, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, 0.0, stride_out, G, SPLITS, False, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _stored(
    scale, zero, srow, tile, k, stride, FOLD: tl.constexpr, COLS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Scales and zero points [BN, 1] of a tile's halves as they are stored: (scales, zeros), tuples of one or two."""
    if PACKED:
        place = srow * (stride // 2) + tile
        s = tl.load(scale + place, eviction_policy="evict_last")
        return (s,), (s if zero is None else tl.load(zero + place, eviction_policy="evict_last"),)
    else:
        return tile_scales(scale, zero, srow, tile * (4 * FOLD) + srow * 0, k, stride, FOLD, COLS)


@triton.jit
def _of_half(stored, HALF: tl.constexpr, PACKED: tl.constexpr):
    """fp32 [BN, 1] of one half of a tile, whose halves have a number each, or the same."""
    if PACKED:
        return half_of(stored[0], HALF, tl.bfloat16)
    else:
        return scale_numbers(stored[HALF % len(stored)])


@triton.jit
def _sums(sums, token, tile, num_tokens):
    """Words [1, BT] of a tile's halves."""
    place = token + 2 * tile * num_tokens
    return tl.load(sums + place), tl.load(sums + (place + num_tokens))


@triton.jit
def _add(
    acc, code, both, words, stored, HALF: tl.constexpr, HAS_ZERO: tl.constexpr, PACKED: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """acc and scaled products [BN, BT] of one half of a tile, given the words and what is stored of both."""
    s, word = _of_half(stored[0], HALF, PACKED), words[HALF]
    less = -_of_half(stored[1], HALF, PACKED).to(tl.int32) if HAS_ZERO else LESS
    part = tl.dot(codes_of_half(code, HALF, ASM).to(tl.int8, bitcast=True), both, out_dtype=tl.int32)
    first, second = tl.split(tl.reshape(part, [acc.shape[0], acc.shape[1], 2]))
    unit = ((word & EXPONENT_MASK) << 23).to(tl.float32, bitcast=True)
    # In this order nothing but the product can be made ahead of it: registers are few.
    whole = less * (word >> EXPONENT) + (first * FIRST + second)
    return acc + whole.to(tl.float32) * unit * s


@triton.jit
def codes_of_half(code, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Bytes of the low, or high, nibbles of bytes."""
    if not ASM:
        return code >> 4 if HIGH else code & 15
    elif HIGH:
        high: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }"
        return tl.inline_asm_elementwise(high, "=r,r", [code], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        low: tl.constexpr = "and.b32 $0, $1, 0x0f0f0f0f;"
        return tl.inline_asm_elementwise(low, "=r,r", [code], dtype=tl.uint8, is_pure=True, pack=4)
