"""Router and experts of very few tokens in three launches: logits, up projection, down projection.

The launch that would choose each token's experts is left out: every program of both projections chooses for itself, in
registers, from the logits. That takes it about as long as reading ids would take, less than a launch takes, and
the down projection does it while the up projection runs.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows,
N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns, BN, BD of a tile, KP = K padded to a
power of two. GATING: see `pieces.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.pieces import activated, weight_rows
from fusecomp.lowerings.experts.vector import _products
from fusecomp.lowerings.route.pieces import choose, expert_numbers


@triton.jit
def logits_kernel(
    x,  # [T, C], last dim contiguous
    weight,  # [E, C] contiguous
    bias,  # [E] contiguous, or None
    norm_weight,  # [C] or None
    y,  # [T, C] contiguous, or None without a norm
    logits,  # [T, E] fp32
    eps,
    stride_x,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of two, at least D
    USE_PDL: tl.constexpr,
):
    """logits = norm(x) @ weight^T + bias, and y = norm(x): BN experts of one token per program."""
    VEC: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    BLOCKS: tl.constexpr = (E + BLOCK_N - 1) // BLOCK_N
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    expert = block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = cols < D
    if USE_PDL:
        gdc_launch_dependents()
    w = tl.load(weight + tl.minimum(expert, E - 1)[:, None] * D + cols, mask=inside, other=0.0)
    scale = tl.full([1, BLOCK_D], 1.0, tl.float32)
    if norm_weight is not None:
        scale = tl.load(norm_weight + cols, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            scale += 1.0
    if USE_PDL:
        gdc_wait()
    v = tl.load(x + token * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    z = tl.sum(_fold(w.to(tl.float32) * (v * scale), VEC), 1)
    if NORM:
        rstd = tl.rsqrt(tl.sum(_fold(v * v, VEC), 1) / D + eps)  # [1]
        z *= rstd
        if block == 0:
            tl.store(y + token * D + cols, (v * rstd[:, None] * scale).to(y.dtype.element_ty), mask=inside)
    if bias is not None:
        z += tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    tl.store(logits + token * E + expert, z, mask=expert < E)


@triton.jit
def up_chosen_kernel(
    x,  # [T, C], last dim contiguous
    logits,  # [T, E] fp32
    route_bias,  # [E] or None
    weight,  # [E, N, C] contiguous
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
    KP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of one token
    STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Tiles of BN rows of a token's experts in turn, the next one loaded while one is multiplied."""
    VEC: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    FEATURES: tl.constexpr = N // 2 if GATING else N
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATING else BLOCK_N
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    token, first = (tl.program_id(0) // PROGRAMS).to(tl.int64), tl.program_id(0) % PROGRAMS
    if USE_PDL:
        gdc_wait()  # before the next line: then the down projection may read the logits without waiting
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK_D)[None, :]
    experts, _ = _choice(
        logits + token * E, route_bias, DTYPE, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G,
        CHOSEN, BLOCK_G, BLOCK_S, KP,
    )  # fmt: skip
    v = tl.load(x + token * stride_x + cols, mask=cols < D, other=0.0).to(tl.float32)
    if STAGES > 0:
        for item in tl.range(first, K * BLOCKS, PROGRAMS, num_stages=STAGES):
            w = _load_rows(weight, experts, item, K * BLOCKS, BLOCKS, N, D, GATING, BLOCK_N, BLOCK_D, KP)
            _finish(
                _fold(w.to(tl.float32) * v, VEC), experts, bias, hidden, token, item, K, BLOCKS, N, GATING, ACT, ALPHA,
                LIMIT, BLOCK_N, BLOCK_F, FEATURES, KP,
            )  # fmt: skip
    else:
        w = _load_rows(weight, experts, first, K * BLOCKS, BLOCKS, N, D, GATING, BLOCK_N, BLOCK_D, KP)
        for item in range(first, K * BLOCKS, PROGRAMS):
            w_next = _load_rows(weight, experts, item + PROGRAMS, K * BLOCKS, BLOCKS, N, D, GATING, BLOCK_N, BLOCK_D, KP)
            _finish(
                _fold(w.to(tl.float32) * v, VEC), experts, bias, hidden, token, item, K, BLOCKS, N, GATING, ACT, ALPHA,
                LIMIT, BLOCK_N, BLOCK_F, FEATURES, KP,
            )  # fmt: skip
            w = w_next


@triton.jit
def _load_rows(
    weight, experts, item, ITEMS: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    GATING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """[BN, BD] whole rows of an item's expert; zeros behind the last item."""
    expert = tl.sum(tl.where(tl.arange(0, KP) == item // BLOCKS, experts, 0), 0).to(tl.int64)
    rows = weight_rows(item % BLOCKS, N, GATING, BLOCK_N, True).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (item < ITEMS) & (cols < D)
    at = weight + expert * (N * D) + rows[:, None] * D + cols
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _finish(
    parts, experts, bias, hidden, token, item, K: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr,
    GATING: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr, FEATURES: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The hidden values of an item from partial sums [BN, BD / VEC]."""
    y = tl.sum(parts, 1)
    k, block = item // BLOCKS, item % BLOCKS
    if bias is not None:
        expert = tl.sum(tl.where(tl.arange(0, KP) == k, experts, 0), 0).to(tl.int64)
        y += tl.load(bias + expert * N + weight_rows(block, N, GATING, BLOCK_N, True)).to(tl.float32)
    y = activated(y[:, None], GATING, True, ACT, ALPHA, LIMIT)
    feature = (block * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    tl.store(hidden + (token * K + k) * FEATURES + feature, y.to(hidden.dtype.element_ty), mask=feature < FEATURES)


@triton.jit
def down_chosen_kernel(
    hidden,  # [R, F]
    logits,  # [T, E] fp32
    route_bias,  # [E] or None
    weight,  # [E, C, F] contiguous
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
    USE_PDL: tl.constexpr,
):
    """As `down_vector_kernel`, by experts and weights that are chosen here."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    if USE_PDL:
        gdc_launch_dependents()
    experts, weights = _choice(
        logits + token * E, route_bias, DTYPE, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G,
        CHOSEN, BLOCK_G, BLOCK_S, KP,
    )  # fmt: skip
    k = tl.arange(0, KP)[:, None]
    live, expert = k < K, experts[:, None].to(tl.int64)
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(feature, N - 1)[None, :]
    y = _products(
        weight + expert * (N * D) + inside.to(tl.int64) * D, hidden + (token * K + k) * D, live, D, BLOCK_D, USE_PDL,
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + expert * N + inside, mask=live, other=0.0).to(tl.float32)
    y *= weights[:, None].to(WEIGHT_DTYPE).to(tl.float32)
    total = tl.sum(tl.where(live, y, 0.0), 0)
    if residual is not None:
        total += tl.load(residual + token * stride_r + feature, mask=feature < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + feature, total.to(out.dtype.element_ty), mask=feature < N)


@triton.jit
def _choice(
    logits, route_bias, DTYPE: tl.constexpr, KIND: tl.constexpr, NORMALISE: tl.constexpr, GROUP_SCORE: tl.constexpr,
    EPS: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, E: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """(experts [KP] int32, weights [KP] fp32) of the token whose logits these are; expert 0 and no weight past K."""
    e = expert_numbers(E, G, BLOCK_G, BLOCK_S)
    z = tl.load(logits + e, mask=e < E, other=0.0, cache_modifier=".cg").to(DTYPE).to(tl.float32)
    rank, weight = choose(z, route_bias, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G, CHOSEN)
    e, slot = tl.reshape(e, [1, BLOCK_G * BLOCK_S]), tl.arange(0, KP)
    experts, weights = tl.zeros([KP], tl.int32), tl.zeros([KP], tl.float32)
    for k in tl.static_range(K):
        experts = tl.where(slot == k, tl.max(tl.where(rank == k, e, 0)), experts)
        weights = tl.where(slot == k, tl.sum(tl.where(rank == k, weight, 0.0)), weights)
    return experts, weights


@triton.jit
def _fold(x, VEC: tl.constexpr):
    """[R, C] -> [R, C / VEC]: sums of VEC neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // VEC, VEC]), 2)
