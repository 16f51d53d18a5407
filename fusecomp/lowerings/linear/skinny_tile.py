"""Kernel of a linear layer with tens of tokens: weights on the wide side of the matrix units, through shared memory.

Under dependent launch (USE_PDL) a program asks for its first weight tiles, and may ask the L2 for those after them,
before it waits for the kernel before; activations, scratch and counters are touched only after. Thus a launch begins
reading while the one before it ends, and consecutive launches may share scratch and counters.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile,
BN = BR / G, BT tokens of an accumulator, S splits of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.linear.skinny_pieces import (
    load_norm,
    load_weight,
    norm_factor,
    rms_scale,
    split_groups,
    sum_of_splits,
    weight_rows,
)


@triton.jit(do_not_specialize=["num_tokens", "per_split"])
def tile_kernel(
    x,  # [T, K], last dim contiguous
    weight,  # [G * N, K] contiguous
    out,  # [T, N], last dim contiguous
    norm_weight,  # [K], or None
    partials,  # [programs, BR, BT] fp32, scratch
    part_squares,  # [programs, BT] fp32, scratch
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    per_split,  # weight tiles along K of one split; no split is empty
    eps,
    stride_x,
    stride_out,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PIPELINED: tl.constexpr,  # tiles that the compiler's pipeline has in flight; 0 keeps one in registers
    EARLY: tl.constexpr,  # weights, not inputs, go through the pipeline, which then begins before the wait
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EXACT_NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Up to BT tokens per program on the narrow side of the matrix units, weights on the wide one.

    A program owns BN features of BT tokens and one split of K. With S > 1 the last of the S programs to arrive sums
    their partial results in order of the splits, so results do not depend on who was last.

    PIPELINED: the compiler's pipeline of asynchronous copies; otherwise one tile is in registers while the next loads.
    dtypes: x, weight, norm_weight, out one of fp32, fp16, bf16; operands of the product in weight's, sums fp32.
    Bytes: G * N * K * itemsize, plus T * K * itemsize from the L2 per BN features, plus 8 * S * G * N * BT of partials
    if S > 1. FLOPs: 2 * T * G * N * K.

    Measured on an H200 (benchmarks/linear.py --tune, bf16, chains under dependent launch, layers of Llama-8B): 3.79,
    3.69, 3.53 and 2.77 TB/s at 8, 16, 32 and 64 tokens; 4.32, 4.33, 4.14 and 3.28 in its lm_head. Layers of Llama-1B:
    2.93, 2.87, 2.43 and 1.84. What is lost is mostly the time between launches, about 4 us each.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    t_block, t_blocks, split, block, first, lo, hi = tile_place(
        num_tokens, per_split, k, BLOCK_T, BLOCK_N, BLOCK_K, SPLITS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    row_at = weight + weight_rows(first, n, BLOCK_R, G)[:, None] * k
    cols = tl.arange(0, BLOCK_K)
    tile_at = row_at + cols[None, :]
    x_at = x + t * stride_x + cols[:, None]

    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_K // 8, BLOCK_T], tl.float32)
    scale = tl.full([1, BLOCK_T], 1.0, tl.float32)
    SUM_SQUARES: tl.constexpr = NORM > 0 and not EXACT_NORM
    start = lo * BLOCK_K
    if PIPELINED == 0:
        w = load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
    if USE_PDL:
        gdc_launch_dependents()
    if PIPELINED > 0 and EARLY:
        # A load of nothing: the loop carries the inputs in the layout of their loads.
        v = tl.load(x_at, mask=live & (num_tokens < 0), other=0.0)
        g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
        for tile in range(lo, hi):
            # The pipeline asks for the weights of its first stages before the loop, hence the wait is within: it and
            # all loads of inputs stand in branches, which the pipeline leaves in their place.
            start = tile * BLOCK_K
            w = load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
            if tile == lo:
                if USE_PDL:
                    gdc_wait()
                if EXACT_NORM:
                    scale = rms_scale(sum_squares_of(x_at, cols, live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
                v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            squares = add_squares(squares, v, SUM_SQUARES)
            y = normalize(v, g, scale, NORM)
            if tile + 1 < hi:
                start += BLOCK_K
                v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
                g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            acc = tl.dot(w, y, acc, input_precision="ieee")
    elif PIPELINED > 0:
        if USE_PDL:
            for i in tl.static_range(PIPELINED):
                if lo + i < hi:
                    prefetch(row_at, (lo + i) * BLOCK_K, k, BLOCK_K)
            gdc_wait()
        if EXACT_NORM:
            scale = rms_scale(sum_squares_of(x_at, cols, live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
        for tile in range(lo, hi):
            start = tile * BLOCK_K
            w = load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
            v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            squares = add_squares(squares, v, SUM_SQUARES)
            acc = tl.dot(w, normalize(v, g, scale, NORM), acc, input_precision="ieee")
    else:
        if USE_PDL:
            gdc_wait()
        if EXACT_NORM:
            scale = rms_scale(sum_squares_of(x_at, cols, live, k, BLOCK_T, BLOCK_K), k, eps)[None, :]
        v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
        g = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
        for tile in range(lo + 1, hi):  # loads one tile, multiplies the one before
            start = tile * BLOCK_K
            w_next = load_weight(tile_at + start, (start + cols < k)[None, :], EVEN_K)
            v_next = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
            g_next = load_norm(norm_weight, spread(start + cols, BLOCK_T), k, EVEN_K, NORM)
            squares = add_squares(squares, v, SUM_SQUARES)
            acc = tl.dot(w, normalize(v, g, scale, NORM), acc, input_precision="ieee")
            w, v, g = w_next, v_next, g_next
        squares = add_squares(squares, v, SUM_SQUARES)
        acc = tl.dot(w, normalize(v, g, scale, NORM), acc, input_precision="ieee")

    finish_tile(
        acc, squares, out, args, strides, partials, part_squares, counters, block, t_block, t_blocks, split, first, t,
        live, n, k, eps, stride_out, G, SPLITS, SUM_SQUARES, EPILOGUE,
    )  # fmt: skip


@triton.jit
def tile_place(
    num_tokens,
    per_split,
    k,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """(block of tokens, of how many, split, block of features, its first, first and last step + 1) of this program.

    Programs of the same weights are neighbours.
    """
    t_blocks = tl.cdiv(num_tokens, BLOCK_T)
    t_block = tl.program_id(0) % t_blocks
    split = tl.program_id(0) // t_blocks % SPLITS
    block = tl.program_id(0) // t_blocks // SPLITS
    first = block.to(tl.int64) * BLOCK_N
    lo = split * per_split
    hi = tl.minimum(lo + per_split, tl.cdiv(k, STEP))
    return t_block, t_blocks, split, block, first, lo, hi


@triton.jit
def finish_tile(
    acc,
    squares,
    out,
    args,
    strides,
    partials,
    part_squares,
    counters,
    block,
    t_block,
    t_blocks,
    split,
    first,
    t,
    live,
    n,
    k,
    eps,
    stride_out,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Sums of the splits, the norm's scale, the epilogue and the store of acc [BR, BT]; squares [*, BT] are inputs'."""
    BLOCK_R: tl.constexpr = acc.shape[0]
    BLOCK_T: tl.constexpr = acc.shape[1]
    BLOCK_N: tl.constexpr = BLOCK_R // G
    sum_squares = tl.sum(squares, 0)  # [BT]
    last = True
    if SPLITS > 1:
        team = block.to(tl.int64) * t_blocks + t_block
        last, acc, sum_squares = sum_of_splits(
            acc, sum_squares, partials, part_squares, counters, team, split, BLOCK_R, BLOCK_T, SPLITS, SUM_SQUARES
        )
    if last:
        if SUM_SQUARES:
            acc *= rms_scale(sum_squares, k, eps)[None, :]
        features = (first + tl.arange(0, BLOCK_N))[:, None]
        mask = (features < n) & live
        y = EPILOGUE(split_groups(acc, G), args, strides, t, features, mask)
        store_rows(out + t * stride_out + features, y.to(out.dtype.element_ty), mask, t_blocks * BLOCK_T)


@triton.jit
def load_tokens(at, cols, live, k, EVEN_K: tl.constexpr):
    """[BK, BT] inputs, zero for tokens past T and columns past K."""
    if EVEN_K:
        return tl.load(at, mask=live, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(at, mask=live & (cols < k), other=0.0, eviction_policy="evict_last")


@triton.jit
def spread(cols, BLOCK_T: tl.constexpr):
    """[BK] -> [BK, BT]: loads of the norm's weight are then laid out, and as wide, as those of the inputs."""
    return tl.broadcast_to(cols[:, None], [cols.shape[0], BLOCK_T])


@triton.jit
def add_squares(squares, v, SUM_SQUARES: tl.constexpr):
    """Adds the squares of 8 neighbours along K, which stay within a thread."""
    if SUM_SQUARES:
        v = v.to(tl.float32)
        squares += tl.sum(tl.reshape(v * v, [squares.shape[0], 8, squares.shape[1]]), 1)
    return squares


@triton.jit
def normalize(v, g, scale, NORM: tl.constexpr):
    """[BK, BT], the product's operand: inputs times the norm's factors, in the inputs' dtype."""
    if NORM > 0:
        v = (v.to(tl.float32) * scale * norm_factor(g, NORM)).to(v.dtype)
    return v


@triton.jit
def sum_squares_of(x_at, cols, live, k, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BT] sums of squares of whole tokens."""
    squares = tl.zeros([BLOCK_K, BLOCK_T], tl.float32)
    for start in range(0, k, BLOCK_K):
        v = load_tokens(x_at + start, start + cols[:, None], live, k, False).to(tl.float32)
        squares += v * v
    return tl.sum(squares, 0)


@triton.jit
def prefetch(row_at, start, k, BLOCK_K: tl.constexpr):
    """Ask the L2 for the lines of BK columns from `start` on, up to the last one."""
    LINE: tl.constexpr = 1024 // row_at.dtype.element_ty.primitive_bitwidth
    lines = row_at + tl.minimum(start + tl.arange(0, BLOCK_K // LINE) * LINE, k - 1)[None, :]
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
