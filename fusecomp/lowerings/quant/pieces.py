"""What the kernels of quantized weights share: loads of codes and scales, and what codes stand for.

KIND, in all kernels: 0 int8, 1 fp8 (e4m3fn, as bytes), 2 fp8 that the GPU converts itself, 3 int4, 4 fp4 (e2m1), 5 nf4.
ROWS, COLS: rows and columns that share a scale; 0 for all.

Legend: R, C rows and columns of a tile of codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8, FP8, NATIVE_FP8, INT4, FP4, NF4 = range(6)


@triton.jit
def magic(code):
    """Small non-negative integers as fp32, without the slow conversion: 2^23 + code has code in its last bits."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _fp8_value(code):
    """fp32 of e4m3fn bytes: moved into fp16's fields they are 2^8 too small, denormals included."""
    byte = code.to(tl.int16)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _fp4_value(code):
    """fp32 of e2m1 codes 0..15, by their doubled magnitudes 0, 1, 2, 3, 4, 6, 8, 12."""
    code = code.to(tl.int32)
    exponent, mantissa = (code >> 1) & 3, code & 1
    doubled = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
    value = doubled.to(tl.float32) * 0.5
    return tl.where(code >= 8, -value, value)


@triton.jit
def _pick(bit, zero: tl.constexpr, one: tl.constexpr):
    return tl.where(bit, one, zero)


@triton.jit
def _nf4_value(code):
    """fp32 of codes 0..15 of the normal distribution's quantiles, chosen bit by bit."""
    b0, b1 = (code & 1) != 0, (code & 2) != 0
    b2, b3 = (code & 4) != 0, (code & 8) != 0
    low = tl.where(
        b2,
        tl.where(
            b1,
            _pick(b0, -0.09105003625154495, 0.0),
            _pick(b0, -0.28444138169288635, -0.18477343022823334),
        ),
        tl.where(
            b1,
            _pick(b0, -0.5250730514526367, -0.39491748809814453),
            _pick(b0, -1.0, -0.6961928009986877),
        ),
    )
    high = tl.where(
        b2,
        tl.where(b1, _pick(b0, 0.7229568362236023, 1.0), _pick(b0, 0.44070982933044434, 0.5626170039176941)),
        tl.where(
            b1,
            _pick(b0, 0.24611230194568634, 0.33791524171829224),
            _pick(b0, 0.07958029955625534, 0.16093020141124725),
        ),
    )
    return tl.where(b3, high, low)


@triton.jit
def nibble_values(code, KIND: tl.constexpr, OFFSET: tl.constexpr):
    """fp32 of 4-bit codes 0..15, integers less OFFSET."""
    if KIND == 4:
        return _fp4_value(code)
    elif KIND == 5:
        return _nf4_value(code)
    else:
        value = magic(code)
        return value - OFFSET if OFFSET > 0 else value


@triton.jit
def byte_values(code, KIND: tl.constexpr):
    """fp32 of 8-bit codes."""
    return _fp8_value(code) if KIND == 1 else code.to(tl.float32)


@triton.jit
def values(code, KIND: tl.constexpr, OFFSET: tl.constexpr):
    """fp32 [R, C] of the codes [R, C], or of their bytes [R, C / 2], in the order of the columns."""
    if KIND >= 3:
        both = tl.join(nibble_values(code & 15, KIND, OFFSET), nibble_values(code >> 4, KIND, OFFSET))
        return tl.reshape(both, [code.shape[0], 2 * code.shape[1]])
    else:
        return byte_values(code, KIND)


@triton.jit
def load_codes(at, mask, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(at, eviction_policy="evict_first")
    elif at.dtype.element_ty.is_floating():
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def scale_row(row, ROWS: tl.constexpr):
    """Row of the scale of a row of the weight."""
    if ROWS == 0:
        return row * 0
    elif ROWS == 1:
        return row
    else:
        return row // ROWS


@triton.jit
def load_scales(scale, row, column, k, stride, COLS: tl.constexpr, EVEN_K: tl.constexpr):
    """Scales (or zeros) in fp32 [R, C'], of rows [R, 1] of the scale and columns [1, C'] of the weight; 0 past K."""
    place = row * stride + (column // COLS if COLS else column * 0)
    if EVEN_K:
        found = tl.load(scale + place, eviction_policy="evict_last")
    else:
        found = tl.load(scale + place, mask=(column < k) & (row >= 0), other=0.0, eviction_policy="evict_last")
    if scale.dtype.element_ty == tl.uint8:  # e8m0: an exponent; 255 is no number, and 2^-127 a denormal
        bits = found.to(tl.int32)
        number = tl.where(bits == 0, 0x400000, bits << 23)
        return tl.where(bits == 255, 0x7FC00000, number).to(tl.float32, bitcast=True)
    elif scale.dtype.element_ty == tl.int8:  # e4m3fn bytes, which zero points may be
        return byte_values(found, 1)
    else:
        return found.to(tl.float32)
