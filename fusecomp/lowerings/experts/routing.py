"""The routing of the experts: which rows each expert gets, without a host sync.

Few rows: one launch, in which every program counts for itself. Many: one launch counts them in chunks, a second one
places them.

Legend: T tokens, K experts per token, E experts, R = T * K routed rows (row r is expert r % K of token r / K), BT rows
of a tile.

A plan is one int32 buffer: [0] the number of tiles, [1:4] unused; then for each of `capacity` tiles (expert, first
place), for each its BT rows, -1 past the expert's last, and for each 0, where `up_kernel` counts what it has done. Rows
are sorted by expert, equal experts in the order of their rows, sentinels left out; a place is an index into the sorted
rows. Tiles are padded here alone: what the matmuls compute lies densely, at the places. All that a tile needs is found
from its number: its loads wait for no other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention.heuristics import cdiv, next_power_of_2

HEADER = 4
TILE, COUNT = 2, 1  # numbers of a tile before its rows and behind all rows
SINGLE_LAUNCH_ROWS = 4096
CHUNK = 512


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
    """Program e counts all experts' rows, then writes the tiles of expert e.

    Bytes: 2 * R * itemsize per program from the L2, about 4 * R written.
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
    if expert == 0:
        tl.store(plan, tl.sum(tiles_of, 0))
    _describe(plan, expert, mine, before, tile, capacity, BLOCK_T, BINS)
    if mine > 0:
        place = plan + 4 + capacity * 2 + tile * BLOCK_T
        for start in range(0, num_rows, BLOCK):
            rows = start + lanes
            hit = (_experts(index, rows, num_rows, E) == expert).to(tl.int32)
            tl.store(place + tl.cumsum(hit, 0) - 1, rows, mask=hit != 0)
            place += tl.sum(hit, 0)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(
    index,  # [R] int64 or int32
    counts,  # [chunks, BINS] int32
    num_rows,
    E: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of each expert in one chunk per program."""
    chunk = tl.program_id(0)
    ids = _experts(index, chunk * CHUNK + tl.arange(0, CHUNK), num_rows, E)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(ids, BINS, mask=ids < E))


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def place_kernel(
    index,  # [R] int64 or int32
    counts,  # [chunks, BINS] int32
    plan,  # int32, see above
    num_rows,
    capacity,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,  # chunks whose counts are read at once
):
    """Program c places the rows of chunk c and describes the tiles of experts c, c + chunks, ...

    Rows are sorted by (expert, row), all in one number. Bytes: chunks * BINS * 4 per program from the L2.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    bins, some = tl.arange(0, BINS), tl.arange(0, STEP)
    all_found = tl.zeros([STEP, BINS], tl.int32)  # summed over its first dimension once: threads meet there
    before_found = tl.zeros([STEP, BINS], tl.int32)
    for start in range(0, chunks, STEP):
        c = start + some
        found = tl.load(counts + c[:, None] * BINS + bins[None, :], mask=(c < chunks)[:, None], other=0)
        all_found += found
        before_found += tl.where((c < chunk)[:, None], found, 0)
    total, earlier = tl.sum(all_found, 0), tl.sum(before_found, 0)
    tiles_of = tl.cdiv(total, BLOCK_T)
    tile = tl.cumsum(tiles_of, 0) - tiles_of
    before = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(plan, tl.sum(tiles_of, 0))
    for expert in range(chunk, E, chunks):
        this = bins == expert
        mine, first = tl.sum(tl.where(this, total, 0), 0), tl.sum(tl.where(this, before, 0), 0)
        _describe(plan, expert, mine, first, tl.sum(tl.where(this, tile, 0), 0), capacity, BLOCK_T, BINS)

    lanes = tl.arange(0, CHUNK)
    ids = _experts(index, chunk * CHUNK + lanes, num_rows, E)
    ordered = tl.sort(ids * CHUNK + lanes)
    ids, row = ordered // CHUNK, chunk * CHUNK + ordered % CHUNK
    here = tl.load(counts + chunk * BINS + bins)
    begin = tile * BLOCK_T + earlier - (tl.cumsum(here, 0) - here)
    at = tl.gather(begin, tl.minimum(ids, E - 1), 0) + lanes
    tl.store(plan + 4 + capacity * 2 + at, row, mask=ids < E)


@triton.jit
def _describe(plan, expert, rows, first, tile, capacity, BLOCK_T: tl.constexpr, BINS: tl.constexpr):
    """The headers of an expert's tiles, from `tile` on, and -1 behind its last row."""
    tiles = tl.cdiv(rows, BLOCK_T)
    for start in range(0, tiles, BINS):
        each = start + tl.arange(0, BINS)
        at = plan + 4 + (tile + each) * 2
        tl.store(at, tl.full([BINS], 0, tl.int32) + expert, mask=each < tiles)
        tl.store(at + 1, first + each * BLOCK_T, mask=each < tiles)
        tl.store(plan + 4 + capacity * (2 + BLOCK_T) + tile + each, tl.full([BINS], 0, tl.int32), mask=each < tiles)
    padding = rows + tl.arange(0, BLOCK_T)
    at = plan + 4 + capacity * 2 + tile * BLOCK_T + padding
    tl.store(at, tl.full([BLOCK_T], -1, tl.int32), mask=padding < tiles * BLOCK_T)


@triton.jit
def _experts(index, rows, num_rows, E: tl.constexpr):
    """Expert of each row; E for those of no expert here, and past the last row."""
    ids = tl.load(index + rows, mask=rows < num_rows, other=E).to(tl.int32)
    return tl.where((ids < 0) | (ids > E), E, ids)


def tile_capacity(num_rows: int, experts: int, block_t: int) -> int:
    """The most tiles that any routing needs: each expert may have one that is not full."""
    return cdiv(min(num_rows, num_rows // block_t + experts), 2) * 2  # even, so that rows begin at 16 bytes


def routing_block(num_rows: int, experts: int) -> tuple[int, int, int]:
    """(bins, rows read at once, warps) of the single launch."""
    block = max(128, min(SINGLE_LAUNCH_ROWS, next_power_of_2(num_rows)))
    return routing_bins(experts), block, max(4, min(16, block // 256))


def routing_bins(experts: int) -> int:
    return max(32, next_power_of_2(experts))


def launch_routing(index: Tensor, experts: int, block_t: int, use_pdl: bool) -> tuple[Tensor, int]:
    """(plan, capacity) of top_k_index [T, K] contiguous."""
    num_rows = index.numel()
    capacity = tile_capacity(num_rows, experts, block_t)
    plan = torch.empty(HEADER + (TILE + block_t + COUNT) * capacity, dtype=torch.int32, device=index.device)
    if num_rows > SINGLE_LAUNCH_ROWS:
        bins, chunks = routing_bins(experts), cdiv(num_rows, CHUNK)
        counts = torch.empty((chunks, bins), dtype=torch.int32, device=index.device)
        common = {"E": experts, "BINS": bins, "CHUNK": CHUNK, "num_warps": 8}
        launch(count_kernel, (chunks,), index, counts, num_rows, **common)
        launch(
            place_kernel, (chunks,),
            index, counts, plan, num_rows, capacity, BLOCK_T=block_t, STEP=place_step(bins), **common,
        )  # fmt: skip
        return plan, capacity
    bins, block, warps = routing_block(num_rows, experts)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        routing_kernel, (experts,),
        index, plan, num_rows, capacity, E=experts, BLOCK_T=block_t, BINS=bins, BLOCK=block, USE_PDL=use_pdl,
        num_warps=warps, **options,
    )  # fmt: skip
    return plan, capacity


def place_step(bins: int) -> int:
    """Chunks that `place_kernel` reads at once, by the registers that their counts take."""
    return max(4, min(64, 8192 // bins))
