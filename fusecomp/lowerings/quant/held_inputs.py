"""How a warp of `folded_held_kernel` comes to hold its part of the only token's inputs, as the products want them.

Legend: as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.linear.skinny_pieces import norm_factor
from fusecomp.lowerings.quant.folded_pieces import BIAS_FP16, MIDDLE


@triton.jit
def hold(
    x, g, column, k, PARTS: tl.constexpr, HAS_ZERO: tl.constexpr, NORM: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """(what a warp holds, what its sums are scaled back by [L], its inputs' sum of squares [L]).

    It holds four operands [W, 64, 8], all columns of which are the token's, and what sums take off, [W, 16, 8]: of
    either half a zero point's, and once. A lane makes eight inputs and has others' by shuffles within the warp.
    """
    v = tl.load(x + column, mask=column < k, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = tl.reshape(v * norm_factor(g, NORM) if NORM >= 2 else v, [PARTS, 32, 8])
    lane = tl.reshape(tl.arange(0, 32 * PARTS), [PARTS, 32]) % 32
    squares = tl.sum(tl.sum(tl.reshape(v * v, [PARTS, 32, 8]), 2), 1, keep_dims=True)
    largest = tl.max(tl.max(tl.abs(y), 2), 1, keep_dims=True)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 16)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # to magnitudes in [2^14, 2^15)
    back = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    y = (y * (up * tl.where(lane // 16 == 1, 0.0625, 1.0))[:, :, None]).to(tl.float16)
    quarters = tl.sum(tl.reshape(tl.sum(y.to(tl.float32), 2), [PARTS, 4, 8]), 2, keep_dims=True)
    sums = tl.reshape(tl.broadcast_to(quarters, [PARTS, 4, 8]), [PARTS, 32])
    words = _pairs(y, PARTS, ASM)
    e0, e1 = tl.gather(sums, lane * 0, 1), tl.gather(sums, lane * 0 + 8, 1)
    e2, e3 = tl.gather(sums, lane * 0 + 16, 1), tl.gather(sums, lane * 0 + 24, 1)
    sum0, sum1 = e0 + e1, 16.0 * (e2 + e3)
    less0, less1 = sum0 * -BIAS_FP16, (e2 + e3) * -BIAS_FP16
    if not HAS_ZERO:
        less0 -= sum0 * MIDDLE
        less1 -= sum1 * MIDDLE
    held = _held(words, lane, (sum0, sum1, less0, less1), ASM)
    return held, _by_lanes(back), _by_lanes(squares)


@triton.jit
def nothing(PARTS: tl.constexpr, ASM: tl.constexpr):
    """What is there before `hold`: zeros in the shapes and layouts of what it gives."""
    lane = tl.reshape(tl.arange(0, 32 * PARTS), [PARTS, 32]) % 32
    word = lane * 0
    none = word.to(tl.float32)
    one = tl.zeros([32 * PARTS], tl.float32)
    return _held((word, word, word, word), lane, (none, none, none, none), ASM), one, one


@triton.jit
def _held(words, lane, sums, ASM: tl.constexpr):
    return (
        _quarter(words, lane, 0, ASM), _quarter(words, lane, 1, ASM), _quarter(words, lane, 2, ASM),
        _quarter(words, lane, 3, ASM), _of_token(sums[0]), _of_token(sums[1]), _of_token(sums[2]), _of_token(sums[3]),
    )  # fmt: skip


@triton.jit
def _by_lanes(v):
    """[W, 1] -> [L]."""
    return tl.reshape(tl.broadcast_to(v, [v.shape[0], 32]), [32 * v.shape[0]])


@triton.jit
def _pairs(y, PARTS: tl.constexpr, ASM: tl.constexpr):
    """fp16 [W, 32, 8] -> four [W, 32] of words, of two neighbours each."""
    low, high = tl.split(tl.reshape(y, [PARTS, 32, 4, 2]))
    if ASM:
        asm: tl.constexpr = "mov.b32 $0, {$1, $2};"
        word = tl.inline_asm_elementwise(asm, "=r,h,h", [low, high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = _bits(low) & 0xFFFF | _bits(high) << 16
    even, odd = tl.split(tl.reshape(word, [PARTS, 32, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _bits(v):
    return v.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _quarter(words, lane, J: tl.constexpr, ASM: tl.constexpr):
    """fp16 [W, 64, 8], the product's operand, of quarter J.

    The compiler has four columns of a step next to one another in a lane, two of either half of what it multiplies.
    """
    PARTS: tl.constexpr = lane.shape[0]
    word = tl.join(_eight(words, lane % 4 + 8 * J), _eight(words, lane % 4 + (8 * J + 4)))  # W, lanes, h, s, a
    if ASM:
        asm: tl.constexpr = "mov.b32 {$0, $1}, $2;"
        low, high = tl.inline_asm_elementwise(
            asm, "=h,=h,r", [word], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        low, high = (
            word.to(tl.int16).to(tl.float16, bitcast=True),
            (word >> 16).to(tl.int16).to(tl.float16, bitcast=True),
        )
    v = tl.reshape(tl.join(low, high), [PARTS, 8, 4, 2, 2, 2, 2])  # W, g, t, h, s, a, p
    return tl.reshape(tl.permute(v, [0, 5, 3, 2, 4, 6, 1]), [PARTS, 64, 8])


@triton.jit
def _eight(words, of):
    """[W, 32, h, s] words of eight columns that lanes `of` have."""
    first = tl.join(tl.gather(words[0], of, 1), tl.gather(words[1], of, 1))
    return tl.join(first, tl.join(tl.gather(words[2], of, 1), tl.gather(words[3], of, 1)))


@triton.jit
def _of_token(v):
    """[W, 32] numbers of lanes -> [W, 16, 8], in the places of the product's sums; zero where no token is."""
    v = tl.join(v, tl.zeros_like(v))
    v = tl.permute(tl.reshape(tl.join(v, v), [v.shape[0], 8, 4, 2, 2]), [0, 4, 1, 2, 3])
    return tl.reshape(v, [v.shape[0], 16, 8])
