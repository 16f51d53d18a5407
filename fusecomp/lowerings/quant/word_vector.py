"""Kernel of a linear layer of 8-bit codes with one token, whose scales serve whole rows: words of four codes at a time.

As `quant_vector_kernel`, but a thread reads two words of codes and the eight inputs that meet them, in one layout:
nothing is exchanged between threads until the sums of a row are, after the loop. That takes 256 columns a warp,
or a multiple. Codes behind a program's first tile are asked of the L2 while it waits for the last kernel.

Legend: N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a tile, BN = BR / G.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import norm_factor, rms_scale, store_features, weight_rows
from fusecomp.lowerings.quant.pieces import ask_l2_for, byte_values, half_of, load_scales, scale_row

WORD = tl.constexpr(4)  # codes of an int32, and 16-bit inputs of an int64
# PTX: the four e4m3fn bytes of a word as fp32, by the conversion that GPUs from compute capability 8.9 on have.
FOUR_FP8 = tl.constexpr(
    "{ .reg .b16 l, h, a, b, c, d; .reg .b32 p, q; mov.b32 {l, h}, $4; "
    "cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h; mov.b32 {a, b}, p; mov.b32 {c, d}, q; "
    "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"
)


@triton.jit
def word_vector_kernel(
    x,  # [K / 4] int64: four inputs each
    q,  # [G * N, K / 4] int32: four codes each
    scale,  # [ceil(G * N / ROWS), 1] contiguous, a float type or uint8 exponents
    out,  # [1, N]
    norm_weight,  # [K / 4] int64, or None
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    n,
    k,
    eps,
    stride_scale,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,  # of the inputs and of the norm's weight: fp16 or bf16
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles behind the first for whose codes the L2 is asked before the wait
    WARPS: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN features per program, over all of K. Products and sums fp32.

    Bytes: G * N * K, the scales, and 2 * (K + N). FLOPs: 2 * G * N * K. Bound by reading the codes.

    Measured on an H100 of 3.19 TB/s (benchmarks/quant_linear.py --tune, fp8, layers of Llama-8B): 88% of it in a chain;
    alone 88% over 117 MB, 86% over 58.7, 76% and 70% over 25.2 and 16.8. On an H200 of 4.60 TB/s 80% in a chain.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    BLOCK_W: tl.constexpr = BLOCK_K // WORD
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    places = tl.arange(0, BLOCK_W)[None, :]
    width = k // WORD
    # 8-byte loads, of 8 codes, since a thread's 16-byte loads of inputs hold 8: so both are laid out alike.
    tile_at = q + rows * width + tl.max_contiguous(places, [1, 2])

    code = _load(tile_at, places < width, EVEN_K, "evict_first")
    s = load_scales(scale, scale_row(rows, ROWS), tl.zeros([1, 1], tl.int32), k, stride_scale, 0, True)  # [BR, 1]
    if AHEAD > 0:
        _ask_l2(q, first, n, width, G, BLOCK_R, BLOCK_W, AHEAD, WARPS)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()

    acc = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    squares = tl.zeros([1, BLOCK_W], tl.float32)
    v = _load(x + places, places < width, EVEN_K, "evict_last")
    g = v
    if NORM >= 2:
        g = _load(norm_weight + places, places < width, EVEN_K, "evict_last")
    for start in range(BLOCK_W, width, BLOCK_W):  # loads one tile, multiplies the one before
        within = start + places < width
        code_next = _load(tile_at + start, within, EVEN_K, "evict_first")
        v_next = _load(x + start + places, within, EVEN_K, "evict_last")
        g_next = v_next
        if NORM >= 2:
            g_next = _load(norm_weight + start + places, within, EVEN_K, "evict_last")
        acc, squares = _add_products(acc, squares, code, v, g, DTYPE, KIND, NORM)
        code, v, g = code_next, v_next, g_next
    acc, squares = _add_products(acc, squares, code, v, g, DTYPE, KIND, NORM)
    y = tl.sum(acc, 1)[:, None] * s  # [BR, 1]
    if NORM > 0:
        y *= rms_scale(tl.sum(squares, 1), k, eps)[:, None]
    store_features(y, first, n, out, args, strides, G, EPILOGUE)


@triton.jit
def _ask_l2(
    q, first, n, width, G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, AHEAD: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Ask the L2 for a program's codes in the AHEAD tiles behind its first, a row to a lane."""
    lane = tl.arange(0, 32 * WARPS)
    row = tl.minimum(first + lane // G, n - 1) + (lane % G).to(tl.int64) * n
    size = tl.minimum(AHEAD * BLOCK_W, width - BLOCK_W) * 4  # bytes
    at = (q + row * width + BLOCK_W).to(tl.int64)
    go = ((lane < BLOCK_R) & (size > 0)).to(tl.int32)
    ask_l2_for(at, lane * 0 + size, go)


@triton.jit
def _load(at, within, EVEN_K: tl.constexpr, KEEP: tl.constexpr):
    """Words, zero past K."""
    if EVEN_K:
        return tl.load(at, eviction_policy=KEEP)
    else:
        return tl.load(at, mask=within, other=0, eviction_policy=KEEP)


@triton.jit
def _add_products(acc, squares, code, v, g, DTYPE: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr):
    """acc [BR, W] and squares [1, W] with the products of words code [BR, W] and v * g [1, W], and the squares of v."""
    c0, c1, c2, c3 = _codes(code, KIND)
    v0, v1, v2, v3 = _inputs(v, DTYPE)
    if NORM > 0:
        squares += v0 * v0
        squares += v1 * v1
        squares += v2 * v2
        squares += v3 * v3
    if NORM >= 2:
        g0, g1, g2, g3 = _inputs(g, DTYPE)
        v0 *= norm_factor(g0, NORM)
        v1 *= norm_factor(g1, NORM)
        v2 *= norm_factor(g2, NORM)
        v3 *= norm_factor(g3, NORM)
    acc += c0 * v0
    acc += c1 * v1
    acc += c2 * v2
    acc += c3 * v3
    return acc, squares


@triton.jit
def _codes(word, KIND: tl.constexpr):
    """fp32 of the four codes of int32 words, the first in the lowest byte."""
    if KIND == 2:
        return tl.inline_asm_elementwise(
            FOUR_FP8, "=f,=f,=f,=f,r", [word], dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            _byte(word, 0, KIND),
            _byte(word, 1, KIND),
            _byte(word, 2, KIND),
            _byte(word, 3, KIND),
        )


@triton.jit
def _byte(word, PLACE: tl.constexpr, KIND: tl.constexpr):
    byte = (word >> (8 * PLACE)) & 255
    if KIND == 0:  # 2^23 + 128 + code has the code in its last bits: no slow conversion of integers
        return ((byte ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        return byte_values(byte, KIND)


@triton.jit
def _inputs(word, DTYPE: tl.constexpr):
    """fp32 of the four 16-bit numbers of int64 words, the first in the lowest bits."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    return half_of(low, 0, DTYPE), half_of(low, 1, DTYPE), half_of(high, 0, DTYPE), half_of(high, 1, DTYPE)
