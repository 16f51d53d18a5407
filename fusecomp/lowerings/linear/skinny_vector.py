"""Kernel of a linear layer with one token: plain products over register tiles.

Programs are small and many: as one launch ends, programs of the next move in one by one, ask for their weights, and
wait. So reading never stops.

Legend: N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a weight tile, BN = BR / G.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import (
    load_inputs,
    load_norm,
    load_weight,
    norm_factor,
    rms_scale,
    store_features,
    weight_rows,
)


@triton.jit
def vector_kernel(
    x,  # [1, K]
    weight,  # [G * N, K] contiguous
    out,  # [1, N]
    norm_weight,  # [K], or None
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    n,
    k,
    eps,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN features per program, over all of K.

    dtypes: x, weight, norm_weight, out one of fp32, fp16, bf16; products and sums fp32.
    Bytes: (G * N * K + K + N) * itemsize. FLOPs: 2 * G * N * K. Bound by reading the weights.

    Measured on an H200 (benchmarks/linear.py --tune, bf16, chains under dependent launch): 4.33 TB/s over the layers
    of Llama-8B, 4.63 in its lm_head; 3.84 and 4.55 in Llama-1B.
    """
    VEC: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth  # elements of a 16-byte load
    BLOCK_N: tl.constexpr = BLOCK_R // G
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    cols = tl.arange(0, BLOCK_K)[None, :]
    tile_at = weight + weight_rows(first, n, BLOCK_R, G)[:, None] * k + cols

    w = load_weight(tile_at, cols < k, EVEN_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()

    # Sums of VEC neighbours stay within a thread; threads meet once, after the loop.
    acc = tl.zeros([BLOCK_R, BLOCK_K // VEC], tl.float32)
    squares = tl.zeros([1, BLOCK_K // VEC], tl.float32)
    v = load_inputs(x + cols, cols < k, EVEN_K)
    g = norm_factor(load_norm(norm_weight, cols, k, EVEN_K, NORM), NORM)
    for start in range(BLOCK_K, k, BLOCK_K):  # loads one tile, multiplies the one before
        w_next = load_weight(tile_at + start, start + cols < k, EVEN_K)
        v_next = load_inputs(x + start + cols, start + cols < k, EVEN_K)
        g_next = norm_factor(load_norm(norm_weight, start + cols, k, EVEN_K, NORM), NORM)
        if NORM > 0:
            squares += _fold(v * v, VEC)
        acc += _fold(w.to(tl.float32) * (v * g), VEC)
        w, v, g = w_next, v_next, g_next
    acc += _fold(w.to(tl.float32) * (v * g), VEC)
    y = tl.sum(acc, 1)[:, None]  # [BR, 1]
    if NORM > 0:
        squares += _fold(v * v, VEC)
        y *= rms_scale(tl.sum(squares, 1), k, eps)[:, None]
    store_features(y, first, n, out, args, strides, G, EPILOGUE)


@triton.jit
def _fold(x, VEC: tl.constexpr):
    """[R, C] -> [R, C / VEC]: sums of VEC neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // VEC, VEC]), 2)
