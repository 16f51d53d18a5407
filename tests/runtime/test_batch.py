"""Every tensor of every step against a row-by-row reference written from docs/architecture.md."""

import dataclasses
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.request import SamplingParams
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.lines import SAMPLING
from fusecomp.runtime.scheduler import Scheduler, SequenceState
from fusecomp.runtime.staging import Pack
from fusecomp.runtime.step_batch import MixedShape, StepBatch, needs_of
from tests.runtime.simulation import EOS, PagedModel, alone, next_token, scenarios, simulate

TENSORS = [f.name for f in dataclasses.fields(StepBatch) if f.type == "torch.Tensor"]


def reference(step, pad_to, block_size):
    """The batch as Python lists; block tables cut to the entries that may be read."""
    out = {name: [] for name in ("ids", "positions", "slots", "logit_indices", "seq_lens", "tables", "sampling")}
    cu = [0]
    for seq, size, start, _ in step.entries:
        for at in range(start, start + size):
            out["ids"].append(seq.token_ids[at])
            out["positions"].append(at)
            out["slots"].append(seq.blocks[at // block_size] * block_size + at % block_size)
        cu.append(cu[-1] + size)
        out["logit_indices"].append(cu[-1] - 1)
        out["seq_lens"].append(start + size)
        out["tables"].append(seq.blocks[: -(-(start + size) // block_size)])
        params = seq.params
        out["sampling"].append((params.temperature, max(params.top_k, 0), params.top_p))
    max_seq_len = max(out["seq_lens"])
    padding = (pad_to or len(step.seqs)) - len(step.seqs)
    for _ in range(padding):  # of a step that is not all decodes, rows without a token
        if step.decode_only:
            out["ids"].append(0)
            out["positions"].append(0)
            out["slots"].append(-1)
        cu.append(len(out["ids"]))
        out["logit_indices"].append(cu[-1] - 1 if step.decode_only else 0)
        out["seq_lens"].append(0)
        out["tables"].append([])
        out["sampling"].append((0.0, 0, 1.0))
    out["cu_q_lens"] = cu
    decodes = step.num_decodes + (padding if step.decode_only else 0)
    counted = len(step.seqs) + (padding if step.decode_only else 0)
    out["host_meta"] = [decodes, max(step.num_new_tokens), max_seq_len, counted]
    return out


def check(batch, step, pad_to, block_size, max_blocks, max_num_seqs):
    want = reference(step, pad_to, block_size)
    rows = len(want["seq_lens"])
    assert batch.tokens.tolist() == [want["ids"], want["positions"], want["slots"]]
    assert batch.tokens.is_contiguous()
    for name in ("logit_indices", "cu_q_lens", "seq_lens", "host_meta"):
        assert getattr(batch, name).tolist() == want[name], name
    assert batch.block_tables.shape == (rows, max_blocks)
    assert [t[: len(w)] for t, w in zip(batch.block_tables.tolist(), want["tables"], strict=True)] == want["tables"]
    assert batch.num_rows == len(step.seqs)
    assert bool(batch.needs) == any(needs_of(seq.params) for seq in step.seqs)
    if batch.needs:
        got = zip(batch.temperature.tolist(), batch.top_k.tolist(), batch.top_p.tolist(), strict=True)
        assert list(got) == want["sampling"]
        padding_rows = [max_num_seqs] * (rows - len(step.seqs))
        assert batch.rows.tolist() == [*(seq.row for seq in step.seqs), *padding_rows]
    params = [seq.params for seq in step.seqs]
    assert batch.all_greedy == all(p.greedy for p in params)
    assert batch.filtered == any(not p.greedy and (p.top_k > 0 or p.top_p < 1) for p in params)
    for seq, seed in zip(step.seqs, batch.seeds.tolist(), strict=False):
        if batch.needs and seq.params.seed is not None:
            assert (seed - seq.params.seed) % 2**64 == 0
    int64 = {"tokens", "logit_indices", "seeds", "rows"}
    for name in TENSORS:
        dtype = torch.float32 if name in ("temperature", "top_p") else torch.int64 if name in int64 else torch.int32
        assert getattr(batch, name).dtype == dtype, name
        assert getattr(batch, name).storage_offset() == 0, name


class TensorModel(PagedModel):
    """The hash model on nothing but the batch's tensors."""

    def run(self, batch):
        ids, positions, slots = batch.tokens.tolist()
        cu, lengths, tables = batch.cu_q_lens.tolist(), batch.seq_lens.tolist(), batch.block_tables.tolist()
        for table, first, last in zip(tables, cu, cu[1:], strict=False):
            for token in range(first, last):
                if slots[token] >= 0:
                    assert slots[token] == self.slot(table, positions[token])
                    self.write(table, positions[token], ids[token])
        return [self.read(table, length) if length else 0 for table, length in zip(tables, lengths, strict=True)]


@given(scenarios(aborts=True), st.data())
def test_batches_match_the_reference_and_drive_the_model(scenario, data):
    builder = BatchBuilder(
        scenario.max_num_seqs,
        scenario.max_num_batched_tokens,
        scenario.max_blocks_per_seq,
        scenario.block_size,
        "cpu",
    )
    paged = TensorModel(scenario.block_size)

    def model(step):
        pad_to = data.draw(st.none() | st.integers(len(step.seqs), scenario.max_num_seqs))
        batch = builder.build(step, pad_to)
        check(batch, step, pad_to, scenario.block_size, scenario.max_blocks_per_seq, scenario.max_num_seqs)
        sampled = paged.run(batch)
        if data.draw(st.integers(0, 9)) == 0:
            builder.padding(data.draw(st.integers(1, scenario.max_num_seqs)))
        return sampled

    seqs = simulate(scenario, scenario.scheduler(), lambda step: None, model)
    for seq, request in zip(seqs, scenario.requests, strict=True):
        expected, _ = alone(request.prompt, request.params, scenario.max_model_len)
        assert seq.output_ids == (expected if seq.finish_reason != "abort" else expected[: seq.num_output_tokens])


def engine(params, seqs=4, prompt=(1, 2, 3), vocab_size=1):
    scheduler = Scheduler(seqs, 64, 64, KVCacheManager(64, 4))
    for i, p in enumerate(params):
        scheduler.add(SequenceState(str(i), list(prompt), p))
    return scheduler, BatchBuilder(seqs, 64, 16, 4, "cpu", seed=3, vocab_size=vocab_size)


def test_a_bucket_keeps_its_addresses():
    scheduler, builder = engine([SamplingParams(max_tokens=30)] * 3)
    captured = builder.padding(4)
    addresses = [getattr(captured, name).data_ptr() for name in TENSORS]
    for _ in range(20):
        step = scheduler.schedule()
        batch = builder.build(step, 4 if step.decode_only else None)
        if step.decode_only:
            assert [getattr(batch, name).data_ptr() for name in TENSORS] == addresses
            assert captured.tokens.tolist() == batch.tokens.tolist()
        scheduler.update(step, [next_token(s.token_ids) for s in step.seqs], ())


def test_a_letter_that_was_never_sent_loses_nothing():
    """Each step is built once in vain, its new blocks too: what the device then holds is the step's all the same."""
    scheduler, builder = engine([SamplingParams(max_tokens=30)] * 3)
    moved = 0
    for number in range(20):
        step = scheduler.schedule()
        builder.build(step, 4 if step.decode_only else None, sealed=True)
        moved += builder._held.moved
        check(builder.build(step, 4 if step.decode_only else None), step, 4 if step.decode_only else None, 4, 16, 4)
        if number % 3 == 0:  # so that the step after this one knows what the device holds, and moves blocks
            check(builder.build(step, 4 if step.decode_only else None), step, 4 if step.decode_only else None, 4, 16, 4)
        scheduler.update(step, [next_token(s.token_ids) for s in step.seqs], ())
    assert moved > 0


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_one_copy_brings_all_that_changes_when_a_sequence_ends(temperature, monkeypatch):
    """Of greedy rows only tables, for nothing reads what they are sampled by."""
    params = [SamplingParams(max_tokens=n, temperature=temperature, ignore_eos=True) for n in (3, 9, 9, 6)]
    scheduler, builder = engine(params)
    copies = list[set[str]]()
    copy = Pack.copy_

    def counted(self, other, counts):
        copies.append(set(counts))
        copy(self, other, counts)

    monkeypatch.setattr(Pack, "copy_", counted)
    others = {"block_tables"} if temperature == 0 else {*SAMPLING, "rows", "block_tables"}
    prompts = {"cu_q_lens", "logit_indices", "seq_lens"}
    for at in range(9):
        step = scheduler.schedule()
        copies.clear()
        check(builder.build(step, 4 if step.decode_only else None), step, 4 if step.decode_only else None, 4, 16, 4)
        assert copies == ([others | prompts] if at == 0 else [others] if at in (3, 6) else []), at
        scheduler.update(step, [next_token(s.token_ids) for s in step.seqs], ())


def test_eight_rows_of_padding_are_the_same_token():
    """What a step pads asks for few experts, and no expert for all of it; what is measured is varied as what serves."""
    scheduler, builder = engine([SamplingParams(max_tokens=9)], seqs=32, vocab_size=1000)
    first = scheduler.schedule()
    mixed = builder.build(first, MixedShape(24, 8, 8)).tokens.clone()
    assert [len(list(run)) for _, run in groupby(mixed[0, 3:].tolist())] == [8, 8, 5]
    scheduler.update(first, [5], ())
    decodes = builder.build(scheduler.schedule(), 32).tokens.clone()
    assert decodes[0, 0] == 5
    for tokens, used in ((mixed, 3), (decodes, 1)):
        assert not tokens[1, used:].any()
        assert (tokens[2, used:] == -1).all()
        assert tokens[0].max() < 1000
    assert [len(list(run)) for _, run in groupby(decodes[0, 1:].tolist())] == [8, 8, 8, 7]
    assert len(set(builder.padding(32).tokens[0].tolist())) == 32


def test_padding_is_inert():
    builder = BatchBuilder(4, 64, 16, 4, "cpu")
    batch = builder.padding(3)
    assert batch.tokens.tolist() == [[0] * 3, [0] * 3, [-1] * 3]
    assert batch.seq_lens.tolist() == [0, 0, 0]
    assert batch.cu_q_lens.tolist() == [0, 1, 2, 3]
    assert batch.host_meta.tolist() == [3, 1, 64, 3]
    assert (batch.num_rows, batch.all_greedy, batch.filtered) == (0, True, False)


def test_requests_without_seed_differ_from_each_other_and_not_from_run_to_run():
    def seeds():
        scheduler, builder = engine(
            [SamplingParams(), SamplingParams(), SamplingParams(seed=9), SamplingParams(seed=-1)]
        )
        return builder.build(scheduler.schedule()).seeds.tolist()

    first = seeds()
    assert first == seeds()
    assert first[2:] == [9, -1]
    assert first[0] != first[1]


def test_a_step_is_not_padded_to_fewer_rows_than_it_has():
    scheduler, builder = engine([SamplingParams()] * 3)
    with pytest.raises(AssertionError):
        builder.build(scheduler.schedule(), pad_to=2)


@pytest.mark.gpu
def test_copies_do_not_race_with_the_next_build():
    """A busy stream delays the copies; the batch on the device must still be the step's own."""
    params = [SamplingParams(max_tokens=200, ignore_eos=True)] * 64
    scheduler = Scheduler(64, 4096, 512, KVCacheManager(64 * 32, 16))
    for i, p in enumerate(params):
        scheduler.add(SequenceState(str(i), [1 + i, 2, 3], p))
    builder = BatchBuilder(64, 4096, 32, 16, "cuda")
    wanted, got = [], []
    for i in range(50):
        step = scheduler.schedule()
        torch.cuda._sleep(2_000_000)
        batch = builder.build(step, 64 if step.decode_only else None)
        wanted.append(reference(step, None, 16))
        got.append((batch.tokens.clone(), batch.seq_lens.clone(), batch.block_tables.clone()))
        scheduler.update(step, [(i + r) % 100 for r in range(64)], EOS)
    for want, (tokens, seq_lens, tables) in zip(wanted, got, strict=True):
        assert tokens.tolist() == [want["ids"], want["positions"], want["slots"]]
        assert seq_lens.tolist() == want["seq_lens"]
        assert [t[: len(w)] for t, w in zip(tables.tolist(), want["tables"], strict=True)] == want["tables"]


@pytest.mark.slow
def test_host_time_of_256_decodes():
    from benchmarks.host import measure

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a copy must not wait for a thread pool
    try:
        times = measure(
            rows=256, steps=100, context=1024, max_model_len=8192, device="cpu", prefix_caching=True, block_size=16
        )
    finally:
        torch.set_num_threads(threads)
    print(times)
    assert times["all"][0] < 250, "microseconds, median: schedule, build and update"
