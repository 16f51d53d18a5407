"""Prefill attention: rows of several new tokens over a cached prefix, causal, with an optional sliding window.

Legend: T tokens of the step, S rows, H query heads, G kv heads, D head dim (DP: padded to a power of two),
B page size, M queries and N keys of one tile, P pages per row of the block table.

Program (row and head, query tile), longest query tiles first. Phase 1 walks the cached prefix through the block
table; phase 2 walks the step's own keys in k and v. Each phase is a loop over tiles that the row fills and one over
a partial tile at its end. A tile is masked only where it meets the diagonal or the edge of the window.

With PACKED the programs are (head, query tile of the step), the tiles of a row after those of the row before, its last
one first. Which row a tile is of is found in `cu_q_lens`, at 2 to 3 us a program, and there are as many as the step's
tokens can have, not as if every row had the longest's: so a CUDA graph, which does not know the rows, wants them.

With CODES the cache is FP8 (`ops/kv_cache.py`): the prefix is converted as it is read, exactly, and k and v are given
as the cache returns them. So a key is the same to every query, however a prompt was cut into steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention import fp8
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
    edge,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORE: tl.constexpr,
):
    """One online-softmax step. i[M], j[N]: query and key positions on one scale.

    `edge` (one value per program) says that some pair of the tile is outside the diagonal or the window. RAGGED: keys
    j >= end are not the row's.
    """
    x_MN = SCORE(dots_MN, pre)
    if CAUSAL or WINDOWED:
        if edge:
            seen = i[:, None] >= j[None, :]
            if WINDOWED:
                seen = seen & (i[:, None] - j[None, :] < window)
            x_MN = tl.where(seen, x_MN, float("-inf"))
    if RAGGED:
        x_MN = tl.where((j < end)[None, :], x_MN, float("-inf"))
    m_new = tl.maximum(m, tl.max(x_MN, 1) * post)
    p_MN = tl.exp2(x_MN * post - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p_MN, 1)
    acc_MD = acc_MD * alpha[:, None]
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return acc_MD, l, m_new


@triton.jit
def _load_tile(at_ND, j, d, end, D: tl.constexpr, DP: tl.constexpr, RAGGED: tl.constexpr):
    """A tile [N, DP] of keys or values; zeros beyond D and, if RAGGED, for keys j >= end."""
    if RAGGED:
        return tl.load(at_ND, mask=(j < end)[:, None] & (d < D)[None, :], other=0.0)
    elif DP != D:
        return tl.load(at_ND, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at_ND)


@triton.jit
def _attend_pages(
    acc_MD,
    l,
    m,
    q_MD,
    k_base,
    v_base,
    pair_base,
    table,
    i,
    last,
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
    RAGGED: tl.constexpr,
    SCORE: tl.constexpr,
    CODES: tl.constexpr,
):
    """Phase 1 over the tiles lo .. hi (multiples of N) of a prefix of `end` keys; `last` is the largest of i."""
    d = tl.arange(0, DP)
    pages = tile_pages(table, lo, end, PAGE, BLOCK_N)
    for start in range(lo, hi, BLOCK_N):
        at = tile_offsets(pages, start, stride_page, stride_slot, PAGE, BLOCK_N)
        if CODES:
            pairs = tl.load(
                pair_base + tile_offsets(pages, start, stride_page // 4, 1, PAGE, BLOCK_N),
                mask=start + tl.arange(0, BLOCK_N) < end,
                other=0,
            )
        pages = tile_pages(table, start + BLOCK_N, end, PAGE, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        k_ND = _load_tile(k_base + at[:, None] + d[None, :], j, d, end, D, DP, RAGGED)
        v_ND = _load_tile(v_base + at[:, None] + d[None, :], j, d, end, D, DP, RAGGED)
        if CODES:
            k_scale, v_scale = fp8.scales_of(pairs)
            k_ND = fp8.scaled(k_ND, k_scale, CODES).to(q_MD.dtype)
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if CODES:
            v_ND = fp8.scaled(v_ND, v_scale, CODES).to(q_MD.dtype)
        edge = start <= last - window
        acc_MD, l, m = _update(
            acc_MD, l, m, dots_MN, v_ND, i, j, end, window, pre, post, edge, False, WINDOWED, RAGGED, SCORE
        )
    return acc_MD, l, m


@triton.jit
def _attend_new(
    acc_MD,
    l,
    m,
    q_MD,
    k,
    v,
    k_tiles,
    v_tiles,
    token,
    g,
    i,
    m0,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    RAGGED: tl.constexpr,
    SCORE: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Phase 2 over the tiles lo .. hi of a row's own `end` new keys; `token` is the first of them in k and v."""
    d = tl.arange(0, DP)
    for start in range(lo, hi, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        if USE_TMA and not RAGGED:  # a descriptor would read on into the next row, whose infinities could leak
            k_ND = k_tiles.load([token + start, g, 0]).reshape(BLOCK_N, DP)
            v_ND = v_tiles.load([token + start, g, 0]).reshape(BLOCK_N, DP)
        else:
            t = (token + j).to(tl.int64)[:, None]
            k_at = k + t * stride_kt + (g.to(tl.int64) * stride_kg + d)[None, :]
            v_at = v + t * stride_vt + (g.to(tl.int64) * stride_vg + d)[None, :]
            k_ND = _load_tile(k_at, j, d, end, D, DP, RAGGED)
            v_ND = _load_tile(v_at, j, d, end, D, DP, RAGGED)
        dots_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        edge = start + BLOCK_N > m0
        if WINDOWED:
            edge = edge | (start <= m0 + BLOCK_M - 1 - window)
        acc_MD, l, m = _update(
            acc_MD, l, m, dots_MN, v_ND, i, j, end, window, pre, post, edge, True, WINDOWED, RAGGED, SCORE
        )
    return acc_MD, l, m


@triton.jit
def _row_of(cu_q_lens, tile, first_row, num_rows, BLOCK_M: tl.constexpr):
    """(row, its first tile, its tiles) of a tile among those of the rows `first_row` .. `num_rows`; past all: no tile.

    Each warp does it for itself: 32 rows at a time are in its lanes.
    """
    row, first, total = first_row, 0, 0
    for start in range(first_row, num_rows, 32):
        r = start + tl.arange(0, 32)
        inside = r < num_rows
        begin = tl.load(cu_q_lens + r, mask=inside, other=0)
        tiles = tl.cdiv(tl.load(cu_q_lens + r + 1, mask=inside, other=0) - begin, BLOCK_M)
        ends = total + tl.cumsum(tiles, 0)
        before = inside & (ends <= tile)
        row += tl.sum(before.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), 0))
        total = tl.max(ends, 0)
    return row, first, total


@triton.jit(
    do_not_specialize=["first_row", "num_rows", "stride_table"],
    do_not_specialize_on_alignment=["cu_q_lens", "seq_lens", "block_tables"],
)
def prefill_kernel(
    q,  # [T, H, D], last dim contiguous
    k,  # [T, G, D], last dim contiguous
    v,  # [T, G, D], last dim contiguous
    k_tiles,  # tensor descriptor of k with blocks [N, 1, DP], or None
    v_tiles,  # tensor descriptor of v with blocks [N, 1, DP], or None
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous; with CODES [num_blocks, G, W] bytes
    out,  # [T, H, D] contiguous
    cu_q_lens,  # [S + 1] int32
    seq_lens,  # [S] int32
    block_tables,  # [S, P] int32
    sinks,  # [H], or None
    first_row,
    num_rows,
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
    CODES: tl.constexpr,  # what the cache holds: see `fp8.py`
    PACKED: tl.constexpr,
):
    """Output rows [T, H, D] of the rows `first_row` .. `num_rows`.

    dtypes: q, k, v, out one of fp32, fp16, bf16, and kv_cache too, or codes; scores, softmax and accumulators fp32; P
    in v's dtype.
    FLOPs per row of q new tokens after p cached ones: 4 * H * D * (q * p + q * (q + 1) / 2), fewer with a window.
    Bytes: q, k, v and out once, the prefix once per query tile and kv head (L2 serves most of it). Bound by
    matrix rate.

    Measured on an H200 (benchmarks/attention.py, bf16, H=32, G=8, D=128; share of a bf16 matmul's 770-800 TFLOP/s):
    430-441 TFLOP/s (55%) at 8 x 2048, 492 at 4 x 4096, 510-574 (64-74%) at 1 x 16384, 565 there with a window of
    4096, 456 at 2048 new tokens after 14336 cached ones. Short rows pay for each program's start: 157 TFLOP/s at
    16 x 256.
    """
    h = tl.program_id(0) % H
    g = h // (H // G)
    # Tiles behind this one are never fewer than 0. Saying so keeps LLVM from taking the sum apart in later addresses,
    # at a register each.
    if PACKED:
        tile = tl.program_id(0) // H
        row, first_tile, num_tiles = _row_of(cu_q_lens, tile, first_row, num_rows, BLOCK_M)
        if tile >= num_tiles:
            return
        token = tl.load(cu_q_lens + row)
        q_len = tl.load(cu_q_lens + row + 1) - token
        m0 = tl.maximum(tl.cdiv(q_len, BLOCK_M) - 1 - (tile - first_tile), 0) * BLOCK_M
    else:
        row = first_row + tl.program_id(0) // H
        token = tl.load(cu_q_lens + row)
        q_len = tl.load(cu_q_lens + row + 1) - token
        m0 = tl.maximum(tl.num_programs(1) - 1 - tl.program_id(1), 0) * BLOCK_M
        if m0 >= q_len:
            return
    prefix = tl.load(seq_lens + row) - q_len

    d = tl.arange(0, DP)
    i = m0 + tl.arange(0, BLOCK_M)
    head = tl.full([BLOCK_M], 0, tl.int32) + h
    # Past the row's end its last query is read again and not stored; nothing but `i` then lives until the store.
    q_row = (token + tl.minimum(i, q_len - 1)).to(tl.int64)
    q_at = q + (q_row * stride_qt)[:, None] + (h.to(tl.int64) * stride_qh + d)[None, :]
    q_MD = tl.load(q_at, mask=(d < D)[None, :], other=0.0) if DP != D else tl.load(q_at)
    m, l = SINK(sinks, head, i >= 0)
    acc_MD = tl.zeros([BLOCK_M, DP], tl.float32)

    # Phase 1: keys 0 .. prefix, from pages. A window skips the tiles before its first key.
    if prefix > 0:
        table = block_tables + row.to(tl.int64) * stride_table
        k_base = kv_cache + g.to(tl.int64) * stride_g
        v_base = k_base + stride_v
        pair_base = fp8.pairs_at(kv_cache, g, stride_g, D, PAGE) if CODES else k_base
        lo = 0
        if WINDOWED:
            lo = tl.minimum(tl.maximum(prefix + m0 - window + 1, 0), prefix) // BLOCK_N * BLOCK_N
        whole = prefix // BLOCK_N * BLOCK_N
        last = prefix + m0 + BLOCK_M - 1
        acc_MD, l, m = _attend_pages(
            acc_MD, l, m, q_MD, k_base, v_base, pair_base, table, prefix + i, last, lo, whole, prefix, window, pre,
            post, stride_page, stride_slot, D, DP, PAGE, BLOCK_N, WINDOWED, False, SCORE, CODES,
        )  # fmt: skip
        acc_MD, l, m = _attend_pages(
            acc_MD, l, m, q_MD, k_base, v_base, pair_base, table, prefix + i, last, whole, prefix, prefix, window, pre,
            post, stride_page, stride_slot, D, DP, PAGE, BLOCK_N, WINDOWED, True, SCORE, CODES,
        )  # fmt: skip

    # Phase 2: the row's own keys, from k and v, up to the diagonal.
    lo = 0
    if WINDOWED:
        lo = tl.maximum(m0 - window + 1, 0) // BLOCK_N * BLOCK_N
    hi = tl.minimum(m0 + BLOCK_M, q_len)
    # Tiles that the row fills: all up to the diagonal, except where the row's last tile is a partial one.
    whole = tl.maximum(tl.minimum(tl.cdiv(hi, BLOCK_N), q_len // BLOCK_N) * BLOCK_N, lo)
    acc_MD, l, m = _attend_new(
        acc_MD, l, m, q_MD, k, v, k_tiles, v_tiles, token, g, i, m0, lo, whole, q_len, window, pre, post,
        stride_kt, stride_kg, stride_vt, stride_vg, D, DP, BLOCK_M, BLOCK_N, WINDOWED, False, SCORE, USE_TMA,
    )  # fmt: skip
    acc_MD, l, m = _attend_new(
        acc_MD, l, m, q_MD, k, v, k_tiles, v_tiles, token, g, i, m0, whole, hi, q_len, window, pre, post,
        stride_kt, stride_kg, stride_vt, stride_vg, D, DP, BLOCK_M, BLOCK_N, WINDOWED, True, SCORE, USE_TMA,
    )  # fmt: skip

    acc_MD = acc_MD / l[:, None]
    to = out + ((token + i).to(tl.int64) * (H * D))[:, None] + (h * D + d)[None, :]
    tl.store(to, acc_MD.to(out.dtype.element_ty), mask=(i < q_len)[:, None] & (d < D)[None, :])
