"""Attention whose sums do not depend on the batch: one kernel for decode and prefill rows, keys in fixed segments.

A query's keys are cut at multiples of SEGMENT positions, and each segment into tiles of N keys at multiples of N: where
a prompt was cut into steps, and what came from the prefix cache, does not show. A segment is an online softmax of its
own, over its tiles in order; segments are then merged in order. Where rows are few, segments are shared out among
programs and the last one to arrive merges them; otherwise one program does them all, in registers. Both do the same
operations on the same numbers: products are not contracted with additions (`enable_fp_fusion`), and tile, warps and
matrix instruction are the same.

A tile of M rows holds the heads of one kv head for one query (decode) or several (prefill). What a row does not see of
a tile that another row wants (a later key, one before its window) leaves its state as it is, exactly: p = exp2(-inf)
= 0, and its maximum, sum and accumulator are multiplied by 1 and added 0. So does a segment of which it sees nothing.

Legend: T tokens, S rows, H query heads, G kv heads, R = H / G (RP: padded to a power of two), D head dim (DP: too),
B page size, M rows and N keys of a tile, P programs that share a decode row's segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention import fp8
from fusecomp.lowerings.paged_attention.pieces import pdl_launch, pdl_wait, tile_offsets, tile_pages


@triton.jit(
    do_not_specialize=["first_row", "stride_table"],
    do_not_specialize_on_alignment=["cu_q_lens", "seq_lens", "block_tables", "arrivals"],
)
def invariant_attention_kernel(
    q,  # [T, H, D], last dim contiguous
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous; with CODES [num_blocks, G, W] bytes
    out,  # [T, H, D] contiguous
    part_acc,  # [S, G, segments, R, D] fp32, scratch of SHARED
    part_ml,  # [S, G, segments, 2, R] fp32, scratch: maxima and sums
    arrivals,  # [S * G] int32, zero before and after the launch
    cu_q_lens,  # [S + 1] int32
    seq_lens,  # [S] int32
    block_tables,  # [S, P] int32
    sinks,  # [H], or None
    first_row,
    pre,
    post,
    window,
    segments,  # that scratch has room for in a row
    stride_qt,
    stride_qh,
    stride_page,
    stride_v,
    stride_g,
    stride_slot,
    stride_table,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    SHARED: tl.constexpr,  # rows of one query, whose segments are shared out along the second grid dimension
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
    CODES: tl.constexpr,  # what the cache holds: see `fp8.py`
    USE_PDL: tl.constexpr,
):
    """Output rows [T, H, D] of the rows `first_row` and up, all of whose keys are in the cache.

    Program (row and kv head, tile of queries), or with SHARED (row and kv head, share of segments).
    dtypes: q, out one of fp32, fp16, bf16, and kv_cache too, or codes, which become q's, exactly; scores, softmax and
    accumulators fp32; P in q's dtype. FLOPs: 4 * H * D per query and key, M / R times as many on the matrix units in a
    decode. Bytes: the keys and values of a row once per tile of queries and kv head, plus 8 * R * (D + 2) per segment
    of partials with SHARED. A row of length 0 gives zeros.
    """
    R: tl.constexpr = H // G
    RP: tl.constexpr = triton.next_power_of_2(R)
    M: tl.constexpr = QUERIES * RP
    pdl_wait(USE_PDL)
    pdl_launch(USE_PDL)
    pair = tl.program_id(0)
    row = first_row + pair // G
    g = pair % G
    token = tl.load(cu_q_lens + row)
    q_len = tl.load(cu_q_lens + row + 1) - token
    seq_len = tl.load(seq_lens + row)
    m0 = 0 if SHARED else tl.program_id(1) * QUERIES
    if m0 >= q_len:
        return
    rows = tl.arange(0, M)
    i, r, d = m0 + rows // RP, rows % RP, tl.arange(0, DP)
    head = g * R + r
    stored = (r < R) & (i < q_len)
    position = seq_len - q_len + i
    last = tl.minimum(m0 + QUERIES, q_len) - 1  # query of the tile
    end = seq_len - q_len + last + 1  # keys that it sees
    begin = 0
    if WINDOWED:
        begin = tl.maximum(seq_len - q_len + m0 - window + 1, 0)
    q_row = (token + tl.minimum(i, last)).to(tl.int64)
    q_at = q + (q_row * stride_qt + tl.minimum(head, H - 1).to(tl.int64) * stride_qh)[:, None] + d[None, :]
    q_MD = tl.load(q_at, mask=(d < D)[None, :], other=0.0)
    k_base = kv_cache + g.to(tl.int64) * stride_g
    v_base = k_base + stride_v
    pair_base = fp8.pairs_at(kv_cache, g, stride_g, D, PAGE) if CODES else k_base
    table = block_tables + row.to(tl.int64) * stride_table
    m, l = SINK(sinks, head, r < R)
    acc_MD = tl.zeros([M, DP], tl.float32)
    first = begin // SEGMENT
    used = tl.maximum(tl.cdiv(end, SEGMENT) - first, 0)
    share = tl.program_id(1) if SHARED else 0
    shares = tl.num_programs(1) if SHARED else 1
    if share >= tl.maximum(used, 1):
        return
    at_row = pair.to(tl.int64) * segments
    for s in range(share, used, shares):
        lo = tl.maximum((first + s) * SEGMENT, begin // BLOCK_N * BLOCK_N)
        hi = tl.minimum((first + s + 1) * SEGMENT, end)
        part_MD, part_l, part_m = _segment(
            q_MD, k_base, v_base, pair_base, table, position, lo, hi, window, pre, post, stride_page, stride_slot,
            M, D, DP, PAGE, BLOCK_N, WINDOWED, SCORE, CODES,
        )  # fmt: skip
        if SHARED:
            place = at_row + s
            tl.store(
                part_acc + ((place * R + r) * D)[:, None] + d[None, :], part_MD, stored[:, None] & (d < D)[None, :]
            )
            tl.store(part_ml + place * 2 * R + r, part_m, stored)
            tl.store(part_ml + (place * 2 + 1) * R + r, part_l, stored)
        else:
            acc_MD, l, m = merge(acc_MD, l, m, part_MD, part_l, part_m)
    if SHARED:
        tl.debug_barrier()  # all of the program's stores precede the release below
        arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.minimum(tl.maximum(used, 1), shares) - 1:
            tl.store(arrivals + pair, 0)
            rp = tl.arange(0, RP)
            live = rp < R
            within = live[:, None] & (d < D)[None, :]
            m_R, l_R = SINK(sinks, g * R + rp, live)
            acc_RD = tl.zeros([RP, DP], tl.float32)
            for s in range(used):
                place = at_row + s
                at = part_acc + ((place * R + rp) * D)[:, None] + d[None, :]
                part_RD = tl.load(at, within, other=0.0, cache_modifier=".cg")
                part_m_R = tl.load(part_ml + place * 2 * R + rp, live, other=0.0, cache_modifier=".cg")
                part_l_R = tl.load(part_ml + (place * 2 + 1) * R + rp, live, other=0.0, cache_modifier=".cg")
                acc_RD, l_R, m_R = merge(acc_RD, l_R, m_R, part_RD, part_l_R, part_m_R)
            acc_RD = acc_RD / tl.where(l_R > 0, l_R, 1.0)[:, None]
            to = out + token.to(tl.int64) * (H * D) + ((g * R + rp) * D)[:, None] + d[None, :]
            tl.store(to, acc_RD.to(out.dtype.element_ty), within)
    else:
        acc_MD = acc_MD / tl.where(l > 0, l, 1.0)[:, None]
        to = out + ((token + i).to(tl.int64) * (H * D))[:, None] + (head * D)[:, None] + d[None, :]
        tl.store(to, acc_MD.to(out.dtype.element_ty), stored[:, None] & (d < D)[None, :])


@triton.jit
def merge(acc_MD, l, m, part_MD, part_l, part_m):
    """Softmax state of two sets of keys from those of each: accumulators, sums and maxima."""
    top = tl.maximum(m, part_m)
    kept = tl.exp2(m - top)
    added = tl.exp2(part_m - top)
    return acc_MD * kept[:, None] + part_MD * added[:, None], l * kept + part_l * added, top


@triton.jit
def _segment(
    q_MD,
    k_base,
    v_base,
    pair_base,
    table,
    position,
    lo,
    hi,
    window,
    pre,
    post,
    stride_page,
    stride_slot,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    CODES: tl.constexpr,
):
    """(accumulator [M, DP], sums, maxima [M]) over the keys lo .. hi of one segment; `lo` is a multiple of N."""
    d, n = tl.arange(0, DP), tl.arange(0, BLOCK_N)
    m = tl.full([M], -1.0e30, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc_MD = tl.zeros([M, DP], tl.float32)
    pages = tile_pages(table, lo, hi, PAGE, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        at = tile_offsets(pages, start, stride_page, stride_slot, PAGE, BLOCK_N)
        j = start + n
        live = (j < hi)[:, None] & (d < D)[None, :]
        if CODES:
            pairs = tl.load(
                pair_base + tile_offsets(pages, start, stride_page // 4, 1, PAGE, BLOCK_N), mask=j < hi, other=0
            )
            k_scale, v_scale = fp8.scales_of(pairs)
        pages = tile_pages(table, start + BLOCK_N, hi, PAGE, BLOCK_N)
        if CODES:
            k_ND = tl.load(k_base + at[:, None] + d[None, :], mask=live, other=0)
            v_ND = tl.load(v_base + at[:, None] + d[None, :], mask=live, other=0)
            k_ND = fp8.scaled(k_ND, k_scale, CODES).to(q_MD.dtype)
            v_ND = fp8.scaled(v_ND, v_scale, CODES).to(q_MD.dtype)
        else:
            k_ND = tl.load(k_base + at[:, None] + d[None, :], mask=live, other=0.0)
            v_ND = tl.load(v_base + at[:, None] + d[None, :], mask=live, other=0.0)
        x_MN = SCORE(tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee"), pre) * post
        seen = j[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (position[:, None] - j[None, :] < window)
        x_MN = tl.where(seen, x_MN, float("-inf"))
        top = tl.maximum(m, tl.max(x_MN, 1))
        p_MN = tl.exp2(x_MN - top[:, None])
        kept = tl.exp2(m - top)
        l = l * kept + tl.sum(p_MN, 1)
        acc_MD = acc_MD * kept[:, None]
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
        m = top
    return acc_MD, l, m
