"""The persistent matmul of the large-M side of `linear`: Triton kernel and its helpers, no launches.

Legend: T tokens, N output features, K input features, G accumulator groups (2 for gate and up, merged by rows), S splits
of K. A tile is BLOCK_T tokens by BLOCK_N features of every group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weight_rows(first_n, N: tl.constexpr, G: tl.constexpr, BLOCK_N: tl.constexpr):
    # Row of w and feature of each row of a weight tile; groups alternate every 8 rows, so that an MMA fragment of one
    # thread holds gate and up of the same features.
    row = tl.arange(0, G * BLOCK_N)
    if G == 1:
        n = first_n + row
        return n, n
    else:
        n = first_n + row // 16 * 8 + row % 8
        return row // 8 % 2 * N + n, n


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
    # [G * BLOCK_N, BLOCK_K], zeros outside of [N, K].
    if USE_TMA:
        if G == 1:
            return w_tiles.load([first_n, k])
        else:
            return w_tiles.load([first_n // 8, 0, 0, k]).reshape(G * BLOCK_N, BLOCK_K)
    else:
        row, n = _weight_rows(first_n, N, G, BLOCK_N)
        column = k + tl.arange(0, BLOCK_K)
        mask = (n < N)[:, None] & (column < K)[None, :]
        return tl.load(w + row.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0)


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
def _groups(acc, G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    # The G tiles that one accumulator interleaves; see `_weight_rows`.
    if G == 1:
        return (acc,)
    elif SWAP:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 8, 2, 8, BLOCK_T)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_N, BLOCK_T, 2)))
        return (gate, up)
    else:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_T, BLOCK_N // 8, 2, 8)), (0, 1, 3, 2))
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_T, BLOCK_N, 2)))
        return (gate, up)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    SUBTILES: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    # Write accs, G tiles [ROWS, COLUMNS]: features by tokens when swapped, tokens by features otherwise. The store wants
    # another layout than the MMA leaves, and SUBTILES pieces need that much less shared memory to get it.
    if SUBTILES > 1:
        half: tl.constexpr = COLUMNS // 2
        next_t = first_t + half if SWAP else first_t
        next_n = first_n if SWAP else first_n + half
        left, right = _halves(accs[0], ROWS, COLUMNS)
        lefts, rights = (left,), (right,)
        if G == 2:
            left1, right1 = _halves(accs[1], ROWS, COLUMNS)
            lefts, rights = (left, left1), (right, right1)
        _finish(
            lefts, out, args, strides, split, first_t, first_n, num_tokens, stride_o, N, G, ROWS, half, SUBTILES // 2,
            SPLITS, SWAP, EPILOGUE,
        )  # fmt: skip
        _finish(
            rights, out, args, strides, split, next_t, next_n, num_tokens, stride_o, N, G, ROWS, half, SUBTILES // 2,
            SPLITS, SWAP, EPILOGUE,
        )  # fmt: skip
    else:
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        m = (first_t + (column if SWAP else row)).to(tl.int64)
        n = (first_n + (row if SWAP else column)).to(tl.int64)
        mask = (m < num_tokens) & (n < N)
        if SPLITS > 1:
            where = out + (split * num_tokens + m) * (G * N) + n  # m is int64
            tl.store(where, accs[0], mask=mask)
            if G == 2:
                tl.store(where + N, accs[1], mask=mask)
        else:
            result = EPILOGUE(accs, args, strides, m, n, mask)
            tl.store(out + m * stride_o + n, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
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
    SUBTILES: tl.constexpr,
    SWAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    USE_PDL: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """out[T, N] = EPILOGUE(x @ w^T), or with SPLITS > 1 the fp32 sums out[S, T, G * N] of each split, without EPILOGUE.

    x [T, K] with row stride stride_x, w [G * N, K] contiguous, both of one 16-bit or fp32 type; fp32 accumulation; out
    [T, N] with row stride stride_o. With USE_TMA x_tiles and w_tiles describe them: x in blocks [BLOCK_T, BLOCK_K], w in
    [BLOCK_N, BLOCK_K], or for two groups, seen as [N / 8, 2, 8, K], in [BLOCK_N / 8, 2, 8, BLOCK_K].
    SWAP puts the features on the row side of the MMA and the tokens on its column side.

    Program p of P does items p, p + P, ...: one split of one tile each, GROUP_T tiles of tokens sharing each
    weight tile before the next one, so that a wave of programs reads few distinct tiles. FLATTEN keeps the loads of
    the next item in flight during the epilogue. Bytes: those of x and w once per wave of tiles; FLOPs: 2 T G N K.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    ROWS: tl.constexpr = BLOCK_N if SWAP else BLOCK_T
    COLUMNS: tl.constexpr = BLOCK_T if SWAP else BLOCK_N
    items, programs = tiles_t * (TILES_N * SPLITS), tl.num_programs(0)
    for item in tl.range(tl.program_id(0), items, programs, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        split, tile = item % SPLITS, item // SPLITS
        group, inside = tile // (GROUP_T * TILES_N), tile % (GROUP_T * TILES_N)
        height = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
        first_t = (group * GROUP_T + inside % height) * BLOCK_T
        first_n = inside // height * BLOCK_N
        if SWAP:
            acc = tl.zeros((G * BLOCK_N, BLOCK_T), tl.float32)
        else:
            acc = tl.zeros((BLOCK_T, G * BLOCK_N), tl.float32)
        for step in range(STEPS):
            k = (split * STEPS + step) * BLOCK_K
            tokens = _load_tokens(x, x_tiles, first_t, k, num_tokens, stride_x, K, BLOCK_T, BLOCK_K, USE_TMA)
            weights = _load_weights(w, w_tiles, first_n, k, N, K, G, BLOCK_N, BLOCK_K, USE_TMA)
            if SWAP:
                acc = tl.dot(weights, tokens.T, acc)
            else:
                acc = tl.dot(tokens, weights.T, acc)
        _finish(
            _groups(acc, G, BLOCK_T, BLOCK_N, SWAP), out, args, strides, split, first_t, first_n, num_tokens, stride_o,
            N, G, ROWS, COLUMNS, SUBTILES, SPLITS, SWAP, EPILOGUE,
        )  # fmt: skip
