"""The experts of very few tokens: plain products over register tiles, without a routing launch.

Programs are small and many, each with all loads of its first tile in flight. Which expert is read is known only after
the wait for the kernel before, in the up projection; the down projection knows it at once, since the kernels before the
up projection have ended when it starts, and asks for its weights before it waits.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows,
N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns, BN, BD of a tile, KP = K padded to a
power of two. GATING: see `pieces.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.pieces import activated, weight_rows


@triton.jit
def up_vector_kernel(
    x,  # [T, C], last dim contiguous
    index,  # [R]
    weight,  # [E, N, C] contiguous
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
        x_at = x + (row // K).to(tl.int64) * stride_x
        y = _products(weight + expert * (N * D), rows, x_at, True, N, D, BLOCK_N, BLOCK_D, False)
        if bias is not None:
            y += tl.load(bias + expert * N + rows).to(tl.float32)
        y = activated(y[:, None], GATING, True, ACT, ALPHA, LIMIT)
        feature = (block * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
        tl.store(hidden + row.to(tl.int64) * FEATURES + feature, y.to(hidden.dtype.element_ty), feature < FEATURES)


@triton.jit
def down_vector_kernel(
    hidden,  # [R, F]
    index,  # [R]
    weight,  # [E, C, F] contiguous
    bias,  # [E, C] contiguous, or None
    routing_weights,  # [R]
    out,  # [T, C] contiguous
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN features of one token per program, from all of its K experts, summed in fp32 in one order.

    Bytes: R * N * D * itemsize. FLOPs: 2 * R * N * D.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    if USE_PDL:
        gdc_launch_dependents()
    lane = tl.arange(0, KP * BLOCK_N)  # features of an expert are neighbours
    k = lane // BLOCK_N
    row = token * K + k
    expert = tl.load(index + row, mask=k < K, other=E, cache_modifier=".cg").to(tl.int64)
    live = (expert >= 0) & (expert < E)
    feature = tl.minimum(block * BLOCK_N + lane % BLOCK_N, N - 1)
    base = weight + tl.where(live, expert, 0) * (N * D)
    y = _products(
        base, feature, (hidden + row.to(tl.int64) * D)[:, None], live[:, None], N, D,
        KP * BLOCK_N, BLOCK_D, USE_PDL,
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + expert * N + feature, mask=live, other=0.0).to(tl.float32)
    y *= tl.load(routing_weights + row, mask=live, other=0.0).to(tl.float32)
    total = tl.sum(tl.reshape(y, [KP, BLOCK_N]), 0)
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out + token.to(tl.int64) * N + feature, total.to(out.dtype.element_ty), mask=feature < N)


@triton.jit
def _products(
    base,
    rows,
    x_at,
    live,
    N: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WAIT: tl.constexpr,
):
    """[ROWS] fp32 products of weight rows with inputs: one base [] or [ROWS], inputs and mask [] or [ROWS, 1].

    WAIT: inputs are touched only after the kernel before has ended, the first weights before.
    """
    # Sums of VEC neighbours stay within a thread; threads meet once, after the loop.
    VEC: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    cols = tl.arange(0, BLOCK_D)[None, :]
    w_at = (base + rows.to(tl.int64) * D)[:, None] + cols
    v_at = x_at + cols
    w = tl.load(w_at, mask=live & (cols < D), other=0.0, eviction_policy="evict_first")
    if WAIT:
        gdc_wait()
    v = tl.load(v_at, mask=live & (cols < D), other=0.0, eviction_policy="evict_last")
    acc = tl.zeros([ROWS, BLOCK_D // VEC], tl.float32)
    for start in range(BLOCK_D, D, BLOCK_D):  # loads one tile, multiplies the one before
        mask = start + cols < D
        w_next = tl.load(w_at + start, mask=live & mask, other=0.0, eviction_policy="evict_first")
        v_next = tl.load(v_at + start, mask=live & mask, other=0.0, eviction_policy="evict_last")
        acc += _fold(w.to(tl.float32) * v.to(tl.float32), VEC)
        w, v = w_next, v_next
    acc += _fold(w.to(tl.float32) * v.to(tl.float32), VEC)
    return tl.sum(acc, 1)


@triton.jit
def _fold(x, VEC: tl.constexpr):
    """[R, C] -> [R, C / VEC]: sums of VEC neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // VEC, VEC]), 2)
