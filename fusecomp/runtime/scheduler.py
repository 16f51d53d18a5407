"""Which tokens the next step computes: continuous batching with chunked prefill and preemption by recompute.

In: requests (`Scheduler.add`), sampled tokens (`update`). Out: `ScheduledStep`s (`schedule`). Pure Python and
deterministic: the same calls give the same steps.

One call of `schedule`, in this order:
    1. every running decode gets one token; when blocks run out, the youngest running sequence is preempted;
    2. running prefills get their next chunks, oldest first, while the token budget and free blocks allow;
    3. waiting sequences are admitted first come, first served, while budget, rows and blocks allow.

Why it ends: running sequences are older than waiting ones and both lists are ordered by arrival (a preempted sequence
returns to the front). Only the youngest is ever preempted, and `add` refuses what does not fit into the empty cache, so
the oldest decode always gets the block it asks for. A prefill never preempts: its blocks were counted at admission,
only decodes can have taken them since, and those end, or are preempted, and give them back. So no step is empty while
there is work, and the oldest sequence never waits for ever.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fusecomp.errors import CapacityError, RequestError
from fusecomp.request import RequestMetrics, SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager

# The sampler's answer for a row whose logits are not finite.
INVALID_TOKEN = -1


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sequence from arrival to end. The caller gives the first three fields; the scheduler owns the rest.

    Attributes:
        token_ids: prompt and output, in one list.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        finish_reason: "stop", "length", "abort", "error" (logits not finite), or None while it lives.
        arrival: order of `Scheduler.add`, from 0.
        row: while running, a number below `max_num_seqs` that no other running sequence has.
        admission: number of the latest move to running. Within one admission `row` is fixed and `blocks` only grows.
        blocks: the block manager's live list while running; read only.
        num_slots: tokens that fit into `blocks`.
        max_total_tokens: prompt and output length at which the sequence ends with "length".
        num_preemptions: times it lost its blocks.
        metrics: when things happened to it; the engine's.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    status: Status = field(default=Status.WAITING, init=False)
    finish_reason: str | None = field(default=None, init=False)
    arrival: int = field(default=-1, init=False)
    row: int = field(default=-1, init=False)
    admission: int = field(default=-1, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    num_slots: int = field(default=0, init=False)
    max_total_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0), init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """A copy of the generated ids, an end-of-sequence or stop token included."""
        return self.token_ids[len(self.prompt_ids) :]


class ScheduledEntry(NamedTuple):
    """One row of a step: tokens `start .. start + num_new_tokens` of `seq`; `samples` if they reach its last one."""

    seq: SequenceState
    num_new_tokens: int
    start: int
    samples: bool


@dataclass(slots=True)
class ScheduledStep:
    """The rows of one step, decodes first. Parallel lists, one item a row, because the batch builder reads columns.

    Attributes:
        seqs: the sequence of each row.
        starts: position of each row's first new token (tokens already cached).
        num_new_tokens: new tokens of each row; 1 for the first `num_decodes` rows.
        samples: whether the token sampled for the row counts.
        num_decodes: rows that decode.
        num_tokens: sum of `num_new_tokens`.
        num_preempted: sequences that lost their blocks to this step.
    """

    seqs: list[SequenceState]
    starts: list[int]
    num_new_tokens: list[int]
    samples: list[bool]
    num_decodes: int
    num_tokens: int
    num_preempted: int

    @property
    def decode_only(self) -> bool:
        return self.num_decodes == len(self.seqs)

    @property
    def entries(self) -> Iterator[ScheduledEntry]:
        return map(ScheduledEntry, self.seqs, self.num_new_tokens, self.starts, self.samples)


class Scheduler:
    """Decides each step's rows and keeps the sequences' state.

    Args:
        max_num_seqs: most rows in a step, and most running sequences.
        max_num_batched_tokens: most tokens in a step; at least `max_num_seqs`, so that every decode fits.
        max_model_len: longest prompt plus output, in tokens.
        kv: the block manager; nobody else allocates from it while sequences run.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, kv: KVCacheManager) -> None:
        assert 1 <= max_num_seqs <= max_num_batched_tokens, (max_num_seqs, max_num_batched_tokens)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.kv = kv
        # A little room left at admission while others run, or the newcomer is soon preempted to feed their decodes.
        self._watermark = max(1, kv.num_blocks // 100)
        self._live: dict[str, SequenceState] = {}
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._num_arrivals = 0
        self._num_admissions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, seq: SequenceState) -> None:
        """Queue a new sequence.

        Raises:
            RequestError: the prompt is empty or leaves no room for output, or the request id is in use.
            CapacityError: the sequence at its longest would not fit into the empty cache.
        """
        where, prompt_len = f"request {seq.request_id!r}", len(seq.prompt_ids)
        assert seq.arrival == -1, f"{where} was added before"
        if seq.request_id in self._live:
            raise RequestError("request id is in use", where=where, remedy="give every live request its own id")
        if prompt_len == 0:
            raise RequestError("the prompt has no tokens", where=where, remedy="give at least one token")
        if prompt_len >= self.max_model_len:
            raise RequestError(
                f"the prompt has {prompt_len} tokens, max_model_len is {self.max_model_len}",
                where=where,
                why="prompt and output together are at most max_model_len tokens",
                remedy="shorten the prompt or raise max_model_len",
            )
        longest = self.max_model_len
        if seq.params.max_tokens is not None:
            longest = min(longest, prompt_len + seq.params.max_tokens)
        # The last token is never fed back, so it needs no slot.
        needed = self.kv.blocks_for(longest - 1)
        if needed > self.kv.num_blocks:
            size = self.kv.block_bytes
            in_bytes = f" ({needed * size} bytes)" if size else ""
            budget = f"kv_cache_bytes to at least {needed * size}" if size else "kv_cache_bytes"
            raise CapacityError(
                f"{longest} tokens need {needed} KV blocks{in_bytes}, the cache has {self.kv.num_blocks}",
                where=where,
                why=f"{prompt_len} prompt tokens, max_tokens={seq.params.max_tokens}, block size {self.kv.block_size}",
                remedy=f"lower max_tokens, shorten the prompt, or raise {budget}",
            )
        seq.max_total_tokens = longest
        seq.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._live[seq.request_id] = seq
        self._waiting.append(seq)

    def abort(self, request_id: str) -> SequenceState | None:
        """End a sequence with "abort", also between `schedule` and `update`. None when no such request lives."""
        seq = self._live.get(request_id)
        if seq is None:
            return None
        if seq.status is Status.RUNNING:
            self._running.remove(seq)
            self._release(seq)
        else:
            self._waiting.remove(seq)
        self._finish(seq, "abort")
        return seq

    def schedule(self) -> ScheduledStep | None:
        """The next step, with slots allocated for all its tokens; None when no sequence lives.

        The caller runs the step and calls `update` before it schedules again.
        """
        seqs: list[SequenceState] = []
        starts: list[int] = []
        prefills: list[SequenceState] = []
        num_preempted = 0
        # Preemption pops from the tail of the list under iteration, behind or at the current sequence: that ends the
        # loop early, as it should. What was scheduled stays.
        for seq in self._running:
            start = seq.num_computed_tokens
            if start + 1 != len(seq.token_ids) or start == 0:
                prefills.append(seq)
                continue
            while start >= seq.num_slots and not self._grow(seq, start + 1):
                num_preempted += 1
                if self._preempt_youngest() is seq:
                    break
            else:
                seqs.append(seq)
                starts.append(start)
        num_decodes = len(seqs)
        num_new = [1] * num_decodes
        samples = [True] * num_decodes
        budget = self.max_num_batched_tokens - num_decodes

        def chunk(seq: SequenceState, size: int) -> None:
            start = seq.num_computed_tokens
            grown = self._grow(seq, start + size)
            assert grown, f"{seq.request_id!r}: no blocks for a chunk that was sized to fit"
            seqs.append(seq)
            starts.append(start)
            num_new.append(size)
            samples.append(start + size == len(seq.token_ids))

        for seq in prefills:
            size = min(len(seq.token_ids) - seq.num_computed_tokens, budget, self._room(seq))
            if size == 0:
                break
            chunk(seq, size)
            budget -= size

        while self._waiting and budget and self._free_rows and self._fits(self._waiting[0]):
            seq = self._admit()
            size = min(len(seq.token_ids), budget)
            chunk(seq, size)
            budget -= size

        if not seqs:
            assert not self._live, "live sequences but nothing to schedule"
            return None
        num_tokens = self.max_num_batched_tokens - budget
        return ScheduledStep(seqs, starts, num_new, samples, num_decodes, num_tokens, num_preempted)

    def schedule_ahead(self, step: ScheduledStep) -> tuple[ScheduledStep, list[int]] | None:
        """The step after `step`, before the tokens that `step` samples are known: every row of it decodes once more.

        Only for the plain case, in which `schedule` would do the same once it knew them. None when some row of `step`
        does not sample, a running sequence is not in it, a waiting one could be admitted, blocks run out, or nothing
        is left because every row reaches its length. A row that turns out to stop at `step` is computed in vain.

        Returns: the step, and for each of its rows the row of `step` whose sampled token it continues from.
        """
        if not all(step.samples) or (self._waiting and self._free_rows and self._fits(self._waiting[0])):
            return None
        alive = [i for i, seq in enumerate(step.seqs) if seq.status is Status.RUNNING]
        if len(alive) != len(self._running):
            return None
        rows = [i for i in alive if len(step.seqs[i].token_ids) + 1 < step.seqs[i].max_total_tokens]
        seqs = [step.seqs[i] for i in rows]
        starts = [len(seq.token_ids) for seq in seqs]
        for seq, start in zip(seqs, starts, strict=True):
            if start >= seq.num_slots and not self._grow(seq, start + 1):
                return None
        count = len(rows)
        if count == 0:
            return None
        return ScheduledStep(seqs, starts, [1] * count, [True] * count, count, count, 0), rows

    def update(
        self, step: ScheduledStep, sampled_token_ids: Sequence[int], eos_ids: Container[int]
    ) -> list[SequenceState]:
        """Account for a step that ran.

        Args:
            step: what the latest `schedule` returned.
            sampled_token_ids: one id a row (more, for padding rows, are ignored); read only for rows that sample.
                `INVALID_TOKEN` ends the row's sequence with "error".
            eos_ids: the model's end-of-sequence ids.

        Returns: the sequences that got a token or ended, in row order. An end or stop token is part of the output.
        """
        assert len(sampled_token_ids) >= len(step.seqs), (len(sampled_token_ids), len(step.seqs))
        advanced = []
        num_finished = 0
        for seq, size, draws, token in zip(
            step.seqs, step.num_new_tokens, step.samples, sampled_token_ids, strict=False
        ):
            if seq.status is not Status.RUNNING:
                continue  # aborted while the step ran, or ended by the token before this one
            seq.num_computed_tokens += size
            if not draws:
                continue
            advanced.append(seq)
            params = seq.params
            if token < 0:
                reason = "error"
            else:
                seq.token_ids.append(token)
                if token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos):
                    reason = "stop"
                elif len(seq.token_ids) >= seq.max_total_tokens:
                    reason = "length"
                else:
                    continue
            num_finished += 1
            self._release(seq)
            self._finish(seq, reason)
        if num_finished:
            self._running = [seq for seq in self._running if seq.status is Status.RUNNING]
        return advanced

    def _room(self, seq: SequenceState) -> int:
        """Tokens that the sequence could add with the blocks it holds and all free ones."""
        return seq.num_slots + self.kv.num_free * self.kv.block_size - seq.num_computed_tokens

    def _grow(self, seq: SequenceState, up_to_tokens: int) -> bool:
        if not self.kv.allocate(seq.request_id, up_to_tokens):
            return False
        seq.blocks = self.kv.block_ids(seq.request_id)
        seq.num_slots = len(seq.blocks) * self.kv.block_size
        return True

    def _fits(self, seq: SequenceState) -> bool:
        """Whether all known tokens of a waiting sequence fit, not just its first chunk.

        Here no running prefill still needs blocks: one that the step does not complete has used up the token budget or
        the free blocks, and nothing is admitted. So a half-done prefill competes for blocks with decodes only. Asking
        for all tokens also keeps a sequence from coming back in the step that preempted it.
        """
        if not self._running:
            return True  # `add` made sure of it
        return self.kv.blocks_for(len(seq.token_ids)) + self._watermark <= self.kv.num_free

    def _admit(self) -> SequenceState:
        seq = self._waiting.popleft()
        seq.status = Status.RUNNING
        seq.row = self._free_rows.pop()
        seq.admission = self._num_admissions
        self._num_admissions += 1
        self._running.append(seq)
        return seq

    def _preempt_youngest(self) -> SequenceState:
        """Free the youngest running sequence's blocks; it waits at the front and is computed again from its start."""
        seq = self._running.pop()
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self._waiting.appendleft(seq)
        return seq

    def _release(self, seq: SequenceState) -> None:
        self.kv.free(seq.request_id)
        self._free_rows.append(seq.row)
        seq.row = -1
        seq.blocks = []
        seq.num_slots = 0

    def _finish(self, seq: SequenceState, reason: str) -> None:
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        del self._live[seq.request_id]
