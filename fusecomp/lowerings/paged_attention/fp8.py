"""Pieces for an FP8 KV cache: what codes stand for, and how a head becomes codes and a scale.

`ops/kv_cache.py` defines both; the bits written here are those of its reference. CODES, in all kernels: 0 for a plain
cache, 1 for codes that are converted by moving bits, 2 where the GPU converts e4m3 itself (compute capability 8.9 on).

Legend: T tokens or keys, D head dim (DP: padded to a power of two), B page size, N keys of one tile, P [R, N]
probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.quant.pieces import FP8, NATIVE_FP8, byte_values

PLAIN = 0
__all__ = ["FP8", "NATIVE_FP8", "PLAIN"]


@triton.jit
def operand(code, CODES: tl.constexpr, WIDE: tl.constexpr):
    """Codes as an operand of a product, exactly: fp16, or fp32 where WIDE."""
    if CODES == 2:
        half = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return half.to(tl.float32) if WIDE else half
    else:
        value = byte_values(code, 1)
        return value if WIDE else value.to(tl.float16)


@triton.jit
def scale_of(top):
    """The least power of two s >= 2^-100 with top <= 448 * s."""
    exponent = ((top.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    return (tl.maximum(exponent, 27) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse(scale):
    """1 / scale of a power of two."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def power_below(scale):
    """The largest power of two that is no larger."""
    return (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(y):
    """e4m3 codes of fp32 |y| <= 448, to nearest even, by its bits."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 a code counts steps of 2^-9, and adding 2^23 rounds to an integer.
    small = (tl.abs(y) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _encoded(y, CODES: tl.constexpr):
    """e4m3 codes of fp32 y, the nearest; 448 beyond it."""
    y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    if CODES == 2:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return _rounded(y)


@triton.jit
def quantized(x_TD, CODES: tl.constexpr):
    """Codes [T, DP] and scale [T] of heads in fp32; what is not finite becomes NaN.

    Four scales are tried, as `quantize_heads` does and with its choice: squared errors are added as integers, in fp32,
    which is exact up to 2^24, four times the most that the best can have. Codes are made again for the chosen scale,
    and not kept: ptxas 12.8 loses codes that are both stored and converted back (`machine_code.py`).
    """
    finite = tl.abs(x_TD) < float("inf")
    x_TD = tl.where(finite, x_TD, 0.0)
    scale = scale_of(tl.max(tl.abs(x_TD), 1))
    y = x_TD * inverse(scale)[:, None]
    chosen = scale
    stretch = scale * 0.0 + 1.0
    least = stretch * float("inf")
    for step in range(4):  # not unrolled: a decode has few registers left
        ratio = 1.0 - step * 0.125
        inverted = tl.where(step == 0, 1.0, tl.where(step == 1, 8.0 / 7.0, tl.where(step == 2, 8.0 / 6.0, 8.0 / 5.0)))
        off = operand(_encoded(y * inverted, CODES), CODES, True) * ratio - y
        error = tl.sum(tl.floor(off * off * 64.0), 1)
        better = error < least
        stretch = tl.where(better, inverted, stretch)
        chosen = tl.where(better, scale * ratio, chosen)
        least = tl.minimum(error, least)
    codes = _encoded(y * stretch[:, None], CODES)
    return tl.where(finite, codes, 0x7F).to(tl.uint8), chosen


@triton.jit
def scaled(code_TD, scale, CODES: tl.constexpr):
    """fp32 values [T, DP] of codes and the scales [T] of their heads."""
    return operand(code_TD, CODES, True) * scale[:, None]


@triton.jit
def pairs_at(kv_cache, g, stride_g, D: tl.constexpr, PAGE: tl.constexpr):
    """Pointer to int32: the pairs of scales of kv head `g` in page 0; pages are stride_page / 4 apart."""
    PAIRS_AT: tl.constexpr = (2 * PAGE * D + 3) // 4 * 4
    return (kv_cache + g.to(tl.int64) * stride_g + PAIRS_AT).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def pair_of(k_scale, v_scale):
    """Two scales, of three significant bits each, as one word of two bf16."""
    return (k_scale.to(tl.int32, bitcast=True) >> 16) | v_scale.to(tl.int32, bitcast=True)


@triton.jit
def scales_of(pair):
    """fp32 scales of K and V of words that `pair_of` made."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def operands(code_pairs, CODES: tl.constexpr, WIDE: tl.constexpr):
    """As `operand`, of int16 that hold two codes: those of the low bytes, and those of the high ones.

    Two rows' pairs lie in one register where values are the second operand of a product; four codes are two
    conversions there. Codes of single bytes would have to be collected from four places.
    """
    if CODES == 2 and not WIDE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 low, high;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {low, high}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [code_pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = operand((code_pairs & 0xFF).to(tl.uint8), CODES, WIDE)
        return low, operand(((code_pairs >> 8) & 0xFF).to(tl.uint8), CODES, WIDE)
