"""Prefill attention: rows of several new tokens over a cached prefix, causal, with an optional sliding window.

Legend: T tokens of the step, S rows, H query heads, G kv heads, D head dim (DP: padded to a power of two),
B page size, M queries and N keys of one tile, P pages per row of the block table.

Program (row and head, query tile), longest query tiles first. Phase 1 walks the cached prefix through the block
table; phase 2 walks the step's own keys in k and v. Each phase is a loop of whole tiles and a guarded loop for
its end: the prefix's last tile, the causal diagonal. Only guarded tiles are masked, and tiles of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention.pieces import tile_offsets, tile_pages


@triton.jit
def _update(
    acc_MD,
    l,
    m,
    dots_MN,
    v_ND,
    i,
    j,
    end,
    window,
    pre,
    post,
    WINDOWED: tl.constexpr,
    GUARD: tl.constexpr,
    SCORE: tl.constexpr,
):
    """One online-softmax step. i[M], j[N]: query and key positions on one scale; keys j >= end are not the row's."""
    x_MN = SCORE(dots_MN, pre)
    if GUARD:
        x_MN = tl.where((j < end)[None, :] & (j[None, :] <= i[:, None]), x_MN, float("-inf"))
    if WINDOWED:
        x_MN = tl.where(i[:, None] - j[None, :] < window, x_MN, float("-inf"))
    m_new = tl.maximum(m, tl.max(x_MN, 1) * post)
    p_MN = tl.exp2(x_MN * post - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p_MN, 1)
    acc_MD = acc_MD * alpha[:, None]
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return acc_MD, l, m_new


@triton.jit
def _load_new(
    x,
    token,
    g,
    start,
    end,
    stride_t,
    stride_g,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GUARD: tl.constexpr,
    USE_TMA: tl.constexpr,
    ZEROED: tl.constexpr,
):
    """The tile [N, DP] of new keys or values start .. start + N of a row; tokens from `end` on are not the row's.

    GUARD: the tile may reach `end`. ZEROED: it matters, because a neighbour's infinity times a weight of zero is NaN.
    """
    n = start + tl.arange(0, BLOCK_N)
    if USE_TMA:
        tile_ND = x.load([token + start, g, 0]).reshape(BLOCK_N, DP)
        if ZEROED:
            tile_ND = tl.where((n < end)[:, None], tile_ND, 0.0)
    else:
        d = tl.arange(0, DP)
        at = x + ((token + n).to(tl.int64) * stride_t)[:, None] + (g.to(tl.int64) * stride_g + d)[None, :]
        if GUARD:
            tile_ND = tl.load(at, mask=(n < end)[:, None] & (d < D)[None, :], other=0.0)
        elif DP != D:
            tile_ND = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            tile_ND = tl.load(at)
    return tile_ND


@triton.jit
def _attend_pages(
    acc_MD,
    l,
    m,
    q_MD,
    k_base,
    v_base,
    table,
    i,
    lo,
    hi,
    end,
    window,
    pre,
    post,
    stride_page,
    stride_slot,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    GUARD: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Phase 1 over the tiles lo .. hi (multiples of N) of a prefix of `end` keys."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, DP)
    pages = tile_pages(table, lo, end, PAGE, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        at = tile_offsets(pages, start, stride_page, stride_slot, PAGE, BLOCK_N)
        pages = tile_pages(table, start + BLOCK_N, end, PAGE, BLOCK_N)
        j = start + n
        k_at = k_base + at[:, None] + d[None, :]
        v_at = v_base + at[:, None] + d[None, :]
        if GUARD:
            live = (j < end)[:, None] & (d < D)[None, :]
            k_ND = tl.load(k_at, mask=live, other=0.0)
            v_ND = tl.load(v_at, mask=live, other=0.0)
        elif DP != D:
            k_ND = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
            v_ND = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
        else:
            k_ND = tl.load(k_at)
            v_ND = tl.load(v_at)
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        acc_MD, l, m = _update(acc_MD, l, m, dots_MN, v_ND, i, j, end, window, pre, post, WINDOWED, GUARD, SCORE)
    return acc_MD, l, m


@triton.jit
def _attend_new(
    acc_MD,
    l,
    m,
    q_MD,
    k,
    v,
    token,
    g,
    i,
    lo,
    hi,
    end,
    window,
    pre,
    post,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    GUARD: tl.constexpr,
    SCORE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Phase 2 over the tiles lo .. hi of a row's own `end` new keys; `token` is the first of them in k and v."""
    for start in range(lo, hi, BLOCK_N):
        k_ND = _load_new(k, token, g, start, end, stride_kt, stride_kg, D, DP, BLOCK_N, GUARD, USE_TMA, False)
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        v_ND = _load_new(v, token, g, start, end, stride_vt, stride_vg, D, DP, BLOCK_N, GUARD, USE_TMA, GUARD)
        j = start + tl.arange(0, BLOCK_N)
        acc_MD, l, m = _update(acc_MD, l, m, dots_MN, v_ND, i, j, end, window, pre, post, WINDOWED, GUARD, SCORE)
    return acc_MD, l, m


@triton.jit(
    do_not_specialize=["first_row", "stride_table"],
    do_not_specialize_on_alignment=["cu_q_lens", "seq_lens", "block_tables"],
)
def prefill_kernel(
    q,  # [T, H, D], last dim contiguous
    k,  # [T, G, D], last dim contiguous; a tensor descriptor with blocks [N, 1, DP] if USE_TMA
    v,  # as k
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous
    out,  # [T, H, D] contiguous
    cu_q_lens,  # [S + 1] int32
    seq_lens,  # [S] int32
    block_tables,  # [S, P] int32
    sinks,  # [H], or None
    first_row,
    pre,
    post,
    window,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Output rows [T, H, D] of the rows `first_row` and up.

    dtypes: q, k, v, kv_cache, out one of fp32, fp16, bf16; scores, softmax and accumulators fp32; P in v's dtype.
    FLOPs per row of q new tokens after p cached ones: 4 * H * D * (q * p + q * (q + 1) / 2), fewer with a window.
    Bytes: q, k, v and out once, the prefix once per query tile and kv head (L2 serves most of it). Bound by
    matrix rate. Roofline shares are in `tuned/` beside each configuration.
    """
    h = tl.program_id(0) % H
    row = first_row + tl.program_id(0) // H
    g = h // (H // G)
    token = tl.load(cu_q_lens + row)
    q_len = tl.load(cu_q_lens + row + 1) - token
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if m0 >= q_len:
        return
    prefix = tl.load(seq_lens + row) - q_len

    d = tl.arange(0, DP)
    i = m0 + tl.arange(0, BLOCK_M)
    head = tl.full([BLOCK_M], 0, tl.int32) + h
    q_row = (token + i).to(tl.int64)
    inside = (i < q_len)[:, None] & (d < D)[None, :]
    q_MD = tl.load(q + (q_row * stride_qt)[:, None] + (h.to(tl.int64) * stride_qh + d)[None, :], mask=inside, other=0.0)
    m, l = SINK(sinks, head, i >= 0)
    acc_MD = tl.zeros([BLOCK_M, DP], tl.float32)

    # Phase 1: keys 0 .. prefix, from pages. A window skips the tiles before its first key.
    table = block_tables + row.to(tl.int64) * stride_table
    k_base = kv_cache + g.to(tl.int64) * stride_g
    v_base = k_base + stride_v
    lo = 0
    if WINDOWED:
        lo = tl.minimum(tl.maximum(prefix + m0 - window + 1, 0), prefix) // BLOCK_N * BLOCK_N
    whole = tl.maximum(prefix // BLOCK_N * BLOCK_N, lo)
    for_prefix = prefix + i
    acc_MD, l, m = _attend_pages(
        acc_MD, l, m, q_MD, k_base, v_base, table, for_prefix, lo, whole, prefix, window, pre, post,
        stride_page, stride_slot, D, DP, PAGE, BLOCK_N, WINDOWED, False, SCORE,
    )  # fmt: skip
    acc_MD, l, m = _attend_pages(
        acc_MD, l, m, q_MD, k_base, v_base, table, for_prefix, whole, prefix, prefix, window, pre, post,
        stride_page, stride_slot, D, DP, PAGE, BLOCK_N, WINDOWED, True, SCORE,
    )  # fmt: skip

    # Phase 2: the row's own keys, from k and v, up to the diagonal.
    lo = 0
    if WINDOWED:
        lo = tl.maximum(m0 - window + 1, 0) // BLOCK_N * BLOCK_N
    whole = m0 // BLOCK_N * BLOCK_N
    hi = tl.minimum(m0 + BLOCK_M, q_len)
    acc_MD, l, m = _attend_new(
        acc_MD, l, m, q_MD, k, v, token, g, i, lo, whole, q_len, window, pre, post,
        stride_kt, stride_kg, stride_vt, stride_vg, D, DP, BLOCK_N, WINDOWED, False, SCORE, USE_TMA,
    )  # fmt: skip
    acc_MD, l, m = _attend_new(
        acc_MD, l, m, q_MD, k, v, token, g, i, whole, hi, q_len, window, pre, post,
        stride_kt, stride_kg, stride_vt, stride_vg, D, DP, BLOCK_N, WINDOWED, True, SCORE, USE_TMA,
    )  # fmt: skip

    acc_MD = acc_MD / l[:, None]
    to = out + (q_row * (H * D))[:, None] + (h * D + d)[None, :]
    tl.store(to, acc_MD.to(out.dtype.element_ty), mask=inside)
