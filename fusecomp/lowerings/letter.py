"""What a step of decodes takes from the host and gives back, in eager PyTorch: what the kernels of `feed.py` do.

Legend: S rows, P pages per row of the block table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # the length of a letter's lists is a multiple: the feeding kernel reads whole blocks
NOWHERE = -1  # in place of a half: nothing is delivered


class Letter(NamedTuple):
    """On the host; pinned where kernels read it. The lists are of equal length.

    Attributes:
        header: [4] int64: the letter's number, rows that continue, entries of block tables, half.
        taken: [1] int64: number of the letter that was taken last.
        ids: int32: of each row its token.
        slots: int64: its KV slot.
        seq_lens: int32: its length.
        moved_at, moved_to: int32: places in the block tables, and the blocks there.
        continues: int32: the row of the ids sampled last that a row continues from, below 0 for none.
    """

    header: Tensor
    taken: Tensor
    ids: Tensor
    slots: Tensor
    seq_lens: Tensor
    moved_at: Tensor
    moved_to: Tensor
    continues: Tensor


def feed_reference(
    letter: Letter, ids: Tensor, seen: Tensor, half: Tensor, tokens: Tensor, seq_lens: Tensor, tables: Tensor, size: int
) -> None:
    """A letter, if it is new, becomes the inputs of a step of S = `size` decodes.

    Args:
        ids: int64, sampled by the step before; invalid ones, below 0, become 0.
        seen: [1] int64: number of the letter that was taken last.
        half: [1] int64: where this run of the step delivers to, or `NOWHERE`.
        tokens: [>= 3 * S] int64: ids, positions, slots.
        seq_lens: [>= S] int32.
        tables: [rows, P] int32, contiguous.
    """
    number, count, moved, to_half = letter.header.tolist()
    if number == int(seen):
        half.fill_(NOWHERE)
        return
    if moved:
        tables.view(-1)[letter.moved_at[:moved].long()] = letter.moved_to[:moved]
    tokens[:size] = letter.ids[:size]
    if count:
        rows = letter.continues[:count].long()
        tokens[:count] = torch.where(rows < 0, tokens[:count], ids[rows.clamp(min=0)].clamp(min=0))
    tokens[size : 2 * size] = (letter.seq_lens[:size] - 1).clamp(min=0)
    tokens[2 * size : 3 * size] = letter.slots[:size]
    seq_lens[:size] = letter.seq_lens[:size]
    half.fill_(to_half)
    seen.fill_(number)
    letter.taken.fill_(number)


def deliver_reference(sampled: Tensor, half: Tensor, ids: Tensor, host: Tensor) -> None:
    """Sampled ids [S] go to ids [>= S] and to a half of host [2, >= S], unless `half` is `NOWHERE`; all int64."""
    if int(half) >= 0:
        ids[: len(sampled)] = sampled
        host[int(half), : len(sampled)] = sampled
