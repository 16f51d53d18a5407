"""Inputs as integers of two signed bytes times a power of two, which bytes of codes are multiplied by: their pieces.

The largest input of those that share a power of two is 2^13 to 2^14, so all are off by at most 2^-14 of it. Where one
is no finite number all are zero times infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST = tl.constexpr(256)  # a first byte is worth as many of the second
ROUND, ROUND_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # 1.5 * 2^23 leaves no bits for fractions


@triton.jit
def magnitude(v):
    """fp32 as integers of the order that magnitudes have; NaN is the largest."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exponent_of(largest):
    """Biased exponent of the largest `magnitude`, as `fixed` and `unit_exponent` take it."""
    return tl.maximum(largest >> 23, 14)


@triton.jit
def unit_exponent(exponent):
    """Biased exponent of what the integers are to be multiplied by; infinity's, where a number is not finite."""
    return tl.where(exponent == 255, 255, exponent - 13)


@triton.jit
def fixed(v, exponent):
    """Integers of fp32 `v`."""
    up = ((267 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, 0, (v * up + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS)


@triton.jit
def two_bytes(whole):
    """(first, second), signed, such that FIRST * first + second are the integers."""
    first = (whole + FIRST // 2) >> 8
    return first, whole - first * FIRST
