"""The persistent matmul of the large-M side of `linear`: Triton kernel and its helpers, no launches.

Legend: T tokens, N output features, K input features, G accumulator groups (2 for gate and up, merged by rows),
S splits of K. A tile is BLOCK_T tokens by BLOCK_N features of every group.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Bytes of each row of a first weight tile that the L2 is asked for before the wait. Of a 1B model on an H200, steps of
# 64 rows are slower by 1.3, 1, 2.6 and 6% with 128, 512, 1,024 and 2,048, those of 256 by 0, 0.6, 2.2 and 4.6%.
PREFETCHED = tl.constexpr(256)


@triton.jit
def _load_weights(
    w,
    w_tiles,
    first_n,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    # [G * BLOCK_N, BLOCK_K], one group after the other, zeros outside of [N, K].
    if USE_TMA:
        if G == 1:
            return w_tiles.load([first_n, k])
        else:
            return w_tiles.load([0, first_n, k]).reshape(G * BLOCK_N, BLOCK_K)
    else:
        row, column = tl.arange(0, G * BLOCK_N), k + tl.arange(0, BLOCK_K)
        n = first_n + row % BLOCK_N
        mask = (n < N)[:, None] & (column < K)[None, :]
        return tl.load(w + (row // BLOCK_N * N + n).to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_tokens(
    x,
    x_tiles,
    first_t,
    k,
    num_tokens,
    stride_x,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    # [BLOCK_T, BLOCK_K], zeros outside of [T, K].
    if USE_TMA:
        return x_tiles.load([first_t, k])
    else:
        row, column = first_t + tl.arange(0, BLOCK_T), k + tl.arange(0, BLOCK_K)
        mask = (row < num_tokens)[:, None] & (column < K)[None, :]
        return tl.load(x + row.to(tl.int64)[:, None] * stride_x + column[None, :], mask=mask, other=0.0)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # Left and right half of a tile; both are in the registers of the same threads.
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _finish(
    accs,
    out,
    args,
    strides,
    split,
    first_t,
    first_n,
    num_tokens,
    stride_o,
    N: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    POLICY: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    # Write accs, G tiles [ROWS, COLUMNS]: features by tokens when swapped, tokens by features otherwise. The store
    # wants another layout than the MMA leaves, and PIECES pieces need that much less shared memory to get it.
    if PIECES > 1:
        HALF: tl.constexpr = COLUMNS // 2
        next_t = first_t + HALF if SWAP else first_t
        next_n = first_n if SWAP else first_n + HALF
        left, right = _halves(accs[0], ROWS, COLUMNS)
        if G == 1:
            lefts, rights = (left,), (right,)
        else:
            left1, right1 = _halves(accs[1], ROWS, COLUMNS)
            lefts, rights = (left, left1), (right, right1)
        _finish(
            lefts, out, args, strides, split, first_t, first_n, num_tokens, stride_o,
            N, G, ROWS, HALF, PIECES // 2, SPLITS, SWAP, POLICY, EPILOGUE,
        )  # fmt: skip
        _finish(
            rights, out, args, strides, split, next_t, next_n, num_tokens, stride_o,
            N, G, ROWS, HALF, PIECES // 2, SPLITS, SWAP, POLICY, EPILOGUE,
        )  # fmt: skip
    else:
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        m = (first_t + (column if SWAP else row)).to(tl.int64)
        n = (first_n + (row if SWAP else column)).to(tl.int64)
        mask = (m < num_tokens) & (n < N)
        if SPLITS > 1:
            target = out + (split * num_tokens + m) * (G * N) + n  # m is int64
            for g in tl.static_range(G):
                tl.store(target + g * N, accs[g], mask=mask, eviction_policy=POLICY)
        else:
            result = EPILOGUE(accs, args, strides, m, n, mask)
            tl.store(out + m * stride_o + n, result.to(out.dtype.element_ty), mask=mask, eviction_policy=POLICY)


@triton.jit
def _prefetch(w, first_n, k, N: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr):
    # Ask for the first bytes of each row of a weight tile to be brought into the L2.
    WIDTH: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
    row, part = tl.arange(0, G * BLOCK_N)[:, None], tl.arange(0, PREFETCHED // 128)[None, :]
    n = tl.minimum(first_n + row % BLOCK_N, N - 1)
    column = tl.minimum(k + part * WIDTH, K - 1)
    where = w + (row // BLOCK_N * N + n).to(tl.int64) * K + column
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _place(item, tiles_t, TILES_N: tl.constexpr, GROUP_T: tl.constexpr, SPLITS: tl.constexpr):
    # (split, tile of tokens, tile of features) of an item.
    split, tile = item % SPLITS, item // SPLITS
    group, inside = tile // (GROUP_T * TILES_N), tile % (GROUP_T * TILES_N)
    height = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
    return split, group * GROUP_T + inside % height, inside // height


@triton.jit
def _zeros(G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((G * BLOCK_N, BLOCK_T), tl.float32)
    else:
        return tl.zeros((BLOCK_T, G * BLOCK_N), tl.float32)


@triton.jit
def _multiply(
    acc,
    x,
    w,
    x_tiles,
    w_tiles,
    first_t,
    first_n,
    k,
    num_tokens,
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    # acc plus the products of columns k .. k + BLOCK_K; those of fp32 operands in fp32.
    tokens = _load_tokens(x, x_tiles, first_t, k, num_tokens, stride_x, K, BLOCK_T, BLOCK_K, USE_TMA)
    weights = _load_weights(w, w_tiles, first_n, k, N, K, G, BLOCK_N, BLOCK_K, USE_TMA)
    if SWAP:
        return tl.dot(weights, tokens.T, acc, input_precision="ieee")
    else:
        return tl.dot(tokens, weights.T, acc, input_precision="ieee")


@triton.jit
def _groups(acc, G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    if G == 1:
        return (acc,)
    else:
        gate, up = _halves(acc, BLOCK_T, G * BLOCK_N)
        return (gate, up)


@triton.jit(do_not_specialize=["num_tokens"])
def persistent_kernel(
    x,
    w,
    x_tiles,
    w_tiles,
    out,
    args,
    strides,
    num_tokens,
    stride_x,
    stride_o,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    SPLITS: tl.constexpr,
    PIECES: tl.constexpr,
    SWAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    USE_PDL: tl.constexpr,
    POLICY: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """out[T, N] = EPILOGUE(x @ w^T), or with SPLITS > 1 the fp32 sums out[S, T, G * N] of each split, no EPILOGUE.

    x [T, K] with row stride stride_x, w [G * N, K] contiguous, both of one 16-bit or fp32 type; fp32 accumulation; out
    [T, N] with row stride stride_o. With USE_TMA x_tiles and w_tiles describe them: x in blocks [BLOCK_T, BLOCK_K], w
    in [BLOCK_N, BLOCK_K], or for two groups, seen as [2, N, K], in [2, BLOCK_N, BLOCK_K].
    SWAP (one group only) puts the features on the row side of the MMA and the tokens on its column side. POLICY: of
    stores, see `keep.py`.

    Program p of P does items p, p + P, ...: one split of one tile each, GROUP_T tiles of tokens sharing each weight
    tile before the next one, so that a wave of programs reads few distinct tiles. The loads of the next item are in
    flight during the epilogue. With USE_PDL the first weights are on their way before the kernel before has ended.
    Bytes: those of x and w once per wave of tiles; FLOPs: 2 T G N K.
    """
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    ROWS: tl.constexpr = BLOCK_N if SWAP else BLOCK_T
    COLUMNS: tl.constexpr = BLOCK_T if SWAP else BLOCK_N
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        split, _, tile_n = _place(tl.program_id(0), tiles_t, TILES_N, GROUP_T, SPLITS)
        _prefetch(w, tile_n * BLOCK_N, split * STEPS * BLOCK_K, N, K, G, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    for item in tl.range(tl.program_id(0), tiles_t * (TILES_N * SPLITS), tl.num_programs(0), flatten=USE_TMA):
        split, tile_t, tile_n = _place(item, tiles_t, TILES_N, GROUP_T, SPLITS)
        first_t, first_n = tile_t * BLOCK_T, tile_n * BLOCK_N
        acc = _zeros(G, BLOCK_T, BLOCK_N, SWAP)
        for step in range(STEPS):
            acc = _multiply(
                acc, x, w, x_tiles, w_tiles, first_t, first_n, (split * STEPS + step) * BLOCK_K, num_tokens, stride_x,
                N, K, G, BLOCK_T, BLOCK_N, BLOCK_K, SWAP, USE_TMA,
            )  # fmt: skip
        _finish(
            _groups(acc, G, BLOCK_T, BLOCK_N), out, args, strides, split, first_t, first_n, num_tokens, stride_o,
            N, G, ROWS, COLUMNS, PIECES, SPLITS, SWAP, POLICY, EPILOGUE,
        )  # fmt: skip
