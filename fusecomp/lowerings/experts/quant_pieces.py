"""Products with experts whose weights are codes: converted on their way to the multiplication.

Legend: E experts, N rows of one expert's weight, D its columns, BT tokens, BN rows and BD columns of a tile, A experts
and B rows of a register tile, U columns of a unit. KIND, ROWS, COLS: see `quant/pieces.py`; GATING: `pieces.py`.
A scale, and a zero point, is [E, ceil(N / ROWS), ceil(D / COLS)] contiguous; 0 stands for all rows or columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fusecomp.lowerings.experts.pieces import dot, load_tokens, weight_rows
from fusecomp.lowerings.quant.pieces import (
    byte_values,
    load_codes,
    load_scales,
    nibble_values,
    scale_row,
    values,
)

PLAIN = -1  # KIND of weights that are numbers
AHEAD: tl.constexpr = tl.constexpr(4)  # tiles of a row that are loaded at once, if there are no more
ONCE_TOKENS: tl.constexpr = tl.constexpr(32)  # up to which no other program will want a tile of codes


@triton.jit
def multiply_codes(
    x_rows,
    live,
    q,  # [E, N, D] codes or [E, N, D / 2] bytes
    q_tiles,  # its descriptor, or None
    scale,
    zero,  # as scale, or None
    expert,
    block,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SWAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    more_rows=None,  # of a second tile of tokens by the same codes, or None
    more_live=None,
    STAGES: tl.constexpr = None,  # of the pipeline, or the launch's
):
    """fp32 products of the rows at x_rows [BT] with a tile of an expert's codes: [BT, BN], or [BN, BT] if SWAP.

    With more_rows a pair of them, for both tiles of tokens.

    COLS is 0, or divides BD, or is a multiple of it. Scales that serve all columns are applied to the accumulator;
    those of a block of columns to the products of a step, where these are fewer than the step's weights, and zero
    points there to the sums of tokens; others to weights. Both are read one step ahead: they are too narrow for the
    pipeline of copies.
    """
    G: tl.constexpr = 2 if GATING == 1 else 1
    PACK: tl.constexpr = 2 if KIND >= 3 else 1  # codes of a byte
    EVEN_D: tl.constexpr = D % BLOCK_D == 0
    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    SCALE_PRODUCTS: tl.constexpr = COLS >= BLOCK_D and BLOCK_T < BLOCK_D
    HAS_ZERO: tl.constexpr = zero is not None
    cols = tl.arange(0, BLOCK_D)
    places = tl.arange(0, BLOCK_D // PACK)[None, :]
    x_at = x_rows[:, None] + cols[None, :]
    rows = weight_rows(block, N, GATING, BLOCK_N, True)[:, None]
    q_at = q + (expert.to(tl.int64) * N + rows) * (D // PACK) + places
    srow = expert_scale_row(expert, rows, N, ROWS)

    acc = tl.zeros([BLOCK_N, BLOCK_T] if SWAP else [BLOCK_T, BLOCK_N], tl.float32)
    more = acc
    s = _tile_scales(scale, srow, 0, D, BLOCK_D, COLS, EVEN_D)
    z = s if zero is None else _tile_scales(zero, srow, 0, D, BLOCK_D, COLS, EVEN_D)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        d, at = step * BLOCK_D, step * (BLOCK_D // PACK)
        inside = at + places < D // PACK  # of neighbours, so that codes are loaded in wide pieces
        tokens = load_tokens(x_at, live, d, D, BLOCK_D)
        if USE_TMA:
            code = q_tiles.load([expert * G, block * (BLOCK_N // G), at]).reshape(BLOCK_N, BLOCK_D // PACK)
        elif BLOCK_T <= ONCE_TOKENS:
            code = load_codes(q_at + at, inside, EVEN_D)
        elif EVEN_D:
            code = tl.load(q_at + at)
        else:
            code = tl.load(q_at + at, mask=inside, other=0.0)
        acc = _add_scaled(code, tokens, z, s, acc, COLS, HAS_ZERO, SCALE_PRODUCTS, SWAP, KIND, OFFSET)
        if more_rows is not None:
            tokens = load_tokens(more_rows[:, None] + cols[None, :], more_live, d, D, BLOCK_D)
            more = _add_scaled(code, tokens, z, s, more, COLS, HAS_ZERO, SCALE_PRODUCTS, SWAP, KIND, OFFSET)
        if COLS > 0:
            ahead = tl.minimum(d + BLOCK_D, (STEPS - 1) * BLOCK_D)
            s = _tile_scales(scale, srow, ahead, D, BLOCK_D, COLS, EVEN_D)
            z = s if zero is None else _tile_scales(zero, srow, ahead, D, BLOCK_D, COLS, EVEN_D)
    if COLS == 0:
        acc *= s if SWAP else s.T
        more *= s if SWAP else s.T
    if more_rows is None:
        return acc
    else:
        return acc, more


@triton.jit
def _add_scaled(
    code, tokens, z, s, acc, COLS: tl.constexpr, HAS_ZERO: tl.constexpr, SCALE_PRODUCTS: tl.constexpr,
    SWAP: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """acc plus the products of a step; SCALE_PRODUCTS: see `multiply_codes`."""
    if SCALE_PRODUCTS:
        part = _add_products(code, tokens, z, s, tl.zeros_like(acc), COLS, False, False, SWAP, KIND, OFFSET)
        if HAS_ZERO:
            sums = tl.sum(tokens.to(tl.float32), 1)
            part -= z * sums[None, :] if SWAP else sums[:, None] * z.T
        return acc + part * (s if SWAP else s.T)
    else:
        return _add_products(code, tokens, z, s, acc, COLS, HAS_ZERO, COLS > 0, SWAP, KIND, OFFSET)


@triton.jit
def expert_scale_row(expert, rows, N: tl.constexpr, ROWS: tl.constexpr):
    """Rows of the scales of all experts that serve these rows of one expert's weight."""
    HEIGHT: tl.constexpr = (N + ROWS - 1) // ROWS if ROWS > 0 else 1
    return expert.to(tl.int64) * HEIGHT + scale_row(rows, ROWS)


@triton.jit
def _tile_scales(scale, srow, start, D: tl.constexpr, BLOCK_D: tl.constexpr, COLS: tl.constexpr, EVEN_D: tl.constexpr):
    """Scales (or zeros) of a tile from column `start` on: [BN, BD / COLS], or [BN, 1] if one serves the tile."""
    WIDTH: tl.constexpr = (D + COLS - 1) // COLS if COLS > 0 else 1
    COUNT: tl.constexpr = BLOCK_D // COLS if COLS > 0 and COLS < BLOCK_D else 1
    columns = start + tl.arange(0, COUNT)[None, :] * COLS
    return load_scales(scale, srow, columns, D, WIDTH, COLS, EVEN_D)


@triton.jit
def _add_products(
    code,
    tokens,
    z,
    s,
    acc,
    COLS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALED: tl.constexpr,
    SWAP: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """acc plus the products of tokens [BT, BD] with dequantized codes [BN, BD], or, if not SCALED, before their scale.

    With few tokens, the two codes of a byte are two products, of the even and the odd columns: then weights stay in the
    registers where their codes were converted, and it is the tokens that change places.
    """
    BLOCK_D: tl.constexpr = tokens.shape[1]
    if KIND >= 3 and tokens.shape[0] <= ONCE_TOKENS and BLOCK_D >= 32:  # matrix units are 16 deep
        even, odd = tl.split(tl.reshape(tokens, [tokens.shape[0], BLOCK_D // 2, 2]))
        low, high = nibble_values(code & 15, KIND, OFFSET), nibble_values(code >> 4, KIND, OFFSET)
        low = _dequantized(low, z, s, BLOCK_D // 2, COLS // 2, HAS_ZERO, SCALED)
        high = _dequantized(high, z, s, BLOCK_D // 2, COLS // 2, HAS_ZERO, SCALED)
        return dot(high.to(tokens.dtype), odd, dot(low.to(tokens.dtype), even, acc, SWAP), SWAP)
    else:
        w = _dequantized(values(code, KIND, OFFSET), z, s, BLOCK_D, COLS, HAS_ZERO, SCALED)
        return dot(w.to(tokens.dtype), tokens, acc, SWAP)


@triton.jit
def _dequantized(
    w, z, s, BLOCK_D: tl.constexpr, COLS: tl.constexpr, HAS_ZERO: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """(w - zero) * scale of fp32 values [BN, BD], or their difference alone."""
    if HAS_ZERO:
        w -= _spread(z, w.shape[0], BLOCK_D, COLS)
    if SCALED:
        w *= _spread(s, w.shape[0], BLOCK_D, COLS)
    return w


@triton.jit
def _spread(s, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COLS: tl.constexpr):
    """A tile's scales as something that broadcasts to [BN, BD]."""
    if COLS == 0 or COLS >= BLOCK_D:
        return s
    else:
        return tl.reshape(tl.broadcast_to(s[:, :, None], [BLOCK_N, BLOCK_D // COLS, COLS]), [BLOCK_N, BLOCK_D])


@triton.jit
def sum_code_products(
    q,  # [E, N, D] codes or [E, N, D / 2] bytes
    scale,
    zero,  # as scale, or None
    expert,  # [A, 1], of which those that are not live are any
    rows,  # [1, B]
    x_rows,  # [A, 1] pointers to inputs
    live,  # [A, 1]
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    X_FIRST: tl.constexpr,
    WAIT: tl.constexpr,
):
    """[A, B] fp32 products of rows of experts with one input each, zero where not live; without matrix units.

    Sums over the columns of a unit, which share a scale, are taken of codes; COLS is 0 or a multiple of 16.
    WAIT: inputs are touched only after the kernel before has ended, the first codes before.
    X_FIRST: inputs are loaded before codes, which then need not change places; it decides the order of sums, as WAIT
    must not.
    """
    PACK: tl.constexpr = 2 if KIND >= 3 else 1  # codes of a byte
    UNIT: tl.constexpr = 16 * PACK if COLS % (16 * PACK) == 0 else 16  # those of a 16-byte load, if they may be
    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    EVEN: tl.constexpr = D % BLOCK_D == 0
    WIDTH: tl.constexpr = (D + COLS - 1) // COLS if COLS > 0 else 1  # of the scale
    HAS_ZERO: tl.constexpr = zero is not None
    A: tl.constexpr = x_rows.shape[0]
    B: tl.constexpr = rows.shape[1]
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    places = tl.arange(0, BLOCK_D // PACK)[None, None, :]
    units = tl.arange(0, BLOCK_D // UNIT if COLS > 0 else 1)[None, None, :] * UNIT  # one serves all if COLS is 0
    x_at, live = x_rows[:, :, None] + cols, live[:, :, None]
    q_at = (q + (expert.to(tl.int64) * N + rows) * (D // PACK))[:, :, None] + places
    srow = expert_scale_row(expert, rows, N, ROWS)[:, :, None]
    acc = tl.zeros([A, B, BLOCK_D // UNIT], tl.float32)
    if STEPS <= AHEAD:
        xs, codes, scales, zeros = (), (), (), ()
        for step in tl.static_range(STEPS):  # all loads in flight at once
            start = step * BLOCK_D
            if X_FIRST:  # the products take the layout of what is loaded last
                mask = live if EVEN else live & (start + cols < D)
                xs = xs + (tl.load(x_at + start, mask=mask, other=0.0, eviction_policy="evict_last"),)  # noqa: RUF005
            mask = live if EVEN else live & (start // PACK + places < D // PACK)
            code = tl.load(q_at + start // PACK, mask=mask, other=0.0, eviction_policy="evict_first")
            s = load_scales(scale, srow, start + units, D, WIDTH, COLS, EVEN)
            z = s
            if HAS_ZERO:
                z = load_scales(zero, srow, start + units, D, WIDTH, COLS, EVEN)
            codes, scales, zeros = codes + (code,), scales + (s,), zeros + (z,)  # noqa: RUF005 - as Triton has it
        if WAIT:
            gdc_wait()
        for step in tl.static_range(STEPS):
            start = step * BLOCK_D
            mask = live if EVEN else live & (start + cols < D)
            if not X_FIRST:
                x = tl.load(x_at + start, mask=mask, other=0.0, eviction_policy="evict_last")
            else:
                x = xs[step]
            acc += _unit_products(codes[step], x, scales[step], zeros[step], UNIT, KIND, OFFSET, HAS_ZERO)
    else:
        code = tl.load(q_at, mask=live & (places < D // PACK), other=0.0, eviction_policy="evict_first")
        s = load_scales(scale, srow, units, D, WIDTH, COLS, EVEN)
        z = s
        if HAS_ZERO:
            z = load_scales(zero, srow, units, D, WIDTH, COLS, EVEN)
        if WAIT:
            gdc_wait()
        x = tl.load(x_at, mask=live & (cols < D), other=0.0, eviction_policy="evict_last")
        for start in range(BLOCK_D, D, BLOCK_D):  # loads one tile, multiplies the one before
            mask = live & (start // PACK + places < D // PACK)
            code_next = tl.load(q_at + start // PACK, mask=mask, other=0.0, eviction_policy="evict_first")
            s_next = load_scales(scale, srow, start + units, D, WIDTH, COLS, EVEN)
            z_next = s_next
            if HAS_ZERO:
                z_next = load_scales(zero, srow, start + units, D, WIDTH, COLS, EVEN)
            mask = live & (start + cols < D)
            x_next = tl.load(x_at + start, mask=mask, other=0.0, eviction_policy="evict_last")
            acc += _unit_products(code, x, s, z, UNIT, KIND, OFFSET, HAS_ZERO)
            code, x, s, z = code_next, x_next, s_next, z_next
        acc += _unit_products(code, x, s, z, UNIT, KIND, OFFSET, HAS_ZERO)
    return tl.sum(acc, 2)


@triton.jit
def _unit_products(code, x, s, z, UNIT: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, HAS_ZERO: tl.constexpr):
    """[A, B, C / UNIT] sums over units of dequantized codes times x [A, 1, C]."""
    x = x.to(tl.float32)
    if KIND >= 3:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 1, x.shape[2] // 2, 2]))
        low, high = nibble_values(code & 15, KIND, OFFSET), nibble_values(code >> 4, KIND, OFFSET)
        sums = _units(low * even + high * odd, UNIT // 2)
    else:
        sums = _units(byte_values(code, KIND) * x, UNIT)
    if HAS_ZERO:
        sums -= z * _units(x, UNIT)
    return sums * s


@triton.jit
def _units(x, UNIT: tl.constexpr):
    """[A, B, C] -> [A, B, C / UNIT]: sums of UNIT neighbours."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // UNIT, UNIT]), 3)
