"""Kernel that norms and rotates a step's queries and keys and scatters keys and values into the paged cache.

Legend: T tokens, H query heads, G kv heads, D head dim (DP: padded to a power of two), ROT rotated dims, B page size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention import fp8
from fusecomp.lowerings.paged_attention.pieces import load_heads, load_tables, pdl_launch, pdl_wait, rotated


@triton.jit(do_not_specialize=["num_tokens"])
def rope_cache_kernel(
    q,  # [T, H, D], last dim contiguous
    k,  # [T, G, D], last dim contiguous
    v,  # [T, G, D], last dim contiguous
    cos,  # [T, ROT] or [T, ROT / 2] (PAIRS), last dim contiguous, or None
    sin,  # as cos
    q_norm,  # [D], or None
    k_norm,  # [D], or None
    q_out,  # [T, H, D] contiguous
    k_out,  # [T, G, D] contiguous
    v_out,  # [T, G, D] contiguous, with CODES only
    kv_cache,  # [num_blocks, 2, G, B, D], last dim contiguous; with CODES [num_blocks, G, W] bytes
    slots,  # [T] int64, block * B + offset, or -1
    eps,
    num_tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    stride_cos,
    stride_sin,
    stride_page,
    stride_v,  # from K to V of one page
    stride_g,
    stride_slot,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROT: tl.constexpr,
    PAGE: tl.constexpr,
    STYLE: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_PDL: tl.constexpr,
    CODES: tl.constexpr,  # what the cache holds: see `fp8.py`
):
    """Program (token block, head block): BLOCK_T tokens of BLOCK_H query heads, or kv heads in the last blocks.

    dtypes: q, k, v, q_out, k_out, v_out one of fp32, fp16, bf16, and kv_cache too, or codes; cos, sin and the norms'
    weights any of them; arithmetic fp32, one rounding. A slot below zero writes nothing to the cache. With CODES, k_out
    and v_out are what the cache returns.
    Bytes: T * (2 * H + 5 * G) * D * itemsize, plus 2 * T * ROT of cos and sin. Bound by memory.
    """
    pdl_wait(USE_PDL)
    pdl_launch(USE_PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (t < num_tokens)[:, None]
    slot = tl.load(slots + t, mask=t < num_tokens, other=-1)
    t = t.to(tl.int64)[:, None]
    d = tl.arange(0, DP)
    tables = load_tables(cos, sin, t, live, d, stride_cos, stride_sin, ROT, STYLE, PAIRS)
    first = tl.program_id(1) * BLOCK_H
    stored = live & (d < D)[None, :]
    # Blocks of query heads come first; H need not be a multiple of BLOCK_H.
    kv_first = first - tl.cdiv(H, BLOCK_H) * BLOCK_H
    if kv_first < 0:
        for h in range(first, tl.minimum(first + BLOCK_H, H)):
            heads = load_heads(q + t * stride_qt + h * stride_qh, live, d, q_norm, D, ROT, STYLE, NORM)
            x_TD = rotated(heads, tables, d, eps, q_norm, D, DP, ROT, STYLE, NORM)
            tl.store(q_out + (t * H + h) * D + d[None, :], x_TD.to(q_out.dtype.element_ty), mask=stored)
    else:
        kept = (slot >= 0)[:, None] & (d < D)[None, :]
        for g in range(kv_first, tl.minimum(kv_first + BLOCK_H, G)):
            heads = load_heads(k + t * stride_kt + g * stride_kg, live, d, k_norm, D, ROT, STYLE, NORM)
            x_TD = rotated(heads, tables, d, eps, k_norm, D, DP, ROT, STYLE, NORM).to(k_out.dtype.element_ty)
            v_TD = tl.load(v + t * stride_vt + g * stride_vg + d[None, :], mask=stored, other=0.0)
            to = (slot // PAGE * stride_page + slot % PAGE * stride_slot + g * stride_g)[:, None]
            cache_at = kv_cache + to + d[None, :]
            if CODES:
                k_code, k_scale = fp8.quantized(x_TD.to(tl.float32), CODES)
                v_code, v_scale = fp8.quantized(v_TD.to(tl.float32), CODES)
                pair_at = fp8.pairs_at(kv_cache, tl.cast(g, tl.int64), stride_g, D, PAGE)
                pair_at += slot // PAGE * (stride_page // 4) + slot % PAGE
                tl.store(pair_at, fp8.pair_of(k_scale, v_scale), mask=slot >= 0)
                tl.store(cache_at, k_code, mask=kept)
                tl.store(cache_at + stride_v, v_code, mask=kept)
                x_TD = fp8.scaled(k_code, k_scale, CODES).to(k_out.dtype.element_ty)
                v_TD = fp8.scaled(v_code, v_scale, CODES).to(v_out.dtype.element_ty)
                tl.store(v_out + (t * G + g) * D + d[None, :], v_TD, mask=stored)
                tl.store(k_out + (t * G + g) * D + d[None, :], x_TD, mask=stored)
            else:
                tl.store(k_out + (t * G + g) * D + d[None, :], x_TD, mask=stored)
                tl.store(cache_at, x_TD, mask=kept)
                tl.store(cache_at + stride_v, v_TD, mask=kept)
