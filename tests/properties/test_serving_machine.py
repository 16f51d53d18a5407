"""The scheduler and the block manager under arrivals, forks, cancellations, failures and tiny caches, in any order.

The device is `PagedModel`: it stores token ids in slots, checks what every row reads, and makes the next token a hash
of all that it read. So a block that was shared wrongly, given away too early or written twice changes some request's
tokens, which must equal those that the request gets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fusecomp.request import SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.scheduler import INVALID_TOKEN, ScheduledStep, Scheduler, SequenceState, Status
from fusecomp.runtime.swap_space import SwapSpace
from tests.runtime.simulation import EOS, VOCAB, PagedModel, alone

MAX_LEN = 40
MOST_LIVE = 12


@dataclass(eq=False)
class Asked:
    """A request, what it got, and the steps that it has been waiting or running for."""

    seq: SequenceState
    ended: str | None = None
    age: int = 0
    got: list[int] = field(default_factory=list)


class ServingMachine(RuleBasedStateMachine):
    prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_LEN - 1)
    params = st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([20, None, 9, 5, 2, 1]),
        ignore_eos=st.sampled_from([True, True, False]),
        stop_token_ids=st.sampled_from([(), (), (3,)]),
    )
    priorities = st.sampled_from([0, 0, 0, 0, -1, 1])

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        spare=st.sampled_from([0, 0, 1, 2, 3, 20]),  # blocks beyond what one request needs at its longest
        rows=st.sampled_from([5, 4, 3, 2, 1]),
        more_tokens=st.sampled_from([0, 1, 3, 10, 40]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        swap_blocks=st.sampled_from([0, 3, 40, 200]),
        dearest=st.sampled_from([1, 1, 4]),
        prompt=prompts,
        params=params,
        n=st.integers(1, 6),
    )
    def begin(self, block_size, spare, rows, more_tokens, prefix_caching, swap_blocks, dearest, prompt, params, n):
        num_blocks = -(-(MAX_LEN - 1) // block_size) + spare
        self.kv = KVCacheManager(num_blocks, block_size, prefix_caching=prefix_caching)
        # What has few tokens is computed again: the choice is made for each preemption.
        self.swap = SwapSpace(swap_blocks, block_size, lambda tokens, blocks: tokens >= dearest)
        self.scheduler = Scheduler(rows, rows + more_tokens, MAX_LEN, self.kv, self.swap)
        self.model = PagedModel(block_size)
        self.asked: list[Asked] = []
        self.failing: set[str] = set()
        self.flight: tuple[ScheduledStep, list[int]] | None = None
        self.preemptions = 0
        self.add(prompt, params, priority=0, count=n)

    @property
    def live(self) -> list[Asked]:
        return [a for a in self.asked if a.ended is None]

    def add(self, prompt: Sequence[int], params: SamplingParams, priority: int, count: int = 1) -> None:
        for _ in range(count):
            if len(self.live) < MOST_LIVE:
                seq = SequenceState(str(len(self.asked)), list(prompt), params, priority)
                self.scheduler.add(seq)
                self.asked.append(Asked(seq))

    @rule(
        prompt=prompts,
        params=params,
        priority=priorities,
        n=st.sampled_from([1, 1, 2, 4]),
    )
    def arrive(self, prompt, params, priority, n):
        self.add(prompt, params, priority, n)

    @rule(
        data=st.data(),
        more=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        params=params,
        priority=priorities,
        n=st.sampled_from([1, 2, 3]),
    )
    def fork(self, data, more, params, priority, n):
        """Requests that go on from what another one has so far, or from a part of it."""
        tokens = data.draw(st.sampled_from(self.asked)).seq.token_ids
        kept = data.draw(st.integers(1, min(len(tokens), MAX_LEN - 1 - len(more))))
        self.add([*tokens[:kept], *more], params, priority, n)

    @rule(data=st.data())
    def cancel(self, data):
        if not self.live:
            return
        asked = data.draw(st.sampled_from(self.live))
        assert self.scheduler.abort(asked.seq.request_id) is asked.seq
        asked.ended = "abort"

    @rule(data=st.data())
    def fail(self, data):
        """The next logits of a request are not finite."""
        if self.live:
            self.failing.add(data.draw(st.sampled_from(self.live)).seq.request_id)

    @rule(times=st.sampled_from([1, 2, 4, 8]), overlap=st.booleans())
    def run_steps(self, times, overlap):
        for _ in range(times):
            self.step(overlap)

    @rule(drain=st.booleans())
    def overwrite_an_idle_cache(self, drain):
        while drain and self.live:
            self.step(overlap=True)
        if not self.live:
            self.kv.pool.forget_all()
            self.model.cache.clear()
            self.flight = None

    def launch(self, step: ScheduledStep, continues=None) -> tuple[ScheduledStep, list[int]]:
        tokens = self.model(step, continues)
        for row, (seq, draws) in enumerate(zip(step.seqs, step.samples, strict=True)):
            if draws and seq.request_id in self.failing:
                tokens[row] = INVALID_TOKEN
        return step, tokens

    def step(self, overlap: bool) -> None:
        """What `Engine.step` does: perhaps the next step is launched before this one's tokens are accounted for."""
        steps_run[0] += 1
        flight, self.flight = self.flight, None
        if flight is None:
            for host in self.swap._free:  # its owner came back or ended: who reads it now fails
                self.model.host.pop(host, None)
            step = self.scheduler.schedule()
            if step is None:
                assert not self.live
                return
            self.check_step(step)
            flight = self.launch(step)
        step, tokens = flight
        if overlap and (ahead := self.scheduler.schedule_ahead(step)) is not None:
            self.check_step(ahead[0], ahead=True)
            self.flight = self.launch(ahead[0], (tokens, ahead[1]))
        advanced = self.scheduler.update(step, tokens, EOS)
        if self.flight and not any(seq.status is Status.RUNNING for seq in self.flight[0].seqs):
            self.flight = None
        for seq in advanced:
            asked = self.asked[int(seq.request_id)]
            assert asked.ended is None
            asked.got = seq.output_ids
            asked.ended = seq.finish_reason
        for asked in self.live:
            asked.age += 1

    def check_step(self, step: ScheduledStep, *, ahead: bool = False) -> None:
        self.preemptions += step.num_preempted
        entries = list(step.entries)
        assert 1 <= len(entries) <= self.scheduler.max_num_seqs
        assert sum(e.num_new_tokens for e in entries) == step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len({id(e.seq) for e in entries}) == len({e.seq.row for e in entries}) == len(entries)
        for i, (seq, size, start, draws) in enumerate(entries):
            assert seq.status is Status.RUNNING
            assert start == seq.num_computed_tokens
            assert 1 <= size <= len(seq.token_ids) - start
            assert draws == (start + size == len(seq.token_ids))
            assert i >= step.num_decodes or (start > 0 and draws and size == 1)
        decodes = [s for s in self.scheduler._places.running if s.num_computed_tokens == len(s.token_ids) - 1 > 0]
        if ahead:  # those that the step in flight ends do not go on
            assert step.num_preempted == 0
            decodes = [s for s in decodes if len(s.token_ids) < s.max_total_tokens]
        assert {id(s) for s in decodes} <= {id(e.seq) for e in entries}, "a decode that runs waits for nothing"

    @invariant()
    def lists_are_in_rank_order(self):
        for seqs in (self.scheduler._places.running, self.scheduler._places.waiting):
            assert [s.rank for s in seqs] == sorted((s.priority, s.arrival) for s in seqs)
        unfinished = [
            s.priority for s in self.scheduler._places.running if len(s.token_ids) - s.num_computed_tokens > 1
        ]
        if self.flight is None:
            assert len(unfinished) == len(set(unfinished)), "two prefills of one priority compete for blocks"

    @invariant()
    def every_block_has_its_owners(self):
        owners = [0] * self.kv.num_blocks
        for seq in self.scheduler._places.running:
            assert seq.blocks is self.kv.block_ids(seq.request_id)
            assert len(seq.blocks) * self.kv.block_size == seq.num_slots >= seq.num_computed_tokens
            for block in seq.blocks:
                owners[block] += 1
        assert owners == [self.kv.pool.ref_count(block) for block in range(self.kv.num_blocks)]
        assert self.kv.num_free == owners.count(0)
        assert len(self.scheduler._places.free_rows) == self.scheduler.max_num_seqs - len(
            self.scheduler._places.running
        )

    @invariant()
    def every_host_block_has_its_owner(self):
        waiting = {seq.request_id: seq for seq in self.scheduler._places.waiting}
        held = [self.swap.holds(name) for name in waiting]
        blocks = [block for owned, _ in held for block in owned]
        assert sorted(blocks + self.swap._free) == list(range(self.swap.num_blocks))
        assert self.swap.num_sequences == sum(tokens > 0 for _, tokens in held), "only those that wait are out"
        for owned, tokens in held:
            assert len(owned) == -(-tokens // self.kv.block_size)

    @invariant()
    def what_can_be_found_is_there(self):
        """Every block that is known by the name of some request's tokens holds these tokens."""
        size = self.kv.block_size
        for asked in self.asked:
            for index, name in enumerate(asked.seq.names):
                if (block := self.kv.pool.find(name)) is not None:
                    held = [self.model.cache[block * size + at][0] for at in range(size)]
                    assert held == asked.seq.token_ids[index * size : (index + 1) * size]

    @invariant()
    def who_makes_a_block_is_running(self):
        assert all(seq.status is Status.RUNNING for seq in self.scheduler.prefix.makers.values())

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        bound = sum(MAX_LEN + 1 for _ in self.live) * (len(self.live) + 1)
        for _ in range(bound):
            if not self.live:
                break
            self.step(overlap=False)
        assert not self.live, f"not served after {bound} steps"
        self.every_block_has_its_owners()
        assert self.kv.num_free == self.kv.num_blocks
        assert self.swap.num_free == self.swap.num_blocks
        assert not self.scheduler.has_work
        assert not self.scheduler.prefix.makers
        for asked in self.asked:
            seq = asked.seq
            expected, reason = alone(seq.prompt_ids, seq.params, MAX_LEN)
            if asked.ended in ("abort", "error"):
                assert seq.output_ids == expected[: seq.num_output_tokens]
            else:
                assert (asked.got, asked.ended) == (expected, reason)
        assert self.scheduler.prefix.hits >= sum(a.seq.num_cached_tokens for a in self.asked)
        event("preempted" if self.preemptions else "never preempted")
        event("moved" if self.swap.moved_in else "never moved")
        event("shared" if self.scheduler.prefix.hits else "never shared")


steps_run = [0]
ServingMachine.TestCase.settings = settings(stateful_step_count=50, max_examples=settings().max_examples)
TestServing = ServingMachine.TestCase


def test_enough_steps_were_run():
    """Follows the machine above in this module, which one worker runs in order."""
    assert steps_run[0] == 0 or steps_run[0] >= 2000
