"""What warps of `decode_apart_kernel` load and multiply: keys and values as operands, queries, scores.

Legend: as there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs_of(table, rows, other, stride, D: tl.constexpr, ROT: tl.constexpr):
    """As `load_tables` of pairs that are neighbours; each is loaded once, in the layout of what it turns."""
    column = tl.arange(0, D // 2)[None, :]
    x = tl.load(table + rows * stride + column, mask=(rows >= 0) & (column < ROT // 2), other=other)
    return tl.reshape(tl.join(x, x), [16, D])


@triton.jit
def warp_pages(table, start, num_pages, PAGE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr):
    """[L] page ids of a warp's first 16 keys, and of the 16 behind, of a tile, where each are of one page.

    Beyond a row's keys they are of some page or other, which is not read.
    """
    pos = start + tl.arange(0, 32 * PARTS) // 32 * KEYS
    if PAGE % 16 == 0:
        at, other = tl.minimum(pos // PAGE, num_pages - 1), tl.minimum((pos + 16) // PAGE, num_pages - 1)
        return tl.load(table + at, volatile=True), tl.load(table + other, volatile=True)
    else:
        return pos, pos


@triton.jit
def load_tile(
    k_base,
    stride_v,
    table,
    page,
    other,
    start,
    keys,
    stride_page,
    stride_slot,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Keys [D, N W] and values [W, N, D] from position `start` on, as operands; zeros for positions >= `keys`.

    The compiler has four of a step's 16 next to one another in a lane, two of either half of what it multiplies. Dims
    of keys are in the order of `by_lanes`, those of values in that of `dims_of`, and values in that of `weights_of`.
    """
    place = tl.arange(0, 32 * PARTS)
    first = start + place // 32 * KEYS
    group, lane = place // 4 % 8, place % 4
    k_at = k_base + lane * 8
    v_at = k_base + stride_v + group * 8
    x = _keys_of(k_at, table, page, first + group, keys, stride_page, stride_slot, D, PAGE)
    if KEYS == 32:
        x = tl.join(x, _keys_of(k_at, table, other, first + group + 16, keys, stride_page, stride_slot, D, PAGE))
    y = _values_of(v_at, table, page, first + 2 * lane, keys, stride_page, stride_slot, D, PAGE)
    if KEYS == 32:
        y = tl.join(y, _values_of(v_at, table, other, first + 2 * lane + 16, keys, stride_page, stride_slot, D, PAGE))
    x = tl.reshape(x, [PARTS, 8, 4, 2, 2, 2, 2, D // 64, 2, KEYS // 16])  # W, g, t, s, h, p, c, c, i, i
    x = tl.reshape(tl.permute(x, [7, 6, 3, 2, 4, 5, 9, 8, 0, 1]), [D, KEYS * PARTS])
    y = tl.reshape(y, [PARTS, 8, 4, 8, D // 64, 2, 2, KEYS // 16])  # W, g, t, e, j, p, h, s
    y = tl.reshape(tl.permute(y, [0, 7, 2, 6, 5, 4, 3, 1]), [PARTS, KEYS, D])
    return x, y


@triton.jit
def _key_at(base, table, page, pos, keys, stride_page, stride_slot, PAGE: tl.constexpr):
    """([L, 8] pointers to the eight numbers at `base` of the keys at `pos`, [L, 1] whether they are there)."""
    if PAGE % 16 != 0:
        page = tl.load(table + pos // PAGE, mask=pos < keys, other=0)
    at = base + page.to(tl.int64) * stride_page + pos % PAGE * stride_slot
    return at[:, None] + tl.arange(0, 8)[None, :], (pos < keys)[:, None]


@triton.jit
def _keys_of(base, table, page, pos, keys, stride_page, stride_slot, D: tl.constexpr, PAGE: tl.constexpr):
    """[L, e, c, .., i] numbers of the keys at `pos` and eight behind."""
    at, live = _key_at(base, table, page, pos, keys, stride_page, stride_slot, PAGE)
    low = _dims(at, live, 32, D)
    at, live = _key_at(base, table, page, pos + 8, keys, stride_page, stride_slot, PAGE)
    return tl.join(low, _dims(at, live, 32, D))


@triton.jit
def _values_of(base, table, page, pos, keys, stride_page, stride_slot, D: tl.constexpr, PAGE: tl.constexpr):
    """[L, e, j, p, h] numbers of the values at `pos`, the next one, and those eight behind; no j if D is 64."""
    at, live = _key_at(base, table, page, pos, keys, stride_page, stride_slot, PAGE)
    even = _dims(at, live, 64, D)
    at, live = _key_at(base, table, page, pos + 1, keys, stride_page, stride_slot, PAGE)
    low = tl.join(even, _dims(at, live, 64, D))
    at, live = _key_at(base, table, page, pos + 8, keys, stride_page, stride_slot, PAGE)
    even = _dims(at, live, 64, D)
    at, live = _key_at(base, table, page, pos + 9, keys, stride_page, stride_slot, PAGE)
    return tl.join(low, tl.join(even, _dims(at, live, 64, D)))


@triton.jit
def _dims(at, live, STEP: tl.constexpr, D: tl.constexpr):
    """[L, 8, ..] numbers every STEP dims of D, one, two or four times: a dimension for every doubling."""
    x = tl.load(at, mask=live, other=0.0)
    if D == 2 * STEP:
        x = tl.join(x, tl.load(at + STEP, mask=live, other=0.0))
    elif D == 4 * STEP:
        y = tl.join(x, tl.load(at + STEP, mask=live, other=0.0))
        x = tl.load(at + 2 * STEP, mask=live, other=0.0)
        x = tl.join(y, tl.join(x, tl.load(at + 3 * STEP, mask=live, other=0.0)))
    return x


@triton.jit
def by_lanes(q_RD):
    """[16, D] with dims in the order in which lanes load keys."""
    D: tl.constexpr = q_RD.shape[1]
    x = tl.reshape(q_RD, [16, D // 32, 4, 2, 4])  # c, t, s, and what a lane has of a step
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [16, D])


@triton.jit
def weights_of(p_WRN):
    """[W, 16, N]: a lane's scores as it has them, where the product wants four of a step next to one another."""
    PARTS: tl.constexpr = p_WRN.shape[0]
    KEYS: tl.constexpr = p_WRN.shape[2]
    x = tl.permute(tl.reshape(p_WRN, [PARTS, 16, KEYS // 16, 2, 4, 2]), [0, 1, 2, 4, 3, 5])  # s, h, t, p
    return tl.reshape(x, [PARTS, 16, KEYS])


@triton.jit
def scores_of(
    q_RD, k_DN, start, first, keys, pre, post, PARTS: tl.constexpr, WINDOWED: tl.constexpr, SCORE: tl.constexpr
):
    """[W, 16, N] scores in base 2; -inf where a position is none of first .. keys."""
    KEYS: tl.constexpr = k_DN.shape[1] // PARTS
    x = SCORE(tl.dot(q_RD, k_DN), pre) * post
    x = tl.permute(tl.reshape(x, [16, KEYS // 8, PARTS, 8]), [2, 0, 1, 3])
    x_WRN = tl.reshape(x, [PARTS, 16, KEYS])
    pos = start + tl.arange(0, PARTS)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    seen = pos < keys
    if WINDOWED:
        seen = seen & (pos >= first)
    return tl.where(seen[:, None, :], x_WRN, float("-inf"))
