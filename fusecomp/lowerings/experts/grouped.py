"""The two grouped matmuls of the experts: persistent programs over the tiles of a routing plan (see `routing.py`).

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows,
N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns (up: C; down: F), BT rows of the plan and
BN weight rows in a tile, BD columns of a step. GATING: see `pieces.py`.

Both kernels: SWAP puts the weights on the wide side of the matrix units and the tokens on the narrow one. USE_TMA reads
weights through `w_tiles`, the weight seen as [E * G, N / G, D] in blocks [G, BN / G, BD], G = 2 for GATING 1, else 1.
TRANSPOSED weights are [E, D, N] and read as they lie, without TMA. Weights that are codes, which KIND says, have scales
and maybe zero points: see `quant_pieces.py`. GROUP_T tiles of tokens share a weight tile before
the next one. FLAT, of numbers read by TMA: the first loads of a program's next item begin before this one is stored,
in as many PIECES as let the stages of copies stay; nothing is carried from item to item, as Triton's fusion of loops
gives all but the first step of an item what the next one has. dtypes: fp32, fp16 or bf16, products summed in fp32,
those of fp32 operands exact.
Bytes: each touched expert's weight once (again from the L2 for its further tiles). FLOPs: 2 * R * N * D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.pieces import activated, dot, halves, load_tokens, weight_rows
from fusecomp.lowerings.experts.quant_pieces import multiply_codes
from fusecomp.lowerings.keep import KEEP


@triton.jit(do_not_specialize=["capacity"])
def up_kernel(
    x,  # [T, C], last dim contiguous
    plan,
    weight,  # [E, N, C] or, transposed, [E, C, N]; contiguous; codes: [E, N, C] or bytes of two
    w_tiles,  # descriptor of the weight, or None
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, N] contiguous, or None
    hidden,  # [R, F] at the plan's places; those of sentinels are not written
    capacity,
    stride_x,
    K: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    SWAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FLAT: tl.constexpr,
    PIECES: tl.constexpr,
    SIGNAL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """hidden = activation(x[tokens of the plan's rows] @ up^T + bias). SIGNAL: each tile counts its finished blocks."""
    if USE_PDL:
        # In this order, so that the down projection, which the second line lets begin, may read the plan at once.
        gdc_wait()
        gdc_launch_dependents()
    FEATURES: tl.constexpr = N // 2 if GATING else N
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATING else BLOCK_N
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    num_tiles = tl.load(plan)
    tile, block = _place(tl.program_id(0), num_tiles, BLOCKS, GROUP_T)
    next_expert, next_first, next_row = _tile(plan, tile, capacity, BLOCK_T)
    for item in tl.range(tl.program_id(0), num_tiles * BLOCKS, tl.num_programs(0), flatten=FLAT):
        tile, block = _place(item, num_tiles, BLOCKS, GROUP_T)
        if FLAT:
            expert, first, row = _tile(plan, tile, capacity, BLOCK_T)
        else:
            expert, first, row = next_expert, next_first, next_row
            next_tile, _ = _place(item + tl.num_programs(0), num_tiles, BLOCKS, GROUP_T)
            next_expert, next_first, next_row = _tile(plan, next_tile, capacity, BLOCK_T)
        live = row >= 0
        place = first + tl.arange(0, BLOCK_T)
        if KIND >= 0:
            acc = multiply_codes(
                x + (row // K).to(tl.int64) * stride_x, live, weight, w_tiles, scale, zero, expert, block, N, D, GATING,
                BLOCK_T, BLOCK_N, BLOCK_D, SWAP, USE_TMA, KIND, OFFSET, ROWS, COLS,
            )  # fmt: skip
        else:
            acc = multiply(
                x + (row // K).to(tl.int64) * stride_x, live, weight, w_tiles, expert, block,
                (D + BLOCK_D - 1) // BLOCK_D, N, D, GATING, BLOCK_T, BLOCK_N, BLOCK_D, SWAP, TRANSPOSED, USE_TMA,
            )  # fmt: skip
        acc = add_bias(acc, bias, expert, block, N, GATING, BLOCK_N, SWAP)
        y = activated(acc, GATING, SWAP, ACT, ALPHA, LIMIT)
        _store(hidden, y, place.to(tl.int64) * FEATURES, live, block * BLOCK_F, FEATURES, SWAP, PIECES)
        if SIGNAL:
            tl.debug_barrier()  # one thread signals for all
            tl.atomic_add(_finished_blocks(plan, capacity, tile, BLOCK_T), 1, sem="release")


@triton.jit(do_not_specialize=["capacity"])
def down_kernel(
    hidden,  # [R, F] at the plan's places
    h_tiles,  # descriptor of hidden in blocks [BT, BD], or None
    plan,
    weight,  # [E, C, F] or, transposed, [E, F, C]; contiguous; codes: [E, C, F] or bytes of two
    w_tiles,  # descriptor of the weight, or None
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, C] contiguous, or None
    parts,  # [R, C] in the order of rows; those of sentinels are not written
    capacity,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    SWAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FLAT: tl.constexpr,
    PIECES: tl.constexpr,
    UP_BLOCKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """parts = hidden @ down^T + bias, in the order of rows. Bytes beyond the weights: R * F read, R * C written.

    h_tiles: read instead of hidden, in blocks whose last rows may be of another tile, or not written: none is stored.
    UP_BLOCKS: those that `up_kernel` signals for each tile, which are all that is waited for; or 0, for it to end.
    """
    tl.static_assert(UP_BLOCKS == 0 or not (FLAT or h_tiles is not None), "TMA does not see what is signalled")
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    if USE_PDL:
        gdc_launch_dependents()
    # The plan was complete before the up projection let this launch begin.
    num_tiles = tl.load(plan, cache_modifier=".cg")
    tile, block = _place(tl.program_id(0), num_tiles, BLOCKS, GROUP_T)
    next_expert, next_first, next_row = _tile(plan, tile, capacity, BLOCK_T)
    if USE_PDL:
        if tile < num_tiles:
            prefetch(weight, next_expert, block, N, D // 2 if KIND >= 3 else D, BLOCK_N, TRANSPOSED)
        if UP_BLOCKS == 0:
            gdc_wait()
    for item in tl.range(tl.program_id(0), num_tiles * BLOCKS, tl.num_programs(0), flatten=FLAT):
        tile, block = _place(item, num_tiles, BLOCKS, GROUP_T)
        if FLAT:
            expert, first, row = _tile(plan, tile, capacity, BLOCK_T)
        else:
            expert, first, row = next_expert, next_first, next_row
            if UP_BLOCKS > 0:
                # Every program of the up projection has begun before any of these, so that this ends.
                while tl.atomic_add(_finished_blocks(plan, capacity, tile, BLOCK_T), 0, sem="acquire") < UP_BLOCKS:
                    pass
            next_tile, _ = _place(item + tl.num_programs(0), num_tiles, BLOCKS, GROUP_T)
            next_expert, next_first, next_row = _tile(plan, next_tile, capacity, BLOCK_T)
        live = row >= 0
        place = first + tl.arange(0, BLOCK_T)
        if KIND >= 0:
            acc = multiply_codes(
                hidden + place.to(tl.int64) * D, live, weight, w_tiles, scale, zero, expert, block, N, D, 0,
                BLOCK_T, BLOCK_N, BLOCK_D, SWAP, USE_TMA, KIND, OFFSET, ROWS, COLS,
            )  # fmt: skip
        else:
            acc = multiply(
                hidden + place.to(tl.int64) * D, live, weight, w_tiles, expert, block,
                (D + BLOCK_D - 1) // BLOCK_D, N, D, 0, BLOCK_T, BLOCK_N, BLOCK_D, SWAP, TRANSPOSED, USE_TMA,
                x_tiles=h_tiles, first_x=first,
            )  # fmt: skip
        acc = add_bias(acc, bias, expert, block, N, 0, BLOCK_N, SWAP)
        _store(parts, acc, row.to(tl.int64) * N, live, block * BLOCK_N, N, SWAP, PIECES)
    if USE_PDL and UP_BLOCKS > 0:
        # One program, so that this launch does not end before the up projection, whose idle programs read the plan too.
        if tl.program_id(0) == 0:
            gdc_wait()


@triton.jit
def _place(item, num_tiles, BLOCKS: tl.constexpr, GROUP_T: tl.constexpr):
    """(tile of the plan, block of the weight's rows) of an item; without groups it waits for no number of tiles."""
    if GROUP_T == 1:
        return item // BLOCKS, item % BLOCKS
    else:
        group, inside = item // (GROUP_T * BLOCKS), item % (GROUP_T * BLOCKS)
        height = tl.maximum(tl.minimum(num_tiles - group * GROUP_T, GROUP_T), 1)  # 1 for an item past the last
        return group * GROUP_T + inside % height, inside // height


@triton.jit
def _tile(plan, tile, capacity, BLOCK_T: tl.constexpr):
    """(expert, first place, rows [BT]) of a tile; of the last one there is room for if `tile` lies behind it.

    Past the L1, as the down projection reads the plan before it waits.
    """
    tile = tl.minimum(tile, capacity - 1)
    at = plan + 4 + 2 * tile
    row_at = plan + 4 + 2 * capacity + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, first = tl.load(at, cache_modifier=".cg"), tl.load(at + 1, cache_modifier=".cg")
    return expert, first, tl.load(row_at, cache_modifier=".cg")


@triton.jit
def _finished_blocks(plan, capacity, tile, BLOCK_T: tl.constexpr):
    """Where a tile counts the blocks of the up projection that are done."""
    return plan + 4 + (2 + BLOCK_T) * capacity + tile


@triton.jit
def _store(out, tile, row_at, live, first, FEATURES: tl.constexpr, SWAP: tl.constexpr, PIECES: tl.constexpr):
    """Write a tile of tokens, whose rows begin at row_at [BT], and of features from `first` on.

    The store wants another layout than the products have; PIECES pieces need that much less shared memory to get it.
    """
    if PIECES > 1:
        tl.static_assert(not SWAP, "pieces are of features")
        HALF: tl.constexpr = tile.shape[1] // 2
        left, right = halves(tile)
        _store(out, left, row_at, live, first, FEATURES, SWAP, PIECES // 2)
        _store(out, right, row_at, live, first + HALF, FEATURES, SWAP, PIECES // 2)
    elif SWAP:
        feature = first + tl.arange(0, tile.shape[0])
        at, mask = row_at[None, :] + feature[:, None], live[None, :] & (feature < FEATURES)[:, None]
        tl.store(out + at, tile.to(out.dtype.element_ty), mask=mask, eviction_policy=KEEP)
    else:
        feature = first + tl.arange(0, tile.shape[1])
        at, mask = row_at[:, None] + feature[None, :], live[:, None] & (feature < FEATURES)[None, :]
        tl.store(out + at, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_bias(
    acc, bias, expert, block, N: tl.constexpr, GATING: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr
):
    """acc plus the bias of its weight rows."""
    if bias is None:
        return acc
    else:
        rows = weight_rows(block, N, GATING, BLOCK_N, True)
        values = tl.load(bias + expert.to(tl.int64) * N + rows).to(tl.float32)
        return acc + (values[:, None] if SWAP else values[None, :])


@triton.jit
def multiply(
    x_rows,
    live,
    weight,
    w_tiles,
    expert,
    block,
    steps,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    more_rows=None,  # of a second tile of tokens by the same weights, or None
    more_live=None,
    STAGES: tl.constexpr = None,  # of the pipeline, or the launch's
    x_tiles=None,  # descriptor of neighbouring rows in blocks [BT, BD], read instead of x_rows; or None
    first_x=0,  # the first of the rows it reads
):
    """fp32 products of the rows at x_rows [BT] with a tile of an expert's weight: [BT, BN], or [BN, BT] if SWAP.

    With more_rows a pair of them, for both tiles of tokens.
    """
    G: tl.constexpr = 2 if GATING == 1 else 1
    cols = tl.arange(0, BLOCK_D)
    x_at = x_rows[:, None] + cols[None, :]
    base = weight + expert.to(tl.int64) * (N * D)
    # Transposed rows are neighbours in memory: masked, not clamped, they are loaded in wide pieces.
    rows = weight_rows(block, N, GATING, BLOCK_N, not TRANSPOSED)
    EVEN_D: tl.constexpr = D % BLOCK_D == 0
    if TRANSPOSED:
        w_at = base + cols.to(tl.int64)[:, None] * N + rows[None, :]
        inside = (rows < N)[None, :]
        STEP: tl.constexpr = BLOCK_D * N
    else:
        w_at = base + rows.to(tl.int64)[:, None] * D + cols[None, :]
        STEP: tl.constexpr = BLOCK_D
    acc = tl.zeros([BLOCK_N, BLOCK_T] if SWAP else [BLOCK_T, BLOCK_N], tl.float32)
    more = acc
    for step in tl.range(0, steps, num_stages=STAGES):
        d = step * BLOCK_D
        if x_tiles is not None:
            tokens = x_tiles.load([first_x, d])
        else:
            tokens = load_tokens(x_at, live, d, D, BLOCK_D)
        if USE_TMA:
            w = w_tiles.load([expert * G, block * (BLOCK_N // G), d]).reshape(BLOCK_N, BLOCK_D)
        elif TRANSPOSED:
            w = _load_weight(w_at, inside & (d + cols < D)[:, None], EVEN_D and N % BLOCK_N == 0, SWAP).T
        else:
            w = _load_weight(w_at, (d + cols < D)[None, :], EVEN_D, SWAP)
        w_at += STEP
        acc = dot(w, tokens, acc, SWAP)
        if more_rows is not None:
            tokens = load_tokens(more_rows[:, None] + cols[None, :], more_live, d, D, BLOCK_D)
            more = dot(w, tokens, more, SWAP)
    if more_rows is None:
        return acc
    else:
        return acc, more


@triton.jit
def _load_weight(at, mask, EVEN: tl.constexpr, ONCE: tl.constexpr):
    """A tile of a weight, zero where masked; ONCE: few tokens, so that no other program will want it."""
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    if EVEN:
        return tl.load(at, eviction_policy=POLICY)
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def prefetch(weight, expert, block, N: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Ask the L2 for the first 512 bytes of each row of a weight tile."""
    row, part = weight_rows(block, N, 0, BLOCK_N, True).to(tl.int64)[:, None], tl.arange(0, 4)[None, :]
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    base = weight + expert.to(tl.int64) * (N * D)
    if TRANSPOSED:
        at = base + row + tl.minimum(part, D - 1) * N
    else:
        at = base + row * D + tl.minimum(part * LINE, D - 1)
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
