"""The experts of very few tokens: plain products over register tiles, without a routing launch.

Programs are small and many, each with all loads of its first tile in flight. Which expert is read is known only after
the wait for the kernel before, in the up projection; the down projection knows it at once, since the kernels before the
up projection have ended when it starts, and asks for its weights before it waits.

Weights that are codes, which KIND says, have scales and maybe zero points: see `quant_pieces.py`.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows,
N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns, BN, BD of a tile, KP = K padded to a
power of two. GATING: see `pieces.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.pieces import activated, weight_rows
from fusecomp.lowerings.experts.quant_pieces import sum_code_products

AHEAD: tl.constexpr = tl.constexpr(4)  # tiles of a row that are loaded at once, if there are no more


@triton.jit
def up_vector_kernel(
    x,  # [T, C], last dim contiguous
    index,  # [R]
    weight,  # [E, N, C] contiguous; codes: also bytes of two
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, N] contiguous, or None
    hidden,  # [R, F]; rows of sentinels are not written
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN rows of one expert's weight by one token per program. Bytes: R * N * D * itemsize. FLOPs: 2 * R * N * D."""
    FEATURES: tl.constexpr = N // 2 if GATING else N
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATING else BLOCK_N
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    row, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    if USE_PDL:
        gdc_wait()  # before the next line: then the down projection may read the index without waiting
        gdc_launch_dependents()
    expert = tl.load(index + row).to(tl.int64)
    if (expert >= 0) & (expert < E):
        rows = weight_rows(block, N, GATING, BLOCK_N, True)
        x_at = x + (row // K).to(tl.int64) * stride_x + tl.zeros([1, 1], tl.int64)
        always = tl.full([1, 1], 1, tl.int1)
        if KIND >= 0:
            y = sum_code_products(
                weight, scale, zero, expert + tl.zeros([1, 1], tl.int64), rows[None, :], x_at, always, N, D, BLOCK_D,
                KIND, OFFSET, ROWS, COLS, True, False,
            )  # fmt: skip
        else:
            w_at = (weight + expert * (N * D) + rows.to(tl.int64) * D)[None, :]
            y = _products(w_at, x_at, always, D, BLOCK_D, False)
        y = tl.reshape(y, [BLOCK_N])
        if bias is not None:
            y += tl.load(bias + expert * N + rows).to(tl.float32)
        y = activated(y[:, None], GATING, True, ACT, ALPHA, LIMIT)
        feature = (block * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
        tl.store(hidden + row.to(tl.int64) * FEATURES + feature, y.to(hidden.dtype.element_ty), feature < FEATURES)


@triton.jit
def down_vector_kernel(
    hidden,  # [R, F]
    index,  # [R]
    weight,  # [E, C, F] contiguous; codes: also bytes of two
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, C] contiguous, or None
    routing_weights,  # [R]
    residual,  # [T, C], last dim contiguous, or None
    out,  # [T, C] contiguous
    stride_r,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN features of one token per program, from all of its K experts, summed in fp32 in one order.

    Bytes: R * N * D * itemsize. FLOPs: 2 * R * N * D.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    if USE_PDL:
        gdc_launch_dependents()
    # Experts along the first dimension, features of one along the second.
    k = tl.arange(0, KP)[:, None]
    row = token * K + k
    expert = tl.load(index + row, mask=k < K, other=E, cache_modifier=".cg").to(tl.int64)
    live = (expert >= 0) & (expert < E)
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(feature, N - 1)[None, :]
    if KIND >= 0:
        y = sum_code_products(
            weight, scale, zero, tl.where(live, expert, 0), inside, hidden + row.to(tl.int64) * D, live, N, D, BLOCK_D,
            KIND, OFFSET, ROWS, COLS, False, USE_PDL,
        )  # fmt: skip
    else:
        base = weight + tl.where(live, expert, 0) * (N * D)
        y = _products(
            base + inside.to(tl.int64) * D, hidden + row.to(tl.int64) * D, live, D, BLOCK_D, USE_PDL,
        )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + expert * N + inside, mask=live, other=0.0).to(tl.float32)
    y *= tl.load(routing_weights + row, mask=live, other=0.0).to(tl.float32)
    total = tl.sum(y, 0)
    if residual is not None:
        total += tl.load(residual + token.to(tl.int64) * stride_r + feature, mask=feature < N, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + feature, total.to(out.dtype.element_ty), mask=feature < N)


@triton.jit
def _products(w_rows, x_rows, live, D: tl.constexpr, BLOCK_D: tl.constexpr, WAIT: tl.constexpr):
    """[A, B] fp32 products of weight rows at w_rows [A, B] with inputs at x_rows [A, 1], zero where not live [A, 1].

    WAIT: inputs are touched only after the kernel before has ended, the first weights before.
    """
    # Sums of VEC neighbours stay within a thread; threads meet once, after the loop.
    VEC: tl.constexpr = 128 // w_rows.dtype.element_ty.primitive_bitwidth
    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    EVEN: tl.constexpr = D % BLOCK_D == 0
    A: tl.constexpr = w_rows.shape[0]
    B: tl.constexpr = w_rows.shape[1]
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    w_at, x_at, live = w_rows[:, :, None] + cols, x_rows[:, :, None] + cols, live[:, :, None]
    acc = tl.zeros([A, B, BLOCK_D // VEC], tl.float32)
    if STEPS <= AHEAD:
        ws = ()
        for step in tl.static_range(STEPS):  # all loads in flight at once
            mask = live if EVEN else live & (step * BLOCK_D + cols < D)
            w = tl.load(w_at + step * BLOCK_D, mask=mask, other=0.0, eviction_policy="evict_first")
            ws = ws + (w,)  # noqa: RUF005 - Triton has no unpacking
        if WAIT:
            gdc_wait()
        for step in tl.static_range(STEPS):
            mask = live if EVEN else live & (step * BLOCK_D + cols < D)
            x = tl.load(x_at + step * BLOCK_D, mask=mask, other=0.0, eviction_policy="evict_last")
            acc += _fold(ws[step].to(tl.float32) * x.to(tl.float32), VEC)
    else:
        w = tl.load(w_at, mask=live & (cols < D), other=0.0, eviction_policy="evict_first")
        if WAIT:
            gdc_wait()
        x = tl.load(x_at, mask=live & (cols < D), other=0.0, eviction_policy="evict_last")
        for start in range(BLOCK_D, D, BLOCK_D):  # loads one tile, multiplies the one before
            mask = live & (start + cols < D)
            w_next = tl.load(w_at + start, mask=mask, other=0.0, eviction_policy="evict_first")
            x_next = tl.load(x_at + start, mask=mask, other=0.0, eviction_policy="evict_last")
            acc += _fold(w.to(tl.float32) * x.to(tl.float32), VEC)
            w, x = w_next, x_next
        acc += _fold(w.to(tl.float32) * x.to(tl.float32), VEC)
    return tl.sum(acc, 2)


@triton.jit
def _fold(x, VEC: tl.constexpr):
    """[A, B, C] -> [A, B, C / VEC]: sums of VEC neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // VEC, VEC]), 3)
