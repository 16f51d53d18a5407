"""How a warp of `folded_held_kernel` comes to hold its part of the inputs, as the products want them.

Legend: as there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.linear.skinny_pieces import norm_factor
from fusecomp.lowerings.quant.fixed_point import exponent_of, fixed, magnitude, two_bytes, unit_exponent


@triton.jit
def load_pairs(x, column, k):
    """Four tensors [L, 2] of neighbours: of the columns at `column` [L] and 64, 128 and 192 behind; zero past K."""
    at = column[:, None] + tl.arange(0, 2)[None, :]
    return _pair(x, at, k), _pair(x, at + 64, k), _pair(x, at + 128, k), _pair(x, at + 192, k)


@triton.jit
def hold(
    x, g, column, scales_at, stride_x, k, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """What a warp holds: its lanes' words of either half's operand, and either half's sums.

    A lane makes eight inputs of a token, those of a word of codes and of its other half, and has others' by shuffles
    within the warp. A warp's share a power of two: see `fixed_point.py`.

    Args:
        g: of the norm's weight what `load_pairs` gives, with NORM of 2 or 3.
        scales_at: [T, 2, W], where what sums are scaled back by is stored, and sums of squares.
    """
    first = load_pairs(x, column, k)
    if BLOCK_T == 1:
        return _of_one(first, g, scales_at, 0, PARTS, NORM)
    else:
        second = load_pairs(x + stride_x, column, k)
        one, other = _of_one(first, g, scales_at, 0, PARTS, NORM), _of_one(second, g, scales_at, 1, PARTS, NORM)
        return one[0] | other[0], one[1] | other[1], one[2] + other[2], one[3] + other[3]


@triton.jit
def _of_one(v, g, scales_at, T: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr):
    """`hold` of token T alone, given what `load_pairs` gives of its row."""
    if NORM >= 2:
        v0, v1 = _scaled(v[0], g[0], NORM), _scaled(v[1], g[1], NORM)
        v2, v3 = _scaled(v[2], g[2], NORM), _scaled(v[3], g[3], NORM)
    else:
        v0, v1, v2, v3 = v[0].to(tl.float32), v[1].to(tl.float32), v[2].to(tl.float32), v[3].to(tl.float32)
    largest = tl.maximum(tl.maximum(magnitude(v0), magnitude(v1)), tl.maximum(magnitude(v2), magnitude(v3)))
    exponent = exponent_of(_by_lanes(tl.max(tl.reshape(tl.max(largest, 1), [PARTS, 32]), 1, keep_dims=True)))
    place = tl.arange(0, 32 * PARTS)
    scales_at += 2 * T * PARTS + place // 32
    back = (unit_exponent(exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales_at, back, mask=place % 32 == 0)
    if NORM > 0:
        squares = _squares(v[0]) + _squares(v[1]) + _squares(v[2]) + _squares(v[3])
        squares = _by_lanes(tl.sum(tl.reshape(squares, [PARTS, 32]), 1, keep_dims=True))
        tl.store(scales_at + PARTS, squares, mask=place % 32 == 0)
    shared = exponent[:, None]
    i0, i1, i2, i3 = fixed(v0, shared), fixed(v1, shared), fixed(v2, shared), fixed(v3, shared)
    return (
        _half_operand(i0, i1, T, PARTS), _half_operand(i2, i3, T, PARTS), _sum_of_token(i0, i1, T, PARTS),
        _sum_of_token(i2, i3, T, PARTS),
    )  # fmt: skip


@triton.jit
def nothing(PARTS: tl.constexpr):
    """What is there before `hold`: zeros in the shapes and layouts of what it gives."""
    one = tl.zeros([32 * PARTS], tl.float32)
    pair = tl.join(one, one).to(tl.int32)
    half, total = _half_operand(pair, pair, 0, PARTS), _sum_of_token(pair, pair, 0, PARTS)
    return half, half, total, total


@triton.jit
def operand(words):
    """int8 [W, 128, 8], the product's operand, of words [W, 32, a, s, h].

    The compiler has eight columns of a product next to one another in a lane, four of either half of it.
    """
    PARTS: tl.constexpr = words.shape[0]
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    v = tl.reshape(tl.join(even, odd), [PARTS, 8, 4, 2, 2, 2, 4])  # W, g, t, a, s, h, b
    return tl.reshape(tl.permute(v, [0, 3, 4, 2, 5, 6, 1]), [PARTS, 128, 8])


@triton.jit
def of_rows(v):
    """[L, r] numbers of a lane's two rows -> [W, 16, 4], in the places of the product's sums."""
    PARTS: tl.constexpr = v.shape[0] // 32
    return tl.reshape(tl.permute(tl.reshape(v, [PARTS, 8, 4, 2]), [0, 3, 1, 2]), [PARTS, 16, 4])


@triton.jit
def _pair(x, at, k):
    return tl.load(x + at, mask=at < k, other=0.0, eviction_policy="evict_last")


@triton.jit
def _scaled(v, g, NORM: tl.constexpr):
    return v.to(tl.float32) * norm_factor(g, NORM)


@triton.jit
def _squares(v):
    v = v.to(tl.float32)
    return tl.sum(v * v, 1)


@triton.jit
def _by_lanes(v):
    """[W, 1] -> [L]."""
    return tl.reshape(tl.broadcast_to(v, [v.shape[0], 32]), [32 * v.shape[0]])


@triton.jit
def _sum_of_token(i, j, T: tl.constexpr, PARTS: tl.constexpr):
    """[W, 16, 4] floats, in the places of token T's sums: of each warp's integers [L, 2], which are exact."""
    total = _by_lanes(tl.sum(tl.reshape(tl.sum(i + j, 1), [PARTS, 32]), 1, keep_dims=True)).to(tl.float32)
    total = tl.where(tl.arange(0, 32 * PARTS) % 4 == T, total, 0.0)
    return of_rows(tl.join(total, total))


@triton.jit
def _half_operand(i, j, T: tl.constexpr, PARTS: tl.constexpr):
    """[W, 32, a, s, h] words that a lane has of its group's column, of integers [L, 2] of a half's two quarters.

    Column 2 T has their first bytes, the next the second ones, others none.
    """
    first_i, second_i = two_bytes(i)
    first_j, second_j = two_bytes(j)
    word, other = _word(first_i, first_j, PARTS), _word(second_i, second_j, PARTS)
    lane = tl.reshape(tl.arange(0, 32 * PARTS), [PARTS, 32]) % 32
    even = tl.join(_words(word, other, lane, T, 0), _words(word, other, lane, T, 2))
    odd = tl.join(_words(word, other, lane, T, 1), _words(word, other, lane, T, 3))
    return tl.join(even, odd)


@triton.jit
def _word(i, j, PARTS: tl.constexpr):
    """[W, 32] words of bytes, in the order of codes: in turns of either quarter."""
    b0, b2 = tl.split(i)
    b1, b3 = tl.split(j)
    return tl.reshape((b0 & 255) | (b1 & 255) << 8 | (b2 & 255) << 16 | b3 << 24, [PARTS, 32])


@triton.jit
def _words(word, other, lane, T: tl.constexpr, AT: tl.constexpr):
    """[W, 32, a] words 4 t + AT, and 16 behind."""
    return tl.join(_of_group(word, other, lane, T, AT), _of_group(word, other, lane, T, AT + 16))


@triton.jit
def _of_group(word, other, lane, T: tl.constexpr, AT: tl.constexpr):
    """[W, 32] words 4 t + AT: of first bytes for group 2 T of lanes, of second ones for the next."""
    at = lane % 4 * 4 + AT
    mine = tl.where(lane // 4 == 2 * T, tl.gather(word, at, 1), tl.gather(other, at, 1))
    return tl.where(lane // 8 == T, mine, 0)
