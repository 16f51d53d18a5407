"""What the device holds of a step's rows, and bringing it up to date by what changed.

Block tables travel packed, without the columns that no sequence has reached, and are laid out on the device. With them
goes what rows are sampled by, if a sampler reads it.

Legend: S rows (padding included), n real rows, P pages per row of the block table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fusecomp.runtime.lines import SAMPLING, Lines
from fusecomp.runtime.mailbox import Mailbox
from fusecomp.runtime.sequence import SequenceState
from fusecomp.runtime.staging import Pack, Staging

_PAD_SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seeds": 0}


class DeviceRows:
    """One builder's.

    Args:
        lines: of the sequences that run.
        device: the buffers of every step, by name.
        shapes: of `buffer_shapes`.
        mailbox: whose letters take new entries of block tables.
        block_size: tokens of a page.
        padding_row: the line that padding rows name.

    Attributes:
        moved: entries of block tables that the letter of the step in the making brings.
        needs: what its rows need of the sampler together, as `StepBatch.needs`.
        most_logprobs: the most that one of them asks for; -1 for none.
    """

    def __init__(
        self,
        lines: Lines,
        device: Mapping[str, Tensor],
        shapes: dict[str, tuple[int, ...]],
        mailbox: Mailbox,
        block_size: int,
        padding_row: int,
    ) -> None:
        self._lines, self._device, self._letter = lines, device, mailbox.arrays
        self._block_size, self._padding_row = block_size, padding_row
        self._max_rows, self._max_blocks = device["block_tables"].shape
        self._arrived = Pack(shapes, device["block_tables"].device)
        self._padded_rows = -1
        self._placement = (0, 0)  # rows before a gap in the block tables, and where those after it begin
        self.moved, self.needs, self.most_logprobs = 0, 0, -1
        self.forget()

    def forget(self) -> None:
        """The rows no longer belong to any sequence."""
        self._seqs: Sequence[SequenceState] = ()
        self._admissions: list[int] = []
        self._num_blocks: list[int] = []
        self._rows = np.zeros(0, np.int64)

    def refresh(
        self,
        seqs: Sequence[SequenceState],
        max_seq_len: int,
        padded: int,
        placement: tuple[int, int],
        staging: Staging,
        decode_only: bool,
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Bring the lines up to date; fill in tables, and sampling parameters that are read, if the device's differ.

        Where the rows are those of the step before and all decode, the places of new blocks go into the letter.

        Args:
            placement: rows before the gap in the block tables, and where those after it begin.

        Returns: the row of each sequence, and what is to be brought: how many entries of which list.
        """
        self.moved = 0
        num_blocks = [len(seq.blocks) for seq in seqs]
        same_rows = seqs is self._seqs  # the scheduler repeats a list only while all of it runs on
        if not same_rows:
            admissions = [seq.admission for seq in seqs]
            same_rows = admissions == self._admissions
            if not same_rows:
                self._rows, self._admissions = np.array([seq.row for seq in seqs], np.int64), admissions
            self._seqs = seqs
        rows = self._rows
        if same_rows and num_blocks == self._num_blocks and placement == self._placement:
            return rows, self.gather_sampling(rows, padded, staging) if padded != self._padded_rows else {}
        n = len(seqs)
        # With the rows of the last step, only those whose blocks moved need a look.
        stale = [i for i, new in enumerate(num_blocks) if new != self._num_blocks[i]] if same_rows else range(n)
        same_places = same_rows and decode_only and placement == self._placement
        places = list[int]()
        for i in stale:
            known, count = self._lines.update(seqs[i], num_blocks[i]), num_blocks[i]
            if same_places:
                places += range(i * self._max_blocks + known, i * self._max_blocks + count)
        brought: dict[str, int] = {}
        if not same_rows or padded != self._padded_rows:
            brought = self.gather_sampling(rows, padded, staging)
        if same_places and len(places) <= self._max_rows:
            self._note_moves(places, rows)
        else:
            brought["block_tables"] = self._gather_tables(rows, max_seq_len, staging)
        self._num_blocks, self._placement = num_blocks, placement
        return rows, brought

    def _note_moves(self, places: list[int], rows: np.ndarray) -> None:
        """Put into the letter what is to be written to the block tables: what the table of each row holds there."""
        self.moved = count = len(places)
        at = np.array(places, np.int64)
        self._letter["moved_at"][:count] = at
        lines, columns = np.divmod(at, self._max_blocks)
        self._letter["moved_to"][:count] = self._lines.blocks[rows[lines], columns]

    def _gather_tables(self, rows: np.ndarray, max_seq_len: int, staging: Staging) -> int:
        """Fill in the rows' tables, up to the last column that one has reached; returns how many entries."""
        n, width = len(rows), -(-max_seq_len // self._block_size)
        staging.arrays["block_tables"][: n * width].reshape(n, width)[:] = self._lines.blocks[rows, :width]
        return n * width

    def gather_sampling(
        self, rows: np.ndarray, padded: int, staging: Staging, *, needed: bool = False
    ) -> dict[str, int]:
        """Fill in what the rows are sampled by, if a sampler reads it; returns how many entries each list has."""
        n = len(rows)
        self._padded_rows = padded
        self.needs = int(np.bitwise_or.reduce(self._lines.needs[rows]))
        self.most_logprobs = int(self._lines.logprobs[rows].max(initial=-1))
        if not self.needs and not needed:
            return {}
        for name in SAMPLING:
            array = staging.arrays[name]
            array[:n] = self._lines.sampling[name][rows]
            array[n:padded] = _PAD_SAMPLING[name]
        staging.arrays["rows"][:n] = rows
        staging.arrays["rows"][n:padded] = self._padding_row
        return dict.fromkeys((*SAMPLING, "rows"), padded)

    def bring(self, counts: dict[str, int], staging: Staging, n: int = 0, placement: tuple[int, int] = (0, 0)) -> None:
        """Bring so many entries of packed lists to the device, by one copy, and lay them out; of `n` tables."""
        if counts:
            self._arrived.copy_(staging.pack, counts)
            staging.used = True
        for name, count in counts.items():
            arrived, to = self._arrived.tensors[name][:count], self._device[name]
            if name != "block_tables":
                to[:count].copy_(arrived)
                continue
            (before, after), width = placement, count // n
            if before:
                to[:before, :width].copy_(arrived.view(n, width)[:before])
            if before < n:
                to[after : after + n - before, :width].copy_(arrived.view(n, width)[before:])
