"""What the kernels of folded 4-bit integers share: requests to the L2, loads of inputs and scales, codes as operands.

Legend: as in `folded.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.linear.skinny_pieces import load_norm
from fusecomp.lowerings.linear.skinny_tile import normalize
from fusecomp.lowerings.quant.pieces import magic, raw_scales, scale_numbers, scaled
from fusecomp.ops.quant import FOLD_ORDER, INT4_OFFSET

MIDDLE = tl.constexpr(float(INT4_OFFSET))
PLACES = tl.constexpr(FOLD_ORDER)  # nibbles by quarter: the order is its own inverse
# Integers whose last four bits are free in the mantissa, and those behind it.
BIAS_BF16, BIAS_FP16 = tl.constexpr(128.0), tl.constexpr(1024.0)


@triton.jit
def prefetch_small(scale, zero, norm_weight, srow, start, stop, stride, COLS: tl.constexpr, NORM: tl.constexpr):
    """Ask the L2 for scales, zero points and the norm's weight of columns [start, stop), up to a limit of each.

    Loops load them a step ahead, less than what memory takes; programs in step would all wait for the same ones.
    """
    if COLS > 0:
        first = srow * stride + start // COLS
        last = (stop - 1) // COLS - start // COLS
        _prefetch(scale + first + tl.minimum(_sectors(scale, 8), last))
        if zero is not None:
            _prefetch(zero + first + tl.minimum(_sectors(zero, 8), last))
    if NORM >= 2:
        _prefetch(norm_weight + tl.minimum(start + _sectors(norm_weight, 256), stop - 1))


@triton.jit
def prefetch_codes(row_at, lo, hi, AHEAD: tl.constexpr, FOLD: tl.constexpr):
    """Ask the L2 for the first AHEAD of a program's tiles [lo, hi), rows [BR, 1] of which begin at `row_at`."""
    if AHEAD > 0:
        SECTORS: tl.constexpr = 2 * FOLD // 32  # of a row of a tile
        word = (lo * SECTORS + tl.arange(0, AHEAD * SECTORS)) * 16
        _prefetch(row_at + tl.minimum(word, hi * FOLD - 1)[None, :])


@triton.jit
def _sectors(at, COUNT: tl.constexpr):
    """Where the first 32-byte sectors begin, in elements."""
    return tl.arange(0, COUNT) * (256 // at.dtype.element_ty.primitive_bitwidth)


@triton.jit
def _prefetch(at):
    """Ask the L2 for the sectors at `at`."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def quarters(at, mask, FOLD: tl.constexpr, MASKED: tl.constexpr):
    """Inputs [..., P, BT] of each quarter of a tile, whose first is at `at`."""
    return (
        load_quarter(at, mask, MASKED),
        load_quarter(at + FOLD, mask, MASKED),
        load_quarter(at + 2 * FOLD, mask, MASKED),
        load_quarter(at + 3 * FOLD, mask, MASKED),
    )


@triton.jit
def load_quarter(at, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        return tl.load(at, eviction_policy="evict_last")


@triton.jit
def norms(norm_weight, cols, k, FOLD: tl.constexpr, NORM: tl.constexpr):
    """The norm's weight for each of `quarters`, of columns [..., P, BT]."""
    return (
        load_norm(norm_weight, cols, k, True, NORM),
        load_norm(norm_weight, cols + FOLD, k, True, NORM),
        load_norm(norm_weight, cols + 2 * FOLD, k, True, NORM),
        load_norm(norm_weight, cols + 3 * FOLD, k, True, NORM),
    )


@triton.jit
def operands(v, g, factor, squares, NORM: tl.constexpr, SUM_SQUARES: tl.constexpr):
    """(normed inputs of each quarter, sums of squares)."""
    if SUM_SQUARES:  # of all quarters in one place each: a thread's own
        for i in tl.static_range(4):
            squares += v[i].to(tl.float32) * v[i].to(tl.float32)
    y = (
        normalize(v[0], g[0], factor, NORM), normalize(v[1], g[1], factor, NORM),
        normalize(v[2], g[2], factor, NORM), normalize(v[3], g[3], factor, NORM),
    )  # fmt: skip
    return y, squares


@triton.jit
def tile_scales(scale, zero, srow, column, k, stride, FOLD: tl.constexpr, COLS: tl.constexpr):
    """Stored (scales, zeros) [..., BR, 1] of a tile from `column` on, tuples by groups; without zeros, scales twice."""
    s = _groups(scale, srow, column, k, stride, FOLD, COLS)
    return s, s if zero is None else _groups(zero, srow, column, k, stride, FOLD, COLS)


@triton.jit
def _groups(scale, srow, column, k, stride, FOLD: tl.constexpr, COLS: tl.constexpr):
    if COLS == 0 or COLS >= 4 * FOLD:
        return (raw_scales(scale, srow, column, k, stride, COLS, True),)
    elif COLS == 2 * FOLD:  # one address, from which neighbours have constant distances
        return (
            raw_scales(scale, srow, column, k, stride, COLS, True),
            raw_scales(scale + 1, srow, column, k, stride, COLS, True),
        )
    else:
        return (
            raw_scales(scale, srow, column, k, stride, COLS, True),
            raw_scales(scale + 1, srow, column, k, stride, COLS, True),
            raw_scales(scale + 2, srow, column, k, stride, COLS, True),
            raw_scales(scale + 3, srow, column, k, stride, COLS, True),
        )


@triton.jit
def multiply(
    acc, sums, word, y, s, z, FOLD: tl.constexpr, COLS: tl.constexpr, HAS_ZERO: tl.constexpr, SUMS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Adds products of a tile's words [..., BR, P] and inputs y, four [..., P, BT], to acc; to sums those of ones."""
    DTYPE: tl.constexpr = y[0].dtype
    PER: tl.constexpr = 4 if COLS == 0 or COLS >= 4 * FOLD else COLS // FOLD  # quarters that share a scale
    ones = tl.full(word.shape, 1.0, tl.float32).to(DTYPE)
    part, part_sums = acc, sums
    for i in tl.static_range(4):
        if COLS > 0 and i % PER == 0:
            part = tl.zeros(acc.shape, tl.float32)
            part_sums = tl.zeros(acc.shape, tl.float32)
        w = quarter(word, z[i // PER], i, DTYPE, HAS_ZERO, SUMS, ASM)
        part = tl.dot(w, y[i], part, input_precision="ieee")
        if SUMS:
            part_sums = tl.dot(ones, y[i], part_sums, input_precision="ieee")
        if COLS > 0 and (i + 1) % PER == 0:
            less = less_of(z[i // PER], HAS_ZERO, DTYPE)
            acc = scaled(part, part_sums, scale_numbers(s[i // PER]), less, acc, SUMS)
    if COLS > 0:
        return acc, sums
    else:
        return part, part_sums


@triton.jit
def _bias(DTYPE: tl.constexpr):
    """What codes of DTYPE's operand are more by, for SUMS."""
    if tl.float16 == DTYPE:
        return BIAS_FP16
    else:
        return BIAS_BF16


@triton.jit
def less_of(z, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """What sums of inputs take off, for SUMS: the bias and zero points."""
    if HAS_ZERO:
        return scale_numbers(z) + _bias(DTYPE)
    else:
        return _bias(DTYPE) + MIDDLE


def _two_codes(place: int, less: str, dtype: str) -> str:
    """PTX: nibble `place` of two 16-bit words, as two floats plus a bias, that less 8, or plus an operand.

    The nibbles become the last bits of floats that equal the bias.
    """
    bias, one, middle = {
        "bf16": ("0x43004300", "0x3f803f80", "0xc308c308"), "fp16": ("0x64006400", "0x3c003c00", "0xe408e408")
    }[dtype]  # fmt: skip
    moved = f"shr.u32 t, $1, {4 * place}; lop3.b32 t, t" if place else "lop3.b32 t, $1"
    code = f".reg .b32 t, o, m; {moved}, 0x000f000f, {bias}, 0xEA; "
    if less == "bias":
        return f"{{ {code}mov.b32 $0, t; }}"
    code += f"mov.b32 o, {one}; " + (f"mov.b32 m, {middle}; " if less == "middle" else "mov.b32 m, $2; ")
    return f"{{ {code}fma.rn.{'f16' if dtype == 'fp16' else dtype}x2 $0, t, o, m; }}"


# By quarter, of fp16 behind those of bf16.
BIASED, CENTRED, SHIFTED = (
    tl.constexpr(tuple(_two_codes(place, less, dtype) for dtype in ("bf16", "fp16") for place in FOLD_ORDER))
    for less in ("bias", "middle", "operand")
)


@triton.jit
def quarter(
    word, z, QUARTER: tl.constexpr, DTYPE: tl.constexpr, HAS_ZERO: tl.constexpr, SUMS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """[BR, P] of DTYPE, exact: codes of a quarter in int16 words less zero points z [BR, 1], or less 8 without; or, for
    SUMS, plus DTYPE's bias."""
    if not ASM:
        value = magic((word.to(tl.int32) >> 4 * PLACES[QUARTER]) & 15)
        return (value + _bias(DTYPE) if SUMS else value - (scale_numbers(z) if HAS_ZERO else MIDDLE)).to(DTYPE)
    elif HAS_ZERO and not SUMS:
        less = -_bias(DTYPE) - scale_numbers(z)
        if tl.float16 == DTYPE:
            half_asm: tl.constexpr = SHIFTED[4 + QUARTER]
            less = less.to(tl.float16)
            return tl.inline_asm_elementwise(half_asm, "=r,r,r", [word, less], dtype=tl.float16, is_pure=True, pack=2)
        else:
            asm: tl.constexpr = SHIFTED[QUARTER]
            less = less.to(tl.bfloat16)
            return tl.inline_asm_elementwise(asm, "=r,r,r", [word, less], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif tl.float16 == DTYPE:
        half_plain: tl.constexpr = BIASED[4 + QUARTER] if SUMS else CENTRED[4 + QUARTER]
        return tl.inline_asm_elementwise(half_plain, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
    else:
        plain: tl.constexpr = BIASED[QUARTER] if SUMS else CENTRED[QUARTER]
        return tl.inline_asm_elementwise(plain, "=r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2)
