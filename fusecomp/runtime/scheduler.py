"""Which tokens the next step computes: continuous batching with chunked prefill, prefix caching, priorities, and
preemption by recompute or by swap (`places.py`, `swap_space.py`).

In: requests (`Scheduler.add`), sampled tokens (`update`). Out: `ScheduledStep`s (`schedule`). Pure Python and
deterministic: the same calls give the same steps.

Sequences are ranked by (priority, arrival), lower first; both lists, of running and of waiting ones, are kept in this
order. One call of `schedule`:
    1. every running decode gets one token, in rank order; when blocks run out, the running sequence of the last rank is
       preempted: it gives its blocks up and waits at its rank. In the step the longest comes first;
    2. if the first prefill has no block left, or the first waiting sequence no row or too few blocks, running sequences
       of a strictly lower priority are preempted for it, last rank first, if that helps;
    3. the remaining tokens go to running prefills and waiting sequences by priority; of one priority, prefills come
       first. A prefill that they do not complete ends the step. A waiting sequence is admitted when blocks for all its
       known tokens are there, and none behind it before it, but for one case: a sequence whose next block is just being
       computed by a running one of no lower priority lets others pass and waits for that block.

What a sequence takes over at admission are the leading full blocks of its known tokens whose content is cached
(`kv_cache.py`), except that its last token is always computed. Blocks become known when the step that wrote them has
run, so a step never reads what it writes itself through another sequence's table.

Why it ends. `add` refuses what does not fit into the empty cache, so the running sequence of the first rank, were all
others preempted, has its blocks.
    - No step is empty while there is work. If nothing runs, the first waiting sequence is admitted: nobody computes a
      block for it. Otherwise, if step 1 schedules no decode, every running decode was preempted, and what is left are
      prefills. Of one priority at most one is unfinished, because behind a prefill that the step leaves unfinished only
      a higher priority is admitted; and the first of them takes blocks from the others in step 2.
    - The first rank always gets on. It is never preempted. Its decodes take blocks from all others. Its prefill gets
      tokens as long as there is a free block; the blocks that it lacks are held by decodes, for it was admitted when
      all fit and later ones of its priority wait for it; those end, or are preempted and come back when it is done.
    - Nobody starves within a priority. Only finitely many sequences rank before one that waits, and all of them end.
      Those that pass it while it waits for a block cannot delay it for ever. Who computes the block ranks before it:
      two that want the same block want the same ones before it, so the first in rank computes them. An unfinished
      prefill lets no newcomer of its priority in, so passing is possible only when the block's prefill completes, and
      the block is known a step later, or in the step after that when its last token came alone.
    - A long prefill is not postponed by short newcomers of its priority, and decodes wait for no prefill: by order.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Sequence
from operator import attrgetter

from fusecomp.errors import CapacityError, RequestError
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.places import RANK, Places
from fusecomp.runtime.sequence import INVALID_TOKEN, UNKNOWN_TOKEN, ScheduledEntry, ScheduledStep, SequenceState, Status
from fusecomp.runtime.swap_space import SwapSpace

KNOWN = -1  # in place of a row: the token is on the host already
NUM_COMPUTED = attrgetter("num_computed_tokens")
__all__ = ["INVALID_TOKEN", "ScheduledEntry", "ScheduledStep", "Scheduler", "SequenceState", "Status"]


class Scheduler:
    """Decides each step's rows and keeps the sequences' state.

    Args:
        max_num_seqs: most rows in a step, and most running sequences.
        max_num_batched_tokens: most tokens in a step; at least `max_num_seqs`, so that every decode fits.
        max_model_len: longest prompt plus output, in tokens.
        kv: the block manager; nobody else allocates from it while sequences run.
        swap: where preempted sequences may keep what they computed; None has all computed again.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        kv: KVCacheManager,
        swap: SwapSpace | None = None,
    ) -> None:
        assert 1 <= max_num_seqs <= max_num_batched_tokens, (max_num_seqs, max_num_batched_tokens)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.kv = kv
        self.swap = swap or SwapSpace(0, kv.block_size, lambda tokens, blocks: False)
        self._places = Places(max_num_seqs, kv, self.swap)
        self.prefix = self._places.prefix
        self._live: dict[str, SequenceState] = {}
        self._num_arrivals = 0
        self._launched: ScheduledStep | None = None  # in flight, its rows moved on by `_move_on`
        self._ranked: list[SequenceState] = []  # the latest step's decodes, and again by length
        self._longest: list[SequenceState] = []

    @property
    def num_waiting(self) -> int:
        return len(self._places.waiting)

    @property
    def num_running(self) -> int:
        return len(self._places.running)

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
        seq.rank = seq.priority, seq.arrival
        self._num_arrivals += 1
        self._live[seq.request_id] = seq
        insort(self._places.waiting, seq, key=RANK)

    def abort(self, request_id: str) -> SequenceState | None:
        """End a sequence with "abort", also between `schedule` and `update`. None when no such request lives."""
        seq = self._live.get(request_id)
        if seq is None:
            return None
        if seq.status is Status.RUNNING:
            self._places.running.remove(seq)
            self._places.release(seq)
        else:
            self._places.waiting.remove(seq)
        self._finish(seq, "abort")
        return seq

    def schedule(self) -> ScheduledStep | None:
        """The next step, with slots allocated for all its tokens; None when no sequence lives.

        The caller runs the step and calls `update` before it schedules again.
        """
        return self._compose()

    def _compose(self, *, ahead: bool = False) -> ScheduledStep | None:
        """The next step of running sequences and of waiting ones.

        With `ahead` those that reach their length with the token to come have no part in it, and nobody is preempted:
        None where somebody would be, and before any is admitted.
        """
        places, seqs = self._places, list[SequenceState]()
        starts: list[int] = []
        prefills: list[SequenceState] = []
        num_preempted = 0
        decode, at = seqs.append, starts.append  # once: the loop below runs for every decode
        # Preemption pops from the tail of the list under iteration, behind or at the current sequence: that ends the
        # loop early, as it should. What was scheduled stays.
        for seq in places.running:
            start, known = seq.num_computed_tokens, len(seq.token_ids)
            if start + 1 != known or start == 0:
                prefills.append(seq)
                continue
            if known == seq.max_total_tokens:
                continue  # only `ahead`
            while start >= seq.num_slots and not places.grow(seq, start):
                if ahead:
                    return None
                num_preempted += 1
                if places.preempt_last() is seq:
                    break
            else:
                decode(seq)
                at(start)
        if ahead:
            if prefills and places.room(prefills[0]) == 0:
                return None
        elif places.running and (prefills or places.waiting):
            for victim in places.make_way(prefills):
                num_preempted += 1
                if seqs and seqs[-1] is victim:  # both lists are in rank order
                    seqs.pop()
                    starts.pop()
        seqs, starts = self._longest_first(seqs, starts)
        num_decodes = len(seqs)
        num_new = [1] * num_decodes
        samples = [True] * num_decodes
        budget = self.max_num_batched_tokens - num_decodes
        # Those preempted above are the last of their kind.
        unfinished = iter([seq for seq in prefills if seq.status is Status.RUNNING] if num_preempted else prefills)
        prefill = next(unfinished, None)
        first = 0  # waiting sequences before it wait for a block
        while budget:
            found = places.next_admissible(first, before=prefill)
            if found is not None:
                first = found[0]
                seq = places.admit(*found)
                size = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            elif prefill is not None:
                seq, prefill = prefill, next(unfinished, None)
                size = min(len(seq.token_ids) - seq.num_computed_tokens, budget, places.room(seq))
                if size == 0:
                    break
            else:
                break
            start = seq.num_computed_tokens
            end = start + size
            grown = places.allocate(seq, end)
            assert grown, f"{seq.request_id!r}: no blocks for a chunk that was sized to fit"
            completes = end == len(seq.token_ids)
            if size == 1 and start and completes and num_decodes == len(seqs):
                num_decodes += 1  # all but the last token was cached: the row is a decode like those before it
            seqs.append(seq)
            starts.append(start)
            num_new.append(size)
            samples.append(completes)
            budget -= size
            if not completes:
                break  # the tokens or the blocks are used up, and no other may take the blocks that it will need

        if not seqs:
            assert ahead or not self._live, "live sequences but nothing to schedule"
            return None
        num_tokens = self.max_num_batched_tokens - budget
        return ScheduledStep(
            seqs, starts, num_new, samples, num_decodes, num_tokens, num_preempted, *self.swap.take_moves()
        )

    def _longest_first(self, ranked: list[SequenceState], starts: list[int]) -> tuple[list[SequenceState], list[int]]:
        """Decodes and their starts by what they read: attention's longest rows, which begin first, do not end alone.

        Decodes of which none ended and none joined since the last step are as much longer, each.
        """
        if ranked != self._ranked:
            order = sorted(range(len(ranked)), key=starts.__getitem__, reverse=True)
            self._ranked, self._longest = ranked, [ranked[i] for i in order]
        return self._longest.copy(), list(map(NUM_COMPUTED, self._longest))

    def schedule_ahead(self, step: ScheduledStep) -> tuple[ScheduledStep, Sequence[int]] | None:
        """The step after `step`, which is launched, before the tokens that `step` samples are known.

        It is what `schedule` gives if no row of `step` turns out to stop; one that does is computed in vain. Rows that
        reach their length end, and what they hold is free from the step after. None when a sequence would have to be
        preempted, or nothing is left to do.

        Returns: the step, and for each of its decodes the row of `step` whose sampled token it continues from, or
            `KNOWN` for the last token of a prompt that was cut before it; a `range` if that is each decode's own row.
        """
        waiting, running = self._places.waiting, self._places.running
        if waiting and running and waiting[0].priority < running[-1].priority:
            return None
        nobody_comes = not waiting or not self._places.free_rows
        still = [seq.status for seq in step.seqs].count(Status.RUNNING)
        same_rows = still == len(step.seqs) == len(running)
        if self._launched is None and nobody_comes and step.decode_only and same_rows and all(step.samples):
            if (due := self._move_decodes_on(step)) is not None:
                return self._repeated(step, due)
        else:
            self._move_on(step)
        following = self._compose(ahead=True)
        if following is None:
            return None
        decodes = following.seqs[: following.num_decodes]
        if decodes == step.seqs and all(step.samples):  # nearly always, and quickly found
            return following, range(len(decodes))
        row_of = {seq: row for row, (seq, draws) in enumerate(zip(step.seqs, step.samples, strict=True)) if draws}
        return following, [row_of.get(seq, KNOWN) for seq in decodes]

    def _move_decodes_on(self, step: ScheduledStep) -> list[SequenceState] | None:
        """`_move_on` of a step whose rows are all that runs, and decode. Returns those of them that want a block before
        the step after; None if one has reached its length."""
        self._launched = step
        due, ended = list[SequenceState](), False
        for seq in step.seqs:
            seq.num_computed_tokens = start = seq.num_computed_tokens + 1
            tokens = seq.token_ids
            tokens.append(UNKNOWN_TOKEN)
            if start >= seq.num_slots:
                due.append(seq)
            if start + 1 == seq.max_total_tokens:
                ended = True
        return None if ended else due

    def _repeated(
        self, step: ScheduledStep, due: Sequence[SequenceState]
    ) -> tuple[ScheduledStep, Sequence[int]] | None:
        """What `_compose` gives ahead where the rows of `step`, moved on, are those of the step after: `due` of them
        grow. None when a sequence would have to be preempted."""
        grow = self._places.grow
        for seq in due:
            if not grow(seq, seq.num_computed_tokens):
                return None
        starts = [start + 1 for start in step.starts]
        rows = len(starts)
        following = ScheduledStep(
            step.seqs, starts, step.num_new_tokens, step.samples, rows, rows, 0, *self.swap.take_moves()
        )
        return following, range(rows)

    def _move_on(self, step: ScheduledStep) -> None:
        """Account for a launched step but for its tokens, which are yet to come: `UNKNOWN_TOKEN` stands for each."""
        if self._launched is step:
            return
        assert self._launched is None, "two steps are in flight"
        self._launched = step
        running = Status.RUNNING
        for seq, size, draws in zip(step.seqs, step.num_new_tokens, step.samples, strict=True):
            if seq.status is running:  # not aborted, nor ended by the token before this one
                seq.num_computed_tokens += size
                if draws:
                    seq.token_ids.append(UNKNOWN_TOKEN)

    def update(
        self, step: ScheduledStep, sampled_token_ids: Sequence[int], eos_ids: Container[int]
    ) -> list[SequenceState]:
        """Account for a step that ran.

        Args:
            step: what the latest `schedule` returned, or the `schedule_ahead` before the latest.
            sampled_token_ids: one id a row (more, for padding rows, are ignored); read only for rows that sample.
                `INVALID_TOKEN` ends the row's sequence with "error".
            eos_ids: the model's end-of-sequence ids.

        Returns: the sequences that got a token or ended, in row order. An end or stop token is part of the output.
        """
        assert len(sampled_token_ids) >= len(step.seqs), (len(sampled_token_ids), len(step.seqs))
        self._move_on(step)
        self._launched = None
        advanced = []
        num_finished = 0
        running = Status.RUNNING
        for seq, draws, token in zip(step.seqs, step.samples, sampled_token_ids, strict=False):
            if not draws or seq.status is not running:
                continue
            advanced.append(seq)
            params = seq.params
            if token < 0:
                del seq.token_ids[-1]
                reason = "error"
            else:
                seq.token_ids[-1] = token
                if token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos):
                    reason = "stop"
                elif len(seq.token_ids) >= seq.max_total_tokens:
                    reason = "length"
                else:
                    continue
            num_finished += 1
            self._places.release(seq, forget=reason == "error")
            self._finish(seq, reason)
        if num_finished:
            self._places.running = [seq for seq in self._places.running if seq.status is Status.RUNNING]
        # A decode's block is named when the next one is needed, the blocks of all that ended were when it did.
        for seq in step.seqs[step.num_decodes :]:
            if seq.status is running:
                self.prefix.name(seq, seq.num_computed_tokens)
        return advanced

    def _finish(self, seq: SequenceState, reason: str) -> None:
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        self.swap.drop(seq.request_id)
        del self._live[seq.request_id]
