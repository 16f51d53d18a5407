"""Kernel of a linear layer with 2 to about 32 tokens: operands of the matrix units come straight from memory.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile,
BN = BR / G, BT tokens of a program (8, or a multiple of 16), W warps.

The warps of a program share its features and divide K between them; they meet once, at the end. So the loop has no
barrier and no shared memory, and programs are small and many, as in `vector_kernel`.

The product of a warp wants each thread to hold columns {4t .. 4t+3} and {16+4t .. 16+4t+3} of every 32, t = 0..3. A
16-byte load gives it 8t .. 8t+7. As a sum over K may run in any order, both operands take loaded column 8t + 4h + l
for the product's column 16h + 4t + l, and no data moves. Tiles are loaded as [rows, 32], eight consecutive rows to a
warp, because that is how the compiler lays out such loads; were it to choose otherwise, results would still be right.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import load_norm, load_weight, norm_factor, rms_scale, split_groups


@triton.jit(do_not_specialize=["num_tokens"])
def warp_kernel(
    x,  # [T, K], last dim contiguous
    weight,  # [G * N, K] contiguous
    out,  # [T, N], last dim contiguous
    norm_weight,  # [K], or None
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    eps,
    stride_x,
    stride_out,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EXACT_NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BT tokens and BN features per program, over all of K.

    dtypes: x, weight, norm_weight, out fp16 or bf16; sums fp32.
    Bytes: G * N * K * itemsize, plus T * K * itemsize from the L1 or L2 per BN features. FLOPs: 2 * T * G * N * K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    STEPS: tl.constexpr = BLOCK_K // (32 * WARPS)
    BT: tl.constexpr = max(BLOCK_T, 16)
    t_blocks = tl.cdiv(num_tokens, BLOCK_T)  # programs of the same weights are neighbours
    first = (tl.program_id(0) // t_blocks).to(tl.int64) * BLOCK_N
    first_t = tl.program_id(0) % t_blocks * BLOCK_T

    row, w_cols = _tile(STEPS, BLOCK_R // 8, WARPS)
    w_at = weight + (tl.minimum(first + row // G, n - 1) + (row % G).to(tl.int64) * n) * k + w_cols
    token, x_cols = _tile(STEPS, BLOCK_T // 8, WARPS)
    token += first_t
    x_at = x + token.to(tl.int64) * stride_x + x_cols
    live = token < num_tokens
    _, g_cols = _tile(STEPS, 1, WARPS)

    w = load_weight(w_at, w_cols < k, EVEN_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([WARPS, BT, BLOCK_R], tl.float32)
    gram = tl.zeros([WARPS, BT, BLOCK_T], tl.float32)
    SUM_SQUARES: tl.constexpr = NORM > 0 and not EXACT_NORM
    scale = 1.0
    if EXACT_NORM:
        for start in range(0, k, BLOCK_K):
            v = _load_x(x_at + start, start + x_cols, live, k, EVEN_K)
            gram = tl.dot(_left(v, STEPS, WARPS), _right(v, STEPS, WARPS), gram)
        scale = tl.reshape(rms_scale(_diagonal(gram, 0), k, eps), [BLOCK_T // 8, 8])
        scale = tl.broadcast_to(scale[None, :, None, :, None], [STEPS, BLOCK_T // 8, WARPS, 8, 32])
        scale = tl.reshape(scale, [STEPS * BLOCK_T * WARPS, 32])
    v = _load_x(x_at, x_cols, live, k, EVEN_K)
    g = load_norm(norm_weight, g_cols, k, EVEN_K, NORM)
    for start in range(BLOCK_K, k, BLOCK_K):  # loads one tile, multiplies the one before
        w_next = load_weight(w_at + start, start + w_cols < k, EVEN_K)
        v_next = _load_x(x_at + start, start + x_cols, live, k, EVEN_K)
        g_next = load_norm(norm_weight, start + g_cols, k, EVEN_K, NORM)
        if SUM_SQUARES:
            gram = tl.dot(_left(v, STEPS, WARPS), _right(v, STEPS, WARPS), gram)
        acc = tl.dot(
            _left(_normalize(v, g, scale, STEPS, NORM, EXACT_NORM), STEPS, WARPS), _right(w, STEPS, WARPS), acc
        )
        w, v, g = w_next, v_next, g_next
    if SUM_SQUARES:
        gram = tl.dot(_left(v, STEPS, WARPS), _right(v, STEPS, WARPS), gram)
    v = _normalize(v, g, scale, STEPS, NORM, EXACT_NORM)
    acc = tl.dot(_left(v, STEPS, WARPS), _right(w, STEPS, WARPS), acc)

    y = tl.trans(tl.sum(acc, 0))  # [BR, BT]
    if SUM_SQUARES:
        y *= rms_scale(_diagonal(gram, 1), k, eps)[None, :]
    features = (first + tl.arange(0, BLOCK_N))[:, None]
    tokens = (first_t + tl.arange(0, BT)).to(tl.int64)[None, :]
    mask = (features < n) & (tokens < tl.minimum(num_tokens, first_t + BLOCK_T))
    y = EPILOGUE(split_groups(y, G), args, strides, tokens, features, mask)
    tl.store(out + tokens * stride_out + features, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile(STEPS: tl.constexpr, EIGHTS: tl.constexpr, WARPS: tl.constexpr):
    """(rows [R, 1], columns [R, 32]) of a tile of 8 * EIGHTS rows and 32 * WARPS * STEPS columns, as it is loaded.

    Loaded rows run over eight rows first, then the warps' columns, the other eights, the warps' next columns.
    """
    i = tl.arange(0, STEPS * EIGHTS * WARPS * 8)[:, None]
    rows = i % 8 + i // (8 * WARPS) % EIGHTS * 8
    cols = (i // (8 * WARPS * EIGHTS) * WARPS + i // 8 % WARPS) * 32 + tl.arange(0, 32)[None, :]
    return rows, cols


@triton.jit
def _load_x(at, cols, live, k, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(at, mask=live, other=0.0)
    else:
        return tl.load(at, mask=live & (cols < k), other=0.0)


@triton.jit
def _normalize(v, g, scale, STEPS: tl.constexpr, NORM: tl.constexpr, EXACT_NORM: tl.constexpr):
    if NORM > 1:
        g = tl.reshape(g, [STEPS, 1, g.shape[0] // STEPS, 32])  # the same for all eights of tokens
        g = tl.broadcast_to(g, [STEPS, v.shape[0] // (STEPS * g.shape[2]), g.shape[2], 32])
        g = tl.reshape(g, [v.shape[0], 32])
    if NORM == 2 and not EXACT_NORM:
        return v * g  # rounded once, as from fp32, in half the instructions
    elif NORM > 0:
        return (v.to(tl.float32) * scale * norm_factor(g, NORM)).to(v.dtype)
    else:
        return v


@triton.jit
def _diagonal(gram, AXIS: tl.constexpr):
    """Products of tokens with tokens [W, BT, T] -> sums of squares, [T] or [BT]: cheap, as the matrix units idle."""
    total = tl.sum(gram, 0)
    same = tl.arange(0, total.shape[0])[:, None] == tl.arange(0, total.shape[1])[None, :]
    return tl.sum(tl.where(same, total, 0.0), AXIS)


@triton.jit
def _left(v, STEPS: tl.constexpr, WARPS: tl.constexpr):
    """Loaded rows -> [W, BT, BK / W], the product's left operand; 8 tokens are filled up to 16 by zeros."""
    EIGHTS: tl.constexpr = v.shape[0] // (STEPS * WARPS * 8)
    if EIGHTS == 1:
        v = tl.reshape(tl.join(v, tl.zeros_like(v)), [STEPS, WARPS, 8, 4, 2, 4, 2])  # s w r t h l e
        return tl.reshape(tl.permute(v, [1, 6, 2, 0, 4, 3, 5]), [WARPS, 16, STEPS * 32])  # w, e r, s h t l
    else:
        v = tl.reshape(v, [STEPS, EIGHTS, WARPS, 8, 4, 2, 4])  # s e w r t h l
        return tl.reshape(tl.permute(v, [2, 1, 3, 0, 5, 4, 6]), [WARPS, EIGHTS * 8, STEPS * 32])  # w, e r, s h t l


@triton.jit
def _right(w, STEPS: tl.constexpr, WARPS: tl.constexpr):
    """Loaded rows -> [W, BK / W, BR], the product's right operand."""
    EIGHTS: tl.constexpr = w.shape[0] // (STEPS * WARPS * 8)
    w = tl.reshape(w, [STEPS, EIGHTS, WARPS, 8, 4, 2, 4])  # s e w r t h l
    return tl.reshape(tl.permute(w, [2, 0, 5, 4, 6, 1, 3]), [WARPS, STEPS * 32, EIGHTS * 8])  # w, s h t l, e r
