"""Decode attention: one query token per row, keys and values from pages, KV split over programs.

Legend: S rows, H query heads, G kv heads, R = H / G query heads per kv head, D head dim (DP: padded to a power of
two), B page size, N keys of one tile, NS splits, P pages per row of the block table, ROT rotated dims.

Program (row and kv head, split). The R query heads of a kv head are the M side of both dots, so each key is read
once. The number of splits is the second dimension of the grid; their ranges follow from `seq_lens` inside the
kernel, so one CUDA graph serves any length. A row that needs one split stores its output at once. Otherwise every
split stores its normalized accumulator and log-sum-exp in fp32, and the last to arrive combines them: there is no
second launch.

With NEW_KEY the kernel also does what precedes attention in a decode step: it norms and rotates its queries while it
reads them, and the split that owns a row's last position norms and rotates the new key, writes it and the new value
to their page, and starts its softmax from them. No program reads that position from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention.pieces import (
    load_heads,
    load_tables,
    pdl_launch,
    pdl_wait,
    rotated,
    tile_offsets,
    tile_pages,
)


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
    k,  # [S, G, D] new keys, last dim contiguous, or None without NEW_KEY
    v,  # [S, G, D] new values, likewise
    cos,  # [S, ROT] or [S, ROT / 2] (PAIRS), last dim contiguous, or None
    sin,  # as cos
    q_norm,  # [D], or None
    k_norm,  # [D], or None
    slots,  # [S] int64, block * B + offset, or -1; None without NEW_KEY
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
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # NS, or a power of two above it; 1 leaves the code for splits out
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
    NEW_KEY: tl.constexpr,
    ROT: tl.constexpr,
    STYLE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,  # let the next kernel start at once, not when the keys are read
):
    """Output rows [S, H, D] of the decode part of a step.

    dtypes: q, kv_cache, out one of fp32, fp16, bf16; scores, softmax and accumulators fp32; P in the cache's dtype.
    Bytes: sum(seq_lens) * 2 * G * D * itemsize of KV, plus q and out (2 * S * H * D * itemsize) and, if NS > 1,
    up to 2 * S * H * NS * (D + 1) * 4 of partials. FLOPs: 4 * sum(seq_lens) * H * D. Bound by reading KV.
    A row of length 0 gives zeros.

    Measured on an H200 (bf16, H=32, G=8, D=128, B=16, chained in a CUDA graph; first with NEW_KEY and a half rotation,
    then without): 256 rows of 224 keys 59.8 and 58.0 us (3.9 and 4.0 TB/s of KV; a plain read reaches 4.5), of 1024
    keys 243 and 241 us; 64 rows of 224 keys 18.0 and 16.8 us unsplit, 19.0 and 18.0 us in the splits that serve unequal
    lengths; 8 rows 7.7 and 6.7 us; one row of 200 keys 5.9 and 4.8 us, of 4096 keys 11.8 and 10.7 us. Short rows are
    bound by the latency of a program's chain of loads, and of the hand-over between splits (about 2 us).
    """
    R: tl.constexpr = H // G
    RP: tl.constexpr = triton.next_power_of_2(R)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row = (pair // G).to(tl.int64)
    g = pair % G
    pdl_wait(USE_PDL)
    pdl_launch(USE_PDL and LAUNCH_EARLY)
    r = tl.arange(0, BLOCK_R)
    rp = tl.arange(0, RP)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK_N)
    head = g * R + r
    head_mask = r < R
    one = tl.full([1, 1], 1, tl.int1)

    # Loads that wait for nothing come first, what is computed of them after the load of the first page.
    seq_len = tl.load(seq_lens + row)
    q_at = q + row * stride_qt + (g * R + rp)[:, None] * stride_qh
    heads = load_heads(q_at, (rp < R)[:, None], d, q_norm, D, ROT, STYLE, NORM)
    tables = load_tables(cos, sin, row, one, d, stride_cos, stride_sin, ROT, STYLE, PAIRS)
    if NEW_KEY:
        k_at = k + row * stride_kt + g * stride_kg + tl.zeros([1, 1], tl.int32)
        new_head = load_heads(k_at, one, d, k_norm, D, ROT, STYLE, NORM)
        new_v_1D = tl.load(v + row * stride_vt + g * stride_vg + d, mask=d < D, other=0.0)[None, :]
        slot = tl.load(slots + row)

    keys = seq_len  # that lie in pages
    if NEW_KEY:
        keys = tl.maximum(seq_len - 1, 0)
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
    v_base = k_base + stride_v
    table = block_tables + row * stride_table
    if PAGE % BLOCK_N == 0:  # every row has this page, whatever its length: no need to wait for it
        pages = tl.load(table + lo * BLOCK_N // PAGE)
    else:
        pages = tile_pages(table, lo * BLOCK_N, keys, PAGE, BLOCK_N)

    heads_RD = rotated(heads, tables, d, eps, q_norm, D, DP, ROT, STYLE, NORM).to(q.dtype.element_ty)
    # Matrix units want 16 rows: the heads repeat, and what the repetitions give is not stored.
    q_RD = tl.reshape(tl.broadcast_to(heads_RD[None, :, :], (BLOCK_R // RP, RP, DP)), (BLOCK_R, DP))
    m, l = SINK(sinks, head, head_mask)
    if MAX_SPLITS > 1 and split > 0:  # the sink enters the denominator once
        m = tl.full([BLOCK_R], -1.0e30, tl.float32)
        l = tl.zeros([BLOCK_R], tl.float32)
    acc_RD = tl.zeros([BLOCK_R, DP], tl.float32)
    if NEW_KEY:
        new_k_1D = rotated(new_head, tables, d, eps, k_norm, D, DP, ROT, STYLE, NORM).to(kv_cache.dtype.element_ty)
        owner = (split == used - 1) & (seq_len > 0)
        kept = (owner & (slot >= 0)) & (d < D)[None, :]
        page_at = k_base + slot // PAGE * stride_page + slot % PAGE * stride_slot + d[None, :]
        tl.store(page_at, new_k_1D, mask=kept)
        tl.store(page_at + stride_v, new_v_1D, mask=kept)
        dots_R = tl.sum(heads_RD.to(tl.float32) * new_k_1D.to(tl.float32), 1)
        dots_R = tl.reshape(tl.broadcast_to(dots_R[None, :], (BLOCK_R // RP, RP)), (BLOCK_R,))
        x_R = tl.where(owner, tl.sum(SCORE(dots_R[:, None], pre), 1) * post, float("-inf"))
        m_new = tl.maximum(m, x_R)
        p_R = tl.exp2(x_R - m_new)
        l = l * tl.exp2(m - m_new) + p_R
        acc_RD = p_R[:, None] * tl.where(owner, new_v_1D.to(tl.float32), 0.0)
        m = m_new
    for tile in range(lo, hi):
        start = tile * BLOCK_N
        at = tile_offsets(pages, start, stride_page, stride_slot, PAGE, BLOCK_N)
        # The next tile's pages are fetched a trip early, so no load of K waits for a load of the table.
        pages = tile_pages(table, start + BLOCK_N, keys, PAGE, BLOCK_N)
        pos = start + n
        live = (pos < keys)[:, None]
        if DP != D:
            live = live & (d < D)[None, :]
        k_ND = tl.load(k_base + at[:, None] + d[None, :], mask=live, other=0.0)
        v_ND = tl.load(v_base + at[:, None] + d[None, :], mask=live, other=0.0)
        x_RN = SCORE(tl.dot(q_RD, tl.trans(k_ND), input_precision="ieee"), pre) * post
        seen = pos < keys
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

    pdl_launch(USE_PDL and not LAUNCH_EARLY)
    acc_RD = acc_RD / tl.where(l > 0, l, 1.0)[:, None]
    if MAX_SPLITS == 1 or used == 1:
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
    CHUNK: tl.constexpr = min(max(4096 // (RP * DP), 1), MAX_SPLITS)  # splits in flight at once, by registers
    r = tl.arange(0, RP)
    d = tl.arange(0, DP)
    base = pair.to(tl.int64) * num_splits
    m = tl.full([RP], -1.0e30, tl.float32)
    l = tl.zeros([RP], tl.float32)
    acc_RD = tl.zeros([RP, DP], tl.float32)
    # One pass, rescaled as it goes: reading all log-sum-exps first would cost a second round trip to memory.
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
        top = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - top[None, :])
        kept = tl.exp2(m - top)
        l = l * kept + tl.sum(weight, 0)
        acc_RD = acc_RD * kept[:, None] + tl.sum(part * weight[:, :, None], 0)
        m = top
    acc_RD = acc_RD / tl.where(l > 0, l, 1.0)[:, None]
    to = out + row * (H * D) + (g * R + r)[:, None] * D + d[None, :]
    tl.store(to, acc_RD.to(out.dtype.element_ty), mask=(r < R)[:, None] & (d < D)[None, :])
