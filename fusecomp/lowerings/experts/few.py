"""The two matmuls of the experts for as many tokens as a tile holds, by the matrix units and without a routing launch.

No expert has more rows than one tile. A program belongs to a routed row; it works for all rows of that row's expert if
its own is the first of them, and ends otherwise. That it finds from the ids alone, which it reads whole.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows,
N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns, BT at least T, BN, BD of a tile, KP = K
padded to a power of two. GATING, SWAP, TRANSPOSED, USE_TMA: see `grouped.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.grouped import _add_bias, _multiply, _prefetch, _spread
from fusecomp.lowerings.experts.pieces import activated


@triton.jit(do_not_specialize=["num_tokens"])
def up_few_kernel(
    x,  # [T, C], last dim contiguous
    index,  # [R]
    weight,  # [E, N, C] or, transposed, [E, C, N]; contiguous
    w_tiles,  # descriptor of the weight, or None
    bias,  # [E, N] contiguous, or None
    hidden,  # [R, F]; of a token's equal experts one row is written, and those of sentinels are not
    num_tokens,
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """hidden = activation(x @ up^T + bias) of every routed row. Bytes: each touched expert's weight once."""
    FEATURES: tl.constexpr = N // 2 if GATING else N
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATING else BLOCK_N
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    if USE_PDL:
        gdc_wait()  # before the next line: then the down projection may read the index without waiting
        gdc_launch_dependents()
    expert, rows, first, _ = _rows_of(index, tl.program_id(0) // BLOCKS, num_tokens, K, KP, BLOCK_T)
    if first & (expert >= 0) & (expert < E):
        block = tl.program_id(0) % BLOCKS
        live, token = rows >= 0, tl.arange(0, BLOCK_T)
        acc = _multiply(
            x + token.to(tl.int64) * stride_x, None, 0, live, weight, w_tiles, expert, block,
            (D + BLOCK_D - 1) // BLOCK_D, N, D, GATING, BLOCK_T, BLOCK_N, BLOCK_D, SWAP, TRANSPOSED, USE_TMA,
        )  # fmt: skip
        acc = _add_bias(acc, bias, expert, block, N, GATING, BLOCK_N, SWAP)
        y = activated(acc, GATING, SWAP, ACT, ALPHA, LIMIT)
        feature = block * BLOCK_F + tl.arange(0, BLOCK_F)
        at, mask = _spread(rows.to(tl.int64) * FEATURES, feature, live, feature < FEATURES, SWAP)
        tl.store(hidden + at, y.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def down_few_kernel(
    hidden,  # [R, F], as the up projection leaves it
    index,  # [R]
    weight,  # [E, C, F] or, transposed, [E, F, C]; contiguous
    w_tiles,  # descriptor of the weight, or None
    bias,  # [E, C] contiguous, or None
    parts,  # [R, C]; those of sentinels are not written
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """parts = hidden @ down^T + bias. Bytes beyond the weights: R * F read, R * C written."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if USE_PDL:
        gdc_launch_dependents()
    # The index was complete before the up projection let this launch begin.
    expert, rows, first, equal = _rows_of(index, tl.program_id(0) // BLOCKS, num_tokens, K, KP, BLOCK_T)
    block = tl.program_id(0) % BLOCKS
    works = first & (expert >= 0) & (expert < E)
    if USE_PDL:
        if works:
            _prefetch(weight, expert, block, N, D, BLOCK_N, TRANSPOSED)
        gdc_wait()
    if works:
        live = rows >= 0
        acc = _multiply(
            hidden + rows.to(tl.int64) * D, None, 0, live, weight, w_tiles, expert, block,
            (D + BLOCK_D - 1) // BLOCK_D, N, D, 0, BLOCK_T, BLOCK_N, BLOCK_D, SWAP, TRANSPOSED, USE_TMA,
        )  # fmt: skip
        acc = _add_bias(acc, bias, expert, block, N, 0, BLOCK_N, SWAP)
        feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at, mask = _spread(rows.to(tl.int64) * N, feature, live, feature < N, SWAP)
        tl.store(parts + at, acc.to(parts.dtype.element_ty), mask=mask)
        if equal:  # a token that chose this expert more than once
            token = tl.arange(0, BLOCK_T)
            for k in range(K):
                row = token * K + k
                same = tl.load(index + row, mask=token < num_tokens, other=E).to(tl.int32) == expert
                at, mask = _spread(row.to(tl.int64) * N, feature, same, feature < N, SWAP)
                tl.store(parts + at, acc.to(parts.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of(index, row, num_tokens, K: tl.constexpr, KP: tl.constexpr, BLOCK_T: tl.constexpr):
    """(expert of a row, each token's row of that expert [BT] or -1, whether `row` is the first of them, whether a token
    has several)."""
    token, k = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, KP)[None, :]
    rows = token * K + k
    ids = tl.load(index + rows, mask=(token < num_tokens) & (k < K), other=-1, cache_modifier=".cg").to(tl.int32)
    expert = tl.load(index + row, cache_modifier=".cg").to(tl.int32)
    mine = (ids == expert) & (token < num_tokens) & (k < K)
    found = tl.max(tl.where(mine, rows, -1), 1)
    first = tl.min(tl.min(tl.where(mine, rows, BLOCK_T * K), 1), 0) == row
    several = tl.max(tl.sum(mine.to(tl.int32), 1), 0) > 1
    return expert, found, first, several
