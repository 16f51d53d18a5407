"""Steps of the decode kernel: what it reads, one online-softmax step, and the combination of a row's splits.

Legend: S rows, H query heads, G kv heads, R = H / G query heads per kv head (RP: padded to a power of two), D head dim
(DP: likewise), N keys of one tile, NS splits. CODES says what the cache holds: see `fp8.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention import fp8
from fusecomp.lowerings.paged_attention.pieces import load_heads, load_tables, tile_offsets


@triton.jit
def load_new(
    q,
    k,
    v,
    cos,
    sin,
    q_norm,
    k_norm,
    slots,
    row,
    g,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    stride_cos,
    stride_sin,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROT: tl.constexpr,
    STYLE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    NEW_KEY: tl.constexpr,
):
    """What the step brings to a row and kv head: raw queries, cos and sin, and with NEW_KEY its key, value and slot."""
    rp = tl.arange(0, RP)
    d = tl.arange(0, DP)
    one = tl.full([1, 1], 1, tl.int1)
    q_at = q + row * stride_qt + (g * R + rp)[:, None] * stride_qh
    heads = load_heads(q_at, (rp < R)[:, None], d, q_norm, D, ROT, STYLE, NORM)
    tables = load_tables(cos, sin, row, one, d, stride_cos, stride_sin, ROT, STYLE, PAIRS)
    new_head = heads
    new_v_1D = 0.0
    slot = -1
    if NEW_KEY:
        k_at = k + row * stride_kt + g * stride_kg + tl.zeros([1, 1], tl.int32)
        new_head = load_heads(k_at, one, d, k_norm, D, ROT, STYLE, NORM)
        new_v_1D = tl.load(v + row * stride_vt + g * stride_vg + d, mask=d < D, other=0.0)[None, :]
        slot = tl.load(slots + row)
    return heads, tables, new_head, new_v_1D, slot


@triton.jit
def load_keys(
    k_base,
    v_base,
    pair_base,
    pages,
    tile,
    keys,
    stride_page,
    stride_slot,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CODES: tl.constexpr,
):
    """Keys and values [N, DP] of a tile whose page ids are `pages`; zeros beyond D and for positions >= `keys`.

    Codes of values come as int16 [N, DP / 2], two adjacent ones each, and codes with the pairs of their scales [N].
    Those of keys are of some page or other for positions >= `keys`: no score is used there.
    """
    d = tl.arange(0, DP)
    start = tile * BLOCK_N
    at = tile_offsets(pages, start, stride_page, stride_slot, PAGE, BLOCK_N)
    live = (start + tl.arange(0, BLOCK_N) < keys)[:, None]
    if DP != D:
        live = live & (d < D)[None, :]
    pairs = 0
    if CODES:
        k_ND = tl.load(k_base + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0)
        c = tl.arange(0, DP // 2)
        seen = start + tl.arange(0, BLOCK_N) < keys
        v_at = v_base.to(tl.pointer_type(tl.int16), bitcast=True) + (at // 2)[:, None] + c[None, :]
        v_ND = tl.load(v_at, mask=seen[:, None] & (c < D // 2)[None, :], other=0)
        pairs_at = pair_base + tile_offsets(pages, start, stride_page // 4, 1, PAGE, BLOCK_N)
        pairs = tl.load(pairs_at, mask=seen, other=0)
    else:
        k_ND = tl.load(k_base + at[:, None] + d[None, :], mask=live, other=0.0)
        v_ND = tl.load(v_base + at[:, None] + d[None, :], mask=live, other=0.0)
    return k_ND, v_ND, pairs


@triton.jit
def attend(
    acc_RD,
    l,
    m,
    unit,
    q_RD,
    q_scale,
    k_ND,
    v_ND,
    pairs,
    tile,
    first,
    keys,
    pre,
    post,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCORE: tl.constexpr,
    CODES: tl.constexpr,
):
    """One online-softmax step over the positions first .. keys of a tile.

    With codes q_RD is q / q_scale, and acc_RD counts units of unit / 1024, where `unit` is the largest scale of a
    value so far, down to a power of two: so both operands of both products fit fp16 whatever the scales are, and no
    code is multiplied alone.
    """
    pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    WIDE: tl.constexpr = q_RD.dtype == tl.float32
    if CODES:
        k_scale, v_scale = fp8.scales_of(pairs)
        dots_RN = tl.dot(q_RD, tl.trans(fp8.operand(k_ND, CODES, WIDE)), input_precision="ieee")
        dots_RN = dots_RN * (k_scale * q_scale)[None, :]
    else:
        dots_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision="ieee")
    x_RN = SCORE(dots_RN, pre) * post
    seen = pos < keys
    if WINDOWED:
        seen = seen & (pos >= first)
    x_RN = tl.where(seen[None, :], x_RN, float("-inf"))
    m_new = tl.maximum(m, tl.max(x_RN, 1))
    p_RN = tl.exp2(x_RN - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p_RN, 1)
    if CODES:
        largest = tl.maximum(unit, fp8.power_below(tl.max(v_scale, 0)))
        relative = fp8.inverse(largest)
        acc_RD = acc_RD * (alpha * (unit * relative))[:, None]
        p_RN = p_RN * (v_scale * (1024.0 * relative))[None, :]
        p_RN = p_RN.to(q_RD.dtype)
        even_ND, odd_ND = fp8.operands(v_ND, CODES, WIDE)
        even_RD, odd_RD = tl.split(tl.reshape(acc_RD, (acc_RD.shape[0], acc_RD.shape[1] // 2, 2)))
        even_RD = tl.dot(p_RN, even_ND, even_RD, input_precision="ieee")
        odd_RD = tl.dot(p_RN, odd_ND, odd_RD, input_precision="ieee")
        acc_RD = tl.reshape(tl.join(even_RD, odd_RD), acc_RD.shape)
        unit = largest
    else:
        acc_RD = acc_RD * alpha[:, None]
        acc_RD = tl.dot(p_RN.to(v_ND.dtype), v_ND, acc_RD, input_precision="ieee")
    return acc_RD, l, m_new, unit


@triton.jit
def combine(
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
