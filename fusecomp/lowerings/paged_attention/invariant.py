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

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention import fp8, heuristics, lowering, pieces
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.paged_attention.lowering import NewTokens
from fusecomp.lowerings.paged_attention.pieces import pdl_launch, pdl_wait, tile_offsets, tile_pages
from fusecomp.ops.kv_cache import KVLayout, is_quantized
from fusecomp.ops.rope import Rope

SEGMENT = 512  # keys; a multiple of every tile
PROGRAMS_PER_SM = 2  # of decode, before rows are enough not to share one out


@dataclass(frozen=True)
class InvariantAttention:
    """The tile of every row of a layer.

    Attributes:
        queries: queries of a tile, so that `queries` times the padded heads of a kv head are its rows.
        segment: keys that are summed by themselves.
    """

    queries: int
    block_n: int
    num_warps: int
    num_stages: int
    segment: int = SEGMENT


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


@cache
def invariant_attention(target: Target, *, head_dim: int, itemsize: int, group: int) -> InvariantAttention:
    """The tile of a layer, whatever the step: 64 rows, which Hopper's widest matrix instruction takes, in 16 bits."""
    dp, rp = heuristics.padded_dim(head_dim), next_power_of_2(group)
    if itemsize == 4:  # products without matrix units, whose operands are in registers
        return InvariantAttention(max(1, 16 // rp), 16, 4 if max(16, rp) * dp <= 4096 else 8, 2)
    block_n = 64 if dp <= 128 else 32
    if not target.has_tma:  # accumulators and operands share the registers
        block_n = 32
    stages = 2 if dp > 128 or not target.has_tma else 3
    return InvariantAttention(max(1, 64 // rp), block_n, 8 if dp > 64 else 4, 1 if target.backend == "hip" else stages)


def launch_invariant_attention(
    q: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    config: InvariantAttention | None = None,
) -> Tensor:
    """Attention [T, H, D] of a packed step whose keys and values are in the cache, the step's own among them.

    Safe under CUDA-graph capture: grids depend on shapes and on `host_meta`.

    Args:
        config: the tile; what `invariant_attention` says by default.

    Raises:
        ValueError: for a shape, dtype or stride that `lowering.supports` or the contract excludes.
    """
    lowering.require_support(q, kv_cache, scale, window, softcap)
    if q.stride(-1) != 1:
        q = q.contiguous()
    lowering.require_unit_stride(kv_cache=kv_cache)
    num_decodes, max_q_len, _, num_rows = host_meta.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    layout = KVLayout.of(kv_cache, q.shape[2])
    target, group = target_of(q), q.shape[1] // layout.heads
    config = config or invariant_attention(
        target, head_dim=layout.head_dim, itemsize=q.element_size(), group=group
    )  # fmt: skip

    def run(first: int, rows: int, tiles: int, segments: int) -> None:
        pre, post = pieces.score_factors(scale, softcap)
        use_pdl, pairs = uses_pdl(q), rows * layout.heads
        shared = segments > 0
        part_acc = part_ml = arrivals = None
        if shared:
            part_acc = torch.empty(pairs * segments * group * layout.head_dim, dtype=torch.float32, device=q.device)
            part_ml = torch.empty(pairs * segments * 2 * group, dtype=torch.float32, device=q.device)
            arrivals = lowering.arrivals(kv_cache, pairs)
        launch(
            invariant_attention_kernel, (pairs, tiles),
            q, kv_cache, out, part_acc, part_ml, arrivals, cu_q_lens, seq_lens, block_tables, sinks, first, pre, post,
            window, segments, q.stride(0), q.stride(1), *lowering.cache_strides(kv_cache, layout.head_dim),
            block_tables.stride(0),
            H=q.shape[1], G=layout.heads, D=layout.head_dim, DP=heuristics.padded_dim(layout.head_dim),
            PAGE=layout.page_size, QUERIES=config.queries, BLOCK_N=config.block_n, SEGMENT=config.segment,
            SHARED=shared, CODES=codes(kv_cache), USE_PDL=use_pdl, num_warps=config.num_warps,
            num_stages=config.num_stages, enable_fp_fusion=False,
            **lowering.hooks(q.dtype, window, softcap, sinks), **lowering.launch_options(use_pdl),
        )  # fmt: skip

    if num_decodes:
        capacity = block_tables.shape[1] * layout.page_size
        segments = triton.cdiv(capacity, config.segment)
        if window > 0:
            segments = min(segments, triton.cdiv(window, config.segment) + 1)
        shares = min(segments, triton.cdiv(PROGRAMS_PER_SM * target.num_sms, num_decodes * layout.heads))
        run(0, num_decodes, shares, segments if shares > 1 else 0)
    if num_rows > num_decodes:
        run(num_decodes, num_rows - num_decodes, triton.cdiv(max_q_len, config.queries), 0)
    return out


def codes(kv_cache: Tensor) -> int:
    """CODES for a cache, as the other kernels have it."""
    return lowering.codes_kind(target_of(kv_cache), is_quantized(kv_cache), native=kv_cache.is_cuda)


def launch_invariant_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    kv_cache: Tensor,
    slots: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    rope: str,
) -> Tensor:
    """`launch_rope_attention` of tokens that do not depend on the batch: rotation and cache write, then attention."""
    from fusecomp.lowerings.paged_attention.rope import launch_rope_cache, require_rope

    parsed = require_rope(Rope.parse(rope), q, k, v, kv_cache, cos, sin, q_norm, k_norm)
    new = NewTokens(k, v, cos, sin, q_norm, k_norm, slots, parsed)
    block = rope_block(q.shape[2])
    rotated, _, _ = launch_rope_cache(q, new, kv_cache, block)
    return launch_invariant_attention(
        rotated, kv_cache, cu_q_lens, seq_lens, block_tables, host_meta, scale, window, softcap, sinks
    )  # fmt: skip


def rope_block(head_dim: int) -> tuple[int, int]:
    """(tokens, heads) per program of the rotation, for any number of tokens: they decide the order of a norm's sums."""
    return max(1, min(4, 1024 // heuristics.padded_dim(head_dim))), 2
