"""Who goes first, who is preempted, and who never waits for ever."""

import pytest

from fusecomp.request import SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.scheduler import Scheduler, SequenceState, Status


def make(max_num_seqs=4, budget=64, blocks=64, block_size=4, max_model_len=64):
    return Scheduler(max_num_seqs, budget, max_model_len, KVCacheManager(blocks, block_size))


def add(scheduler, name, length, priority=0, **params):
    seq = SequenceState(name, [len(name)] * length, SamplingParams(**{"max_tokens": 40, **params}), priority)
    scheduler.add(seq)
    return seq


def step(scheduler):
    scheduled = scheduler.schedule()
    seen = [(e.seq.request_id, e.num_new_tokens) for e in scheduled.entries]
    scheduler.update(scheduled, [9] * len(seen), ())
    return seen


def test_a_lower_number_goes_first_then_order_of_arrival():
    scheduler = make(budget=8)
    for name, priority in (("late", 1), ("first", -3), ("second", 0), ("third", 0)):
        add(scheduler, name, 6, priority)
    assert step(scheduler) == [("first", 6), ("second", 2)]
    assert step(scheduler) == [("first", 1), ("second", 4), ("third", 3)]
    assert step(scheduler) == [("first", 1), ("second", 1), ("third", 3), ("late", 3)]


def test_blocks_are_taken_from_the_lowest_priority_then_the_youngest():
    scheduler = make(blocks=6, max_model_len=24)
    low = add(scheduler, "low", 3, priority=5, max_tokens=21)
    old, young = add(scheduler, "old", 7, max_tokens=17), add(scheduler, "young", 3, max_tokens=21)
    step(scheduler)  # low 1, old 2, young 1 of six blocks
    gone = []
    while old.status is not Status.FINISHED:
        before = {seq: seq.num_preemptions for seq in (low, old, young)}
        step(scheduler)
        gone += [seq.request_id for seq in (low, old, young) if seq.num_preemptions > before[seq]]
    assert gone[:2] == ["low", "young"]
    assert old.num_preemptions == 0


def test_a_waiting_request_takes_the_row_of_a_lower_priority():
    scheduler = make(max_num_seqs=2)
    add(scheduler, "a", 5, priority=1)
    low = add(scheduler, "b", 5, priority=2)
    step(scheduler)
    add(scheduler, "urgent", 5)
    assert step(scheduler) == [("a", 1), ("urgent", 5)]
    assert (low.status, low.num_preemptions) == (Status.WAITING, 1)
    add(scheduler, "equal", 5, priority=1)
    assert step(scheduler) == [("a", 1), ("urgent", 1)], "an equal priority waits"


def test_a_waiting_request_takes_the_blocks_of_lower_priorities_if_they_suffice():
    scheduler = make(blocks=8, max_model_len=32)
    add(scheduler, "same", 14, max_tokens=18)  # four blocks
    low = add(scheduler, "low", 6, priority=1, max_tokens=3)  # two
    step(scheduler)
    add(scheduler, "huge", 24, max_tokens=1)  # six and one in reserve: without "low" four are free
    assert step(scheduler) == [("same", 1), ("low", 1)], "to preempt would not help"
    scheduler.abort("huge")
    add(scheduler, "fits", 12, max_tokens=1)
    assert step(scheduler) == [("same", 1), ("fits", 12)]
    assert low.num_preemptions == 1


def test_a_higher_priority_passes_an_unfinished_prefill():
    scheduler = make(budget=8)
    add(scheduler, "long", 30, priority=1)
    assert step(scheduler) == [("long", 8)]
    add(scheduler, "urgent", 5)
    assert step(scheduler) == [("urgent", 5), ("long", 3)]
    assert step(scheduler) == [("urgent", 1), ("long", 7)]


def test_a_stuck_prefill_takes_blocks_from_a_lower_priority():
    scheduler = make(blocks=8, max_model_len=32, budget=9)
    low = add(scheduler, "low", 3, priority=1, max_tokens=20)
    step(scheduler)
    high = add(scheduler, "high", 27, max_tokens=2)
    while high.num_output_tokens == 0:
        assert "high" in dict(step(scheduler))
        while low.status is Status.RUNNING and scheduler.kv.num_free and len(low.blocks) < 3:
            low.token_ids.append(9)  # as if it had decoded faster, so that blocks run out under the prefill
            low.num_computed_tokens += 1
            scheduler._places.allocate(low, low.num_computed_tokens + 1)
    assert low.num_preemptions == 1


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_long_prompt_is_not_postponed_by_short_ones_and_decodes_wait_for_neither(prefix_caching):
    kv = KVCacheManager(400, 4, prefix_caching=prefix_caching)
    scheduler = Scheduler(8, 16, 400, kv)
    decode = add(scheduler, "decode", 3, max_tokens=200)
    step(scheduler)
    long = add(scheduler, "long prompt", 300, max_tokens=1)
    steps = 0
    while long.status is not Status.FINISHED:
        steps += 1
        add(scheduler, f"short {steps}", 3, max_tokens=2)
        seen = step(scheduler)
        assert seen[0] == ("decode", 1)
        assert sum(size for _, size in seen) <= 16
    assert steps == 300 // 15
    assert decode.num_output_tokens == steps + 1


def test_nobody_starves_within_a_priority():
    """A request of 5 blocks among a stream of small ones on 8 blocks: it is served though some of those always fit."""
    scheduler = make(blocks=8, max_model_len=32, max_num_seqs=3)
    add(scheduler, "x0", 5, max_tokens=6)
    big = None
    for number in range(1, 60):
        if number == 4:
            big = add(scheduler, "big one", 18, max_tokens=3)
        add(scheduler, f"x{number}", 5, max_tokens=6)
        step(scheduler)
        if big is not None and big.status is Status.FINISHED:
            break
    assert big is not None
    assert big.status is Status.FINISHED
    waiting = [seq.request_id for seq in scheduler._places.waiting]
    assert "x3" not in waiting, "who came before it was served before it"
