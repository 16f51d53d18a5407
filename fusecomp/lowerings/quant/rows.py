"""Kernel that makes codes of activations, one row a program: norm, scale and rounding in one launch.

Legend: T tokens, K features, B columns of a block that share a scale.

SCALE, how a row's scale is found: 0 it is given for all, 1 from the row, 2 from each block of it, 3 from the maxima of
all rows, which a launch with SCALE 4 wrote.
KIND: of the codes, as in `pieces.py`: int8, fp8 as bytes, or fp8 that the GPU converts itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.linear.norm import parameters, scaled
from fusecomp.lowerings.quant.pieces import byte_values

GIVEN, OF_TOKEN, OF_BLOCK, OF_MAXIMA, MAXIMA = range(5)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(value, AXIS: tl.constexpr):
    """Largest magnitude along an axis; NaN if there is one."""
    return tl.reduce(tl.abs(value), AXIS, _larger, keep_dims=True)


@triton.jit
def _sum_and_larger(a, b, c, d):
    return a + c, tl.maximum(b, d, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fp8_bytes(value):
    """e4m3fn bytes of fp32 numbers in [-448, 448], rounded to even; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # the exponent's bias is 7, not 127
    # Below 2^-6 codes count units of 2^-9; 2^23 + count has the count in its last bits.
    small = (tl.abs(value) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode(value, KIND: tl.constexpr):
    """Codes of fp32 numbers that a scale has brought into their range, clamped to it, rounded to even."""
    if KIND == 0:
        value = tl.clamp(value, -127.0, 127.0)
        return ((value + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23 leaves no bits for fractions
    else:
        value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        return fp8_bytes(value) if KIND == 1 else value.to(tl.float8e4nv)


@triton.jit
def scale_of(magnitude, KIND: tl.constexpr):
    """The scale that makes the largest magnitude the largest code; 1 for zeros."""
    scale = tl.div_rn(magnitude, tl.full(magnitude.shape, 127.0 if KIND == 0 else 448.0, tl.float32))
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quotient(value, scale):
    """value / scale as IEEE has it, but for scales below 2^-126: values half-way between two codes are not rare.

    A reciprocal for the row, and one step of refinement for each value.
    """
    inverse = tl.minimum(
        tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 3e38, propagate_nan=tl.PropagateNan.ALL
    )
    inverse, scale = tl.broadcast_to(inverse, value.shape), tl.broadcast_to(scale, value.shape)
    first = value * inverse
    return tl.fma(tl.fma(-first, scale, value), inverse, first)


@triton.jit
def _write(
    value, scale, out, scales, m, first, k, within,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
    FAKE: tl.constexpr,
):  # fmt: skip
    # Codes of a row's columns k (from `first` on), or what they stand for; scales of its blocks.
    if SCALE == 2:
        BLOCKS: tl.constexpr = BLOCK_K // BLOCK
        value = tl.reshape(value, [BLOCKS, BLOCK])
        scale = scale_of(largest(value, 1), KIND)
        if not FAKE:
            block = first // BLOCK + tl.arange(0, BLOCKS)[:, None]
            width: tl.constexpr = (K + BLOCK - 1) // BLOCK
            tl.store(scales + m * width + block, scale, mask=block < width)
    codes = encode(quotient(value, scale), KIND)
    if FAKE:
        codes = (byte_values(codes, KIND) * scale).to(out.dtype.element_ty)
    if SCALE == 2:
        codes = tl.reshape(codes, [1, BLOCK_K])
    store_rows(out + m * K + k, codes, within, tl.num_programs(0))


@triton.jit
def quantize_row(
    value, scale, given, out, scales, eps, m, k,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PLUS_ONE: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, FAKE: tl.constexpr,
):  # fmt: skip
    """Writes codes of norm(value [1, BLOCK_K]), a whole row with zeros behind, and scales of its blocks: its scale.

    given: the norm's `parameters`, zeros behind the row.
    """
    within = k < K
    if NORM == 2:
        value = tl.where(within, value - tl.sum(value, 1, keep_dims=True) / K, 0.0)
    if NORM and SCALE == 1 and not HAS_BIAS:  # the row's only scale: both of its statistics at once
        weighted = scaled(value, given, HAS_WEIGHT, False, PLUS_ONE)
        square, most = tl.reduce((value * value, tl.abs(weighted)), 1, _sum_and_larger, keep_dims=True)
        factor = tl.rsqrt(square / K + eps)
        value, scale = weighted * factor, scale_of(most * factor, KIND)
    elif NORM:
        factor = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / K + eps)
        value = tl.where(within, scaled(value * factor, given, HAS_WEIGHT, HAS_BIAS, PLUS_ONE), 0.0)
    if SCALE == 4:
        tl.store(scales + m + tl.zeros([1, 1], tl.int32), largest(value, 1))
    else:
        if SCALE == 1 and (HAS_BIAS or not NORM):
            scale = scale_of(largest(value, 1), KIND)
        _write(value, scale, out, scales, m, 0, k, within, K, BLOCK_K, BLOCK, KIND, SCALE, FAKE)
    return scale


@triton.jit
def store_scale(scales, scale, m, SCALE: tl.constexpr):
    """The scale of row m, or from the first row that of all; those of blocks are stored with their codes."""
    if SCALE == 1:
        tl.store(scales + m + tl.zeros([1, 1], tl.int32), scale)
    if SCALE % 3 == 0:  # given, or from the maxima
        if m == 0:
            tl.store(scales + tl.zeros([1, 1], tl.int32), scale)


@triton.jit
def _normed(value, mean, factor, weight, bias, k, within, NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The norm of a part of a longer row."""
    if NORM:
        given = parameters(weight, bias, k, within)
        value = scaled((value - mean) * factor, given, weight is not None, bias is not None, PLUS_ONE)
        value = tl.where(within, value, 0.0)
    return value


@triton.jit(do_not_specialize=["num_rows"])
def quantize_kernel(
    x,  # [T, K], last dim contiguous
    weight,  # [K] of the norm, or None
    bias,  # [K] of the norm, or None
    given,  # SCALE 0: [1], a float type; SCALE 3: [T] fp32 maxima; else None
    out,  # [T, K] codes, or of x's dtype if FAKE; None if SCALE is 4
    scales,  # fp32 [1], [T] or [T, ceil(K / B)]; None if FAKE
    eps,
    num_rows,
    stride_x,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 RMSNorm, 2 LayerNorm
    PLUS_ONE: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    FAKE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Codes and scales of norm(x), or if FAKE what the codes stand for; program i does row i.

    dtypes: x, weight, bias one of fp32, fp16, bf16; everything is computed in fp32, the normed value is not rounded
    before it is quantized. Rows of up to BLOCK_K columns are read once, longer ones once for each statistic and for
    the codes. A NaN in a row makes its dynamic scale NaN.
    Bytes: T * K * (itemsize + 1) and the scales; if FAKE, 2 * T * K * itemsize.
    """
    m = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)[None, :]
    norm = parameters(weight, bias, columns, columns < K)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    one = tl.full([1, 1], 1.0, tl.float32)
    zero = tl.zeros([1, 1], tl.float32)
    mean, factor, scale = zero, one, one
    if SCALE == 0:
        scale = tl.load(given + tl.zeros([1, 1], tl.int32)).to(tl.float32)
    if SCALE == 3:
        magnitude = zero
        for first in range(0, num_rows, 1024):
            row = first + tl.arange(0, 1024)[None, :]
            magnitude = _larger(magnitude, largest(tl.load(given + row, mask=row < num_rows, other=0.0), 1))
        scale = scale_of(magnitude, KIND)
    if K <= BLOCK_K:
        value = tl.load(x + m * stride_x + columns, mask=columns < K, other=0.0).to(tl.float32)
        scale = quantize_row(
            value, scale, norm, out, scales, eps, m, columns, K, BLOCK_K, BLOCK, NORM, weight is not None,
            bias is not None, PLUS_ONE, KIND, SCALE, FAKE,
        )  # fmt: skip
    else:
        if NORM == 2:
            for first in range(0, K, BLOCK_K):
                k = first + columns
                value = tl.load(x + m * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
                mean += tl.sum(value, 1, keep_dims=True) / K
        if NORM:
            square = zero
            for first in range(0, K, BLOCK_K):
                k = first + columns
                value = tl.load(x + m * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
                rest = tl.where(k < K, value - mean, 0.0)
                square += tl.sum(rest * rest, 1, keep_dims=True) / K
            factor = tl.rsqrt(square + eps)
        if SCALE % 3 == 1:  # from the row, or the maxima
            magnitude = zero
            for first in range(0, K, BLOCK_K):
                k = first + columns
                value = tl.load(x + m * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
                value = _normed(value, mean, factor, weight, bias, k, k < K, NORM, PLUS_ONE)
                magnitude = _larger(magnitude, largest(value, 1))
            if SCALE == 4:
                tl.store(scales + m + tl.zeros([1, 1], tl.int32), magnitude)
            scale = scale_of(magnitude, KIND)
        if SCALE != 4:
            for first in range(0, K, BLOCK_K):
                k = first + columns
                value = tl.load(x + m * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
                value = _normed(value, mean, factor, weight, bias, k, k < K, NORM, PLUS_ONE)
                _write(value, scale, out, scales, m, first, k, k < K, K, BLOCK_K, BLOCK, KIND, SCALE, FAKE)
    if not FAKE:
        store_scale(scales, scale, m, SCALE)
