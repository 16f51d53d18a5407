"""Kernel of a linear layer by folded 4-bit integers, for one or two tokens, whose programs stay and hold the inputs.

Each warp has 256 columns: its lanes hold their inputs as the matrix units' operand, made once, and it goes over the
rows of the program with them. Codes go through the compiler's pipeline of copies, which read whole lines of memory, to
the lanes that multiply them; sums of warps meet in scratch after the last row, so that none waits for another's.

Codes are multiplied as bytes, which a mask makes of them, and for those of a tile's second half a shift. Inputs are
fixed-point numbers of two signed bytes, each warp's by a power of two; of the eight columns of a product two are a
token's, of first bytes and of second ones. Sums of half a tile are exact.

Legend: as in `folded.py`; W warps, L = 32 W lanes, KP = 256 W columns of a program. An operand's dimensions are those
of the matrix units: g, eight groups of lanes, each a row of the weight or a column of inputs; t, four lanes of a group;
and what a lane holds: r, two rows of one, eight apart; a, parts of 64 bytes; s, products of 32; h, halves of those; b,
four bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.linear.skinny_pieces import rms_scale, store_features
from fusecomp.lowerings.quant.fixed_point import FIRST
from fusecomp.lowerings.quant.folded_digits import codes_of_half
from fusecomp.lowerings.quant.folded_pieces import MIDDLE
from fusecomp.lowerings.quant.held_inputs import hold, load_pairs, nothing, of_rows, operand
from fusecomp.lowerings.quant.pieces import ask_l2_for, half_of, load_codes

TILE, ROWS = tl.constexpr(256), tl.constexpr(16)  # columns of a warp; rows of a product


@triton.jit(do_not_specialize=["count"])
def folded_held_kernel(
    x,  # [T, K], last dim contiguous
    q,  # [G * N, K / 2] bytes, contiguous: codes, folded by 64 columns
    scale,  # [G * N, K / 256] int32, contiguous: two scales of bf16, each of 128 columns
    zero,  # as scale, integers 0 to 16, or None
    out,  # [T, N], last dim contiguous
    norm_weight,  # [K], or None
    partials,  # [programs, T, BR, W] fp32, scratch
    warp_scales,  # [programs, T, 2, W] fp32, scratch: what sums are scaled back by, and sums of squares
    counters,  # [programs / S] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    stride_x,
    stride_out,
    count,  # products, of 16 rows each, that a program makes
    n,  # a multiple of 16 / G; G * N * K / 2 is below 2^31
    k,  # KP * S at most, a multiple of 256
    eps,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,  # T: 1 or 2
    BLOCK_R: tl.constexpr,  # a power of two, 16 * count at least
    PARTS: tl.constexpr,  # W
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,  # products of which the L2 is asked for the codes before the wait
    ASK_SCALES: tl.constexpr,  # it is asked for all scales and zero points, which need rows of whole 16 bytes
    EVEN_K: tl.constexpr,  # KP * S is K
    EARLY: tl.constexpr,  # inputs are made in the loop, whose pipeline then asks for its first codes before the wait
    ASM: tl.constexpr,  # an NVIDIA GPU
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A program owns 16 count / G features and one split of K.

    dtypes: x, norm_weight, scales and zero points bf16; out one of bf16, fp16, fp32; sums fp32.
    A token with an input that is no number has none in its output.
    Bytes: G * N * K / 2 and the scales; per program through the L2 2 * T * KP of inputs and 8 * T * W * BR of partial
    sums. Operations: 16 * G * N * K, of bytes.

    Measured on an H200 (benchmarks/quant_linear.py, layers of Llama-8B in a chain, zero points): about 59% of what it
    reads, of two tokens 50%; alone 19.5 us over 60.6 MB, 12.3, 7.6 and 6.1 over 30.3, 13 and 8.7: 4 to 6 us more than
    their bytes take.
    """
    FEATURES: tl.constexpr = ROWS // G
    COLUMNS: tl.constexpr = PARTS * TILE
    split, team = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    program = tl.program_id(0).to(tl.int64)
    first = team * (count * FEATURES)
    place = tl.arange(0, 32 * PARTS)
    group = place // 4 % 8
    tile = split * PARTS + place // 32
    # Rows g and g + 8 of a product, groups interleaved: as `weight_rows`. Both are of one group.
    row, width, scale_width = group // G + group % G * n, tl.multiple_of(k // 2, 128), k // TILE
    all_rows, byte = tl.arange(0, ROWS), split * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    byte_at = q + ((all_rows // G + all_rows % G * n) * width)[:, None] + byte[None, :]
    scale_at = scale + row * scale_width + tile
    zero_at = scale_at if zero is None else zero + row * scale_width + tile
    inside = tile * TILE < k

    if USE_PDL:
        gdc_launch_dependents()
    if ASK_SCALES:
        _ask_scales(scale, zero, first, count, n, scale_width, split, place, G, SPLITS)
    start = tl.minimum(first, n - FEATURES)
    s = _scales(scale_at + start * scale_width, inside, scale_width, G, EVEN_K)
    z = s if zero is None else _scales(zero_at + start * scale_width, inside, scale_width, G, EVEN_K)
    column = tile * TILE + place % 32 * 2
    g = load_pairs(norm_weight, column, k) if NORM >= 2 else 1.0
    if ASM and AHEAD > 0:
        _ask_l2(q, first, count, n, k, split, place, G, SPLITS, AHEAD)
    scales_at = warp_scales + team.to(tl.int64) * (SPLITS * BLOCK_T * 2 * PARTS)
    own_at = scales_at + split * (BLOCK_T * 2 * PARTS)
    if EARLY:
        held = nothing(PARTS)
    else:
        if USE_PDL:
            gdc_wait()
        held = hold(x, g, column, own_at, stride_x, k, BLOCK_T, PARTS, NORM)
    part_at = partials + program * (BLOCK_T * BLOCK_R * PARTS) + place // 32
    for i in range(count):
        start = tl.minimum(first + i * FEATURES, n - FEATURES)
        code = load_codes(byte_at + start * width, (byte < width)[None, :], EVEN_K)
        if EARLY and i == 0:
            if USE_PDL:
                gdc_wait()
            held = hold(x, g, column, own_at, stride_x, k, BLOCK_T, PARTS, NORM)
        sums = _half(code, s, z, held, 0, zero is not None, ASM) + _half(code, s, z, held, 1, zero is not None, ASM)
        _store_sums(part_at + i * (ROWS * PARTS), sums, place, BLOCK_T, BLOCK_R)
        # Scales come after the product, into the registers of those that it has read: nothing waits for a copy.
        start = tl.minimum(first + (i + 1) * FEATURES, n - FEATURES)
        s = _scales(scale_at + start * scale_width, inside, scale_width, G, EVEN_K)
        z = s if zero is None else _scales(zero_at + start * scale_width, inside, scale_width, G, EVEN_K)

    tl.debug_barrier()  # all of the program's stores precede the release, or the loads, below
    last = True
    if SPLITS > 1:
        last = tl.atomic_add(counters + team, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.store(counters + team, 0)
        at = partials + team.to(tl.int64) * (SPLITS * BLOCK_T * BLOCK_R * PARTS)
        rows, end = tl.arange(0, BLOCK_R), tl.minimum(first + count * FEATURES, n)
        for t in tl.static_range(BLOCK_T):
            own_at = scales_at + t * (2 * PARTS)
            acc = _sum_of_parts(at + (t * BLOCK_R + rows) * PARTS, own_at, rows < count * ROWS, BLOCK_T, PARTS, SPLITS)
            if NORM > 0:
                total = tl.zeros([1], tl.float32)
                for j in tl.static_range(SPLITS):
                    squares_at = own_at + (2 * j * BLOCK_T + 1) * PARTS + tl.arange(0, PARTS)
                    total += tl.sum(tl.load(squares_at, cache_modifier=".cg"), 0)
                acc *= rms_scale(total, k, eps)
            store_features(acc[:, None], first, end, out + t * stride_out, args, strides, G, EPILOGUE, t)


@triton.jit
def _ask_l2(q, first, count, n, k, split, place, G: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr):
    """Ask the L2 for the codes of the first AHEAD products, a row to a lane; of the columns of `split`, about."""
    FEATURES: tl.constexpr = ROWS // G
    r, i = place % ROWS, place // ROWS
    start = tl.minimum(first + i * FEATURES, n - FEATURES)
    size = k // (32 * SPLITS) * 16  # bytes, sixteen at least
    at = q.to(tl.int64) + (start + r // G + (r % G).to(tl.int64) * n) * (k // 2) + split * size
    go = (i < tl.minimum(count, AHEAD)).to(tl.int32)
    ask_l2_for(at, size + place * 0, go)


@triton.jit
def _ask_scales(scale, zero, first, count, n, width, split, place, G: tl.constexpr, SPLITS: tl.constexpr):
    """Ask the L2 for a split's share of its team's rows of scales and zero points: memory takes longer than a product.

    The first lanes ask for what is one behind the other: the rows of a group.
    """
    FEATURES: tl.constexpr = ROWS // G
    share = tl.cdiv(count * FEATURES, SPLITS)
    begin = tl.minimum(first + split * share, n)
    size = (tl.minimum(begin + share, n) - begin).to(tl.int32) * (4 * width) + place * 0
    at = (begin + (place % G).to(tl.int64) * n) * (4 * width)
    go = (place < G) & (size > 0)
    ask_l2_for(at + scale.to(tl.int64), size, go.to(tl.int32))
    if zero is not None:
        ask_l2_for(at + zero.to(tl.int64), size, go.to(tl.int32))


@triton.jit
def _scales(at, inside, width, G: tl.constexpr, EVEN_K: tl.constexpr):
    """[L, r] words."""
    if EVEN_K:
        return tl.join(tl.load(at), tl.load(at + 8 // G * width))
    else:
        return tl.join(tl.load(at, mask=inside, other=0), tl.load(at + 8 // G * width, mask=inside, other=0))


@triton.jit
def _half(code, s, z, held, HALF: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr):
    """[W, 16, 4] scaled sums of one half of each warp's columns, of codes [16, 128 W], for up to four tokens."""
    PARTS: tl.constexpr = code.shape[1] // 128
    v = codes_of_half(code, HALF, ASM).to(tl.int8, bitcast=True)
    v = tl.permute(tl.reshape(v, [16, PARTS, 2, 4, 2, 2, 4]), [1, 0, 2, 4, 3, 5, 6])  # row, W, a, t, s, h, b
    part = tl.dot(tl.reshape(v, [PARTS, 16, 128]), operand(held[HALF]), out_dtype=tl.int32)
    first, second = tl.split(tl.reshape(part, [PARTS, 16, 4, 2]))
    whole = (first * FIRST + second).to(tl.float32)
    less = of_rows(half_of(z, HALF, tl.bfloat16)) if HAS_ZERO else MIDDLE
    return (whole - less * held[2 + HALF]) * of_rows(half_of(s, HALF, tl.bfloat16))


@triton.jit
def _store_sums(at, acc, place, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """Stores [W, 16, 4], each lane a token's that it has, where the warps' sums of a row are neighbours."""
    PARTS: tl.constexpr = acc.shape[0]
    acc = tl.permute(tl.reshape(acc, [PARTS, 2, 8, 4]), [0, 2, 3, 1])  # W, g, t, r
    at = (at + (place % 4 * BLOCK_R + place // 4 % 8) * PARTS)[:, None] + tl.arange(0, 2)[None, :] * (8 * PARTS)
    tl.store(at, tl.reshape(acc, [32 * PARTS, 2]), mask=(place % 4 < BLOCK_T)[:, None], eviction_policy=KEEP)


@triton.jit
def _sum_of_parts(
    at, scales_at, mask, BLOCK_T: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """[BR] sums over warps, each scaled back, and then over splits."""
    total = tl.zeros(mask.shape, tl.float32)
    parts = tl.arange(0, PARTS)[None, :]
    for j in tl.static_range(SPLITS):
        part_at = (at + j * (BLOCK_T * mask.shape[0] * PARTS))[:, None] + parts
        part = tl.load(part_at, mask=mask[:, None], other=0.0, cache_modifier=".cg")
        total += tl.sum(part * tl.load(scales_at + j * (BLOCK_T * 2 * PARTS) + parts, cache_modifier=".cg"), 1)
    return total
