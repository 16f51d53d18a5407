"""Router and experts of very few tokens in three launches: logits, up projection, down projection.

The launch that would choose each token's experts is left out: every program of both projections chooses for itself, in
registers, from the logits. The down projection does it while the up projection runs.

A router of 128 x 2048 with its norm and its experts of 768, in a chain of layers on an H100 (bf16): 30.5 us at one
token and 53.9 at two, against 32.2 and 57.0 by the launches of `route/` and `vector.py`; measured when the down
projection still took its experts one by one from the choice. No faster from four tokens on. Of fp8 on an H200 of
4.60 TB/s 16.99 us instead of 17.26 at one token, no faster at two.

Weights that are codes have scales and maybe zero points, and are multiplied as in `vector.py`. CODES says which they
are: what KIND is there, where here it is the router's.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows,
N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns, BN, BD of a tile, KP = K padded to a
power of two. GATING: see `pieces.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.later import ask_for
from fusecomp.lowerings.experts.pieces import activated, weight_rows
from fusecomp.lowerings.experts.quant_pieces import sum_code_products
from fusecomp.lowerings.experts.vector import _products
from fusecomp.lowerings.route.pieces import choose, chosen_expert, expert_numbers


@triton.jit
def logits_kernel(
    x,  # [T, C], last dim contiguous
    weight,  # [E, C] contiguous
    bias,  # [E] contiguous, or None
    norm_weight,  # [C] or None
    y,  # [T, C] contiguous, or None without a norm
    logits,  # [T, E] fp32
    later,  # a weight that is read after the experts, or None
    eps,
    stride_x,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of two, at least D
    LATER: tl.constexpr,  # bytes of it that each program asks the L2 for, by THREADS
    THREADS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """logits = norm(x) @ weight^T + bias, one of a token per program, and y = norm(x) by each token's first program.

    Bytes: E * C * itemsize, and T * E * LATER into the L2. FLOPs: 2 * T * C * E.
    """
    token, expert = (tl.program_id(0) // E).to(tl.int64), tl.program_id(0) % E
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    if USE_PDL:
        gdc_launch_dependents()
    w = tl.load(weight + expert * D + cols, mask=inside, other=0.0)
    scale = tl.full([1, BLOCK_D], 1.0, tl.float32)
    if norm_weight is not None:
        scale = tl.load(norm_weight + cols, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            scale += 1.0
    if later is not None:
        ask_for(later, tl.program_id(0), LATER, THREADS)
    if USE_PDL:
        gdc_wait()
    v = tl.load(x + token * stride_x + cols, mask=inside, other=0.0)
    z = _dots(w, v.to(tl.float32) * scale)
    if NORM:
        rstd = tl.rsqrt(_dots(v, v.to(tl.float32)) / D + eps)
        z *= rstd
        if expert == 0:
            normed = v.to(tl.float32) * rstd[:, None] * scale
            tl.store(y + token * D + cols, normed.to(y.dtype.element_ty), mask=inside)
    if bias is not None:
        z += tl.load(bias + expert).to(tl.float32)
    tl.store(logits + token * E + expert + tl.arange(0, 1), z)


@triton.jit
def up_chosen_kernel(
    x,  # [T, C], last dim contiguous
    logits,  # [T, E] fp32
    route_bias,  # [E] or None
    weight,  # [E, N, C] contiguous; codes: also bytes of two
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, N] contiguous, or None
    hidden,  # [R, F]
    stride_x,
    DTYPE: tl.constexpr,  # to which logits are rounded
    KIND: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of numbers: a power of two, at least D
    CODES: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN whole rows of one expert's weight by one token per program. Bytes: R * N * D * itemsize. FLOPs: 2 * R * N * D.

    A tile is best one warp's: its choice and its sums meet no barrier.
    """
    FEATURES: tl.constexpr = N // 2 if GATING else N
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATING else BLOCK_N
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    row, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    token = (row // K).to(tl.int64)
    if USE_PDL:
        gdc_wait()  # before the next line: then the down projection may read the logits without waiting
        gdc_launch_dependents()
    if CODES < 0:
        cols = tl.arange(0, BLOCK_D)[None, :]
        inside = cols < D
        v = tl.load(x + token * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    e = expert_numbers(E, G, BLOCK_G, BLOCK_S)
    z = tl.load(logits + token * E + e, mask=e < E, other=0.0).to(DTYPE).to(tl.float32)
    # As many steps as its own expert takes: those of the first ones read their weights meanwhile.
    expert = tl.max(chosen_expert(z, route_bias, row % K, KIND, GROUP_SCORE, E, G, CHOSEN)).to(tl.int64)
    rows = weight_rows(block, N, GATING, BLOCK_N, True)
    if CODES >= 0:
        x_at = x + token * stride_x + tl.zeros([1, 1], tl.int64)
        y = sum_code_products(
            weight, scale, zero, expert + tl.zeros([1, 1], tl.int64), rows[None, :], x_at, tl.full([1, 1], 1, tl.int1),
            N, D, BLOCK_D, CODES, OFFSET, ROWS, COLS, True, False,
        )  # fmt: skip
        y = tl.reshape(y, [BLOCK_N])
    else:
        at = weight + expert * (N * D) + rows.to(tl.int64)[:, None] * D + cols
        w = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
        y = _dots(w, v)
    if bias is not None:
        y += tl.load(bias + expert * N + rows).to(tl.float32)
    y = activated(y[:, None], GATING, True, ACT, ALPHA, LIMIT)
    feature = (block * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    tl.store(hidden + row.to(tl.int64) * FEATURES + feature, y.to(hidden.dtype.element_ty), mask=feature < FEATURES)


@triton.jit
def down_chosen_kernel(
    hidden,  # [R, F]
    logits,  # [T, E] fp32
    route_bias,  # [E] or None
    weight,  # [E, C, F] contiguous; codes: also bytes of two
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, C] contiguous, or None
    residual,  # [T, C], last dim contiguous, or None
    out,  # [T, C] contiguous
    stride_r,
    DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,  # of the router's weights
    KIND: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CODES: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """As `down_vector_kernel`, by experts and weights that are chosen here."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    if USE_PDL:
        gdc_launch_dependents()
    rank, weights, e = _choice(
        logits + token * E, route_bias, DTYPE, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G,
        CHOSEN, BLOCK_G, BLOCK_S,
    )  # fmt: skip
    k = tl.arange(0, KP)[:, None]
    live, hit = k < K, (rank == k) & (rank < K)  # what is not chosen has rank K
    expert = tl.sum(tl.where(hit, e, 0), 1)[:, None].to(tl.int64)
    share = tl.sum(tl.where(hit, weights, 0.0), 1)[:, None].to(WEIGHT_DTYPE).to(tl.float32)
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(feature, N - 1)[None, :]
    if CODES >= 0:
        y = sum_code_products(
            weight, scale, zero, expert, inside, hidden + (token * K + k) * D, live, N, D, BLOCK_D, CODES, OFFSET, ROWS,
            COLS, False, USE_PDL,
        )  # fmt: skip
    else:
        y = _products(
            weight + expert * (N * D) + inside.to(tl.int64) * D, hidden + (token * K + k) * D, live, D, BLOCK_D,
            USE_PDL,
        )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + expert * N + inside, mask=live, other=0.0).to(tl.float32)
    total = tl.sum(y * share, 0)
    if residual is not None:
        total += tl.load(residual + token * stride_r + feature, mask=feature < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + feature, total.to(out.dtype.element_ty), mask=feature < N)


@triton.jit
def _choice(
    logits, route_bias, DTYPE: tl.constexpr, KIND: tl.constexpr, NORMALISE: tl.constexpr, GROUP_SCORE: tl.constexpr,
    EPS: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, E: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(rank, weight, expert), each [1, BG * BS], of the token whose logits these are; see `choose`."""
    e = expert_numbers(E, G, BLOCK_G, BLOCK_S)
    z = tl.load(logits + e, mask=e < E, other=0.0, cache_modifier=".cg").to(DTYPE).to(tl.float32)
    rank, weight = choose(z, route_bias, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G, CHOSEN)
    return rank, weight, tl.reshape(e, [1, BLOCK_G * BLOCK_S])


@triton.jit
def _dots(w, v):
    """[R] fp32 products of rows w [R, C] with v [1, C]: sums of neighbours stay within a thread, threads meet once."""
    VEC: tl.constexpr = 128 // w.dtype.primitive_bitwidth
    x = w.to(tl.float32) * v
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // VEC, VEC]), 2), 1)
