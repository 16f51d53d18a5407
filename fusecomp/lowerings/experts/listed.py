"""The two matmuls of the experts by the lists that a router has made of each expert's rows: see `route/kernel.py`.

No launch counts and sorts rows, and a program knows from its number which weights it reads: the first of them ask the
L2 for theirs before the routing is known. A program takes an expert's first rows: a tile or, where tiles are small, two
at a time by the same weights, for by the time of a second one the L2 has them no more. What experts of more rows leave
is shared by the programs of those that have none, where these are enough, or else follows in turn.

Rows may be digits, which codes are multiplied by as they are: see `digits.py`. Those of the hidden activations are made
by the program that finishes an expert's last block.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows (row
r is expert r % K of token r / K), N rows of one expert's weight (up: F, or 2F if gated; down: C), D its columns (up: C;
down: F), BT rows of a tile, BN weight rows and BD columns. GATING, USE_TMA, TRANSPOSED, KIND: as in `grouped.py`.

A unit is the rows of an expert that a program takes at once: BT, or 2 BT. Weights are on the wide side of the matrix
units. Bytes: each touched expert's weight once (again from the L2 for its further units). FLOPs: 2 * R * N * D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.digits import convert_hidden, multiply_digits
from fusecomp.lowerings.experts.grouped import add_bias, multiply, prefetch
from fusecomp.lowerings.experts.pieces import activated, weight_rows
from fusecomp.lowerings.experts.quant_pieces import multiply_codes
from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.quant.pieces import ask_l2_for


@triton.jit(do_not_specialize=["capacity"])
def up_listed_kernel(
    x,  # [T, C], last dim contiguous; or digits [T, 2, C]
    units,  # [T] of digits, or None
    lists,
    weight,  # [E, N, C] or, transposed, [E, C, N]; contiguous; codes: [E, N, C]
    w_tiles,  # descriptor of the weight, or None
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, N] contiguous, or None
    hidden,  # [R, F]
    hidden_digits,  # [R, 2, F], or None
    hidden_units,  # [R], or None
    capacity,
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    GATING: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ASKING: tl.constexpr,  # programs that ask the L2 for the first bytes of their weights before they wait
    ASKED: tl.constexpr,  # bytes of each row, a multiple of 16
    PAIR_STAGES: tl.constexpr,  # of the pipeline with two tiles of tokens; 0: one at a time
    BLOCK_R: tl.constexpr,  # with BLOCK_F, of `convert_hidden`
    BLOCK_F: tl.constexpr,
    SIGNAL: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """hidden = activation(x[r / K] @ up^T + bias) of each row r, and its digits if there is room for them.

    SIGNAL: each expert counts its finished blocks, and one more when its rows are digits.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # of gate and up as many rows each
    UNIT: tl.constexpr = 2 * BLOCK_T if PAIR_STAGES > 0 else BLOCK_T
    F: tl.constexpr = N // 2 if GATING else N
    lanes = tl.arange(0, BLOCK_T)
    expert, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    if ASKING > 0:
        if tl.program_id(0) < ASKING:
            _ask(weight, expert, block, N, D, GATING, BLOCK_N, ASKED)
    if USE_PDL:
        # In this order, so that the down projection, which the second line lets begin, may read lists at once.
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(lists + expert, cache_modifier=".cg")
    row = _list_rows(lists, expert, lanes, True, capacity, E)
    items, helper, helpers = _share(lists, count, expert, block, E, UNIT, BLOCKS)
    for i in range(items):
        unit = i
        if helpers > 0:
            expert, block, unit = _item_left(lists, helper + i * helpers, E, UNIT, BLOCKS)
            count = tl.load(lists + expert, cache_modifier=".cg")
        place = unit * UNIT + lanes
        if unit > 0:
            row = _list_rows(lists, expert, place, True, capacity, E)
        left = count - unit * UNIT
        if PAIR_STAGES > 0 and left > BLOCK_T:
            live = place + BLOCK_T < count
            more = _list_rows(lists, expert, place + BLOCK_T, live, capacity, E)
            acc, more_acc = _products(
                x, stride_x, units, row // K, place < count, weight, w_tiles, scale, zero, expert, block, N, D, GATING,
                BLOCK_T, BLOCK_N, BLOCK_D, TRANSPOSED, USE_TMA, KIND, OFFSET, ROWS, COLS, more // K, live, PAIR_STAGES,
            )  # fmt: skip
            _store_up(acc, row, place < count, bias, hidden, expert, block, N, GATING, BLOCK_N, ACT, ALPHA, LIMIT)
            _store_up(more_acc, more, live, bias, hidden, expert, block, N, GATING, BLOCK_N, ACT, ALPHA, LIMIT)
        elif left > 0:
            live = place < count
            row = tl.where(live, row, 0)
            acc = _products(
                x, stride_x, units, row // K, live, weight, w_tiles, scale, zero, expert, block, N, D, GATING, BLOCK_T,
                BLOCK_N, BLOCK_D, TRANSPOSED, USE_TMA, KIND, OFFSET, ROWS, COLS, None, None, None,
            )  # fmt: skip
            _store_up(acc, row, live, bias, hidden, expert, block, N, GATING, BLOCK_N, ACT, ALPHA, LIMIT)
        if SIGNAL:
            if left > 0:
                tl.debug_barrier()  # one thread signals for all
                if hidden_digits is None:
                    tl.atomic_add(lists + E + expert, 1, sem="release")
                elif tl.atomic_add(lists + E + expert, 1, sem="acq_rel") == BLOCKS * tl.cdiv(count, UNIT) - 1:
                    list_at = lists + 2 * E + 1 + expert * capacity
                    convert_hidden(hidden, hidden_digits, hidden_units, list_at, count, F, BLOCK_R, BLOCK_F, KIND)
                    tl.debug_barrier()
                    tl.atomic_add(lists + E + expert, 1, sem="release")


@triton.jit(do_not_specialize=["capacity"])
def down_listed_kernel(
    hidden,  # [R, F]; or digits [R, 2, F]
    units,  # [R] of digits, or None
    lists,
    weight,  # [E, C, F] or, transposed, [E, F, C]; contiguous; codes: [E, C, F]
    w_tiles,  # descriptor of the weight, or None
    scale,  # of codes, contiguous, or None
    zero,  # as scale, or None
    bias,  # [E, C] contiguous, or None
    parts,  # [R, C]
    capacity,
    E: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    USE_TMA: tl.constexpr,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ASKS: tl.constexpr,  # the L2 for weights whether or not their expert has rows
    PAIR_STAGES: tl.constexpr,  # of the pipeline with two tiles of tokens; 0: one at a time
    UP_BLOCKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """parts = hidden @ down^T + bias. Bytes beyond the weights: R * F read, R * C written.

    UP_BLOCKS: those that `up_listed_kernel` signals for each expert, which are all that is waited for; or 0, for it to
    end.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    UNIT: tl.constexpr = 2 * BLOCK_T if PAIR_STAGES > 0 else BLOCK_T
    lanes = tl.arange(0, BLOCK_T)
    expert, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    if USE_PDL:
        gdc_launch_dependents()
        if ASKS:
            prefetch(weight, expert, block, N, D, BLOCK_N, TRANSPOSED)
        if UP_BLOCKS == 0:
            gdc_wait()
    # Lists were complete before the up projection let this launch begin; past the L1, for nothing was waited for.
    count = tl.load(lists + expert, cache_modifier=".cg")
    row = _list_rows(lists, expert, lanes, True, capacity, E)
    items, helper, helpers = _share(lists, count, expert, block, E, UNIT, BLOCKS)
    for i in range(items):
        unit = i
        if helpers > 0:
            expert, block, unit = _item_left(lists, helper + i * helpers, E, UNIT, BLOCKS)
            count = tl.load(lists + expert, cache_modifier=".cg")
        place = unit * UNIT + lanes
        if unit > 0:
            row = _list_rows(lists, expert, place, True, capacity, E)
        left = count - unit * UNIT
        if USE_PDL and not ASKS:
            if left > 0:
                prefetch(weight, expert, block, N, D, BLOCK_N, TRANSPOSED)
        if UP_BLOCKS > 0:
            if left > 0:
                # Every program of the up projection has begun before any of these, so that this ends.
                all_blocks = UP_BLOCKS * tl.cdiv(count, UNIT) + (1 if units is not None else 0)
                while tl.atomic_add(lists + E + expert, 0, sem="acquire") < all_blocks:
                    pass
        if PAIR_STAGES > 0 and left > BLOCK_T:
            live = place + BLOCK_T < count
            more = _list_rows(lists, expert, place + BLOCK_T, live, capacity, E)
            acc, more_acc = _products(
                hidden, D, units, row, place < count, weight, w_tiles, scale, zero, expert, block, N, D, 0, BLOCK_T,
                BLOCK_N, BLOCK_D, TRANSPOSED, USE_TMA, KIND, OFFSET, ROWS, COLS, more, live, PAIR_STAGES,
            )  # fmt: skip
            _store_down(acc, row, place < count, bias, parts, expert, block, N, BLOCK_N)
            _store_down(more_acc, more, live, bias, parts, expert, block, N, BLOCK_N)
        elif left > 0:
            live = place < count
            row = tl.where(live, row, 0)
            acc = _products(
                hidden, D, units, row, live, weight, w_tiles, scale, zero, expert, block, N, D, 0, BLOCK_T, BLOCK_N,
                BLOCK_D, TRANSPOSED, USE_TMA, KIND, OFFSET, ROWS, COLS, None, None, None,
            )  # fmt: skip
            _store_down(acc, row, live, bias, parts, expert, block, N, BLOCK_N)
    if USE_PDL and UP_BLOCKS > 0:
        # One program, so that launches end in order: the next ones take that for granted of memory they use again.
        if tl.program_id(0) == 0:
            gdc_wait()


@triton.jit
def _list_rows(lists, expert, place, live, capacity, E: tl.constexpr):
    """The rows at these places of an expert's list: some number behind the last, 0 where not live."""
    return tl.load(lists + 2 * E + 1 + expert * capacity + place, mask=live, other=0, cache_modifier=".cg")


@triton.jit
def _share(lists, count, expert, block, E: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr):
    """(items, helper, helpers) of a program: the units of its expert or, of one without rows, its part of what is left.

    An expert's programs leave all units but the first if that is no more than two items for each program of an expert
    without rows; else none helps. Those of an expert of one unit look at no other, nor any where none has more.
    """
    items, helper, helpers = tl.cdiv(count, UNIT), 0, 0
    most = tl.load(lists + 2 * E, cache_modifier=".cg")
    if (most > UNIT) & ((count == 0) | (count > UNIT)):
        counts = _counts(lists, E)
        empty = (counts == 0).to(tl.int32)
        left, free = tl.sum(_units_left(counts, UNIT), 0), tl.sum(empty, 0)
        if left <= 2 * free:
            if count > 0:
                items = 1
            else:
                helper = tl.sum(tl.where(tl.arange(0, empty.shape[0]) < expert, empty, 0), 0) * BLOCKS + block
                helpers = free * BLOCKS
                items = tl.cdiv(tl.maximum(left * BLOCKS - helper, 0), helpers)
    return items, helper, helpers


@triton.jit
def _item_left(lists, item, E: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr):
    """(expert, block, unit) of one of the items that are no expert's first."""
    left = _units_left(_counts(lists, E), UNIT)
    index = item // BLOCKS
    expert = tl.sum((tl.cumsum(left, 0) <= index).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, left.shape[0]) < expert, left, 0), 0)
    return expert, item % BLOCKS, index - before + 1


@triton.jit
def _counts(lists, E: tl.constexpr):
    """[padded E] rows of each expert; one where there is none."""
    e = tl.arange(0, triton.next_power_of_2(E))
    return tl.load(lists + e, mask=e < E, other=1, cache_modifier=".cg")


@triton.jit
def _units_left(counts, UNIT: tl.constexpr):
    """Units of each expert behind its first."""
    return tl.maximum(tl.cdiv(counts, UNIT) - 1, 0)


@triton.jit
def _products(
    x, stride, units, place, live, weight, w_tiles, scale, zero, expert, block, N: tl.constexpr, D: tl.constexpr,
    GATING: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TRANSPOSED: tl.constexpr, USE_TMA: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, more_place, more_live, STAGES: tl.constexpr,
):  # fmt: skip
    """fp32 products [BN, BT] of a block of an expert's weights by rows `place` of x, or a pair by as many more."""
    if units is not None:
        return multiply_digits(
            x, units, place, live, w_tiles, scale, expert, block, N, D, GATING, BLOCK_T, BLOCK_N, BLOCK_D, ROWS,
            more_place, more_live, STAGES,
        )  # fmt: skip
    else:
        x_rows = x + place.to(tl.int64) * stride
        more_rows = None if more_place is None else x + more_place.to(tl.int64) * stride
        if KIND >= 0:
            return multiply_codes(
                x_rows, live, weight, w_tiles, scale, zero, expert, block, N, D, GATING, BLOCK_T, BLOCK_N, BLOCK_D,
                True, USE_TMA, KIND, OFFSET, ROWS, COLS, more_rows, more_live, STAGES,
            )  # fmt: skip
        else:
            return multiply(
                x_rows, live, weight, w_tiles, expert, block, (D + BLOCK_D - 1) // BLOCK_D, N, D, GATING, BLOCK_T,
                BLOCK_N, BLOCK_D, True, TRANSPOSED, USE_TMA, more_rows, more_live, STAGES,
            )  # fmt: skip


@triton.jit
def _store_up(
    acc, row, live, bias, hidden, expert, block, N: tl.constexpr, GATING: tl.constexpr, BLOCK_N: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """hidden of rows [BT] from products [BN, BT]."""
    FEATURES: tl.constexpr = N // 2 if GATING else N
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATING else BLOCK_N
    acc = add_bias(acc, bias, expert, block, N, GATING, BLOCK_N, True)
    y = activated(acc, GATING, True, ACT, ALPHA, LIMIT).to(hidden.dtype.element_ty)
    feature = (block * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    at = hidden + row.to(tl.int64)[None, :] * FEATURES + feature
    tl.store(at, y, mask=live[None, :] & (feature < FEATURES), eviction_policy=KEEP)


@triton.jit
def _store_down(acc, row, live, bias, parts, expert, block, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """parts of rows [BT] from products [BN, BT]."""
    acc = add_bias(acc, bias, expert, block, N, 0, BLOCK_N, True)
    feature = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    at = parts + row.to(tl.int64)[None, :] * N + feature
    tl.store(at, acc.to(parts.dtype.element_ty), mask=live[None, :] & (feature < N), eviction_policy=KEEP)


@triton.jit
def _ask(
    weight, expert, block, N: tl.constexpr, D: tl.constexpr, GATING: tl.constexpr, BLOCK_N: tl.constexpr,
    ASKED: tl.constexpr,
):  # fmt: skip
    """Ask the L2 for the first bytes of each row of a tile of a weight [E, N, D] of elements of any kind."""
    row = weight_rows(block, N, GATING, BLOCK_N, True).to(tl.int64)
    at = (weight + expert.to(tl.int64) * (N * D) + row * D).to(tl.int64)
    ask_l2_for(at, tl.full([BLOCK_N], ASKED, tl.int32), tl.full([BLOCK_N], 1, tl.int32))
