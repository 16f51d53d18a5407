"""What a step of decodes is given by the host, and what it gives back, by kernels that use pinned host memory.

Both stand in a step's CUDA graph, so between two steps there is nothing but the launch of a graph. A copy engine would
cost several microseconds at every turn, in which the GPU is idle; a few KB over the bus take a kernel about two.

`letter.py` has the eager references, `runtime/mailbox.py` the host's side and the rules by which the two take turns.

Legend: S rows, P pages per row of the block table.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.letter import BLOCK, Letter
from fusecomp.lowerings.paged_attention.heuristics import cdiv


@triton.jit(do_not_specialize=["size"])
def feed_kernel(
    header,  # [4] int64, host: number of the letter, rows that continue, entries of block tables, half
    taken,  # [1] int64, host: number of the letter that was taken last
    new_ids,  # [M] int32, host; M, rows of the lists, is a multiple of BLOCK
    slots,  # [M] int64, host
    lens,  # [M] int32, host
    moved_at,  # [M] int32, host: places in the block tables
    moved_to,  # [M] int32, host: the blocks there
    continues,  # [M] int32, host: the row of `ids` that a row continues from, or below 0
    ids,  # int64: sampled by the step before; invalid ones, below 0, become 0
    seen,  # [1] int64: number of the letter that was taken last
    half,  # [1] int64: where this run of the step delivers to; below 0 for nowhere
    tokens,  # [3 * S] int64: ids, positions, slots
    seq_lens,  # [S] int32
    tables,  # [S * P] int32
    size,
    BLOCK: tl.constexpr,
):
    """tokens and seq_lens of a step of S = `size` decodes, and the entries of the block tables that changed.

    A letter is taken once: what runs again finds its inputs where they are, and delivers nothing.
    One program: the bus is asked for everything at once. Of one warp, in words of 16 bytes: nothing is asked for twice,
    for host memory is not cached. On an H100 a launch of 64 rows took 38 us with the header read word by word in eight
    warps, and 10 with lists read to the end of a block, 9 KB.
    It lets nothing start before it has ended: what reads ahead of its wait (`paged_attention/decode.py`) counts on the
    step's lengths and block tables.
    Bytes: 20 a row and 8 an entry from the host; 28 a row and 4 an entry written.
    """
    word = tl.arange(0, 4)
    words = tl.load(header + word)
    number = tl.sum(tl.where(word == 0, words, 0), 0)
    count = tl.sum(tl.where(word == 1, words, 0), 0)
    moved = tl.sum(tl.where(word == 2, words, 0), 0)
    to_half = tl.sum(tl.where(word == 3, words, 0), 0)
    fresh = number != tl.load(seen)
    asked = (size + 31) // 32 * 32  # a multiple, so that the mask does not break words up
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        row = tl.load(continues + at, mask=at < asked, other=-1)
        value = tl.load(new_ids + at, mask=at < asked, other=0).to(tl.int64)
        slot = tl.load(slots + at, mask=at < asked, other=0)
        length = tl.load(lens + at, mask=at < asked, other=0)
        live = (at < size) & fresh
        goes_on = live & (at < count) & (row >= 0)
        sampled = tl.load(ids + row, mask=goes_on, other=0)
        tl.store(tokens + at, tl.where(goes_on, tl.maximum(sampled, 0), value), mask=live)
        tl.store(tokens + size + at, tl.maximum(length - 1, 0).to(tl.int64), mask=live)
        tl.store(tokens + 2 * size + at, slot, mask=live)
        tl.store(seq_lens + at, length, mask=live)
    for first in range(0, tl.where(fresh, moved, 0), BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = tl.load(moved_at + at, mask=at < moved, other=0)
        block = tl.load(moved_to + at, mask=at < moved, other=0)
        tl.store(tables + place, block, mask=at < moved)
    tl.debug_barrier()  # all was read that the host may now overwrite
    tl.store(half, tl.where(fresh, to_half, -1))
    tl.store(seen, number)
    tl.store(taken, number, cache_modifier=".wt")  # the host waits for it while the graph goes on


@triton.jit(do_not_specialize=["size", "stride"])
def deliver_kernel(sampled, half, ids, host, size, stride, BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """ids[:size] and host[half, :size] = sampled[:size], int64, unless half is below 0; `host` is pinned.

    The end of the launch makes them visible to the host.
    """
    if USE_PDL:
        gdc_wait()
    to = tl.load(half)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (at < size) & (to >= 0)
    value = tl.load(sampled + at, mask=live, other=0)
    tl.store(ids + at, value, mask=live)
    tl.store(host + to * stride + at, value, mask=live, cache_modifier=".wt")


def launch_feed(
    letter: Letter, ids: Tensor, seen: Tensor, half: Tensor, tokens: Tensor, seq_lens: Tensor, tables: Tensor, size: int
) -> None:
    """Queue `feed_kernel`: `feed_reference`, of a pinned letter whose lists are whole blocks."""
    assert letter.ids.shape[0] % BLOCK == 0
    launch(
        feed_kernel, (1,),
        *letter, ids, seen, half, tokens, seq_lens, tables, size, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip


def launch_deliver(sampled: Tensor, half: Tensor, ids: Tensor, host: Tensor) -> None:
    """Queue `deliver_kernel`: `deliver_reference`, of contiguous tensors and pinned `host`."""
    size = sampled.shape[0]
    use_pdl = uses_pdl(sampled)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        deliver_kernel, (cdiv(size, BLOCK),),
        sampled, half, ids, host, size, host.stride(0), BLOCK=BLOCK, USE_PDL=use_pdl, num_warps=4, **options,
    )  # fmt: skip
