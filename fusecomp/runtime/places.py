"""Who has rows and blocks: admission, growth, preemption. The scheduler decides when.

Both lists, of running and of waiting sequences, are in the order of their ranks (`scheduler.py`).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.prefix import PrefixSharing
from fusecomp.runtime.sequence import SequenceState, Status
from fusecomp.runtime.swap_space import SwapSpace

RANK = attrgetter("rank")


class Places:
    """The rows of a step and the blocks of the cache, and the sequences that have or want them.

    Args:
        max_num_seqs: rows.
        kv: the block manager; nobody else allocates from it while sequences run.
        swap: where preempted sequences may keep what they computed.

    Attributes:
        waiting, running: sequences by rank.
        free_rows: that no running sequence has.
        prefix: what sequences share.
    """

    def __init__(self, max_num_seqs: int, kv: KVCacheManager, swap: SwapSpace) -> None:
        self.kv, self.swap, self.prefix = kv, swap, PrefixSharing(kv)
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        self.free_rows = list(reversed(range(max_num_seqs)))
        self._max_num_seqs = max_num_seqs
        # A little room left at admission while others run, or the newcomer is soon preempted to feed their decodes.
        self._watermark = max(1, kv.num_blocks // 100)
        self._num_admissions = 0

    def allocate(self, seq: SequenceState, up_to_tokens: int) -> bool:
        if not self.kv.allocate(seq.request_id, up_to_tokens):
            return False
        seq.blocks = self.kv.block_ids(seq.request_id)
        seq.num_slots = len(seq.blocks) * self.kv.block_size
        return True

    def grow(self, seq: SequenceState, position: int) -> bool:
        """A block for a decode's token at `position`, the first after full blocks. Their tokens are known, and computed
        or about to be by a step that is launched: from the next step on others may read them."""
        self.prefix.name(seq, position)
        if not self.kv.append_block(seq.blocks):
            return False
        seq.num_slots += self.kv.block_size
        return True

    def _first_waiting(self, at: int = 0) -> tuple[int, list[int]] | None:
        """Index, from `at` on, of the first waiting sequence that waits for no block; cached blocks it begins with."""
        for index in range(at, min(len(self.waiting), self._max_num_seqs)):
            seq = self.waiting[index]
            cached = self.prefix.cached(seq)
            if not self.prefix.waits(seq, cached):
                return index, cached
        return None

    def next_admissible(self, at: int, before: SequenceState | None) -> tuple[int, list[int]] | None:
        """`_first_waiting` if there is room for it, and its priority goes before that of the prefill `before`."""
        if at >= len(self.waiting) or not self.free_rows:
            return None
        if before is not None and self.waiting[at].priority >= before.priority:
            return None
        found = self._first_waiting(at)
        if found is None:
            return None
        seq = self.waiting[found[0]]
        if before is not None and seq.priority >= before.priority:
            return None
        return found if self._fits(seq, found[1]) else None

    def _missing_blocks(self, seq: SequenceState, cached: Sequence[int]) -> int:
        """Free blocks that a waiting sequence needs for all its known tokens."""
        return self.kv.blocks_for(len(seq.token_ids)) - len(cached) + self.kv.num_idle(cached)

    def _fits(self, seq: SequenceState, cached: Sequence[int]) -> bool:
        """Whether all known tokens of a waiting sequence fit, not just its first chunk.

        Here no running prefill of its priority still needs blocks: one that the step does not complete has used up the
        token budget or the free blocks, and nothing is admitted. So a half-done prefill competes for blocks with
        decodes, and with other priorities. Asking for all tokens also keeps a sequence from coming back in the step
        that preempted it for a decode.
        """
        if not self.running:
            return True  # `add` made sure of it
        free = self.kv.num_free - self._watermark
        return free > 0 and self._missing_blocks(seq, cached) <= free

    def admit(self, index: int, cached: list[int]) -> SequenceState:
        """Move a waiting sequence to the running ones; it begins with the blocks `cached`."""
        seq = self.waiting.pop(index)
        seq.status = Status.RUNNING
        seq.row = self.free_rows.pop()
        seq.admission = self._num_admissions
        self._num_admissions += 1
        insort(self.running, seq, key=RANK)
        self.prefix.begin(seq, cached)
        self.swap.move_in(seq, self.allocate)
        self.prefix.name(seq, seq.num_computed_tokens)  # what moves in is there before the step reads
        return seq

    def make_way(self, prefills: Sequence[SequenceState]) -> list[SequenceState]:
        """Preempt running sequences of lower priority for the first prefill or the first waiting sequence, if need be.

        For the waiting one nobody is preempted unless it then fits. Returns those preempted.
        """
        victims: list[SequenceState] = []
        running = self.running
        if prefills and self.room(prefills[0]) == 0:
            while running[-1].priority > prefills[0].priority and not self.kv.num_free:
                victims.append(self.preempt_last())
            return victims
        if not self.waiting or self.waiting[0].priority >= running[-1].priority:
            return victims
        if prefills and prefills[0].priority <= self.waiting[0].priority:
            return victims  # its turn comes when that is done
        found = self._first_waiting()
        if found is None or self.waiting[found[0]].priority >= running[-1].priority:
            return victims
        seq, cached = self.waiting[found[0]], set(found[1])
        short = self._missing_blocks(seq, found[1]) + self._watermark - self.kv.num_free
        rows = len(self.free_rows)
        count = 0
        while (short > 0 or rows == 0) and count < len(running) and running[-1 - count].priority > seq.priority:
            count += 1
            rows += 1
            short -= self.kv.num_private(running[-count].request_id, cached)
        if short <= 0 and rows:
            victims = [self.preempt_last() for _ in range(count)]
        return victims

    def room(self, seq: SequenceState) -> int:
        """Tokens that the sequence could add with the blocks it holds and all free ones."""
        return seq.num_slots + self.kv.num_free * self.kv.block_size - seq.num_computed_tokens

    def preempt_last(self) -> SequenceState:
        """Free the blocks of the last running sequence in rank; it waits, and goes on where it was if they are kept on
        the host. Otherwise it is computed again from its start, or from where the first of its blocks was taken
        meanwhile."""
        seq = self.running.pop()
        self.swap.move_out(seq)
        self.release(seq)
        seq.status = Status.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        insort(self.waiting, seq, key=RANK)
        return seq

    def release(self, seq: SequenceState, *, forget: bool = False) -> None:
        """Give a running sequence's blocks and row back. With `forget` nobody finds what it computed."""
        self.prefix.leave(seq, forget=forget)
        self.kv.free(seq.request_id, forget=forget)
        self.free_rows.append(seq.row)
        seq.row = -1
        seq.blocks = []
        seq.num_slots = seq.num_named = 0
