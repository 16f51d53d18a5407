"""Policy and stop rules on small, named cases."""

import pytest

from fusecomp.errors import CapacityError, RequestError
from fusecomp.request import SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.metrics import Metrics
from fusecomp.runtime.scheduler import INVALID_TOKEN, Scheduler, SequenceState, Status


def make(max_num_seqs=4, budget=16, max_model_len=32, blocks=64, block_size=4, block_bytes=0):
    return Scheduler(max_num_seqs, budget, max_model_len, KVCacheManager(blocks, block_size, block_bytes))


def sequence(name, length, **params):
    return SequenceState(name, list(range(1, length + 1)), SamplingParams(**params))


def rows(step):
    return [(e.seq.request_id, e.start, e.num_new_tokens, e.samples) for e in step.entries]


def test_decodes_then_running_prefills_then_newcomers():
    scheduler = make(budget=8)
    scheduler.add(sequence("a", 3))
    scheduler.add(sequence("b", 12))
    step = scheduler.schedule()
    assert rows(step) == [("a", 0, 3, True), ("b", 0, 5, False)]
    assert step.num_decodes == 0
    assert [s.request_id for s in scheduler.update(step, [9, 9], ())] == ["a"]
    scheduler.add(sequence("c", 2))
    step = scheduler.schedule()
    assert rows(step) == [("a", 3, 1, True), ("b", 5, 7, True)]
    assert (step.num_decodes, step.decode_only, step.num_tokens) == (1, False, 8)
    scheduler.update(step, [9, 9], ())
    assert rows(scheduler.schedule()) == [("b", 12, 1, True), ("a", 4, 1, True), ("c", 0, 2, True)]


def test_the_longest_decode_comes_first():
    """Of those as long the first in rank; whoever ends or joins, and where steps are repeated ahead."""
    scheduler = make(max_num_seqs=6, budget=64)
    for name, length in {"a": 3, "b": 9, "c": 5, "d": 9, "e": 2}.items():
        scheduler.add(sequence(name, length, max_tokens=3 if name == "b" else 8))
    scheduler.update(scheduler.schedule(), [7] * 5, ())
    step = scheduler.schedule()
    assert [seq.request_id for seq in step.seqs] == ["b", "d", "c", "a", "e"]
    following, continues = scheduler.schedule_ahead(step)
    assert following.seqs is step.seqs and continues == range(5)
    scheduler.update(step, [7] * 5, ())
    after, continues = scheduler.schedule_ahead(following)
    assert [seq.request_id for seq in after.seqs] == ["d", "c", "a", "e"] and continues == [1, 2, 3, 4]
    scheduler.update(following, [7] * 5, ())
    scheduler.add(sequence("f", 7))
    scheduler.update(after, [7] * 4, ())
    scheduler.update(scheduler.schedule(), [7] * 5, ())
    assert [(e.seq.request_id, e.start) for e in scheduler.schedule().entries] == [
        ("d", 13), ("c", 9), ("a", 7), ("f", 7), ("e", 6)
    ]  # fmt: skip


def test_out_of_blocks_preempts_the_youngest_and_recomputes_it():
    scheduler = make(blocks=5, max_model_len=20, block_size=4)
    old, young = sequence("old", 7, max_tokens=9), sequence("young", 7, max_tokens=9)
    scheduler.add(old)
    scheduler.add(young)
    preempted = False
    while (step := scheduler.schedule()) is not None:
        if step.num_preempted:
            preempted = True
            assert [e.seq for e in step.entries] == [old]
            assert (young.status, young.num_computed_tokens, young.blocks, young.row) == (Status.WAITING, 0, [], -1)
            known = len(young.token_ids)
            assert known > 7
        elif preempted and young.status is Status.RUNNING:
            preempted = False
            assert old.status is Status.FINISHED
            assert (step.starts, step.num_new_tokens, step.samples) == ([0], [known], [True])
        scheduler.update(step, [3] * len(step.seqs), ())
    assert young.num_preemptions == 1
    assert young.output_ids == old.output_ids == [3] * 9
    assert scheduler.kv.usage == 0


def test_admission_leaves_a_block_to_running_sequences():
    scheduler = make(blocks=4, max_model_len=16, block_size=4)
    scheduler.add(sequence("a", 8, max_tokens=2))
    scheduler.update(scheduler.schedule(), [9], ())
    scheduler.add(sequence("b", 4))
    # 2 blocks are free: "a" takes one at this step, and "b" would take the last.
    step = scheduler.schedule()
    assert rows(step) == [("a", 8, 1, True)]
    scheduler.update(step, [9], ())
    assert rows(scheduler.schedule()) == [("b", 0, 4, True)]


def test_a_long_prompt_is_admitted_only_when_all_of_it_fits():
    scheduler = make(blocks=8, max_model_len=32, block_size=4, budget=6)
    scheduler.add(sequence("a", 5))
    scheduler.update(scheduler.schedule(), [9], ())
    scheduler.add(sequence("b", 25))  # 7 blocks; its first chunk alone would fit into the 6 that are free
    assert rows(scheduler.schedule()) == [("a", 5, 1, True)]


@pytest.mark.parametrize(
    ("params", "reason", "output"),
    [
        ({}, "stop", [7, 8, 2]),
        ({"ignore_eos": True}, "length", [7, 8, 2, 7, 8, 2, 7, 8, 2, 7, 8, 2, 7, 8, 2, 7]),
        ({"stop_token_ids": (8,)}, "stop", [7, 8]),
        ({"stop_token_ids": (2,), "ignore_eos": True}, "stop", [7, 8, 2]),
        ({"max_tokens": 2}, "length", [7, 8]),
        ({"max_tokens": 3}, "stop", [7, 8, 2]),
        ({"max_tokens": None, "ignore_eos": True}, "length", [7, 8, 2] * 9 + [7, 8]),
    ],
)
def test_stop_rules(params, reason, output):
    scheduler = make()
    seq = sequence("a", 3, **params)
    scheduler.add(seq)
    tokens = [7, 8, 2] * 20
    while (step := scheduler.schedule()) is not None:
        scheduler.update(step, [tokens[seq.num_output_tokens]], {2})
    assert (seq.finish_reason, seq.output_ids) == (reason, output)
    assert scheduler.kv.num_free == 64


def test_invalid_logits_end_only_their_sequence():
    scheduler = make()
    bad, good = sequence("bad", 3), sequence("good", 3)
    scheduler.add(bad)
    scheduler.add(good)
    assert scheduler.update(scheduler.schedule(), [INVALID_TOKEN, 4], ()) == [bad, good]
    assert (bad.finish_reason, bad.output_ids, bad.status) == ("error", [], Status.FINISHED)
    assert (good.finish_reason, good.output_ids) == (None, [4])
    assert rows(scheduler.schedule()) == [("good", 3, 1, True)]


def test_abort_between_schedule_and_update():
    scheduler = make()
    scheduler.add(sequence("a", 3))
    scheduler.add(sequence("b", 3))
    step = scheduler.schedule()
    assert scheduler.abort("a").finish_reason == "abort"
    assert scheduler.abort("a") is None
    assert [s.request_id for s in scheduler.update(step, [4, 4], ())] == ["b"]
    assert scheduler.kv.num_free == 63
    scheduler.add(sequence("a", 3))  # the id is free again


def test_refusals():
    scheduler = make(blocks=4, block_size=4, max_model_len=64, block_bytes=1000)
    with pytest.raises(
        CapacityError, match=r"request 'big': 18 tokens need 5 KV blocks \(5000 bytes\).* at least 5000"
    ):
        scheduler.add(sequence("big", 10, max_tokens=8))
    scheduler.add(sequence("fits", 10, max_tokens=7))
    with pytest.raises(RequestError, match="in use"):
        scheduler.add(sequence("fits", 2))
    with pytest.raises(RequestError, match="no tokens"):
        scheduler.add(sequence("empty", 0))
    with pytest.raises(RequestError, match="64 tokens, max_model_len is 64"):
        scheduler.add(sequence("long", 64))
    assert scheduler.num_waiting == 1


def test_metrics_add_up():
    scheduler, metrics = make(), Metrics()
    for name in "abc":
        seq = sequence(name, 3, max_tokens=2)
        scheduler.add(seq)
        metrics.on_add(seq)
    scheduler.abort("c")
    metrics.on_abort(SequenceState("x", [1], SamplingParams()), "abort", 0.0)
    assert metrics.snapshot(scheduler).waiting == 2
    step = scheduler.schedule()
    metrics.on_step(step, scheduler.update(step, [4, 4], ()), 0.5)
    now = metrics.snapshot(scheduler)
    assert (now.running, now.waiting, now.kv_usage) == (2, 0, 2 / 64)
    step = scheduler.schedule()
    metrics.on_step(step, scheduler.update(step, [4, INVALID_TOKEN], ()), 0.25)
    now = metrics.snapshot(scheduler)
    assert (now.requests, now.finished, now.steps, now.preemptions) == (3, 3, 2, 0)
    assert (now.prompt_tokens, now.generation_tokens, now.computed_tokens) == (9, 3, 8)
    assert (now.host_seconds, now.last_host_seconds, now.kv_usage) == (0.75, 0.25, 0)
