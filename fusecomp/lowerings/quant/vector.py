"""Kernel of a quantized linear layer with one token: plain products of codes and inputs over register tiles.

Sums over the columns of a unit, which share a scale, are taken of codes; scales and zero points then cost one operation
a unit. As in the skinny vector kernel, programs are small and many, and ask for their weights before they wait.

Legend: N features of the output, K inputs, G accumulator groups, BR, BK rows and columns of a tile, BN = BR / G,
U columns of a unit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import (
    load_inputs,
    load_norm,
    norm_factor,
    rms_scale,
    store_features,
    weight_rows,
)
from fusecomp.lowerings.quant.pieces import byte_values, load_codes, load_scales, nibble_values, scale_row


@triton.jit
def quant_vector_kernel(
    x,  # [1, K]
    q,  # [G * N, K] codes or [G * N, K / 2] bytes, contiguous
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type or uint8 exponents
    zero,  # as scale, a float type, or None
    out,  # [1, N]
    norm_weight,  # [K], or None
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    n,
    k,
    eps,
    stride_scale,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_K: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """BN features per program, over all of K. COLS is 0 or a multiple of UNIT.

    dtypes: x, norm_weight, out one of fp32, fp16, bf16; products and sums fp32.
    Bytes: G * N * K * bits / 8, the scales, and (K + N) * itemsize. FLOPs: 2 * G * N * K. Bound by reading the codes.

    Measured on an H100 of 3.2 TB/s (benchmarks/quant_linear.py --tune, fp8 in chains): 81% of it over 58.7 MB, 61% over
    16.8 MB.
    """
    PACK: tl.constexpr = 2 if KIND >= 3 else 1  # codes of a byte
    BLOCK_N: tl.constexpr = BLOCK_R // G
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = weight_rows(first, n, BLOCK_R, G)[:, None]
    cols = tl.arange(0, BLOCK_K)[None, :]
    places = tl.arange(0, BLOCK_K // PACK)[None, :]
    units = tl.arange(0, BLOCK_K // UNIT)[None, :] * UNIT
    tile_at = q + rows * (k // PACK) + places
    srow = scale_row(rows, ROWS)

    code = load_codes(tile_at, places * PACK < k, EVEN_K)
    s = load_scales(scale, srow, units, k, stride_scale, COLS, EVEN_K)
    z = s if zero is None else load_scales(zero, srow, units, k, stride_scale, COLS, EVEN_K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()

    acc = tl.zeros([BLOCK_R, BLOCK_K // UNIT], tl.float32)
    squares = tl.zeros([1, BLOCK_K // UNIT], tl.float32)
    v = load_inputs(x + cols, cols < k, EVEN_K)
    g = norm_factor(load_norm(norm_weight, cols, k, EVEN_K, NORM), NORM)
    for start in range(BLOCK_K, k, BLOCK_K):  # loads one tile, multiplies the one before
        code_next = load_codes(tile_at + start // PACK, start + places * PACK < k, EVEN_K)
        s_next = load_scales(scale, srow, start + units, k, stride_scale, COLS, EVEN_K)
        z_next = s_next if zero is None else load_scales(zero, srow, start + units, k, stride_scale, COLS, EVEN_K)
        v_next = load_inputs(x + start + cols, start + cols < k, EVEN_K)
        g_next = norm_factor(load_norm(norm_weight, start + cols, k, EVEN_K, NORM), NORM)
        if NORM > 0:
            squares += _units(v * v, UNIT)
        acc += _products(code, v * g, s, z, UNIT, KIND, OFFSET, zero is not None)
        code, s, z, v, g = code_next, s_next, z_next, v_next, g_next
    acc += _products(code, v * g, s, z, UNIT, KIND, OFFSET, zero is not None)
    y = tl.sum(acc, 1)[:, None]  # [BR, 1]
    if NORM > 0:
        squares += _units(v * v, UNIT)
        y *= rms_scale(tl.sum(squares, 1), k, eps)[:, None]
    store_features(y, first, n, out, args, strides, G, EPILOGUE)


@triton.jit
def _units(x, UNIT: tl.constexpr):
    """[R, C] -> [R, C / UNIT]: sums of UNIT neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // UNIT, UNIT]), 2)


@triton.jit
def _products(
    code, v, s, z, UNIT: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, HAS_ZERO: tl.constexpr
):  # fmt: skip
    """[R, C / UNIT] sums over units of dequantized codes times v [1, C]."""
    if KIND >= 3:
        even, odd = tl.split(tl.reshape(v, [1, v.shape[1] // 2, 2]))
        low, high = nibble_values(code & 15, KIND, OFFSET), nibble_values(code >> 4, KIND, OFFSET)
        sums = _units(low * even + high * odd, UNIT // 2)
    else:
        sums = _units(byte_values(code, KIND) * v, UNIT)
    if HAS_ZERO:
        sums -= z * _units(v, UNIT)
    return sums * s
