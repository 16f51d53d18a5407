"""Kernel of codes by codes with tens of tokens: weights on the wide side of the matrix units, K split over programs.

As in `linear/skinny_tile.py`, a program asks the L2 for its first weights before it waits for the kernel before; that
kernel makes the codes of x and is short, so it costs little more than its launch.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile,
BN = BR / G, BT tokens of an accumulator, S splits of K, X and W the columns that share a scale of x and of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.linear.skinny_pieces import load_weight, split_groups, sum_of_splits, weight_rows
from fusecomp.lowerings.quant.pieces import scale_row


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def scaled_tile_kernel(
    x,  # [T, K] codes, last dim contiguous
    q,  # [G * N, K] codes, contiguous
    x_scale,  # fp32 [1], or if X_ROWS [T, ceil(K / X)]
    w_scale,  # [ceil(G * N / ROWS), ceil(K / W)] contiguous, a float type
    out,  # [T, N], last dim contiguous
    partials,  # [programs, BR, BT] fp32, scratch
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    per_split,  # weight tiles along K of one split; no split is empty
    stride_x,
    stride_out,
    stride_xs,
    stride_ws,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,  # weight tiles that the L2 is asked for before the wait
    CHUNK: tl.constexpr,
    X_ROWS: tl.constexpr,
    X_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out[T, N] = EPILOGUE((x * x_scale) @ (q * w_scale)^T); BN features of BT tokens and one split of K a program.

    x and q are both int8 or both e4m3fn; BK divides X and W where they are not 0. Sums: int32; of fp8 as the matrix
    units keep them (see `scaled_kernel`), or if CHUNK those of one tile, added up in fp32. With S > 1 the last of S
    programs to arrive sums their scaled parts in order of the splits.
    Bytes: G * N * K, T * K from the L2 per BN features, 8 * S * G * N * BT of partials if S > 1. FLOPs: 2 T G N K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    BLOCKWISE: tl.constexpr = X_COLS > 0 or COLS > 0
    SUMS: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    t_blocks = tl.cdiv(num_tokens, BLOCK_T)  # programs of the same weights are neighbours
    t_block = tl.program_id(0) % t_blocks
    split = tl.program_id(0) // t_blocks % SPLITS
    block = tl.program_id(0) // t_blocks // SPLITS
    first = block.to(tl.int64) * BLOCK_N
    lo = split * per_split
    hi = tl.minimum(lo + per_split, tl.cdiv(k, BLOCK_K))
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    row_at = q + rows * k
    cols = tl.arange(0, BLOCK_K)
    x_at = x + t * stride_x + cols[:, None]
    ws_at = w_scale + scale_row(rows, ROWS) * stride_ws
    xs_at = x_scale + t * (stride_xs if X_ROWS else 0)
    if USE_PDL:
        gdc_launch_dependents()
        for i in tl.static_range(AHEAD):
            if lo + i < hi:
                lines = tl.arange(0, (BLOCK_K + 127) // 128) * 128
                where = row_at + tl.minimum((lo + i) * BLOCK_K + lines, k - 1)[None, :]
                asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
                tl.inline_asm_elementwise(asm, "=r,l", [where.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
        gdc_wait()

    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32 if BLOCKWISE else SUMS)
    if BLOCKWISE:
        xs = tl.load(xs_at + (lo * BLOCK_K // X_COLS if X_COLS else 0), mask=live, other=0.0)
        ws = tl.load(ws_at + (lo * BLOCK_K // COLS if COLS else 0))
    for tile in range(lo, hi):
        start = tile * BLOCK_K
        w = load_weight(row_at + start + cols[None, :], (start + cols < k)[None, :], EVEN_K)
        if EVEN_K:
            v = tl.load(x_at + start, mask=live, other=0.0, eviction_policy="evict_last")
        else:
            v = tl.load(x_at + start, mask=live & (start + cols < k)[:, None], other=0.0, eviction_policy="evict_last")
        if BLOCKWISE:
            after = tl.minimum(start + BLOCK_K, k - 1)  # on their way during the product
            xs_next = tl.load(xs_at + (after // X_COLS if X_COLS else 0), mask=live, other=0.0)
            ws_next = tl.load(ws_at + (after // COLS if COLS else 0))
            part = tl.dot(w, v, tl.zeros([BLOCK_R, BLOCK_T], SUMS), out_dtype=SUMS)
            acc += part.to(tl.float32) * (ws.to(tl.float32) * xs)
            xs, ws = xs_next, ws_next
        elif CHUNK:
            acc += tl.dot(w, v, tl.zeros([BLOCK_R, BLOCK_T], SUMS), out_dtype=SUMS)
        else:
            acc = tl.dot(w, v, acc, out_dtype=SUMS)
    if BLOCKWISE:
        sums = acc
    else:
        sums = acc.to(tl.float32) * tl.load(ws_at).to(tl.float32) * tl.load(xs_at, mask=live, other=0.0)

    last = True
    if SPLITS > 1:
        team = block.to(tl.int64) * t_blocks + t_block
        squares = tl.zeros([BLOCK_T], tl.float32)
        last, sums, squares = sum_of_splits(
            sums, squares, partials, partials, counters, team, split, BLOCK_R, BLOCK_T, SPLITS, False
        )
    if last:
        features = (first + tl.arange(0, BLOCK_N))[:, None]
        mask = (features < n) & live
        y = EPILOGUE(split_groups(sums, G), args, strides, t, features, mask)
        store_rows(out + t * stride_out + features, y.to(out.dtype.element_ty), mask, num_tokens)
