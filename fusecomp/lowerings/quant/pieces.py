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
    """fp32 of e2m1 codes 0..15: moved into fp16's fields they are 2^14 too small, the denormal included."""
    code = code.to(tl.int16)
    half = ((code & 8) << 12) | ((code & 7) << 9)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


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


def _two_bytes(place: int, dtype: str) -> str:
    """PTX: the e4m3fn bytes `place` of two words as two floats; there is no conversion to bf16."""
    halves = f"prmt.b32 t, $1, $2, 0x00{4 + place}{place}; mov.b32 {{l, h}}, t; cvt.rn.f16x2.e4m3x2 t, l; "
    if dtype == "fp16":
        return f"{{ .reg .b32 t; .reg .b16 l, h; {halves}mov.b32 $0, t; }}"
    wide = "mov.b32 {l, h}, t; cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 $0, b, a; "
    return f"{{ .reg .b32 t; .reg .b16 l, h; .reg .f32 a, b; {halves}{wide}}}"


# By place, of bf16 and then of fp16.
BYTES = tl.constexpr(tuple(_two_bytes(i, dtype) for dtype in ("bf16", "fp16") for i in range(4)))


@triton.jit
def _part(word, PLACE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The fp8 code PLACE of int32 words, exact; ASM: by the GPU's own conversion."""
    if not ASM:
        return _fp8_value((word >> 8 * PLACE) & 255).to(DTYPE)
    elif tl.float16 == DTYPE:
        half_asm: tl.constexpr = BYTES[4 + PLACE]
        return tl.inline_asm_elementwise(half_asm, "=r,r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    else:
        asm: tl.constexpr = BYTES[PLACE]
        return tl.inline_asm_elementwise(asm, "=r,r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def word_values(word, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """[A, B, 16] int32 words of four fp8 codes -> [A, B, 64] values, in the order of `word_order`.

    A thread's words become its part of the product's operand: nothing is exchanged between threads.
    """
    a = tl.join(_part(word, 0, DTYPE, ASM), _part(word, 2, DTYPE, ASM))
    b = tl.join(_part(word, 1, DTYPE, ASM), _part(word, 3, DTYPE, ASM))
    parts = tl.permute(tl.reshape(tl.join(a, b), [word.shape[0], word.shape[1], 16, 4]), [0, 1, 3, 2])
    return tl.reshape(parts, [word.shape[0], word.shape[1], 64])


@triton.jit
def word_order(v):
    """[A, 64, T] inputs in the order of `word_values`: columns 0, 4, ..., 60, 1, 5, ..."""
    by_place = tl.permute(tl.reshape(v, [v.shape[0], 16, 4, v.shape[2]]), [0, 2, 1, 3])
    return tl.reshape(by_place, [v.shape[0], 64, v.shape[2]])


@triton.jit
def unscaled(code, DTYPE: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr, OFFSET: tl.constexpr):
    """[R, C] of DTYPE: what codes [R, C], or their bytes [R, C / 2], stand for before zero and scale."""
    if KIND == 0 and ASM:  # a few integer operations, where fp32 would take the slow conversion
        return code.to(DTYPE)
    else:
        return values(code, KIND, OFFSET).to(DTYPE)


@triton.jit
def scaled(part, sums, s, z, acc, HAS_ZERO: tl.constexpr):
    """acc + (part - zero * sums) * s: part of products with codes, sums of the inputs that made it."""
    if HAS_ZERO:
        part -= z * sums
    return acc + part * s


@triton.jit
def half_of(pair, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """fp32 of one of two 16-bit numbers of int32 words, the first in the lowest bits."""
    if tl.bfloat16 == DTYPE:
        return ((pair & -65536) if PLACE else (pair << 16)).to(tl.float32, bitcast=True)
    else:
        return (pair >> (16 * PLACE)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def ask_l2_for(at, size, go):
    """Ask the L2 for `size` bytes from each address on, multiples of 16 both, where `go` is not 0; by TMA."""
    asm: tl.constexpr = (
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    )
    tl.inline_asm_elementwise(asm, "=r,l,r,r", [at, size, go], dtype=tl.int32, is_pure=False, pack=1)


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
    return scale_numbers(raw_scales(scale, row, column, k, stride, COLS, EVEN_K))


@triton.jit
def raw_scales(scale, row, column, k, stride, COLS: tl.constexpr, EVEN_K: tl.constexpr):
    """As `load_scales`, as they are stored: nothing waits for them yet."""
    place = row * stride + (column // COLS if COLS else column * 0)
    if EVEN_K:
        return tl.load(scale + place, eviction_policy="evict_last")
    else:
        return tl.load(scale + place, mask=(column < k) & (row >= 0), other=0.0, eviction_policy="evict_last")


@triton.jit
def scale_numbers(found):
    """fp32 of stored scales or zeros."""
    if found.dtype == tl.uint8:  # e8m0: an exponent; 255 is no number, and 2^-127 a denormal
        bits = found.to(tl.int32)
        number = tl.where(bits == 0, 0x400000, bits << 23)
        return tl.where(bits == 255, 0x7FC00000, number).to(tl.float32, bitcast=True)
    elif found.dtype == tl.int8:  # e4m3fn bytes, which zero points may be
        return byte_values(found, 1)
    else:
        return found.to(tl.float32)
