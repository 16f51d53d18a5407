"""What a step of decodes is given by the host, and what it gives back, by kernels that use pinned host memory.

Between two replays of CUDA graphs nothing else should run: a copy engine and the kernels around it wait for each other,
several microseconds at every turn, in which the GPU is idle. A kernel follows another within one, and a few KB over the
bus take it about two more.

Legend: S rows, P pages per row of the block table.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.launch import launch

BLOCK = 256


@triton.jit(do_not_specialize=["size", "count", "moved"])
def feed_kernel(
    staged_tokens,  # [3 * S] int64, host: ids, positions, slots
    staged_lens,  # [S] int32, host
    moved_at,  # [moved] int32, host: places in the block tables
    moved_to,  # [moved] int32, host: the blocks there
    continues,  # [count] int64, host: the row of `sampled` that a row continues from, or below 0
    sampled,  # int64: ids of the step before; invalid ones, below 0, become 0
    tokens,  # [3 * S] int64
    seq_lens,  # [S] int32
    tables,  # [S * P] int32
    size,
    count,
    moved,
    BLOCK: tl.constexpr,
):
    """tokens and seq_lens of a step of S = `size` decodes, and the entries of the block tables that changed.

    Program (i, j) does block j of part i: ids, positions, slots, lengths, tables.
    Bytes: 28 a row and 8 an entry from the host, as many written.
    """
    part = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if part < 3:
        place = part * size + at
        value = tl.load(staged_tokens + place, mask=at < size, other=0)
        row = tl.load(continues + at, mask=(at < count) & (part == 0), other=-1)
        taken = tl.load(sampled + row, mask=row >= 0, other=0)
        tl.store(tokens + place, tl.where(row >= 0, tl.maximum(taken, 0), value), mask=at < size)
    elif part == 3:
        tl.store(seq_lens + at, tl.load(staged_lens + at, mask=at < size, other=0), mask=at < size)
    else:
        place = tl.load(moved_at + at, mask=at < moved, other=0)
        tl.store(tables + place, tl.load(moved_to + at, mask=at < moved, other=0), mask=at < moved)


@triton.jit(do_not_specialize=["size"])
def deliver_kernel(sampled, host, size, BLOCK: tl.constexpr):
    """host[:size] = sampled[:size], int64; `host` is pinned. The launch's end makes it visible to the host."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(host + at, tl.load(sampled + at, mask=at < size, other=0), mask=at < size)


def launch_feed(
    staged_tokens: Tensor,
    staged_lens: Tensor,
    moves: tuple[Tensor, Tensor],
    continues: Tensor,
    sampled: Tensor | None,
    tokens: Tensor,
    seq_lens: Tensor,
    tables: Tensor,
    size: int,
    count: int,
    moved: int,
) -> None:
    """Queue `feed_kernel`; without a row that continues, `sampled` is None and `count` 0. The first five are pinned."""
    launch(
        feed_kernel, (5, triton.cdiv(max(size, moved), BLOCK)),
        staged_tokens, staged_lens, *moves, continues, tokens if sampled is None else sampled, tokens, seq_lens,
        tables, size, count, moved, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def launch_deliver(sampled: Tensor, host: Tensor) -> None:
    """Queue a copy of sampled [S] to pinned `host` [S]; both int64, contiguous."""
    size = sampled.shape[0]
    launch(deliver_kernel, (triton.cdiv(size, BLOCK),), sampled, host, size, BLOCK=BLOCK, num_warps=4)
