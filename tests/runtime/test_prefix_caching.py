"""What requests with common prefixes share, on small, named cases: blocks of 4 tokens."""

import pytest

from fusecomp.request import SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.metrics import Metrics
from fusecomp.runtime.scheduler import INVALID_TOKEN, Scheduler, SequenceState
from tests.runtime.simulation import PagedModel, next_token

PROMPT = [*range(1, 11)]  # two blocks and a half


def make(max_num_seqs=8, budget=64, blocks=64, block_size=4, max_model_len=64):
    kv = KVCacheManager(blocks, block_size, prefix_caching=True)
    return Scheduler(max_num_seqs, budget, max_model_len, kv)


def sequence(name, prompt, priority=0, takes_cached=True, **params):
    return SequenceState(name, prompt, SamplingParams(**params), priority, takes_cached)


def rows(step):
    return [(e.seq.request_id, e.start, e.num_new_tokens, e.samples) for e in step.entries]


class Run:
    """Steps a scheduler on the paged model, which checks that every row reads its own tokens."""

    def __init__(self, scheduler):
        self.scheduler, self.model, self.computed = scheduler, PagedModel(scheduler.kv.block_size), 0

    def step(self):
        step = self.scheduler.schedule()
        if step is None:
            return []
        seen = rows(step)
        self.computed += step.num_tokens
        self.scheduler.update(step, self.model(step), ())
        return seen

    def drain(self):
        steps = []
        while seen := self.step():
            steps.append(seen)
        assert self.scheduler.kv.num_free == self.scheduler.kv.num_blocks
        assert not self.scheduler.prefix.makers
        return steps


def continuation(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def test_a_later_request_computes_only_what_is_new():
    run = Run(make())
    run.scheduler.add(sequence("a", PROMPT, max_tokens=1))
    run.drain()
    again = sequence("b", [*PROMPT[:8], 77, 78], max_tokens=2)
    run.scheduler.add(again)
    assert run.step() == [("b", 8, 2, True)]
    run.drain()
    assert again.output_ids == continuation(again.prompt_ids, 2)
    assert (again.num_cached_tokens, run.scheduler.prefix.queries, run.scheduler.prefix.hits) == (8, 20, 8)
    now = Metrics().snapshot(run.scheduler)
    assert (now.prefix_cache_queries, now.prefix_cache_hits) == (20, 8)


@pytest.mark.parametrize(("block_size", "start"), [(4, 4), (1, 7), (8, 0)])
def test_the_last_token_is_always_computed(block_size, start):
    run = Run(make(block_size=block_size))
    run.scheduler.add(sequence("a", PROMPT[:8], max_tokens=1))
    run.drain()
    run.scheduler.add(sequence("b", PROMPT[:8], max_tokens=1))
    step = run.scheduler.schedule()
    assert rows(step) == [("b", start, 8 - start, True)]
    assert step.decode_only == (start == 7), "one token on cached ones is a decode"


def test_generated_tokens_are_found_too():
    run = Run(make())
    first = sequence("a", PROMPT, max_tokens=7)
    run.scheduler.add(first)
    run.drain()
    # 16 tokens are computed: the last one that was generated is never fed back.
    run.scheduler.add(sequence("turn two", [*PROMPT, *first.output_ids, 5, 6], max_tokens=1))
    assert run.step() == [("turn two", 16, 3, True)]


def test_without_the_option_nothing_is_shared():
    kv = KVCacheManager(64, 4)
    run = Run(Scheduler(8, 64, 64, kv))
    for name in "ab":
        run.scheduler.add(sequence(name, PROMPT, max_tokens=1))
        assert run.step() == [(name, 0, 10, True)]
    assert (run.scheduler.prefix.queries, run.scheduler.prefix.hits, kv.pool.num_known) == (0, 0, 0)


def test_a_request_that_wants_logits_of_its_prompt_computes_all_of_it():
    run = Run(make())
    run.scheduler.add(sequence("a", PROMPT, max_tokens=1))
    run.drain()
    run.scheduler.add(sequence("b", PROMPT, takes_cached=False, max_tokens=1))
    assert run.step() == [("b", 0, 10, True)]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("budget", [16, 64, 256])
def test_eight_samples_compute_a_long_prompt_once(budget, block_size):
    prompt, run = (
        [i % 7 for i in range(100)],
        Run(make(budget=budget, block_size=block_size, blocks=512, max_model_len=128)),
    )
    samples = [sequence(f"s/{i}", prompt, max_tokens=5) for i in range(8)]
    for seq in samples:
        run.scheduler.add(seq)
    steps = run.drain()
    assert all(seq.output_ids == continuation(prompt, 5) for seq in samples)
    # Each of the others computes the tokens after the last full block, and each its own output.
    rest = 100 - 99 // block_size * block_size
    assert run.computed == 100 + 7 * rest + 8 * 4
    shared = 100 - rest
    assert all(len(step) == 1 for step in steps[: -(-shared // budget)]), "they wait for the first"
    together = -(-shared // budget) + -(-(8 * rest) // (budget - 8)) + 5
    assert len(steps) <= together, "and for nothing else"


def test_others_pass_a_request_that_waits_for_a_block():
    run = Run(make(budget=12))
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("c", [50, 51]), ("d", [60, 61])):
        run.scheduler.add(sequence(name, prompt, max_tokens=3))
    assert run.step() == [("a", 0, 10, True), ("c", 0, 2, True)]
    assert run.step() == [("a", 10, 1, True), ("c", 2, 1, True), ("b", 8, 2, True), ("d", 0, 2, True)]
    run.drain()


def test_an_unfinished_prefill_lets_nobody_pass():
    run = Run(make(max_num_seqs=4, budget=6))
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("c", [50])):
        run.scheduler.add(sequence(name, prompt, max_tokens=3))
    assert run.step() == [("a", 0, 6, False)]
    assert run.step() == [("a", 6, 4, True), ("c", 0, 1, True)]
    assert run.step() == [("a", 10, 1, True), ("c", 1, 1, True), ("b", 8, 2, True)]
    run.drain()


@pytest.mark.parametrize("between", [False, True], ids=["between steps", "in flight"])
def test_who_waited_computes_the_block_when_its_maker_goes(between):
    run = Run(make(max_num_seqs=4, budget=6))
    for name in "abc":
        run.scheduler.add(sequence(name, PROMPT, max_tokens=1))
    if between:
        step = run.scheduler.schedule()
        run.scheduler.abort("a")
        run.scheduler.update(step, [1], ())
    else:
        assert run.step() == [("a", 0, 6, False)]
        run.scheduler.abort("a")
    start = 0 if between else 4  # what the maker had computed stays
    assert run.step() == [("b", start, 6, start == 4)]
    run.drain()


def test_prefills_of_one_token_a_step_keep_nobody_waiting_longer():
    run = Run(make(max_num_seqs=2, budget=2, block_size=4))
    run.scheduler.add(sequence("decode", [9], max_tokens=40))
    run.step()
    run.scheduler.add(sequence("a", PROMPT[:6], max_tokens=20))
    for start in range(6):
        assert run.step()[1:] == [("a", start, 1, start == 5)]
    assert run.scheduler.kv.pool.num_known >= 2, "a's first block is known before a needs its next"
    run.scheduler.abort("decode")
    run.scheduler.add(sequence("b", PROMPT[:6], max_tokens=1))
    assert run.step() == [("a", 6, 1, True), ("b", 4, 1, False)]
    run.drain()


def test_a_preempted_sequence_finds_its_own_blocks():
    run = Run(make(blocks=7, max_model_len=24))
    old, young = sequence("old", PROMPT, max_tokens=9), sequence("young", [*range(30, 40)], max_tokens=9)
    run.scheduler.add(old)
    run.scheduler.add(young)
    steps = run.drain()
    assert young.num_preemptions == 1
    assert (old.output_ids, young.output_ids) == (continuation(PROMPT, 9), continuation(young.prompt_ids, 9))
    resumed = [(start, size) for step in steps for name, start, size, _ in step if name == "young" and size > 1]
    # "old" took one of its blocks, the blank last one; the first full ones are found again.
    assert resumed[0] == (0, 10)
    assert resumed[1][0] >= 8
    assert young.num_cached_tokens == 0, "hits count at the first admission"


def test_what_gave_wrong_logits_is_found_by_nobody():
    run = Run(make())
    run.scheduler.add(sequence("bad", PROMPT, max_tokens=1))
    step = run.scheduler.schedule()
    run.scheduler.update(step, [INVALID_TOKEN], ())
    run.scheduler.add(sequence("good", PROMPT, max_tokens=1))
    assert run.step() == [("good", 0, 10, True)]


def test_a_block_in_use_is_no_free_block():
    """Sharing needs no room for what is shared with a running request, but for what lies idle it does."""
    run = Run(make(blocks=8, max_model_len=32))
    run.scheduler.add(sequence("a", [*range(20)], max_tokens=3))  # five blocks
    run.step()
    run.scheduler.add(sequence("b", [*range(20)], max_tokens=1))  # shares four, needs one; one is kept for "a"
    assert ("b", 16, 4, True) in run.step()
    run.drain()
    run.scheduler.add(sequence("c", [90, 91, 92], max_tokens=8))
    run.step()
    run.scheduler.add(sequence("d", [*range(20), *range(50, 54), 1, 2, 3], max_tokens=1))  # seven; seven are free
    assert "d" not in {name for name, *_ in run.step()}
