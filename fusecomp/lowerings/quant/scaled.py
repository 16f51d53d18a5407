"""The persistent matmul of codes by codes: the one of `linear`, whose sums are scaled before the epilogue.

Legend: T tokens, N output features, K input features, G accumulator groups (2 for gate and up, merged by rows),
S splits of K, X and W the columns that share a scale of x and w. A tile is BLOCK_T tokens by BLOCK_N features of every
group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.linear.persistent import (
    _finish,
    _groups,
    _halves,
    _load_tokens,
    _load_weights,
    _place,
    _prefetch,
)
from fusecomp.lowerings.quant.pieces import scale_row


@triton.jit
def _unpacked(pairs):
    # The two fp16 numbers in each int32, in fp32.
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _packed(low, high):
    bits = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return bits | (low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)


@triton.jit
def _scales(
    x_scale,
    w_scale,
    first_t,
    first_n,
    k,
    num_tokens,
    stride_xs,
    stride_ws,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X_ROWS: tl.constexpr,
    X_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SWAP: tl.constexpr,
):
    # Scales of a tile's tokens and weight rows in the columns from k on, so that both broadcast to its sums.
    column = tl.minimum(k, K - 1)
    t = first_t + tl.arange(0, BLOCK_T)
    x_at = x_scale + t.to(tl.int64) * (stride_xs if X_ROWS else 0) + (column // X_COLS if X_COLS else 0)
    xs = tl.load(x_at, mask=t < num_tokens, other=0.0).to(tl.float32)
    row = tl.arange(0, G * BLOCK_N)
    w_at = w_scale + (column // COLS if COLS else 0)
    if ROWS % BLOCK_N == 0 and (G == 1 or N % BLOCK_N == 0):  # one scale for a tile's rows of a group
        ws = tl.load(w_at + scale_row(first_n, ROWS).to(tl.int64) * stride_ws).to(tl.float32)
        if G == 2:
            up = tl.load(w_at + scale_row(N + first_n, ROWS).to(tl.int64) * stride_ws).to(tl.float32)
            ws = tl.where(row < BLOCK_N, ws, up)
        else:
            ws += tl.zeros([1], tl.float32)
    else:
        n = row // BLOCK_N * N + tl.minimum(first_n + row % BLOCK_N, N - 1)
        ws = tl.load(w_at + scale_row(n, ROWS).to(tl.int64) * stride_ws).to(tl.float32)
    if SWAP:
        return xs[None, :], ws[:, None]
    else:
        return xs[:, None], ws[None, :]


@triton.jit(do_not_specialize=["num_tokens"])
def scaled_kernel(
    x,
    w,
    x_tiles,
    w_tiles,
    x_scale,
    w_scale,
    out,
    args,
    strides,
    num_tokens,
    stride_x,
    stride_o,
    stride_xs,
    stride_ws,
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
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    X_ROWS: tl.constexpr,
    X_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    USE_TMA: tl.constexpr,
    USE_PDL: tl.constexpr,
    POLICY: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """out[T, N] = EPILOGUE((x * x_scale) @ (w * w_scale)^T), or with SPLITS > 1 fp32 sums out[S, T, G * N].

    x [T, K] with row stride stride_x, w [G * N, K] contiguous, both int8 or both e4m3fn. x_scale is fp32, [1], or if
    X_ROWS [T, ceil(K / X)]; w_scale [ceil(G * N / ROWS), ceil(K / W)] of a float type. BLOCK_K divides X and W; where
    both are 0, sums over all of K are scaled once, else those of every BLOCK_K columns.
    Sums are int32, or of fp8 fp32, of which the matrix units of compute capability 9.0 keep about 13 bits: an error of
    0.0013 over 4,096 columns and of 0.0029 over 14,336, where the result's rounding to bf16 is 0.0017. CHUNK steps are
    summed there, 0 for all; sums of chunks are kept in pairs of fp16 times UNIT, for which there are registers.
    Tiles, items, descriptors, SWAP, POLICY and dependent launch are those of `linear/persistent.py`.
    Bytes: those of x and w once per wave of tiles; FLOPs: 2 T G N K.
    """
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    ROW_SIDE: tl.constexpr = G * BLOCK_N if SWAP else BLOCK_T
    COLUMN_SIDE: tl.constexpr = BLOCK_T if SWAP else G * BLOCK_N
    BLOCKWISE: tl.constexpr = X_COLS > 0 or COLS > 0
    SUMS: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        split, _, tile_n = _place(tl.program_id(0), tiles_t, TILES_N, GROUP_T, SPLITS)
        _prefetch(w, tile_n * BLOCK_N, split * STEPS * BLOCK_K, N, K, G, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    for item in tl.range(tl.program_id(0), tiles_t * (TILES_N * SPLITS), tl.num_programs(0), flatten=USE_TMA):
        split, tile_t, tile_n = _place(item, tiles_t, TILES_N, GROUP_T, SPLITS)
        first_t, first_n = tile_t * BLOCK_T, tile_n * BLOCK_N
        acc = tl.zeros((ROW_SIDE, COLUMN_SIDE), tl.float32 if BLOCKWISE else SUMS)
        if CHUNK > 0:
            pairs = tl.zeros((ROW_SIDE, COLUMN_SIDE // 2), tl.int32)
        if BLOCKWISE:
            xs, ws = _scales(
                x_scale, w_scale, first_t, first_n, split * STEPS * BLOCK_K, num_tokens, stride_xs, stride_ws,
                N, K, G, BLOCK_T, BLOCK_N, X_ROWS, X_COLS, ROWS, COLS, SWAP,
            )  # fmt: skip
        for step in range(STEPS):
            k = (split * STEPS + step) * BLOCK_K
            tokens = _load_tokens(x, x_tiles, first_t, k, num_tokens, stride_x, K, BLOCK_T, BLOCK_K, USE_TMA)
            weights = _load_weights(w, w_tiles, first_n, k, N, K, G, BLOCK_N, BLOCK_K, USE_TMA)
            a, b = (weights, tokens.T) if SWAP else (tokens, weights.T)
            if BLOCKWISE:
                xs_next, ws_next = _scales(  # on their way during the product
                    x_scale, w_scale, first_t, first_n, k + BLOCK_K, num_tokens, stride_xs, stride_ws,
                    N, K, G, BLOCK_T, BLOCK_N, X_ROWS, X_COLS, ROWS, COLS, SWAP,
                )  # fmt: skip
                part = tl.dot(a, b, tl.zeros((ROW_SIDE, COLUMN_SIDE), SUMS), out_dtype=SUMS)
                acc += part.to(tl.float32) * (xs * ws)
                xs, ws = xs_next, ws_next
            else:
                acc = tl.dot(a, b, acc, out_dtype=SUMS)
                if CHUNK > 0:
                    if step % CHUNK == CHUNK - 1:
                        left, right = _halves(acc, ROW_SIDE, COLUMN_SIDE)
                        low, high = _unpacked(pairs)
                        pairs = _packed(low + left * UNIT, high + right * UNIT)
                        acc = tl.zeros((ROW_SIDE, COLUMN_SIDE), tl.float32)
        if CHUNK > 0:
            left, right = _halves(acc, ROW_SIDE, COLUMN_SIDE)
            low, high = _unpacked(pairs)
            both = tl.join(left + low / UNIT, right + high / UNIT)
            acc = tl.reshape(tl.permute(both, (0, 2, 1)), (ROW_SIDE, COLUMN_SIDE))
        if not BLOCKWISE:
            xs, ws = _scales(
                x_scale, w_scale, first_t, first_n, 0, num_tokens, stride_xs, stride_ws,
                N, K, G, BLOCK_T, BLOCK_N, X_ROWS, X_COLS, ROWS, COLS, SWAP,
            )  # fmt: skip
            scaled = acc.to(tl.float32) * xs * ws
        else:
            scaled = acc
        _finish(
            _groups(scaled, G, BLOCK_T, BLOCK_N), out, args, strides, split, first_t, first_n, num_tokens, stride_o,
            N, G, BLOCK_N if SWAP else BLOCK_T, BLOCK_T if SWAP else BLOCK_N, PIECES, SPLITS, SWAP, POLICY, EPILOGUE,
        )  # fmt: skip
