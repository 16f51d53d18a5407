"""A scheduled step as tensors: the packed step of docs/architecture.md plus what the sampler reads.

Legend: T tokens, S rows (padding included), n real rows, P pages per row of the block table, B page size.

The device tensors of every step are views of one set of buffers (`views.py`): a batch is valid until the next `build`.

Host side: a step gathers the lines of its sequences (`lines.py`) into pinned buffers. What changes at every step of
decodes is a letter that the step itself takes (`mailbox.py`); the rest is copied when it changed, from one of two
staging sets (`staging.py`), each with an event: one is filled while the other may still be read. A copy between two
steps is time in which the device does nothing, tens of us each, so where sequences end or begin to decode one copy
brings all that changes: tables, and what rows are sampled by if anything reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fusecomp.lowerings.launch import compiling_ahead
from fusecomp.runtime.lines import SAMPLING, Lines
from fusecomp.runtime.mailbox import NOWHERE, Mailbox
from fusecomp.runtime.scheduler import KNOWN, ScheduledStep, SequenceState
from fusecomp.runtime.staging import Pack, Staging, buffer_shapes, device_buffers
from fusecomp.runtime.step_batch import MOST_PREFILLS, MixedShape, StepBatch
from fusecomp.runtime.views import BatchViews

_PAD_SAMPLING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seeds": 0}


class BatchBuilder:
    """Turns steps of one `Scheduler` into `StepBatch`es.

    Args:
        max_num_seqs: most rows, and the bound of `SequenceState.row`; the largest decode bucket. A `MixedShape` may
            have `MOST_PREFILLS` more.
        max_num_batched_tokens: most tokens in a step.
        max_blocks_per_seq: P.
        block_size: B.
        device: where the batch lives. On CUDA, copies go to the current stream, without a sync.
        seed: engine seed. A request without a seed draws from this and its order of arrival.
        on_enter: called with each newly admitted sequence before the step's copies are issued.
        mailbox: of the engine; one of its own when None.

    Attributes:
        mailbox: where steps of decodes find what they are given, and all leave what they sample.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks_per_seq: int,
        block_size: int,
        device: torch.device | str,
        seed: int = 0,
        on_enter: Callable[[SequenceState], None] | None = None,
        mailbox: Mailbox | None = None,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_rows = max_num_seqs + MOST_PREFILLS
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_blocks_per_seq = max_blocks_per_seq
        self.block_size = block_size
        self.device = torch.device(device)
        self.mailbox = mailbox or Mailbox(self.max_rows, self.device)

        S, T, P = self.max_rows, max_num_batched_tokens, max_blocks_per_seq
        shapes = buffer_shapes(S, T, P)
        self._device = device_buffers(shapes, self.device)
        # Tables travel packed, without the columns that no sequence has reached, and are laid out on the device.
        self._device["block_tables"] = torch.zeros(S, P, dtype=torch.int32, device=self.device)
        self._arrived = Pack(shapes, self.device)
        self._staging = (Staging(shapes, self.device), Staging(shapes, self.device))
        self._turn = 0
        self._host_meta = torch.zeros(4, dtype=torch.int32)
        self._host_meta_np = self._host_meta.numpy()
        self._views = BatchViews(self._device, S)
        self._order = np.arange(S)

        self._lines = Lines(max_num_seqs, P, block_size, seed, on_enter)

        # What the device buffers hold, to copy only what changed.
        self._seqs: Sequence[SequenceState] = ()
        self._admissions: list[int] = []
        self._num_blocks: list[int] = []
        self._rows = np.zeros(0, np.int64)
        self._padded_rows = -1
        self._placement = (0, 0)  # rows before a gap in the block tables, and where those after it begin
        self._all_needs, self._most_logprobs = 0, -1
        self._moved = 0  # entries of block tables that the step in the making brings
        self._letter: tuple[int, int, int] | None = None  # rows, those that continue, moved: written and not sent

    def build(
        self,
        step: ScheduledStep,
        pad_to: int | MixedShape | None = None,
        continues: Sequence[int] | None = None,
        *,
        sealed: bool = False,
    ) -> StepBatch:
        """Fill the batch of `step`.

        Args:
            step: from `Scheduler.schedule`, before the matching `update`.
            pad_to: rows of the decode bucket, for a step that is all decodes; for any other the shape of its bucket.
            continues: for a step scheduled ahead, for each decode the row of the step before whose id, in the mailbox,
                it continues from, or `KNOWN`; a `range` says each its own.
            sealed: of a step of decodes leave what changes at every step to `send` or `feed`, one of which follows.

        Returns: the batch; its tensors are overwritten by the next `build` or `padding`.
        """
        seqs = step.seqs
        n, nd = len(seqs), step.num_decodes
        shape = pad_to if isinstance(pad_to, MixedShape) else None
        if shape is not None:
            assert shape.holds(step.num_tokens, nd, n - nd) and not step.decode_only, (shape, step.num_tokens, n, nd)
            S, T, gap = shape.rows, shape.tokens, shape.decodes - nd
        else:
            assert not isinstance(pad_to, MixedShape)
            assert pad_to is None or (step.decode_only and n <= pad_to <= self.max_num_seqs), (n, pad_to)
            S, gap = pad_to or n, 0
            T = S if step.decode_only else step.num_tokens
        assert self.max_num_batched_tokens >= T, T
        starts = np.array(step.starts, np.int64)
        ends = starts + 1 if step.decode_only else starts + np.array(step.num_new_tokens, np.int64)
        if self._letter is not None:  # its entries of block tables never arrived
            self._forget()
        self._turn ^= 1
        staging = self._staging[self._turn]
        staging.wait()
        if step.decode_only:
            self.mailbox.wait()

        max_seq_len = int(ends.max())
        self._moved = 0
        rows = self._refresh(seqs, max_seq_len, S, (nd, nd + gap) if gap else (0, 0), staging, step.decode_only)
        if step.decode_only:
            max_q_len = 1
            self._write_letter(step, rows, starts, S, continues)
            if not sealed:
                self.feed()
        else:
            max_q_len = max(step.num_new_tokens)
            seq_lens = staging.arrays["seq_lens"]
            seq_lens[:nd] = ends[:nd]
            seq_lens[nd : nd + gap] = 0
            seq_lens[nd + gap : n + gap] = ends[nd:]
            seq_lens[n + gap : S] = 0
            tokens = staging.arrays["tokens"][: 3 * T].reshape(3, T)
            if continues is None or KNOWN in continues:
                tokens[0, :nd] = [seq.token_ids[-1] for seq in seqs[:nd]]
            tokens[1, :nd] = starts[:nd]
            tokens[2, :nd] = self._lines.slots(rows[:nd], starts[:nd])
            self._fill_prefills(step, tokens)
            cu_q_lens = staging.arrays["cu_q_lens"]
            ends_of_rows = np.cumsum(step.num_new_tokens)
            cu_q_lens[1 : nd + 1] = ends_of_rows[:nd]
            cu_q_lens[nd + 1 : nd + gap + 1] = nd
            cu_q_lens[nd + gap + 1 : n + gap + 1] = ends_of_rows[nd:]
            staging.arrays["logit_indices"][:n] = ends_of_rows - 1
            if shape is not None:
                used = step.num_tokens
                tokens[:2, used:] = 0
                tokens[2, used:] = -1
                seq_lens[n + gap] = T - used
                cu_q_lens[n + gap + 1 : S + 1] = T
                staging.arrays["logit_indices"][n:S] = 0
            self._copy(staging, "cu_q_lens", S + 1)
            self._copy(staging, "logit_indices", S)
            self._copy(staging, "seq_lens", S)
            self._copy(staging, "tokens", 3 * T)
            if continues:
                self._continue_from(continues, staging)
        staging.record()
        if shape is not None:
            self._host_meta_np[:] = (shape.decodes, T, self.longest, S)
            return self._batch(self._views.bucket(shape), n)
        self._host_meta_np[:] = (S if step.decode_only else nd, max_q_len, max_seq_len, S)
        views = self._views.decodes(S) if step.decode_only else self._views.mixed(S, T)
        return self._batch(views, n)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a block table holds, which a captured launch must serve."""
        return self.max_blocks_per_seq * self.block_size

    def _write_letter(
        self, step: ScheduledStep, rows: np.ndarray, starts: np.ndarray, size: int, continues: Sequence[int] | None
    ) -> None:
        """What a step of `size` decodes takes, padding last: a row's position is that before its length, or 0."""
        letter, n, count = self.mailbox.arrays, len(step.seqs), len(continues or ())
        if continues is None or KNOWN in continues:
            letter["ids"][:n] = [seq.token_ids[-1] for seq in step.seqs]
        if continues:
            letter["continues"][:count] = self._order[:count] if isinstance(continues, range) else continues
        letter["seq_lens"][:n] = starts + 1
        letter["slots"][:n] = self._lines.slots(rows, starts)
        letter["ids"][n:size] = letter["seq_lens"][n:size] = 0
        letter["slots"][n:size] = -1
        self._letter = size, count, self._moved

    def send(self, half: int) -> None:
        """Send the sealed letter, if there is one, to a step that is launched next and begins with `launch_feed`."""
        if self._letter is not None:
            _, count, moved = self._letter
            self.mailbox.send(count, moved, half)
            self._letter = None

    def feed(self, half: int = NOWHERE) -> None:
        """Send the sealed letter, if there is one, and bring it to the device."""
        if self._letter is not None:
            size = self._letter[0]
            self.send(half)
            self.launch_feed(size)
            if compiling_ahead():
                self.mailbox.skip()

    def launch_feed(self, size: int) -> None:
        """Queue what takes the letter to a step of `size` decodes."""
        device = self._device
        self.mailbox.feed(device["tokens"], device["seq_lens"], device["block_tables"], size)

    def _continue_from(self, rows: Sequence[int], staging: Staging) -> None:
        """Put sampled ids into the first tokens without reading them; an invalid one becomes id 0, its row is void."""
        count, tokens, sampled = len(rows), self._device["tokens"], self.mailbox.ids
        if isinstance(rows, range):
            torch.clamp(sampled[:count], min=0, out=tokens[:count])
            return
        staging.arrays["continues"][:count] = rows
        staging.used = True
        at = staging.tensors["continues"][:count].to(self.device, non_blocking=True)
        taken = sampled[at.clamp(min=0)].clamp_(min=0)
        tokens[:count] = torch.where(at < 0, tokens[:count], taken) if KNOWN in rows else taken

    def _forget(self) -> None:
        """The device rows no longer belong to any sequence."""
        self._seqs, self._admissions, self._num_blocks, self._rows = (), [], [], np.zeros(0, np.int64)
        self._letter = None

    def padding(self, shape: int | MixedShape) -> StepBatch:
        """A batch of nothing but padding, of so many decode rows or of a mixed shape, safe to run for warm-up and
        capture: it writes no KV slot.

        Its `host_meta` announces the longest possible sequence, so what is sized by it serves every later step.
        """
        mixed = isinstance(shape, MixedShape)
        rows, T, decodes = (shape.rows, shape.tokens, shape.decodes) if isinstance(shape, MixedShape) else (shape,) * 3
        assert 1 <= rows <= self.max_rows and self.max_num_batched_tokens >= T, shape
        self._turn ^= 1
        staging = self._staging[self._turn]
        staging.wait()
        tokens = staging.arrays["tokens"][: 3 * T].reshape(3, T)
        tokens[:2] = 0
        tokens[2] = -1
        staging.arrays["seq_lens"][:rows] = 0
        if mixed:
            staging.arrays["seq_lens"][decodes] = T
            staging.arrays["cu_q_lens"][: decodes + 1] = 0
            staging.arrays["cu_q_lens"][decodes + 1 : rows + 1] = T
            staging.arrays["logit_indices"][:rows] = 0
            self._copy(staging, "cu_q_lens", rows + 1)
            self._copy(staging, "logit_indices", rows)
        self._copy(staging, "tokens", 3 * T)
        self._copy(staging, "seq_lens", rows)
        self._bring(self._gather_sampling(np.zeros(0, np.int64), rows, staging, needed=True), staging)
        staging.record()
        self._forget()
        self._host_meta_np[:] = (decodes, T if mixed else 1, self.longest, rows)
        return self._batch(self._views.bucket(shape) if isinstance(shape, MixedShape) else self._views.decodes(rows), 0)

    def _refresh(
        self,
        seqs: Sequence[SequenceState],
        max_seq_len: int,
        padded: int,
        placement: tuple[int, int],
        staging: Staging,
        decode_only: bool,
    ) -> np.ndarray:
        """Bring tables up to date; copy block tables, and sampling parameters that are read, if the device's differ.

        Where the rows are those of the step before and all decode, the places of new blocks go into the letter.

        Args:
            placement: rows before the gap in the block tables, and where those after it begin.

        Returns: the row of each sequence.
        """
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
            if padded != self._padded_rows:
                self._bring(self._gather_sampling(rows, padded, staging), staging)
            return rows
        n = len(seqs)
        # With the rows of the last step, only those whose blocks moved need a look.
        stale = [i for i, new in enumerate(num_blocks) if new != self._num_blocks[i]] if same_rows else range(n)
        same_places = same_rows and decode_only and placement == self._placement
        places = list[int]()
        for i in stale:
            known, count = self._lines.update(seqs[i], num_blocks[i]), num_blocks[i]
            if same_places:
                places += range(i * self.max_blocks_per_seq + known, i * self.max_blocks_per_seq + count)
        counts: dict[str, int] = {}
        if not same_rows or padded != self._padded_rows:
            counts = self._gather_sampling(rows, padded, staging)
        if same_places and len(places) <= self.max_rows:
            self._note_moves(places, rows)
        else:
            counts["block_tables"] = self._gather_tables(rows, max_seq_len, staging)
        self._bring(counts, staging, n, placement)
        self._num_blocks, self._placement = num_blocks, placement
        return rows

    def _note_moves(self, places: list[int], rows: np.ndarray) -> None:
        """Put into the letter what is to be written to the block tables: what the table of each row holds there."""
        self._moved = count = len(places)
        at = np.array(places, np.int64)
        self.mailbox.arrays["moved_at"][:count] = at
        lines, columns = np.divmod(at, self.max_blocks_per_seq)
        self.mailbox.arrays["moved_to"][:count] = self._lines.blocks[rows[lines], columns]

    def _gather_tables(self, rows: np.ndarray, max_seq_len: int, staging: Staging) -> int:
        """Fill in the rows' tables, up to the last column that one has reached; returns how many entries."""
        n, width = len(rows), -(-max_seq_len // self.block_size)
        staging.arrays["block_tables"][: n * width].reshape(n, width)[:] = self._lines.blocks[rows, :width]
        return n * width

    def _gather_sampling(
        self, rows: np.ndarray, padded: int, staging: Staging, *, needed: bool = False
    ) -> dict[str, int]:
        """Fill in what the rows are sampled by, if a sampler reads it; returns how many entries each list has."""
        n = len(rows)
        self._padded_rows = padded
        self._all_needs = int(np.bitwise_or.reduce(self._lines.needs[rows]))
        self._most_logprobs = int(self._lines.logprobs[rows].max(initial=-1))
        if not self._all_needs and not needed:
            return {}
        for name in SAMPLING:
            array = staging.arrays[name]
            array[:n] = self._lines.sampling[name][rows]
            array[n:padded] = _PAD_SAMPLING[name]
        staging.arrays["rows"][:n] = rows
        staging.arrays["rows"][n:padded] = self.max_num_seqs
        return dict.fromkeys((*SAMPLING, "rows"), padded)

    def _bring(self, counts: dict[str, int], staging: Staging, n: int = 0, placement: tuple[int, int] = (0, 0)) -> None:
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

    def _fill_prefills(self, step: ScheduledStep, tokens: np.ndarray) -> None:
        at = step.num_decodes
        for i in range(step.num_decodes, len(step.seqs)):
            seq, start, size = step.seqs[i], step.starts[i], step.num_new_tokens[i]
            positions = np.arange(start, start + size)
            part = tokens[:, at : at + size]
            part[0] = seq.token_ids[start : start + size]
            part[1] = positions
            part[2] = self._lines.slots(np.full(1, seq.row), positions)
            at += size

    def _copy(self, staging: Staging, name: str, size: int) -> None:
        staging.copy(name, self._device[name], size)

    def _batch(self, views: dict[str, torch.Tensor], num_rows: int) -> StepBatch:
        return StepBatch(
            **views,
            host_meta=self._host_meta,
            num_rows=num_rows,
            needs=self._all_needs,
            logprobs=self._most_logprobs,
        )
