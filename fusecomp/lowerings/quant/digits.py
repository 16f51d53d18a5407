"""Kernels of a linear layer by folded 4-bit integers for a few tokens, whose inputs become two digits of a byte each.

A product of bytes takes codes as they are stored: a mask, and for every second one a shift, make four operands of them,
where 16-bit floats take as much work for two. Inputs are 15-bit fixed-point numbers, with a unit for each half of a
block of columns and token. That is finer than a 16-bit float of the largest of them, and sums of products are exact.

Legend: T tokens, N features of the output, K inputs, G accumulator groups, BR rows of a weight tile, BN = BR / G,
P columns of a quarter of a block of codes, H = 2 P of a half, W warps, each with blocks of its own, C groups of four
tokens. Digits of token t are rows 2 t, which counts 256 units, and 2 t + 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.linear.skinny_pieces import norm_factor, rms_scale, split_groups
from fusecomp.lowerings.quant.folded import prefetch_codes
from fusecomp.lowerings.quant.pieces import raw_scales, scale_numbers, scale_row
from fusecomp.lowerings.quant.rows import largest
from fusecomp.ops.quant import INT4_OFFSET

MIDDLE = tl.constexpr(INT4_OFFSET)
# 1.5 * 2^23 as fp32: integers added to its bits add to its value, so sums need no conversion.
BASE, BASE_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
# Of a number: units are powers of two, by which sums are scaled exactly.
BITS = tl.constexpr(14)


@triton.jit
def digit_rows_kernel(
    x,  # [T, K], last dim contiguous
    norm_weight,  # [K], or None
    digits,  # [2 T, K] int8: of each half both quarters' columns in turn
    units,  # [K / H, 2 T] fp32: what digits count
    sums,  # [K / H, 2 T] int32: of the half's digits
    eps,
    k,
    stride_x,
    ALL: tl.constexpr,  # a power of two from K on
    FOLD: tl.constexpr,
    HALVES: tl.constexpr,  # halves of blocks that a program does
    NORM: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Digits of norm(x), rounded to even; program (t, i) does the i-th HALVES halves of token t.

    dtypes: x, norm_weight one of fp16, bf16; all else in fp32. NaN and infinity make their half's units no number.
    Bytes: T * K * (itemsize + 2); with a norm a program reads the whole row. Registers hold ALL inputs then.
    """
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    at = x + t * stride_x
    factor = tl.full([1, 1], 1.0, tl.float32)
    if NORM > 0:
        every = tl.arange(0, ALL)
        value = tl.load(at + every, mask=every < k, other=0.0).to(tl.float32)
        factor = tl.reshape(rms_scale(tl.sum(value * value, keep_dims=True), k, eps), [1, 1])
    half = tl.program_id(1) * HALVES + tl.arange(0, HALVES)[:, None]
    column = half * (2 * FOLD) + tl.arange(0, FOLD)[None, :]
    within = column < k
    a = _inputs(at, norm_weight, column, within, factor, NORM)
    b = _inputs(at, norm_weight, column + FOLD, within, factor, NORM)
    unit, inverse = _unit(tl.maximum(largest(a, 1), largest(b, 1), propagate_nan=tl.PropagateNan.ALL))
    a_high, a_low = _digits(a * inverse)
    b_high, b_low = _digits(b * inverse)
    place = half * (2 * tl.num_programs(0)) + 2 * t
    some = half * (2 * FOLD) < k
    tl.store(units + place, unit * 256.0, mask=some)
    tl.store(units + place + 1, unit, mask=some)
    tl.store(sums + place, tl.sum(a_high + b_high, 1, keep_dims=True), mask=some)
    tl.store(sums + place + 1, tl.sum(a_low + b_low, 1, keep_dims=True), mask=some)
    position = half * (2 * FOLD) + tl.arange(0, 2 * FOLD)[None, :]
    out = digits + 2 * t * k + position
    tl.store(out, _pairs(a_high, b_high), mask=position < k)
    tl.store(out + k, _pairs(a_low, b_low), mask=position < k)


@triton.jit
def _inputs(at, norm_weight, column, within, factor, NORM: tl.constexpr):
    """Normed inputs in fp32."""
    value = tl.load(at + column, mask=within, other=0.0).to(tl.float32) * factor
    if NORM >= 2:
        value *= norm_factor(tl.load(norm_weight + column, mask=within, other=0.0), NORM)
    return value


@triton.jit
def _unit(size):
    """(the power of two that makes a number's magnitude one below 2^BITS, its inverse); NaN of no number.

    Both are normal: below 2^-100 numbers lose bits, and vanish where a sum of products would be no normal one either.
    """
    exponent = tl.maximum(((size.to(tl.int32, bitcast=True) >> 23) & 255) - (BITS - 1), 27)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(size < float("inf"), unit, float("nan")), inverse


@triton.jit
def _digits(value):
    """int32 (high, low) of numbers rounded to integers, low from -128 to 127."""
    bits = (value + BASE).to(tl.int32, bitcast=True) - BASE_BITS
    high = (bits + 128) >> 8
    return high, bits - (high << 8)


@triton.jit
def _pairs(a, b):
    """[R, C] and [R, C] -> int8 [R, 2 C], taken in turn."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]]).to(tl.int8)


@triton.jit(do_not_specialize=["num_tokens"])
def digits_kernel(
    x,  # [2 T, K] int8 of `digit_rows_kernel`
    units,  # [K / H, 2 T] fp32
    sums,  # [K / H, 2 T] int32
    q,  # [G * N, K / 2] int8, contiguous: folded codes
    scale,  # [ceil(G * N / ROWS), ceil(K / COLS)] contiguous, a float type
    zero,  # as scale, integers 0 to 16 of a float type, or None
    out,  # [T, N], last dim contiguous
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    stride_out,
    stride_scale,
    G: tl.constexpr,
    GROUPS: tl.constexpr,  # C
    BLOCK_R: tl.constexpr,
    FOLD: tl.constexpr,  # P; 4 P divides K
    PARTS: tl.constexpr,  # W
    STEPS: tl.constexpr,  # ceil(K / (4 P W))
    EVEN_N: tl.constexpr,  # BN divides N
    EVEN_K: tl.constexpr,  # 4 P W divides K
    AHEAD: tl.constexpr,  # blocks of a row that the L2 is asked for before the wait
    ASM: tl.constexpr,  # an NVIDIA GPU
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # 0 or a multiple of H
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program i owns tiles i, i + programs, ... of BN features, whose steps of W blocks along K are one loop.

    The pipeline of copies has nothing but codes, so that it begins before the wait for the last kernel. Digits come
    from the L1 after a program's first tile, straight into a thread's part of the product's operand.
    dtypes: out one of fp32, fp16, bf16; sums of a half exact, of halves fp32.
    Bytes: G * N * K / 2 and the scales, 2 * T * K from the L2 per program. Integer operations: 4 * T * G * N * K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    HALF: tl.constexpr = 2 * FOLD
    blocks = k // (2 * HALF)
    part = tl.arange(0, PARTS)[:, None, None]
    byte = tl.arange(0, HALF)
    digit = tl.arange(0, 8)[None, None, :]
    accs = _copies(tl.zeros([PARTS, BLOCK_R, 8], tl.float32), GROUPS)
    row = _rows(0, n, BLOCK_R, G, EVEN_N)
    if USE_PDL:
        gdc_launch_dependents()
        words = tl.reshape(q + row * tl.multiple_of(k // 2, HALF), [BLOCK_R, 1])
        prefetch_codes(words.to(tl.pointer_type(tl.int16), bitcast=True), 0, blocks, AHEAD, FOLD)
    s, z = _weights(scale, zero, row, tl.minimum(part, blocks - 1), k, stride_scale, HALF, ROWS, COLS)
    if USE_PDL:
        gdc_wait()
    count = tl.cdiv(tl.cdiv(n, BLOCK_N) - tl.program_id(0), tl.num_programs(0)) * STEPS
    u = _numbers(units, sums, tl.minimum(part, blocks - 1), digit, num_tokens, GROUPS)
    for i in range(0, count):
        turn, step = i // STEPS, i % STEPS
        block = tl.minimum(step * PARTS + part, blocks - 1)
        row = _rows(turn, n, BLOCK_R, G, EVEN_N)
        codes = tl.load(q + row * tl.multiple_of(k // 2, HALF) + block * HALF + byte[None, None, :],
                        eviction_policy="evict_first")  # fmt: skip
        x_at = x + digit.to(tl.int64) * tl.multiple_of(k, HALF) + block * (2 * HALF) + byte[None, :, None]
        v = _digits_of(x_at, digit, k, num_tokens, HALF, GROUPS)
        s_now, z_now, u_now = s, z, u
        next_step = tl.minimum(i + 1, count - 1)
        after = tl.minimum(next_step % STEPS * PARTS + part, blocks - 1)
        row = _rows(next_step // STEPS, n, BLOCK_R, G, EVEN_N)
        s, z = _weights(scale, zero, row, after, k, stride_scale, HALF, ROWS, COLS)
        u = _numbers(units, sums, after, digit, num_tokens, GROUPS)
        inside = step * PARTS + part < blocks
        accs = _every_group(accs, codes, v, u_now, s_now, z_now, inside, EVEN_K, zero is not None, ASM)
        if step == STEPS - 1:
            first = _first(turn, BLOCK_N)
            for group in tl.static_range(GROUPS):
                _finish(accs[group], out, args, strides, first, group, num_tokens, n, stride_out, G, EPILOGUE)
            accs = _copies(accs[0] * 0.0, GROUPS)


@triton.jit
def _copies(acc, COUNT: tl.constexpr):
    if COUNT == 1:
        return (acc,)
    elif COUNT == 2:
        return acc, acc
    else:
        return acc, acc, acc, acc


@triton.jit
def _finish(
    acc, out, args, strides, first, group: tl.constexpr, num_tokens, n, stride_out, G: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The epilogue and the store of four tokens' sums [W, BR, 8], whose digits are neighbours."""
    BLOCK_R: tl.constexpr = acc.shape[1]
    y = tl.sum(tl.reshape(tl.sum(acc, 0), [BLOCK_R, 4, 2]), 2)
    t = (4 * group + tl.arange(0, 4)).to(tl.int64)[None, :]
    features = (first + tl.arange(0, BLOCK_R // G))[:, None]
    mask = (features < n) & (t < num_tokens)
    y = EPILOGUE(split_groups(y, G), args, strides, t, features, mask)
    tl.store(out + t * stride_out + features, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _first(turn, BLOCK_N: tl.constexpr):
    """The first feature of a program's tile."""
    return (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64) * BLOCK_N


@triton.jit
def _rows(turn, n, BLOCK_R: tl.constexpr, G: tl.constexpr, EVEN_N: tl.constexpr):
    """[1, BR, 1] rows of the weight, of the program's tile of a turn, groups interleaved; past N the last."""
    r = tl.arange(0, BLOCK_R)[None, :, None]
    feature = _first(turn, BLOCK_R // G) + r // G
    return (feature if EVEN_N else tl.minimum(feature, n - 1)) + (r % G).to(tl.int64) * n


@triton.jit
def _weights(scale, zero, row, block, k, stride, HALF: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Stored (scales, zeros) of both halves of blocks; without zeros, scales twice."""
    srow, at = scale_row(row, ROWS), block * (2 * HALF)
    s = _both(scale, srow, at, k, stride, HALF, COLS)
    return s, s if zero is None else _both(zero, srow, at, k, stride, HALF, COLS)


@triton.jit
def _both(scale, srow, column, k, stride, HALF: tl.constexpr, COLS: tl.constexpr):
    one = raw_scales(scale, srow, column, k, stride, COLS, True)
    if COLS == HALF:  # one address
        return one, raw_scales(scale + 1, srow, column, k, stride, COLS, True)
    else:
        return one, one


@triton.jit
def _numbers(units, sums, block, digit, num_tokens, GROUPS: tl.constexpr):
    """By groups of tokens: (units, sums of the digits) of both halves of blocks."""
    one = _numbers_of(units, sums, block, digit, num_tokens)
    if GROUPS == 1:
        return (one,)
    elif GROUPS == 2:
        return one, _numbers_of(units, sums, block, digit + 8, num_tokens)
    else:
        return (
            one, _numbers_of(units, sums, block, digit + 8, num_tokens),
            _numbers_of(units, sums, block, digit + 16, num_tokens),
            _numbers_of(units, sums, block, digit + 24, num_tokens),
        )  # fmt: skip


@triton.jit
def _numbers_of(units, sums, block, digit, num_tokens):
    at, live = block * (4 * num_tokens) + digit, digit < 2 * num_tokens
    return (
        (tl.load(units + at, mask=live, other=0.0), tl.load(units + at + 2 * num_tokens, mask=live, other=0.0)),
        (tl.load(sums + at, mask=live, other=0), tl.load(sums + at + 2 * num_tokens, mask=live, other=0)),
    )


@triton.jit
def _digits_of(at, digit, k, num_tokens, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """By groups of tokens: digits [W, H, 8] of both halves of blocks."""
    if GROUPS == 1:
        return (_halves_of(at, digit, num_tokens, HALF),)
    elif GROUPS == 2:
        return (
            _halves_of(at, digit, num_tokens, HALF), _halves_of(at + 8 * k, digit + 8, num_tokens, HALF)
        )  # fmt: skip
    else:
        return (
            _halves_of(at, digit, num_tokens, HALF), _halves_of(at + 8 * k, digit + 8, num_tokens, HALF),
            _halves_of(at + 16 * k, digit + 16, num_tokens, HALF),
            _halves_of(at + 24 * k, digit + 24, num_tokens, HALF),
        )  # fmt: skip


@triton.jit
def _halves_of(at, digit, num_tokens, HALF: tl.constexpr):
    live = digit < 2 * num_tokens
    return (
        tl.load(at, mask=live, other=0, eviction_policy="evict_last"),
        tl.load(at + HALF, mask=live, other=0, eviction_policy="evict_last"),
    )


@triton.jit
def _every_group(accs, codes, v, u, s, z, inside, EVEN_K: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr):
    """accs with a step's products added, four tokens each."""
    if len(accs) == 1:
        return (_group(accs[0], codes, v[0], u[0], s, z, inside, EVEN_K, HAS_ZERO, ASM),)
    elif len(accs) == 2:
        return (
            _group(accs[0], codes, v[0], u[0], s, z, inside, EVEN_K, HAS_ZERO, ASM),
            _group(accs[1], codes, v[1], u[1], s, z, inside, EVEN_K, HAS_ZERO, ASM),
        )
    else:
        return (
            _group(accs[0], codes, v[0], u[0], s, z, inside, EVEN_K, HAS_ZERO, ASM),
            _group(accs[1], codes, v[1], u[1], s, z, inside, EVEN_K, HAS_ZERO, ASM),
            _group(accs[2], codes, v[2], u[2], s, z, inside, EVEN_K, HAS_ZERO, ASM),
            _group(accs[3], codes, v[3], u[3], s, z, inside, EVEN_K, HAS_ZERO, ASM),
        )


@triton.jit
def _group(
    acc, codes, v, numbers, s, z, inside, EVEN_K: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """acc [W, BR, 8] + (codes - zero) @ digits * units * scale of both halves of blocks."""
    for half in tl.static_range(2):
        u, total = numbers[0][half], numbers[1][half]
        if not EVEN_K:
            u = tl.where(inside, u, 0.0)
        if HAS_ZERO:
            less = scale_numbers(z[half]).to(tl.int32) * total
        else:
            less = tl.broadcast_to(total * MIDDLE, acc.shape)
        product = tl.dot(_nibbles(codes, half, ASM), v[half], -less + BASE_BITS, out_dtype=tl.int32)
        product = product.to(tl.float32, bitcast=True)
        product = tl.fma(product, tl.broadcast_to(u, acc.shape), tl.broadcast_to(u * -BASE, acc.shape))
        acc += product * scale_numbers(s[half])
    return acc


@triton.jit
def _nibbles(codes, HALF: tl.constexpr, ASM: tl.constexpr):
    """int8 of the nibbles of bytes that are codes of a block's first half, or of its second."""
    if not ASM:
        return (codes >> 4 * HALF) & 15
    elif HALF == 0:
        low: tl.constexpr = "and.b32 $0, $1, 0x0f0f0f0f;"
        return tl.inline_asm_elementwise(low, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        high: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }"
        return tl.inline_asm_elementwise(high, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
