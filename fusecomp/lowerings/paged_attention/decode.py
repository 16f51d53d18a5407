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
to their page, and starts its softmax from them. No program reads that position from the cache. Lengths, block tables
and the cache's other positions are inputs of the step, which none of its kernels writes: a program reads its length and
its first pages before the wait for the kernel that it follows, and with READ_AHEAD its first tile, which then stays in
registers until the end.

With CODES the cache is FP8 (`ops/kv_cache.py`): codes are converted to fp16, exactly, as they become operands; a key's
scale multiplies its scores and a value's its probabilities, so nothing is multiplied once an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.paged_attention import fp8
from fusecomp.lowerings.paged_attention.decode_pieces import attend, combine, load_keys, load_new
from fusecomp.lowerings.paged_attention.pieces import pdl_launch, pdl_wait, rotated, tile_pages


@triton.jit(
    do_not_specialize=["min_tiles", "stride_table"],
    do_not_specialize_on_alignment=["seq_lens", "block_tables", "arrivals"],
)
def decode_kernel(
    q,  # [S, H, D], last dim contiguous
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous; with CODES [num_blocks, G, W] bytes
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
    READ_AHEAD: tl.constexpr,  # the first tile is read before the wait; requires NEW_KEY
    LAUNCH_EARLY: tl.constexpr,  # let the next kernel start at once, not when the keys are read
    CODES: tl.constexpr,  # what the cache holds: see `fp8.py`
):
    """Output rows [S, H, D] of the decode part of a step.

    dtypes: q, out one of fp32, fp16, bf16, and kv_cache too, or codes; scores, softmax and accumulators fp32; P in the
    cache's dtype, or fp16 with codes (fp32 where q is).
    Bytes: sum(seq_lens) * 2 * G * D * itemsize of KV (with codes sum(seq_lens) * G * (2 * D + 4)), plus q and out
    (2 * S * H * D * itemsize) and, if NS > 1, up to 2 * S * H * NS * (D + 1) * 4 of partials. FLOPs:
    4 * sum(seq_lens) * H * D. Bound by reading KV.
    A row of length 0 gives zeros.

    Measured on an H200 (bf16, H=32, G=8, D=128, B=16, chained in a CUDA graph; first with NEW_KEY and a half rotation,
    then without): 256 rows of 224 keys 59.8 and 58.0 us (3.9 and 4.0 TB/s of KV; a plain read reaches 4.5), of 1024
    keys 243 and 241 us; 64 rows of 224 keys 18.0 and 16.8 us unsplit, 19.0 and 18.0 us in the splits that serve unequal
    lengths; 8 rows 7.7 and 6.7 us; one row of 200 keys 5.9 and 4.8 us, of 4096 keys 11.8 and 10.7 us. Short rows are
    bound by the latency of a program's chain of loads, and of the hand-over between splits (about 2 us). With G=4,
    norms and 229 keys: one row 5.4 us and 8 rows 5.8 us with READ_AHEAD, 6.6 and 7.6 us without.
    """
    R: tl.constexpr = H // G
    RP: tl.constexpr = triton.next_power_of_2(R)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row = (pair // G).to(tl.int64)
    g = pair % G
    pdl_launch(USE_PDL and LAUNCH_EARLY)
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, DP)
    head = g * R + r
    head_mask = r < R

    seq_len = tl.load(seq_lens + row)
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
    pair_base = fp8.pairs_at(kv_cache, g, stride_g, D, PAGE) if CODES else k_base
    table = block_tables + row * stride_table
    if PAGE % BLOCK_N == 0:  # every row has this page, whatever its length: no need to wait for it
        pages = tl.load(table + lo * BLOCK_N // PAGE)
    else:
        pages = tile_pages(table, lo * BLOCK_N, keys, PAGE, BLOCK_N)
    if READ_AHEAD:
        # Nothing of this step is in these keys. They arrive while the queries are prepared, and are attended to last.
        k_first, v_first, pairs_first = load_keys(
            k_base, v_base, pair_base, pages, lo, keys, stride_page, stride_slot, D, DP, PAGE, BLOCK_N, CODES
        )
        pages = tile_pages(table, (lo + 1) * BLOCK_N, keys, PAGE, BLOCK_N)
    pdl_wait(USE_PDL)
    heads, tables, new_head, new_v_1D, slot = load_new(
        q, k, v, cos, sin, q_norm, k_norm, slots, row, g, stride_qt, stride_qh, stride_kt, stride_kg, stride_vt,
        stride_vg, stride_cos, stride_sin, R, RP, D, DP, ROT, STYLE, PAIRS, NORM, NEW_KEY,
    )  # fmt: skip

    heads_RD = rotated(heads, tables, d, eps, q_norm, D, DP, ROT, STYLE, NORM).to(q.dtype.element_ty)
    scaled_RD = heads_RD
    q_scale = 1.0
    if CODES:
        wide_RD = heads_RD.to(tl.float32)
        q_scale = fp8.scale_of(tl.max(tl.max(tl.abs(wide_RD), 1), 0))
        WIDE: tl.constexpr = q.dtype.element_ty == tl.float32
        scaled_RD = (wide_RD * fp8.inverse(q_scale)).to(tl.float32 if WIDE else tl.float16)
    # Matrix units want 16 rows: the heads repeat, and what the repetitions give is not stored.
    q_RD = tl.reshape(tl.broadcast_to(scaled_RD[None, :, :], (BLOCK_R // RP, RP, DP)), (BLOCK_R, DP))
    m, l = SINK(sinks, head, head_mask)
    if MAX_SPLITS > 1 and split > 0:  # the sink enters the denominator once
        m = tl.full([BLOCK_R], -1.0e30, tl.float32)
        l = tl.zeros([BLOCK_R], tl.float32)
    acc_RD = tl.zeros([BLOCK_R, DP], tl.float32)
    unit = 7.888609052210118e-31  # 2^-100, the least scale
    if NEW_KEY:
        new_k_1D = rotated(new_head, tables, d, eps, k_norm, D, DP, ROT, STYLE, NORM).to(q.dtype.element_ty)
        owner = (split == used - 1) & (seq_len > 0)
        kept = (owner & (slot >= 0)) & (d < D)[None, :]
        page_at = k_base + slot // PAGE * stride_page + slot % PAGE * stride_slot + d[None, :]
        if CODES:
            k_code_1D, k_scale_1 = fp8.quantized(new_k_1D.to(tl.float32), CODES)
            v_code_1D, v_scale_1 = fp8.quantized(new_v_1D.to(tl.float32), CODES)
            tl.store(page_at, k_code_1D, mask=kept)
            tl.store(page_at + stride_v, v_code_1D, mask=kept)
            pair_at = pair_base + slot // PAGE * (stride_page // 4) + slot % PAGE + tl.arange(0, 1)
            tl.store(pair_at, fp8.pair_of(k_scale_1, v_scale_1), mask=owner & (slot >= 0))
            # What the cache returns, as every later query will see it.
            new_k_1D = fp8.scaled(k_code_1D, k_scale_1, CODES)
            new_v_1D = fp8.scaled(v_code_1D, v_scale_1, CODES)
            unit = tl.where(owner, tl.maximum(unit, fp8.power_below(tl.max(v_scale_1, 0))), unit)
        else:
            tl.store(page_at, new_k_1D, mask=kept)
            tl.store(page_at + stride_v, new_v_1D, mask=kept)
        dots_R = tl.sum(heads_RD.to(tl.float32) * new_k_1D.to(tl.float32), 1)
        dots_R = tl.reshape(tl.broadcast_to(dots_R[None, :], (BLOCK_R // RP, RP)), (BLOCK_R,))
        x_R = tl.where(owner, tl.sum(SCORE(dots_R[:, None], pre), 1) * post, float("-inf"))
        m_new = tl.maximum(m, x_R)
        p_R = tl.exp2(x_R - m_new)
        l = l * tl.exp2(m - m_new) + p_R
        if CODES:
            new_v_1D = new_v_1D * (1024.0 * fp8.inverse(unit))
        acc_RD = p_R[:, None] * tl.where(owner, new_v_1D.to(tl.float32), 0.0)
        m = m_new
    for tile in range(lo + (1 if READ_AHEAD else 0), hi):
        k_ND, v_ND, pairs = load_keys(
            k_base, v_base, pair_base, pages, tile, keys, stride_page, stride_slot, D, DP, PAGE, BLOCK_N, CODES
        )
        # The next tile's pages are fetched a trip early, so no load of K waits for a load of the table.
        pages = tile_pages(table, (tile + 1) * BLOCK_N, keys, PAGE, BLOCK_N)
        acc_RD, l, m, unit = attend(
            acc_RD, l, m, unit, q_RD, q_scale, k_ND, v_ND, pairs, tile, first, keys, pre, post, BLOCK_N, WINDOWED,
            SCORE, CODES,
        )  # fmt: skip
    if READ_AHEAD:
        acc_RD, l, m, unit = attend(
            acc_RD, l, m, unit, q_RD, q_scale, k_first, v_first, pairs_first, lo, first, keys, pre, post, BLOCK_N,
            WINDOWED, SCORE, CODES,
        )  # fmt: skip

    pdl_launch(USE_PDL and not LAUNCH_EARLY)
    acc_RD = acc_RD / tl.where(l > 0, l, 1.0)[:, None]
    if CODES:
        acc_RD = acc_RD * (unit * 0.0009765625)
    if MAX_SPLITS == 1 or used == 1:
        to = out + row * (H * D) + head[:, None] * D + d[None, :]
        tl.store(to, acc_RD.to(out.dtype.element_ty), mask=head_mask[:, None] & (d < D)[None, :], eviction_policy=KEEP)
    else:
        place = pair.to(tl.int64) * num_splits + split
        part = part_acc + (place * R + r)[:, None] * D + d[None, :]
        tl.store(part, acc_RD, mask=head_mask[:, None] & (d < D)[None, :], eviction_policy=KEEP)
        tl.store(part_lse + place * R + r, m + tl.log2(l), mask=head_mask)
        tl.debug_barrier()  # all of the program's stores precede the release below
        arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == used - 1:
            tl.store(arrivals + pair, 0)
            combine(out, part_acc, part_lse, pair, row, g, used, num_splits, H, R, D, DP, MAX_SPLITS)
