"""Decode attention: one query token per row, keys and values from pages, KV split over programs.

Legend: S rows, H query heads, G kv heads, R = H / G query heads per kv head, D head dim (DP: padded to a power of
two), B page size, N keys of one tile, NS splits, P pages per row of the block table.

Program (row and kv head, split). The R query heads of a kv head are the M side of both dots, so each key is read
once. The number of splits is the second dimension of the grid; their ranges follow from `seq_lens` inside the
kernel, so one CUDA graph serves any length. A row that needs one split stores its output at once. Otherwise every
split stores its normalized accumulator and log-sum-exp in fp32, and the last to arrive combines them: there is no
second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention.pieces import tile_offsets, tile_pages


@triton.jit(
    do_not_specialize=["min_tiles", "stride_table"],
    do_not_specialize_on_alignment=["seq_lens", "block_tables", "arrivals"],
)
def decode_kernel(
    q,  # [S, H, D], last dim contiguous
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous
    out,  # [S, H, D] contiguous
    part_acc,  # [S, G, NS, R, D] fp32, scratch
    part_lse,  # [S, G, NS, R] fp32, base 2, scratch
    arrivals,  # [S * G] int32, zero before and after the launch
    seq_lens,  # [S] int32
    block_tables,  # [S, P] int32
    sinks,  # [H], or None
    pre,
    post,
    window,
    min_tiles,  # tiles below which a row is not split further
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
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
):
    """Output rows [S, H, D] of the decode part of a step.

    dtypes: q, kv_cache, out one of fp32, fp16, bf16; scores, softmax and accumulators fp32; P in the cache's dtype.
    Bytes: sum(seq_lens) * 2 * G * D * itemsize of KV, plus q and out (2 * S * H * D * itemsize) and, if NS > 1,
    up to 2 * S * H * NS * (D + 1) * 4 of partials. FLOPs: 4 * sum(seq_lens) * H * D. Bound by reading KV.
    A row of length 0 gives zeros.

    Measured on an H200 (benchmarks/attention.py, bf16, H=32, G=8, D=128, B=16; share of a 4.4 TB/s read): 4.15 TB/s
    (94%) at 32 rows of 4096 keys in two splits, 4.4 TB/s at 256 rows of 1024; bound by latency at one row: 6.8 us for
    200 keys, 7.7 us for 1024, 39 us (77%) for 32768.
    """
    R: tl.constexpr = H // G
    pair = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row = (pair // G).to(tl.int64)
    g = pair % G
    seq_len = tl.load(seq_lens + row)

    first = 0
    if WINDOWED:
        first = tl.maximum(seq_len - window, 0)
    first_tile = first // BLOCK_N
    tiles = tl.cdiv(seq_len, BLOCK_N) - first_tile
    per_split = tl.maximum(tl.cdiv(tiles, num_splits), min_tiles)
    used = tl.maximum(tl.cdiv(tiles, per_split), 1)
    if split >= used:
        return
    lo = first_tile + split * per_split
    hi = tl.minimum(lo + per_split, first_tile + tiles)

    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK_N)
    head = g * R + r
    head_mask = r < R
    q_RD = tl.load(
        q + row * stride_qt + head[:, None] * stride_qh + d[None, :],
        mask=head_mask[:, None] & (d < D)[None, :],
        other=0.0,
    )
    table = block_tables + row * stride_table
    k_base = kv_cache + g.to(tl.int64) * stride_g
    v_base = k_base + stride_v

    m, l = SINK(sinks, head, head_mask)
    if split > 0:  # the sink enters the denominator once
        m = tl.full([BLOCK_R], -1.0e30, tl.float32)
        l = tl.zeros([BLOCK_R], tl.float32)
    acc_RD = tl.zeros([BLOCK_R, DP], tl.float32)
    pages = tile_pages(table, lo * BLOCK_N, seq_len, PAGE, BLOCK_N)
    for tile in range(lo, hi):
        start = tile * BLOCK_N
        at = tile_offsets(pages, start, stride_page, stride_slot, PAGE, BLOCK_N)
        # The next tile's pages are fetched a trip early, so no load of K waits for a load of the table.
        pages = tile_pages(table, start + BLOCK_N, seq_len, PAGE, BLOCK_N)
        pos = start + n
        live = (pos < seq_len)[:, None]
        if DP != D:
            live = live & (d < D)[None, :]
        k_ND = tl.load(k_base + at[:, None] + d[None, :], mask=live, other=0.0)
        v_ND = tl.load(v_base + at[:, None] + d[None, :], mask=live, other=0.0)
        x_RN = SCORE(tl.dot(q_RD, tl.trans(k_ND), input_precision="ieee"), pre) * post
        seen = pos < seq_len
        if WINDOWED:
            seen = seen & (pos >= first)
        x_RN = tl.where(seen[None, :], x_RN, float("-inf"))
        m_new = tl.maximum(m, tl.max(x_RN, 1))
        p_RN = tl.exp2(x_RN - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p_RN, 1)
        acc_RD = acc_RD * alpha[:, None]
        acc_RD = tl.dot(p_RN.to(v_ND.dtype), v_ND, acc_RD, input_precision="ieee")
        m = m_new

    acc_RD = acc_RD / tl.where(l > 0, l, 1.0)[:, None]
    if used == 1:
        to = out + row * (H * D) + head[:, None] * D + d[None, :]
        tl.store(to, acc_RD.to(out.dtype.element_ty), mask=head_mask[:, None] & (d < D)[None, :])
    else:
        slot = pair.to(tl.int64) * num_splits + split
        part = part_acc + (slot * R + r)[:, None] * D + d[None, :]
        tl.store(part, acc_RD, mask=head_mask[:, None] & (d < D)[None, :])
        tl.store(part_lse + slot * R + r, m + tl.log2(l), mask=head_mask)
        tl.debug_barrier()  # all of the program's stores precede the release below
        arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == used - 1:
            tl.store(arrivals + pair, 0)
            _combine(out, part_acc, part_lse, pair, row, g, used, num_splits, H, R, D, DP, MAX_SPLITS)


@triton.jit
def _combine(
    out,
    part_acc,
    part_lse,
    pair,
    row,
    g,
    used,
    num_splits,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Weigh the `used` partial results of one row and kv head by exp2(lse) and store [R, D] of the output."""
    RP: tl.constexpr = triton.next_power_of_2(R)
    CHUNK: tl.constexpr = max(8192 // (RP * DP), 1)  # splits in flight at once, by registers
    r = tl.arange(0, RP)
    d = tl.arange(0, DP)
    base = pair.to(tl.int64) * num_splits
    s_all = tl.arange(0, MAX_SPLITS)
    lse_all = tl.load(
        part_lse + (base + s_all)[:, None] * R + r[None, :],
        mask=(s_all < used)[:, None] & (r < R)[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    top = tl.maximum(tl.max(lse_all, 0), -1.0e30)
    total = tl.sum(tl.exp2(lse_all - top[None, :]), 0)
    acc_RD = tl.zeros([RP, DP], tl.float32)
    for first in range(0, used, CHUNK):
        s = first + tl.arange(0, CHUNK)
        live = (s < used)[:, None] & (r < R)[None, :]
        at = (base + s)[:, None] * R + r[None, :]
        lse = tl.load(part_lse + at, mask=live, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            part_acc + at[:, :, None] * D + d[None, None, :],
            mask=live[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc_RD += tl.sum(part * tl.exp2(lse - top[None, :])[:, :, None], 0)
    acc_RD = acc_RD / tl.where(total > 0, total, 1.0)[:, None]
    to = out + row * (H * D) + (g * R + r)[:, None] * D + d[None, :]
    tl.store(to, acc_RD.to(out.dtype.element_ty), mask=(r < R)[:, None] & (d < D)[None, :])
