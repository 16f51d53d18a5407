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
    """[L] page ids of a warp's first 16 keys, and of the 16 behind if it has 32, of a tile, where each are of one page.

    Beyond a row's keys they are of some page or other, which is not read.
    """
    pos = start + tl.arange(0, 32 * PARTS) // 32 * KEYS
    page, other = pos, pos
    if PAGE % 16 == 0:
        page = tl.load(table + tl.minimum(pos // PAGE, num_pages - 1), volatile=True)
        if KEYS == 32:
            other = tl.load(table + tl.minimum((pos + 16) // PAGE, num_pages - 1), volatile=True)
    return page, other


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
    """Words of two numbers each of keys and values from position `start` on, for `operands`; 0 for positions >= `keys`.

    Words, for a loop that carries them to its next trip keeps a number of 16 bits in a register of its own.
    """
    place = tl.arange(0, 32 * PARTS)
    first = start + place // 32 * KEYS
    group, lane = place // 4 % 8, place % 4
    words = tl.pointer_type(tl.int32)
    k_at = k_base.to(words, bitcast=True) + lane * 4
    v_at = (k_base + stride_v).to(words, bitcast=True) + group * 4
    x = _keys_of(k_at, table, page, first + group, keys, stride_page, stride_slot, D, PAGE)
    y = _values_of(v_at, table, page, first + 2 * lane, keys, stride_page, stride_slot, D, PAGE)
    if KEYS == 32:
        x = tl.join(x, _keys_of(k_at, table, other, first + group + 16, keys, stride_page, stride_slot, D, PAGE))
        y = tl.join(y, _values_of(v_at, table, other, first + 2 * lane + 16, keys, stride_page, stride_slot, D, PAGE))
    return x, y


@triton.jit
def load_ahead(
    k_base,
    stride_v,
    table,
    page,
    other,
    tile,
    stop,
    stride_page,
    stride_slot,
    num_pages,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What `load_tile` gives of a tile, and what `warp_pages` does of the one behind it."""
    start = tile * (KEYS * PARTS)
    x, y = load_tile(
        k_base, stride_v, table, page, other, start, stop, stride_page, stride_slot, D, PAGE, KEYS, PARTS
    )  # fmt: skip
    page, other = warp_pages(table, start + KEYS * PARTS, num_pages, PAGE, KEYS, PARTS)
    return x, y, page, other


@triton.jit
def operands(x, y, like, D: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr):
    """Keys [D, N W] and values [W, N, D] of words, in the dtype of `like`, as operands.

    The compiler has four of a step's 16 next to one another in a lane, two of either half of what it multiplies. Dims
    of keys are in the order of `by_lanes`, those of values in that of `dims_of`, and values in that of `weights_of`.
    """
    x, y = _halves(x, like), _halves(y, like)
    x = tl.reshape(x, [PARTS, 8, 4, 2, 2, 2, D // 64, 2, KEYS // 16, 2])  # W, g, t, s, h, c, c, i, i, p
    x = tl.reshape(tl.permute(x, [6, 5, 3, 2, 4, 9, 8, 7, 0, 1]), [D, KEYS * PARTS])
    y = tl.reshape(y, [PARTS, 8, 4, 4, D // 64, 2, 2, KEYS // 16, 2])  # W, g, t, e, j, p, h, s, e
    y = tl.reshape(tl.permute(y, [0, 7, 2, 6, 5, 4, 3, 8, 1]), [PARTS, KEYS, D])
    return x, y


@triton.jit
def _halves(x, like):
    """Both numbers of each word, in a dimension behind the others."""
    dtype: tl.constexpr = like.dtype.element_ty
    low = (x & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, (x >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def _key_at(base, table, page, pos, keys, stride_page, stride_slot, PAGE: tl.constexpr):
    """([L, 4] pointers to the four words at `base` of the keys at `pos`, [L, 1] whether they are there)."""
    if PAGE % 16 != 0:
        page = tl.load(table + pos // PAGE, mask=pos < keys, other=0)
    at = base + page.to(tl.int64) * (stride_page // 2) + pos % PAGE * (stride_slot // 2)
    return at[:, None] + tl.arange(0, 4)[None, :], (pos < keys)[:, None]


@triton.jit
def _keys_of(base, table, page, pos, keys, stride_page, stride_slot, D: tl.constexpr, PAGE: tl.constexpr):
    """[L, e, c, .., i] words of the keys at `pos` and eight behind."""
    at, live = _key_at(base, table, page, pos, keys, stride_page, stride_slot, PAGE)
    low = _dims(at, live, 32, D)
    at, live = _key_at(base, table, page, pos + 8, keys, stride_page, stride_slot, PAGE)
    return tl.join(low, _dims(at, live, 32, D))


@triton.jit
def _values_of(base, table, page, pos, keys, stride_page, stride_slot, D: tl.constexpr, PAGE: tl.constexpr):
    """[L, e, j, p, h] words of the values at `pos`, the next one, and those eight behind; no j if D is 64."""
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
    """[L, 4, ..] words every STEP dims of D, one, two or four times: a dimension for every doubling."""
    NEXT: tl.constexpr = STEP // 2
    x = tl.load(at, mask=live, other=0)
    if D == 2 * STEP:
        x = tl.join(x, tl.load(at + NEXT, mask=live, other=0))
    elif D == 4 * STEP:
        y = tl.join(x, tl.load(at + NEXT, mask=live, other=0))
        x = tl.load(at + 2 * NEXT, mask=live, other=0)
        x = tl.join(y, tl.join(x, tl.load(at + 3 * NEXT, mask=live, other=0)))
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


@triton.jit
def attend_apart(
    acc_WRD,
    l_WR,
    m_WR,
    q_RD,
    k_words,
    v_words,
    like,
    start,
    first,
    keys,
    pre,
    post,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
):
    """One online-softmax step of each warp over its keys of the tile at position `start`."""
    k_DN, v_WND = operands(k_words, v_words, like, D, KEYS, PARTS)
    x_WRN = scores_of(q_RD, k_DN, start, first, keys, pre, post, PARTS, WINDOWED, SCORE)
    m_new = tl.maximum(m_WR, tl.max(x_WRN, 2))
    p_WRN = tl.exp2(x_WRN - m_new[:, :, None])
    alpha = tl.exp2(m_WR - m_new)
    l_WR = l_WR * alpha + tl.sum(p_WRN, 2)
    acc_WRD = tl.dot(weights_of(p_WRN.to(v_WND.dtype)), v_WND, acc_WRD * alpha[:, :, None])
    return acc_WRD, l_WR, m_new
