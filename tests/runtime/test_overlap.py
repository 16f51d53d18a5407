"""Launching a step before the last one's tokens are read changes nothing but the order of work."""

import random

import pytest
import torch
import transformers

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.scheduler import KNOWN, Scheduler, SequenceState


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=99,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return model


# What depends on tokens that the host has not read when a step is launched, and what does not.
PLAIN = [{}]
EVERYTHING = [
    {},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"min_tokens": 4, "min_p": 0.05},
    {"bad_words": tuple((a, b) for a in range(0, 99, 3) for b in range(1, 99, 4)), "logit_bias": {7: 3.0}},
    {"allowed_token_ids": tuple(range(5, 60)), "typical_p": 0.9, "logprobs": 3},
]


def serve(engine, seed, aborts, options=PLAIN):
    """A random scenario; returns tokens and end of every request that was not aborted, and the steps taken ahead."""
    rng, tokens, ends, added, ahead = random.Random(seed), {}, {}, 0, 0
    waiting = [[rng.randrange(99) for _ in range(rng.choice([1, 2, 14, 30, 70]))] for _ in range(30)]
    dropped = set()
    while waiting or engine.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 0, 0, 0, 0, 1, 5])):
            if waiting:
                params = SamplingParams(
                    temperature=rng.choice([0, 0, 1.0]),
                    top_k=rng.choice([0, 7]),
                    seed=added,
                    max_tokens=rng.randint(4, 50),
                    stop_token_ids=(11, 12),
                    **rng.choice(options),
                )
                engine.add_request(str(added), waiting.pop(), params)
                added += 1
        if aborts and added and rng.random() < 0.05:
            victim = str(rng.randrange(added))
            engine.abort_request(victim)
            dropped.add(victim)
        for out in engine.step():
            tokens.setdefault(out.request_id, []).extend(out.new_token_ids)
            ends[out.request_id] = out.finish_reason
        ahead += engine._flight is not None
    kv = engine._scheduler.kv
    assert kv.num_free == kv.num_blocks
    return {k: (v, ends[k]) for k, v in tokens.items() if k not in dropped}, ahead


@pytest.mark.parametrize("blocks", [None, 9], ids=["roomy", "preempting"])
@pytest.mark.parametrize("aborts", [False, True])
def test_overlap_gives_the_same_tokens(model, blocks, aborts):
    block_bytes = 2 * 2 * 16 * 32 * 4
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=48,
        enforce_eager=True,
        kv_cache_bytes=blocks and blocks * block_bytes,
    )
    engine = Engine(model, config, eos_token_ids=(5, 6))
    engine.overlap = False
    expected, ahead = serve(engine, 3, aborts)
    assert ahead == 0
    engine.overlap = True
    actual, ahead = serve(engine, 3, aborts)
    assert ahead > 20
    common = actual.keys() & expected.keys()
    # An abort lands at another point of a request's life; all others must be untouched by it.
    assert len(common) > 15 and all(actual[k] == expected[k] for k in common)
    assert aborts or actual.keys() == expected.keys()
    assert blocks is None or engine.metrics.preemptions > 0


@pytest.mark.parametrize("blocks", [None, 9], ids=["roomy", "preempting"])
def test_options_that_depend_on_the_last_token(model, blocks):
    """In turn, overlapped, and alone: the same tokens, also of rows that lost their cache and came back."""
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=48,
        enforce_eager=True,
        kv_cache_bytes=blocks and blocks * 2 * 2 * 16 * 32 * 4,
    )
    engine = Engine(model, config, eos_token_ids=(5, 6))
    engine.overlap = False
    expected, _ = serve(engine, 5, False, EVERYTHING)
    engine.overlap = True
    actual, ahead = serve(engine, 5, False, EVERYTHING)
    assert actual == expected and ahead > 20
    assert blocks is None or engine.metrics.preemptions > 0
    # The tables matter: without them the tokens are others.
    engine._tables.enter = lambda seq: None
    engine._builder = engine._new_builder(engine.config)
    assert serve(engine, 5, False, EVERYTHING)[0] != expected


def test_a_flight_that_nobody_waits_for_is_dropped(model):
    engine = Engine(model, EngineConfig(max_num_seqs=2, max_num_batched_tokens=32, enforce_eager=True))
    engine.overlap = True
    engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=9))
    first = engine.step()
    assert engine._flight is not None
    engine.abort_request("a")
    engine.add_request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=1))
    tokens = [out for _ in range(3) for out in engine.step()]
    assert [t.new_token_ids for t in tokens] == [first[0].new_token_ids] and tokens[0].finish_reason == "length"


def test_a_prompt_cut_before_its_last_token_goes_on_among_decodes():
    """Its row's token is known, and by priority it comes before rows whose tokens are not."""
    scheduler = Scheduler(4, 8, 64, KVCacheManager(32, 4))
    builder = BatchBuilder(4, 8, 16, 4, "cpu")
    params = SamplingParams(max_tokens=9)
    scheduler.add(SequenceState("low", [1, 2], params, priority=1))
    scheduler.update(scheduler.schedule(), [3], ())
    scheduler.add(SequenceState("high", [11, 12, 13, 14, 15, 16, 17, 18], params))
    step = scheduler.schedule()
    assert [(e.seq.request_id, e.num_new_tokens, e.samples) for e in step.entries] == [
        ("low", 1, True),
        ("high", 7, False),
    ]
    following, continues = scheduler.schedule_ahead(step)
    assert [seq.request_id for seq in following.seqs] == ["high", "low"] and continues == [KNOWN, 0]
    builder.mailbox.ids[:2] = torch.tensor([77, 88])
    batch = builder.build(following, None, continues)
    assert batch.tokens[:2].tolist() == [[18, 77], [7, 3]]
    scheduler.update(step, [77, 88], ())
    scheduler.update(following, [99, 5], ())
    assert [seq.output_ids for seq in following.seqs] == [[99], [3, 77, 5]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("blocks", [40, 9])  # plenty, and so few that a step ahead is refused now and then
def test_a_repeated_step_is_what_composing_it_gives(monkeypatch, seed, blocks):
    """Rows that all run on take a shortcut, others waiting for a row or not: steps, tokens and blocks are the same."""
    shortcuts = 0

    def composed(self, step):
        self._move_on(step)

    def serve(shortcut: bool) -> list:
        nonlocal shortcuts
        draws, trace = random.Random(seed), []
        scheduler = Scheduler(3, 16, 64, KVCacheManager(blocks, 4))
        for i in range(6):
            size, longest = draws.randint(1, 6), draws.randint(6, 20)
            scheduler.add(SequenceState(str(i), [i] * size, SamplingParams(max_tokens=longest)))
        with monkeypatch.context() as patch:
            if not shortcut:
                patch.setattr(Scheduler, "_move_decodes_on", composed)
            step = scheduler.schedule()
            while step is not None:
                found = scheduler.schedule_ahead(step)
                if found is not None:
                    shortcuts += shortcut and found[0].seqs is step.seqs
                    trace.append((list(found[1]), found[0].num_decodes, found[0].num_tokens, found[0].num_preempted))
                scheduler.update(step, [2 if draws.random() < 0.08 else 5 for _ in step.seqs], {2})
                step = scheduler.schedule() if found is None else found[0]
                entries = () if step is None else step.entries
                trace.append([(e.seq.request_id, e.start, e.num_new_tokens, e.samples, *e.seq.blocks) for e in entries])
        return trace

    assert serve(True) == serve(False) and shortcuts
