"""A scheduled step as tensors: the packed step of docs/architecture.md plus what the sampler reads.

Legend: T tokens, S rows (padding included), n real rows, P pages per row of the block table, B page size.

Padding computes what nobody reads, but a mixture of experts routes it. Were all of it one token, a few experts would
get all of it; were every row another, experts would be read that no real row asks for. So `SHARED_ID` rows have one id.

The device tensors of every step are views of one set of buffers (`views.py`): a batch is valid until the next `build`.

Host side: a step gathers the lines of its sequences (`lines.py`) into pinned buffers. What changes at every step of
decodes is a letter that the step itself takes (`mailbox.py`); the rest is copied when it changed, from one of two
staging sets (`staging.py`), each with an event: one is filled while the other may still be read. In a copy between two
steps the device does nothing, for tens of us, so one brings all that changed but a mixed step's tokens: tables,
lengths, and what rows are sampled by if anything reads it (`device_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fusecomp.lowerings.launch import compiling_ahead
from fusecomp.runtime.device_rows import DeviceRows
from fusecomp.runtime.lines import Lines
from fusecomp.runtime.mailbox import NOWHERE, Mailbox
from fusecomp.runtime.scheduler import KNOWN, ScheduledStep, SequenceState
from fusecomp.runtime.staging import Staging, buffer_shapes, device_buffers
from fusecomp.runtime.step_batch import MOST_PREFILLS, MixedShape, StepBatch
from fusecomp.runtime.views import BatchViews

SHARED_ID = 8  # rows of padding that are the same token: as many as the smallest tile of the experts' kernels has


def _lists_of(rows: int) -> dict[str, int]:
    """What a step brings that is not all decodes, besides its tokens: how many entries of which list."""
    return {"cu_q_lens": rows + 1, "logit_indices": rows, "seq_lens": rows}


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
        vocab_size: V; ids that padding may have are below it.

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
        vocab_size: int = 1,
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
        self._device["block_tables"] = self._device["block_tables"].view(S, P)
        self._staging = (Staging(shapes, self.device), Staging(shapes, self.device))
        self._turn = 0
        self._host_meta = torch.zeros(4, dtype=torch.int32)
        self._host_meta_np = self._host_meta.numpy()
        self._views = BatchViews(self._device, S)
        self._order = np.arange(S)
        self._different = np.arange(T) * max(1, vocab_size // T) % vocab_size
        self._padding_ids = self._different[np.arange(T) // SHARED_ID]

        self._lines = Lines(max_num_seqs, P, block_size, seed, on_enter)

        self._held = DeviceRows(self._lines, self._device, shapes, self.mailbox, block_size, padding_row=max_num_seqs)
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
            pad_to: the shape of the step's bucket, which of a step that is all decodes is its rows; of another without
                a bucket, rows to which its own are padded, no token.
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
            assert pad_to is None or n <= pad_to <= self.max_num_seqs, (n, pad_to)
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
        placement = (nd, nd + gap) if gap else (0, 0)
        rows, brought = self._held.refresh(seqs, max_seq_len, S, placement, staging, step.decode_only)
        if step.decode_only:
            max_q_len = 1
            self._held.bring(brought, staging, n)
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
            cu_q_lens[n + gap + 1 : S + 1] = T
            staging.arrays["logit_indices"][:n] = ends_of_rows - 1
            staging.arrays["logit_indices"][n:S] = 0
            if shape is not None:
                used = step.num_tokens
                tokens[0, used:] = self._padding_ids[: T - used]
                tokens[1, used:] = 0
                tokens[2, used:] = -1
                seq_lens[n + gap] = T - used
            self._held.bring(brought | _lists_of(S), staging, n, placement)
            staging.copy("tokens", self._device["tokens"], 3 * T)
            if continues:
                self._continue_from(continues, staging)
        staging.record()
        if shape is not None:
            self._host_meta_np[:] = (shape.decodes, T, self.longest, S)
            return self._batch(self._views.bucket(shape), n)
        decodes, counted = (S, S) if step.decode_only else (nd, n)
        self._host_meta_np[:] = (decodes, max_q_len, max_seq_len, counted)
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
        letter["ids"][n:size] = self._padding_ids[: size - n]
        letter["seq_lens"][n:size] = 0
        letter["slots"][n:size] = -1
        self._letter = size, count, self._held.moved

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
        self._held.forget()
        self._letter = None

    def padding(self, shape: int | MixedShape) -> StepBatch:
        """A batch of nothing but padding, of so many decode rows or of a mixed shape, safe to run for warm-up and
        capture: it writes no KV slot. Every token is another, as far as there are ids: as in a step that serves.

        Its `host_meta` announces the longest possible sequence, so what is sized by it serves every later step.
        """
        mixed = isinstance(shape, MixedShape)
        rows, T, decodes = (shape.rows, shape.tokens, shape.decodes) if isinstance(shape, MixedShape) else (shape,) * 3
        prompts = rows - decodes
        assert 1 <= rows <= self.max_rows and self.max_num_batched_tokens >= T, shape
        self._turn ^= 1
        staging = self._staging[self._turn]
        staging.wait()
        tokens = staging.arrays["tokens"][: 3 * T].reshape(3, T)
        tokens[0], tokens[1], tokens[2] = self._different[:T], 0, -1
        staging.arrays["seq_lens"][:rows] = 0
        if mixed:
            # As evenly as prompts can be: its time stands for a step of several.
            staging.arrays["cu_q_lens"][: decodes + 1] = 0
            staging.arrays["cu_q_lens"][decodes + 1 : rows + 1] = np.arange(1, prompts + 1) * T // prompts
            staging.arrays["seq_lens"][decodes:rows] = np.diff(staging.arrays["cu_q_lens"][decodes : rows + 1])
            staging.arrays["logit_indices"][:rows] = 0
        brought = self._held.gather_sampling(np.zeros(0, np.int64), rows, staging, needed=True)
        self._held.bring(brought | (_lists_of(rows) if mixed else {"seq_lens": rows}), staging)
        staging.copy("tokens", self._device["tokens"], 3 * T)
        staging.record()
        self._forget()
        self._host_meta_np[:] = (decodes, T if mixed else 1, self.longest, rows)
        return self._batch(self._views.bucket(shape) if isinstance(shape, MixedShape) else self._views.decodes(rows), 0)

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

    def _batch(self, views: dict[str, torch.Tensor], num_rows: int) -> StepBatch:
        return StepBatch(
            **views,
            host_meta=self._host_meta,
            num_rows=num_rows,
            needs=self._held.needs,
            logprobs=self._held.most_logprobs,
        )
