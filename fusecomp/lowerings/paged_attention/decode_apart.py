"""Decode attention of few rows: `decode_kernel` with NEW_KEY, whose warps share nothing until they have their sums.

Few programs run, so what counts is how many latencies follow one another. Each warp has keys of its own. Its lanes load
them, and their values, as what they hold of the matrix units' operands, before the wait for the kernel that this one
follows: they need neither shared memory nor another warp, and are there when the queries are. The new key and its value
are no part of a warp's: they and the sinks enter where the warps' sums meet.

Legend: as in `decode.py`; W warps, N keys of one, L = 32 W lanes, RP query heads of a kv head padded to a power of two,
M = max(8, RP) rows that sums of warps have. An operand's dimensions are those of the matrix units: g, eight groups of
lanes, each a key (of K), a dim (of V) or a query head; t, four lanes of a group; and what a lane holds: s, steps of 16;
h, halves of a step; p, pairs. c, a chunk of 32 dims of K, e, eight dims or values that are loaded at once; i, eight
keys; j, 64 dims of V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention.pieces import load_heads, load_tables, pdl_launch, pdl_wait, rotated


@triton.jit(
    do_not_specialize=["min_tiles", "stride_table", "num_pages"],
    # Nor of what the end reads and writes: a thread has single numbers there, all in one layout.
    do_not_specialize_on_alignment=["seq_lens", "block_tables", "arrivals", "out", "part_acc", "part_lse", "v"],
)
def decode_apart_kernel(
    q,  # [S, H, D], last dim contiguous
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous
    out,  # [S, H, D] contiguous
    part_acc,  # [S, G, NS, R, D] fp32, scratch
    part_lse,  # [S, G, NS, R] fp32, base 2, scratch
    arrivals,  # [S * G] int32, zero before and after the launch
    seq_lens,  # [S] int32
    block_tables,  # [S, P] int32
    sinks,  # [H], or None
    k,  # [S, G, D] new keys, last dim contiguous
    v,  # [S, G, D] new values, likewise
    cos,  # [S, ROT] or [S, ROT / 2] (PAIRS), last dim contiguous, or None
    sin,  # as cos
    q_norm,  # [D], or None
    k_norm,  # [D], or None
    slots,  # [S] int64, block * B + offset, or -1
    pre,
    post,
    eps,
    window,
    min_tiles,  # tiles below which a row is not split further
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    stride_cos,
    stride_sin,
    stride_page,
    stride_v,
    stride_g,
    stride_slot,
    stride_table,
    num_pages,  # P
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,  # 64 or 128
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,  # N, 16 or 32
    PARTS: tl.constexpr,  # W
    MAX_SPLITS: tl.constexpr,  # NS, or a power of two above it; 1 leaves the code for splits out
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
    ROT: tl.constexpr,
    STYLE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,  # let the next kernel start at once, not when the keys are read
):
    """Output rows [S, H, D] of a step of decodes, R = H / G <= 16.

    dtypes: q, k, v, kv_cache, out one of fp16, bf16; scores, softmax and accumulators fp32; P in the cache's dtype.
    Bytes: as `decode_kernel`; through shared memory the queries once a warp and 4 * W * RP * D of sums.
    FLOPs: 4 * sum(seq_lens) * H * D. Bound by latencies: of a program's loads, and of the hand-over between splits.
    A row of length 0 gives zeros.
    """
    BLOCK_N: tl.constexpr = PARTS * KEYS
    R: tl.constexpr = H // G
    RP: tl.constexpr = triton.next_power_of_2(R)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row = (pair // G).to(tl.int64)
    g = pair % G
    pdl_launch(USE_PDL and LAUNCH_EARLY)
    table = block_tables + row * stride_table
    # Of a row's first tile, whatever its length, and asked for first: volatile, lest the compiler moves them behind it.
    page, other = _pages(table, 0, num_pages, PAGE, KEYS, PARTS)
    seq_len = tl.load(seq_lens + row, volatile=True)
    keys = tl.maximum(seq_len - 1, 0)  # that lie in pages
    first = 0
    if WINDOWED:
        first = tl.maximum(seq_len - window, 0)
    first_tile = first // BLOCK_N
    tiles = tl.cdiv(keys, BLOCK_N) - first_tile
    used = 1
    lo = first_tile
    hi = first_tile + tiles
    if MAX_SPLITS > 1:
        per_split = tl.maximum(tl.cdiv(tiles, num_splits), min_tiles)
        used = tl.maximum(tl.cdiv(tiles, per_split), 1)
        if split >= used:
            return
        lo += split * per_split
        hi = tl.minimum(lo + per_split, hi)
    k_base = kv_cache + g.to(tl.int64) * stride_g
    if MAX_SPLITS > 1 or WINDOWED:
        if lo > 0:
            page, other = _pages(table, lo * BLOCK_N, num_pages, PAGE, KEYS, PARTS)
    # Nothing of this step is in these keys.
    k_DN, v_WND = _load_tile(
        k_base, stride_v, table, page, other, lo * BLOCK_N, keys, stride_page, stride_slot, D, PAGE, KEYS, PARTS
    )
    r = tl.arange(0, 16)
    head = g * R + r % RP
    m, l = SINK(sinks, head, r % RP < R)
    if MAX_SPLITS > 1 and split > 0:  # the sink enters the denominator once
        m = tl.full([16], -1.0e30, tl.float32)
        l = tl.zeros([16], tl.float32)
    pdl_wait(USE_PDL)

    # Every row of 16 is a query head; the new key and what rotates are repeated for each, so a row is one warp's.
    d = tl.arange(0, D)
    live = (r % RP < R)[:, None]
    every = (r >= 0)[:, None]
    rows = row + r[:, None] * 0
    heads = load_heads(q + rows * stride_qt + head[:, None] * stride_qh, live, d, q_norm, D, ROT, STYLE, NORM)
    k_at = k + rows * stride_kt + g * stride_kg
    new_head = load_heads(k_at, every, d, k_norm, D, ROT, STYLE, NORM)
    if STYLE == "interleaved" and PAIRS:
        tables = _pairs_of(cos, rows, 1.0, stride_cos, D, ROT), _pairs_of(sin, rows, 0.0, stride_sin, D, ROT)
    else:
        tables = load_tables(cos, sin, rows, every, d, stride_cos, stride_sin, ROT, STYLE, PAIRS)
    v_at = v + row * stride_vt + g * stride_vg
    new_v_D = tl.load(v_at + d)
    ROWS: tl.constexpr = max(8, RP)  # of the warps' sums, each some of the dims of a head
    z = tl.arange(0, ROWS)
    column = tl.arange(0, D * RP // ROWS)
    dim = _dims_of(z // RP, column)
    new_v = tl.load(v_at + dim)
    slot = tl.load(slots + row)
    q_RD = rotated(heads, tables, d, eps, q_norm, D, D, ROT, STYLE, NORM).to(q.dtype.element_ty)
    new_k_RD = rotated(new_head, tables, d, eps, k_norm, D, D, ROT, STYLE, NORM).to(q.dtype.element_ty)
    owner = (split == used - 1) & (seq_len > 0)
    kept = owner & (slot >= 0)
    page_at = k_base + slot // PAGE * stride_page + slot % PAGE * stride_slot
    tl.store(page_at + d[None, :] + r[:, None] * 0, new_k_RD, mask=kept & (r == 0)[:, None])
    tl.store(page_at + stride_v + d, new_v_D, mask=kept & (d >= 0))
    dots_R = tl.sum(q_RD.to(tl.float32) * new_k_RD.to(tl.float32), 1)
    x_R = tl.where(owner, SCORE(dots_R, pre) * post, float("-inf"))

    q_RD = _by_lanes(q_RD)
    x_WRN = _scores(q_RD, k_DN, lo * BLOCK_N, first, keys, pre, post, PARTS, WINDOWED, SCORE)
    m_WR = tl.maximum(tl.max(x_WRN, 2), -1.0e30)
    p_WRN = tl.exp2(x_WRN - m_WR[:, :, None])
    l_WR = tl.sum(p_WRN, 2)
    acc_WRD = tl.dot(_weights(p_WRN.to(v_WND.dtype)), v_WND, tl.zeros([PARTS, 16, D], tl.float32))
    for tile in range(lo + 1, hi):
        start = tile * BLOCK_N
        page, other = _pages(table, start, num_pages, PAGE, KEYS, PARTS)
        k_DN, v_WND = _load_tile(
            k_base, stride_v, table, page, other, start, keys, stride_page, stride_slot, D, PAGE, KEYS, PARTS
        )
        x_WRN = _scores(q_RD, k_DN, start, first, keys, pre, post, PARTS, WINDOWED, SCORE)
        m_new = tl.maximum(m_WR, tl.max(x_WRN, 2))
        p_WRN = tl.exp2(x_WRN - m_new[:, :, None])
        alpha = tl.exp2(m_WR - m_new)
        l_WR = l_WR * alpha + tl.sum(p_WRN, 2)
        acc_WRD = tl.dot(_weights(p_WRN.to(v_WND.dtype)), v_WND, acc_WRD * alpha[:, :, None])
        m_WR = m_new
    pdl_launch(USE_PDL and not LAUNCH_EARLY)

    # Warps' sums meet.
    x_M, m_M, l_M = _rows(x_R, ROWS), _rows(m, ROWS), _rows(l, ROWS)
    sums = _apart(tl.permute(tl.join(_rows(m_WR, ROWS), _rows(l_WR, ROWS)), [1, 2, 0]))
    accs = _apart(_by_dims(_folded(_rows(acc_WRD, ROWS), RP)))
    # As wide as the sums from here on: else the compiler has weights in another layout, and exchanges each of them.
    x, m, l = _wide(x_M, dim), _wide(m_M, dim), _wide(l_M, dim)
    top = tl.maximum(x, m)
    for i in tl.static_range(PARTS):
        top = tl.maximum(top, _wide(tl.split(sums[i])[0], dim))
    p = tl.exp2(x - top)
    l = l * tl.exp2(m - top) + p
    acc = p * new_v.to(tl.float32)
    for i in tl.static_range(PARTS):
        m_own, l_own = tl.split(sums[i])
        weight = tl.exp2(_wide(m_own, dim) - top)
        l += _wide(l_own, dim) * weight
        acc += accs[i] * weight
    acc = acc / tl.where(l > 0, l, 1.0)
    mask = (z % RP < R)[:, None] & (column >= 0)[None, :]
    if MAX_SPLITS == 1 or used == 1:
        to = out + row * (H * D) + (g * R + z % RP)[:, None] * D + dim
        tl.store(to, acc.to(out.dtype.element_ty), mask=mask)
    else:
        place = ((pair.to(tl.int64) * num_splits + split) * R + z % RP)[:, None]
        tl.store(part_acc + place * D + dim, acc, mask=mask)
        # Rows that repeat a head's write the same.
        tl.store(part_lse + place + dim * 0, top + tl.log2(l), mask=mask & (column == 0)[None, :])
        tl.debug_barrier()  # all of the program's stores precede the release below
        arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == used - 1:
            tl.store(arrivals + pair, 0)
            _combine(out, part_acc, part_lse, pair, row, g, used, num_splits, H, R, D, min(MAX_SPLITS, 8))


@triton.jit
def _combine(
    out, part_acc, part_lse, pair, row, g, used, num_splits, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """As `combine`, where each thread adds up numbers of its own, CHUNK splits in flight: no warp waits for another.

    In one dimension, for weights and what they weigh to be of one layout.
    """
    COUNT: tl.constexpr = triton.next_power_of_2(R) * D
    r, d = tl.arange(0, COUNT) // D, tl.arange(0, COUNT) % D
    m = tl.full([COUNT], -1.0e30, tl.float32)
    l = tl.zeros([COUNT], tl.float32)
    acc = tl.zeros([COUNT], tl.float32)
    for first in range(0, used, CHUNK):
        at = (pair.to(tl.int64) * num_splits + first) * R + r
        for i in tl.static_range(CHUNK):
            live = (r < R) & (first + i < used)
            lse = tl.load(part_lse + at + i * R, mask=live, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(part_acc + (at + i * R) * D + d, mask=live, other=0.0, cache_modifier=".cg")
            top = tl.maximum(m, lse)
            weight = tl.exp2(lse - top)
            kept = tl.exp2(m - top)
            l = l * kept + weight
            acc = acc * kept + part * weight
            m = top
    acc = acc / tl.where(l > 0, l, 1.0)
    tl.store(out + row * (H * D) + (g * R + r) * D + d, acc.to(out.dtype.element_ty), mask=r < R)


@triton.jit
def _pairs_of(table, rows, other, stride, D: tl.constexpr, ROT: tl.constexpr):
    """As `load_tables` of pairs that are neighbours; each is loaded once, in the layout of what it turns."""
    column = tl.arange(0, D // 2)[None, :]
    x = tl.load(table + rows * stride + column, mask=(rows >= 0) & (column < ROT // 2), other=other)
    return tl.reshape(tl.join(x, x), [16, D])


@triton.jit
def _load_tile(
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
    of keys are in the order of `_by_lanes`, those of values in that of `_dims_of`, and values in that of `_weights`.
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
def _pages(table, start, num_pages, PAGE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr):
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
def _by_lanes(q_RD):
    """[16, D] with dims in the order in which lanes load keys."""
    D: tl.constexpr = q_RD.shape[1]
    x = tl.reshape(q_RD, [16, D // 32, 4, 2, 4])  # c, t, s, and what a lane has of a step
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [16, D])


@triton.jit
def _weights(p_WRN):
    """[W, 16, N]: a lane's scores as it has them, where the product wants four of a step next to one another."""
    PARTS: tl.constexpr = p_WRN.shape[0]
    KEYS: tl.constexpr = p_WRN.shape[2]
    x = tl.permute(tl.reshape(p_WRN, [PARTS, 16, KEYS // 16, 2, 4, 2]), [0, 1, 2, 4, 3, 5])  # s, h, t, p
    return tl.reshape(x, [PARTS, 16, KEYS])


@triton.jit
def _scores(
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
def _rows(x, ROWS: tl.constexpr):
    """The first ROWS of 16 rows of [16], [W, 16] or [W, 16, D]; the others repeat them, in other registers."""
    if ROWS == 8:
        if len(x.shape) == 1:
            x, _ = tl.split(tl.permute(tl.reshape(x, [2, 8]), [1, 0]))
        elif len(x.shape) == 2:
            x, _ = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 8]), [0, 2, 1]))
        else:
            x, _ = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 8, x.shape[2]]), [0, 2, 3, 1]))
    return x


@triton.jit
def _folded(x, RP: tl.constexpr):
    """[W, M, D] whose rows repeat RP -> [W, M, D * RP / M]: the first RP rows have the first dims, and so on."""
    x = _half(x, 4) if RP <= 4 else x
    x = _half(x, 2) if RP <= 2 else x
    return _half(x, 1) if RP == 1 else x


@triton.jit
def _half(x, BIT: tl.constexpr):
    """The first half of the dims of rows [W, 8, D] without a bit, the second of those with it."""
    x = tl.reshape(x, [x.shape[0], 8, 2, x.shape[2] // 2])
    low, high = tl.split(tl.permute(x, [0, 1, 3, 2]))
    return tl.where((tl.arange(0, 8) & BIT != 0)[None, :, None], high, low)


@triton.jit
def _by_dims(x):
    """[W, M, D'] -> [M, D', W], a lane's eight dims next to one another: see `_dims_of`."""
    PARTS: tl.constexpr = x.shape[0]
    WIDE: tl.constexpr = x.shape[2] // 64 if x.shape[2] > 64 else 1
    x = tl.reshape(x, [PARTS, x.shape[1], WIDE, x.shape[2] // (8 * WIDE), 8])
    return tl.reshape(tl.permute(x, [1, 2, 4, 3, 0]), [x.shape[1], x.shape[2] * x.shape[3] * 8, PARTS])


@triton.jit
def _wide(x, like):
    """[M] -> [M, D']."""
    return tl.broadcast_to(x[:, None], like.shape)


@triton.jit
def _dims_of(part, column):
    """[M, D'] dims of `_by_dims`: column n = 64 j + 8 e + c of a product is dim 64 j + 8 c + e."""
    COUNT: tl.constexpr = column.shape[0]
    WIDE: tl.constexpr = COUNT // 64 if COUNT > 64 else 1
    EACH: tl.constexpr = COUNT // (8 * WIDE)
    at = column[None, :]
    group = part[:, None] * (COUNT // 8) + at // (8 * EACH) * EACH + at % EACH
    return group // 8 * 64 + at // EACH % 8 * 8 + group % 8


@triton.jit
def _apart(x):
    """[.., W] -> W tensors, through shared memory: warps' numbers are then each thread's."""
    a, b = _pair(x)
    if x.shape[-1] == 4:
        a, c = _pair(a)
        b, d = _pair(b)
        return _one(a), _one(b), _one(c), _one(d)
    else:
        tl.static_assert(x.shape[-1] == 8)
        a, c = _pair(a)
        b, d = _pair(b)
        a, e = _pair(a)
        b, f = _pair(b)
        c, g = _pair(c)
        d, h = _pair(d)
        return _one(a), _one(b), _one(c), _one(d), _one(e), _one(f), _one(g), _one(h)


@triton.jit
def _pair(x):
    """[.., n] -> two [.., n / 2]."""
    if len(x.shape) == 2:
        x = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2])
    return tl.split(x)


@triton.jit
def _one(x):
    """[.., 1] -> [..]."""
    return tl.reshape(x, [x.shape[0]]) if len(x.shape) == 2 else tl.reshape(x, [x.shape[0], x.shape[1]])
