"""Kernel of a linear layer by folded 4-bit integers, for more tokens than `folded.py` is for, up to some hundreds.

Codes are scaled before they are multiplied: a weight costs some operations more, and sums of products stay where the
matrix units add them up. Codes and scales become operands in the registers they were loaded to.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR rows of a weight tile, BN = BR / G,
P columns of a quarter of a folded tile, W words of a step, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import weight_rows
from fusecomp.lowerings.linear.skinny_tile import finish_tile, tile_place
from fusecomp.lowerings.quant.folded_pieces import prefetch_codes, quarter, tile_scales
from fusecomp.lowerings.quant.pieces import scale_numbers, scale_row


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def folded_wide_kernel(
    x,  # [T, K], last dim contiguous
    x_tiles,  # its descriptor in blocks [BT, W], or None
    q,  # [G * N, K / 4] int16, contiguous: folded codes
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
    per_split,  # steps of one split; no split is empty
    stride_x,
    stride_out,
    stride_scale,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,  # P; 4 P divides K
    WORDS: tl.constexpr,  # W, which divides P
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,  # steps of which the L2 is asked for the codes before the wait
    PACKED: tl.constexpr,  # COLS is 2 P, scales and zeros of x's dtype: a word has those of a tile
    ASM: tl.constexpr,  # an NVIDIA GPU, and 16-bit inputs
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_TMA: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns BN features of BT tokens and one split of K. Programs of the same weights are neighbours.

    A step takes W words of each row, so W columns of each quarter of a tile. COLS is 0 or a multiple of P. Scaled
    weights are rounded to x's dtype, as a dequantized weight is; sums fp32.
    dtypes: x, out one of fp32, fp16, bf16. Words of scales go through the compiler's pipeline, as codes do; loads of
    16 bits and less would each be laid out anew, at the cost of a barrier.
    With USE_TMA inputs come by x_tiles: no thread copies them, and products need no fence behind such copies. Instead
    Triton has a barrier before each of the four blocks that a step asks for.
    Bytes: G * N * K / 2 and the scales, T * K * itemsize from the L2 per BN features, and the codes again from the L2
    per BT tokens; 8 * S * G * N * BT of partials if S > 1. FLOPs: 2 * T * G * N * K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    PER: tl.constexpr = 4 if COLS == 0 or COLS >= 4 * FOLD else COLS // FOLD  # quarters that share a scale
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, 4 * WORDS, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    srow, column = scale_row(rows, ROWS), tl.zeros([1, 1], tl.int32)
    cols = tl.arange(0, WORDS)
    row_at = q + rows * tl.multiple_of(k // 4, FOLD)
    # Inputs past T are the last token's, or a descriptor's zeros; their sums are not stored.
    token = tl.minimum(t, num_tokens - 1)
    x_at = x + token * stride_x + cols[:, None]
    if USE_PDL:
        gdc_launch_dependents()
        prefetch_codes(row_at, lo, hi, AHEAD, WORDS)
        gdc_wait()
    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    for step in range(lo, hi):
        start = step // (FOLD // WORDS) * (4 * FOLD) + step % (FOLD // WORDS) * WORDS
        word = tl.load(row_at + step * WORDS + cols[None, :], eviction_policy="evict_first")
        # Not a step ahead: what a loop carries is not laid out as operands are.
        if PACKED:
            s, z = packed_scales(scale, zero, srow, column + start // (4 * FOLD), stride_scale, x.dtype.element_ty)
        else:
            s, z = tile_scales(scale, zero, srow, column + start, k, stride_scale, FOLD, COLS)
        if USE_TMA:
            blocks = four_blocks(x_tiles, t_block * BLOCK_T, start, FOLD)
        for i in tl.static_range(4):
            if USE_TMA:
                v = blocks[i].T
            else:
                v = tl.load(x_at + start + i * FOLD, eviction_policy="evict_last")
            w = quarter(word, z[i // PER], i, v.dtype, zero is not None, False, ASM)
            acc = tl.dot(times(w, s[i // PER], ASM), v, acc, input_precision="ieee")
        if ASM:  # a product that ends in the next step makes ptxas wait after each instruction of all of them
            acc = tl.inline_asm_elementwise("// $0", "=r,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    squares = tl.zeros([1, BLOCK_T], tl.float32)
    finish_tile(
        acc, squares, out, args, strides, partials, partials, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, 0.0, stride_out, G, SPLITS, False, EPILOGUE,
    )  # fmt: skip


@triton.jit
def four_blocks(tiles, row, column, APART: tl.constexpr):
    """A descriptor's blocks from four columns on: loads with no product in between are waited for once."""
    return (
        tiles.load([row, column]),
        tiles.load([row, column + APART]),
        tiles.load([row, column + 2 * APART]),
        tiles.load([row, column + 3 * APART]),
    )


@triton.jit
def packed_scales(scale, zero, srow, tile, stride, DTYPE: tl.constexpr):
    """(scales, zeros) [BR, 1] in DTYPE of a tile's two groups; without zeros, scales twice."""
    s = _pair(scale + srow * (stride // 2) + tile, DTYPE)
    return s, s if zero is None else _pair(zero + srow * (stride // 2) + tile, DTYPE)


@triton.jit
def _pair(at, DTYPE: tl.constexpr):
    both = tl.load(at, eviction_policy="evict_last")
    high = (both >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return both.to(tl.int16).to(DTYPE, bitcast=True), high


# PTX: products of two bf16 or fp16 by two, each rounded once.
TIMES = tl.constexpr(
    tuple(f"{{ .reg .b32 o; mov.b32 o, 0x80008000; fma.rn.{d}x2 $0, $1, $2, o; }}" for d in ("bf16", "f16"))
)


@triton.jit
def times(w, s, ASM: tl.constexpr):
    """w [BR, W] times stored scales s [BR, 1], rounded once to w's dtype."""
    if not ASM or s.dtype != w.dtype:
        return (w.to(tl.float32) * scale_numbers(s)).to(w.dtype)
    else:
        asm: tl.constexpr = TIMES[1 if w.dtype == tl.float16 else 0]
        return tl.inline_asm_elementwise(asm, "=r,r,r", [w, s], dtype=w.dtype, is_pure=True, pack=2)
