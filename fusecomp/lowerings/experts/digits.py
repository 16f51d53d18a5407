"""Products of experts' fp8 codes with rows that are two fp8 digits: codes go to the matrix units as they lie in memory.

Converted to bf16 in registers a code takes more than two instructions of the three that the loop spends on it, and
energy, of which a step of some dozen tokens has no more: see docs/measurements.md. Rows are few, and each is made into
digits once, so that only the products are twice as many, on matrix units that wait for memory anyway.

Legend: T tokens, E experts, R routed rows, N rows of one expert's weight, D its columns, BT rows of a tile, BN weight
rows and BD columns. GATING: see `pieces.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.experts.pieces import weight_rows
from fusecomp.lowerings.experts.quant_heuristics import MAX_DIGITS
from fusecomp.lowerings.experts.quant_pieces import expert_scale_row
from fusecomp.lowerings.paged_attention.heuristics import next_power_of_2
from fusecomp.lowerings.quant.digit_rows import store_digits
from fusecomp.lowerings.quant.digits import SECOND
from fusecomp.lowerings.quant.pieces import load_scales

LEAST_ROWS = 64  # of a product whose codes the matrix units read from shared memory


@triton.constexpr_function
def halves_apart(gating: int, block_n: int) -> bool:
    """Whether rows of gate and up, which are not neighbours, are two products, or one through registers."""
    return gating == 1 and block_n >= 2 * LEAST_ROWS


@triton.jit
def multiply_digits(
    digits,  # [rows, 2, D], contiguous, e4m3fn or their bytes
    units,  # [rows] fp32
    place,  # [BT] rows of them
    live,
    w_tiles,  # descriptor of the codes: see `grouped.py`; `halves_apart`: in blocks [1, BN / 2, BD]
    scale,
    expert,
    block,
    N: tl.constexpr,
    D: tl.constexpr,  # a multiple of BD
    GATING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    more_place=None,  # of a second tile of rows by the same codes, or None
    more_live=None,
    STAGES: tl.constexpr = None,  # of the pipeline, or the launch's
):
    """fp32 products [BN, BT] of an expert's codes with rows that share a scale; with more_place a pair of them.

    The matrix units add fp8 products with 13 to 14 bits, so their sums are of one step, and steps are added in fp32.
    """
    HALVES: tl.constexpr = 2 if GATING == 1 else 1
    APART: tl.constexpr = 2 if halves_apart(GATING, BLOCK_N) else 1  # products of a step
    BLOCK_M: tl.constexpr = BLOCK_N // APART
    rows = weight_rows(block, N, GATING, BLOCK_N, True)[:, None]
    s = load_scales(scale, expert_scale_row(expert, rows, N, ROWS), tl.zeros([1, 1], tl.int32), D, 1, 0, True)
    at, mask = _columns(digits, place, live, D, BLOCK_D)
    unit = tl.load(units + place, mask=live, other=0.0)[None, :]
    if more_place is not None:
        more_at, more_mask = _columns(digits, more_place, more_live, D, BLOCK_D)
        more_unit = tl.load(units + more_place, mask=more_live, other=0.0)[None, :]
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_T], tl.float32)
    up, more, more_up = acc, acc, acc
    for step in tl.range(0, D // BLOCK_D, num_stages=STAGES):
        d = step * BLOCK_D
        both = tl.load(at + d, mask=mask, other=0.0)
        code = w_tiles.load([expert * HALVES, block * (BLOCK_N // HALVES), d]).reshape(BLOCK_M, BLOCK_D)
        acc = _add(code, both, acc)
        if more_place is not None:
            more_both = tl.load(more_at + d, mask=more_mask, other=0.0)
            more = _add(code, more_both, more)
        if APART == 2:
            code = w_tiles.load([expert * HALVES + 1, block * BLOCK_M, d]).reshape(BLOCK_M, BLOCK_D)
            up = _add(code, both, up)
            if more_place is not None:
                more_up = _add(code, more_both, more_up)
    if more_place is None:
        return _products(acc, up, APART) * (s * unit)
    else:
        return _products(acc, up, APART) * (s * unit), _products(more, more_up, APART) * (s * more_unit)


@triton.jit
def _products(acc, up, APART: tl.constexpr):
    """[BN, BT] of digits' products [BN / APART, 2 BT]."""
    y = _sum_of_digits(acc)
    if APART == 1:
        return y
    else:
        y = tl.permute(tl.join(y, _sum_of_digits(up)), [2, 0, 1])
        return tl.reshape(y, [2 * y.shape[1], y.shape[2]])


@triton.jit
def _columns(digits, place, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(pointers [2 BT, BD], mask): a row's digits are neighbours."""
    BLOCK_T: tl.constexpr = place.shape[0]
    row = _twice(place).to(tl.int64) * 2 + tl.arange(0, 2 * BLOCK_T) % 2
    return digits + row[:, None] * D + tl.arange(0, BLOCK_D)[None, :], (_twice(live.to(tl.int32)) > 0)[:, None]


@triton.jit
def _twice(x):
    """[B] -> [2 B], each twice."""
    return tl.reshape(tl.join(x, x), [2 * x.shape[0]])


@triton.jit
def _add(code, both, acc):
    code, both = code.to(tl.float8e4nv, bitcast=True), both.to(tl.float8e4nv, bitcast=True)
    return acc + tl.dot(code, both.T, out_dtype=tl.float32)


@triton.jit
def _sum_of_digits(acc):
    """[BN, BT] of [BN, 2 BT]."""
    high, low = tl.split(tl.reshape(acc, [acc.shape[0], acc.shape[1] // 2, 2]))
    return high + low * (1.0 / SECOND)


@triton.jit
def convert_hidden(
    hidden,  # [R, F] bf16, written by other programs
    digits,  # [R, 2, F], e4m3fn or their bytes
    units,  # [R] fp32
    list_at,  # of the expert's rows
    count,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    KIND: tl.constexpr,
):
    """Digits of an expert's rows of `hidden`. A row is read past the L1, where what others have written may be old."""
    lanes = tl.arange(0, BLOCK_R)
    f = tl.arange(0, BLOCK_F)[None, :]
    for first in range(0, count, BLOCK_R):
        live = (first + lanes < count)[:, None]
        row = tl.load(list_at + first + lanes, mask=first + lanes < count, other=0, cache_modifier=".cg")
        row = row.to(tl.int64)[:, None]
        y = tl.load(hidden + row * F + f, mask=live & (f < F), other=0.0, cache_modifier=".cg").to(tl.float32)
        store_digits(y, digits, units, row, f, live, F, KIND)


def rows_at_once(columns: int) -> tuple[int, int]:
    """BLOCK_R and BLOCK_F of `convert_hidden`."""
    block = next_power_of_2(columns)
    return max(1, min(8, MAX_DIGITS // block)), block
