"""Whatever arrives, in whatever order, on however small a cache: every request gets the tokens it would get alone."""

from hypothesis import event, given

from fusecomp.runtime.scheduler import ScheduledStep, Status
from tests.runtime.simulation import PagedModel, Scenario, alone, scenarios, simulate


def check_step(scenario: Scenario, step: ScheduledStep) -> None:
    entries = list(step.entries)
    assert 1 <= len(entries) <= scenario.max_num_seqs
    assert sum(e.num_new_tokens for e in entries) == step.num_tokens <= scenario.max_num_batched_tokens
    assert len({e.seq.row for e in entries}) == len({e.seq.request_id for e in entries}) == len(entries)
    for i, (seq, size, start, draws) in enumerate(entries):
        assert seq.status is Status.RUNNING
        assert 0 <= seq.row < scenario.max_num_seqs
        assert start == seq.num_computed_tokens
        assert 1 <= size <= len(seq.token_ids) - start
        assert draws == (start + size == len(seq.token_ids))
        assert len(seq.blocks) * scenario.block_size == seq.num_slots >= start + size
        decodes = start > 0 and start + 1 == len(seq.token_ids)
        if i < step.num_decodes:
            assert decodes, "decodes come first"
        elif decodes:
            # A newcomer behind prefills, all but whose last token was cached.
            assert scenario.prefix_caching
            assert i > step.num_decodes


@given(scenarios())
def test_every_request_ends_as_if_alone(scenario):
    scheduler = scenario.scheduler()
    preemptions = 0

    def on_step(step):
        nonlocal preemptions
        preemptions += step.num_preempted
        check_step(scenario, step)
        for seqs in (scheduler._places.running, scheduler._places.waiting):
            ranks = [(s.priority, s.arrival) for s in seqs]
            assert ranks == sorted(ranks), "by priority, then first come, first served, also after preemption"

    seqs = simulate(scenario, scheduler, on_step, PagedModel(scenario.block_size))
    for seq, request in zip(seqs, scenario.requests, strict=True):
        assert (seq.output_ids, seq.finish_reason) == alone(request.prompt, request.params, scenario.max_model_len)
        assert seq.num_output_tokens == len(seq.output_ids)
        assert seq.num_cached_tokens % scenario.block_size == 0
    assert sum(seq.num_preemptions for seq in seqs) == preemptions
    assert not scheduler.prefix.makers
    assert scheduler.prefix.hits == sum(seq.num_cached_tokens for seq in seqs)
    assert scheduler.kv.num_free == scenario.num_blocks
    assert not scheduler.has_work
    event("preempted" if preemptions else "never preempted")
    event("shared" if scheduler.prefix.hits else "never shared")


@given(scenarios(aborts=True))
def test_aborts_leave_the_others_alone(scenario):
    scheduler = scenario.scheduler()
    seqs = simulate(scenario, scheduler, lambda step: check_step(scenario, step), PagedModel(scenario.block_size))
    for seq, request in zip(seqs, scenario.requests, strict=True):
        expected, reason = alone(request.prompt, request.params, scenario.max_model_len)
        if seq.finish_reason == "abort":
            assert seq.output_ids == expected[: seq.num_output_tokens]
        else:
            assert (seq.output_ids, seq.finish_reason) == (expected, reason)
        assert seq.status is Status.FINISHED
    assert scheduler.kv.num_free == scenario.num_blocks
    assert sorted(scheduler._places.free_rows) == list(range(scenario.max_num_seqs))


@given(scenarios(aborts=True))
def test_same_calls_same_steps(scenario):
    def trace():
        steps = []
        simulate(
            scenario,
            scenario.scheduler(),
            lambda step: steps.append([(e.seq.request_id, *e[1:], list(e.seq.blocks)) for e in step.entries]),
            PagedModel(scenario.block_size),
        )
        return steps

    assert trace() == trace()
