"""Decode attention of few rows: `decode_kernel` with NEW_KEY, whose warps share nothing until they have their sums.

Few programs run, so what counts is how many latencies follow one another. Each warp has keys of its own. Its lanes load
them, and their values, as what they hold of the matrix units' operands, before the wait for the kernel that this one
follows: they need neither shared memory nor another warp, and are there when the queries are. The new key and its value
are no part of a warp's: they and the sinks enter where the warps' sums meet.

With AHEAD two tiles are on their way before that wait, and always one while another is multiplied, in registers. So
programs of 64 keys a tile read as fast as memory gives, where two fit a multiprocessor: they serve more rows.

Legend: as in `decode.py`; W warps, N keys of one, L = 32 W lanes, RP query heads of a kv head padded to a power of two,
M = max(8, RP) rows that sums of warps have. An operand's dimensions are those of the matrix units: g, eight groups of
lanes, each a key (of K), a dim (of V) or a query head; t, four lanes of a group; and what a lane holds: s, steps of 16;
h, halves of a step; p, pairs. c, a chunk of 32 dims of K, e, eight dims or values that are loaded at once; i, eight
keys; j, 64 dims of V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention.apart_loads import (
    attend_apart,
    by_lanes,
    load_ahead,
    load_tile,
    operands,
    pairs_of,
    scores_of,
    warp_pages,
    weights_of,
)
from fusecomp.lowerings.paged_attention.apart_sums import (
    by_dims,
    combine_apart,
    dims_of,
    first_rows,
    folded,
    of_warps,
    wide,
)
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
    AHEAD: tl.constexpr,  # a tile is loaded while the one before is multiplied, for which N is 16
):
    """Output rows [S, H, D] of a step of decodes, R = H / G <= 16.

    dtypes: q, k, v, kv_cache, out one of fp16, bf16; scores, softmax and accumulators fp32; P in the cache's dtype.
    Bytes: as `decode_kernel`; through shared memory the queries once a warp and 4 * W * RP * D of sums.
    FLOPs: 4 * sum(seq_lens) * H * D. Bound by latencies: of a program's loads, and of the hand-over between splits.
    A row of length 0 gives zeros.

    Measured on an H200 in steps of one row (benchmarks/step_tune.py): per layer of Llama-8B 4.2 us less than
    `decode_kernel` at context 200 and 3.3 at 4,096; per layer of Qwen3-30B-A3B 3.1 less at 200. With AHEAD, and 4 kv
    heads, 9.9 less at 16 rows and 6.0 at 32; alone, chained, 64 rows of 640 keys 24.5 us (28.6), 19.1 by their bytes.
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
    page, other = warp_pages(table, 0, num_pages, PAGE, KEYS, PARTS)
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
            page, other = warp_pages(table, lo * BLOCK_N, num_pages, PAGE, KEYS, PARTS)
    # Nothing of this step is in these keys.
    stop = tl.minimum(keys, hi * BLOCK_N)
    k_words, v_words = load_tile(
        k_base, stride_v, table, page, other, lo * BLOCK_N, stop, stride_page, stride_slot, D, PAGE, KEYS, PARTS
    )
    if AHEAD:
        page, other = warp_pages(table, (lo + 1) * BLOCK_N, num_pages, PAGE, KEYS, PARTS)
    # What rotates neighbours takes registers that the second tile has then.
    SECOND_LATER: tl.constexpr = STYLE == "interleaved"
    if AHEAD and not SECOND_LATER:
        next_k, next_v, page, other = load_ahead(
            k_base, stride_v, table, page, other, lo + 1, stop, stride_page, stride_slot, num_pages, D, PAGE, KEYS,
            PARTS,
        )  # fmt: skip
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
        tables = pairs_of(cos, rows, 1.0, stride_cos, D, ROT), pairs_of(sin, rows, 0.0, stride_sin, D, ROT)
    else:
        tables = load_tables(cos, sin, rows, every, d, stride_cos, stride_sin, ROT, STYLE, PAIRS)
    v_at = v + row * stride_vt + g * stride_vg
    new_v_D = tl.load(v_at + d)
    ROWS: tl.constexpr = max(8, RP)  # of the warps' sums, each some of the dims of a head
    z = tl.arange(0, ROWS)
    column = tl.arange(0, D * RP // ROWS)
    dim = dims_of(z // RP, column)
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

    q_RD = by_lanes(q_RD)
    if AHEAD and SECOND_LATER:
        next_k, next_v, page, other = load_ahead(
            k_base, stride_v, table, page, other, lo + 1, stop, stride_page, stride_slot, num_pages, D, PAGE, KEYS,
            PARTS,
        )  # fmt: skip
    k_DN, v_WND = operands(k_words, v_words, k_base, D, KEYS, PARTS)
    x_WRN = scores_of(q_RD, k_DN, lo * BLOCK_N, first, keys, pre, post, PARTS, WINDOWED, SCORE)
    m_WR = tl.maximum(tl.max(x_WRN, 2), -1.0e30)
    p_WRN = tl.exp2(x_WRN - m_WR[:, :, None])
    l_WR = tl.sum(p_WRN, 2)
    acc_WRD = tl.dot(weights_of(p_WRN.to(v_WND.dtype)), v_WND, tl.zeros([PARTS, 16, D], tl.float32))
    for tile in range(lo + 1, hi):
        if AHEAD:
            k_words, v_words = next_k, next_v
            next_k, next_v, page, other = load_ahead(
                k_base, stride_v, table, page, other, tile + 1, stop, stride_page, stride_slot, num_pages, D, PAGE,
                KEYS, PARTS,
            )  # fmt: skip
        else:
            page, other = warp_pages(table, tile * BLOCK_N, num_pages, PAGE, KEYS, PARTS)
            k_words, v_words = load_tile(
                k_base, stride_v, table, page, other, tile * BLOCK_N, stop, stride_page, stride_slot, D, PAGE, KEYS,
                PARTS,
            )  # fmt: skip
        acc_WRD, l_WR, m_WR = attend_apart(
            acc_WRD, l_WR, m_WR, q_RD, k_words, v_words, k_base, tile * BLOCK_N, first, keys, pre, post, D, KEYS,
            PARTS, WINDOWED, SCORE,
        )  # fmt: skip
    pdl_launch(USE_PDL and not LAUNCH_EARLY)

    # Warps' sums meet.
    x_M, m_M, l_M = first_rows(x_R, ROWS), first_rows(m, ROWS), first_rows(l, ROWS)
    sums = of_warps(tl.permute(tl.join(first_rows(m_WR, ROWS), first_rows(l_WR, ROWS)), [1, 2, 0]))
    accs = of_warps(by_dims(folded(first_rows(acc_WRD, ROWS), RP)))
    # As wide as the sums from here on: else the compiler has weights in another layout, and exchanges each of them.
    x, m, l = wide(x_M, dim), wide(m_M, dim), wide(l_M, dim)
    top = tl.maximum(x, m)
    for i in tl.static_range(PARTS):
        top = tl.maximum(top, wide(tl.split(sums[i])[0], dim))
    p = tl.exp2(x - top)
    l = l * tl.exp2(m - top) + p
    acc = p * tl.where(owner, new_v.to(tl.float32), 0.0)
    for i in tl.static_range(PARTS):
        m_own, l_own = tl.split(sums[i])
        weight = tl.exp2(wide(m_own, dim) - top)
        l += wide(l_own, dim) * weight
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
            combine_apart(out, part_acc, part_lse, pair, row, g, used, num_splits, H, R, D, min(MAX_SPLITS, 8))
