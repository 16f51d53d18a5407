"""The routing launch of the experts: which rows each expert gets, in one kernel without a host sync.

Legend: T tokens, K experts per token, E experts, R = T * K routed rows (row r is expert r % K of token r / K), BT rows
of a tile.

A plan is one int32 buffer: [0] the tiles of experts, [1] those and the tiles of sentinels behind them, [2:4] unused;
then for each of `capacity` tiles (expert, first place), and for each its BT rows, -1 past the expert's last. Rows are
sorted by expert, sentinels last, equal experts in the order of their rows; a place is an index into the sorted rows.
Tiles are padded here alone: what the matmuls compute lies densely, at the places. All that a tile needs is found from
its number, so that its loads wait for no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention.heuristics import next_power_of_2

HEADER = 4
TILE = 2
MAX_BLOCK = 4096


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def routing_kernel(
    index,  # [R] int64 or int32
    plan,  # int32, see above
    num_rows,
    capacity,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BINS: tl.constexpr,  # a power of two, at least E
    BLOCK: tl.constexpr,  # rows read at once
    USE_PDL: tl.constexpr,
):
    """Program e counts all experts' rows, then writes the tiles of expert e; program E those of the sentinels.

    Every program counts for itself, so none waits for another. Bytes: 2 * R * itemsize per program from the L2, about
    4 * R written; at R = 512 the launch costs its latency, at R = 65536 and E = 512 it reads half a gigabyte.
    """
    if USE_PDL:
        gdc_wait()  # before the next line: kernels further on may then read the index without a wait of their own
        gdc_launch_dependents()
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_rows, BLOCK):
        ids = _experts(index, start + lanes, num_rows, E)
        counts += tl.histogram(ids, BINS, mask=ids < E)
    tiles_of = tl.cdiv(counts, BLOCK_T)
    before = tl.sum(tl.where(bins < expert, counts, 0), 0)
    tile = tl.sum(tl.where(bins < expert, tiles_of, 0), 0)
    mine = tl.sum(tl.where(bins == expert, counts, 0), 0)
    if expert == E:
        mine = num_rows - before
        tl.store(plan, tile)
        tl.store(plan + 1, tile + tl.cdiv(mine, BLOCK_T))

    tiles = tl.cdiv(mine, BLOCK_T)
    for first in range(0, tiles, BINS):
        each = first + bins
        at = plan + 4 + (tile + each) * 2
        tl.store(at, tl.full([BINS], 0, tl.int32) + expert, mask=each < tiles)
        tl.store(at + 1, before + each * BLOCK_T, mask=each < tiles)
    if mine > 0:
        place = plan + 4 + capacity * 2 + tile * BLOCK_T
        padding = mine + tl.arange(0, BLOCK_T)
        tl.store(place + padding, tl.full([BLOCK_T], -1, tl.int32), mask=padding < tiles * BLOCK_T)
        for start in range(0, num_rows, BLOCK):
            rows = start + lanes
            hit = (_experts(index, rows, num_rows, E) == expert).to(tl.int32)
            tl.store(place + tl.cumsum(hit, 0) - 1, rows, mask=hit != 0)
            place += tl.sum(hit, 0)


@triton.jit
def _experts(index, rows, num_rows, E: tl.constexpr):
    """Expert of each row, E for those of no expert here, E + 1 past the last row."""
    ids = tl.load(index + rows, mask=rows < num_rows, other=E + 1).to(tl.int32)
    return tl.where((ids < 0) | ((ids > E) & (rows < num_rows)), E, ids)


def tile_capacity(num_rows: int, experts: int, block_t: int) -> int:
    """The most tiles that any routing needs, those of sentinels included: each expert may have one that is not full."""
    return triton.cdiv(min(num_rows, num_rows // block_t + experts + 1), 2) * 2  # even, so that rows begin at 16 bytes


def routing_block(num_rows: int, experts: int) -> tuple[int, int, int]:
    """(bins, rows read at once, warps)."""
    block = max(128, min(MAX_BLOCK, next_power_of_2(num_rows)))
    return max(32, next_power_of_2(experts)), block, max(4, min(16, block // 256))


def launch_routing(index: Tensor, experts: int, block_t: int, use_pdl: bool) -> tuple[Tensor, int]:
    """(plan, capacity) of top_k_index [T, K] contiguous."""
    num_rows = index.numel()
    capacity = tile_capacity(num_rows, experts, block_t)
    plan = torch.empty(HEADER + (TILE + block_t) * capacity, dtype=torch.int32, device=index.device)
    bins, block, warps = routing_block(num_rows, experts)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        routing_kernel, (experts + 1,),
        index, plan, num_rows, capacity, E=experts, BLOCK_T=block_t, BINS=bins, BLOCK=block, USE_PDL=use_pdl,
        num_warps=warps, **options,
    )  # fmt: skip
    return plan, capacity
