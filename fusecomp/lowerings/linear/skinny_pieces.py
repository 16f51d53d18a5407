"""What the skinny kernels share: rows of the weight, loads, the norm, and the epilogue that does nothing.

Legend: N features of the output, K inputs, G accumulator groups (2: gate and up, merged by rows), BR rows of a weight
tile, BN = BR / G features of it. A tile interleaves the rows of its groups (feature 0 of gate, feature 0 of up, ...),
so one product serves all groups.

NORM, in all kernels: 0 no norm, 1 RMSNorm without weight, 2 with weight w, 3 with 1 + w. The norm's weight multiplies
the inputs as they are loaded; its scale multiplies the sums, for the sum of squares is free: every program reads all
of its tokens' inputs anyway. EXACT_NORM scales the inputs too, before the product, as fp16 needs, where x * w may
overflow; they are read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.keep import KEEP


@triton.jit
def plain(accs, args, strides, m, n, mask):
    """The epilogue that does nothing."""
    return accs[0]


@triton.jit
def weight_rows(first, n, BLOCK_R: tl.constexpr, G: tl.constexpr):
    """[BR] int64 rows of the weight, groups interleaved. Features past N read the last one; they are not stored."""
    r = tl.arange(0, BLOCK_R)
    return tl.minimum(first + r // G, n - 1) + (r % G).to(tl.int64) * n


@triton.jit
def split_groups(acc, G: tl.constexpr):
    """[BR, C] -> tuple of G tiles [BN, C]."""
    if G == 1:
        return (acc,)
    else:
        return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0] // 2, 2, acc.shape[1]]), [0, 2, 1]))


@triton.jit
def store_features(y, first, n, out, args, strides, G: tl.constexpr, EPILOGUE: tl.constexpr, TOKEN: tl.constexpr = 0):
    """The epilogue and the store of one token's sums y [BR, 1], whose features begin at `first`, to its row `out`."""
    features = (first + tl.arange(0, y.shape[0] // G))[:, None]
    mask = features < n
    y = EPILOGUE(split_groups(y, G), args, strides, tl.full([1, 1], TOKEN, tl.int64), features, mask)
    tl.store(out + features, y.to(out.dtype.element_ty), mask=mask, eviction_policy=KEEP)


@triton.jit
def load_weight(at, mask, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_inputs(at, mask, EVEN_K: tl.constexpr):
    """Inputs of one token in fp32, zero past K."""
    if EVEN_K:
        return tl.load(at, eviction_policy="evict_last").to(tl.float32)
    else:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def load_norm(norm_weight, cols, k, EVEN_K: tl.constexpr, NORM: tl.constexpr):
    """The norm's weight in `cols`, zero past K; 1 where there is none."""
    if NORM <= 1:
        return tl.full([1, 1], 1.0, tl.float32)
    else:
        if EVEN_K:
            return tl.load(norm_weight + cols, eviction_policy="evict_last")
        else:
            return tl.load(norm_weight + cols, mask=cols < k, other=0.0, eviction_policy="evict_last")


@triton.jit
def norm_factor(g, NORM: tl.constexpr):
    g = g.to(tl.float32)
    if NORM == 3:
        g += 1.0
    return g


@triton.jit
def rms_scale(sum_squares, k, eps):
    """RMSNorm's factor of each token."""
    return tl.rsqrt(sum_squares / k + eps)


@triton.jit
def sum_of_splits(
    acc,
    sum_squares,
    partials,
    part_squares,
    counters,
    team,
    split,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
):
    """(whether this program is the last of its team, then the team's sums) of acc [BR, BT] and squares [BT].

    Parts are summed in order of the splits, so results do not depend on who was last.
    """
    part_at = partials + tl.arange(0, BLOCK_R)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    part_squares_at = part_squares + tl.arange(0, BLOCK_T)
    mine = team * SPLITS + split
    tl.store(part_at + mine * (BLOCK_R * BLOCK_T), acc, eviction_policy=KEEP)
    if SUM_SQUARES:
        tl.store(part_squares_at + mine * BLOCK_T, sum_squares)
    tl.debug_barrier()  # all of the program's stores precede the release below
    last = tl.atomic_add(counters + team, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(counters + team, 0)
        acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
        sum_squares = tl.zeros([BLOCK_T], tl.float32)
        for s in tl.static_range(SPLITS):
            acc += tl.load(part_at + (team * SPLITS + s) * (BLOCK_R * BLOCK_T), cache_modifier=".cg")
            if SUM_SQUARES:
                sum_squares += tl.load(part_squares_at + (team * SPLITS + s) * BLOCK_T, cache_modifier=".cg")
    return last, acc, sum_squares
