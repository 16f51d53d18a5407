"""Steps padded to the shapes of CUDA graphs give the same tokens. Without a GPU: a replay runs the captured function
again, on the same static buffers, so a wrong layout shows as it would on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime import graphs as graphs_module
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.graphs import GraphRunner, is_long
from fusecomp.runtime.step_batch import MOST_PREFILLS, MixedShape
from tests.runtime.graph_device import Rerun
from tests.runtime.test_overlap import EVERYTHING, model, serve  # noqa: F401


@pytest.fixture(scope="module")
def moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=256,
    )  # fmt: skip
    found = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in found.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return found


def with_graphs(engine: Engine, recorder: Rerun) -> GraphRunner:
    """Give a CPU engine graphs as on a GPU. The check writes to the first blocks, whoever's content they keep."""
    engine._scheduler.kv.pool.forget_all()
    engine._graphs = engine._new_graphs(engine.config.max_num_seqs, recorder)
    engine._capture_wanted(engine._graphs)
    return engine._graphs


@pytest.mark.parametrize("which", ["model", "moe"])
@pytest.mark.parametrize("blocks", [None, 12], ids=["roomy", "preempting"])
def test_padded_steps_give_the_same_tokens(request, monkeypatch, which, blocks):
    """Decodes and mixed, one after the other and ahead, with every option of the sampler, captured in service."""
    monkeypatch.setattr(graphs_module, "MIXED_TOKENS", (32, 64, 96))
    config = EngineConfig(
        max_num_seqs=10,
        max_num_batched_tokens=96,
        enforce_eager=True,
        kv_cache_bytes=blocks and blocks * 2 * 2 * 16 * 32 * 4,
    )
    engine = Engine(request.getfixturevalue(which), config, eos_token_ids=(5, 6))
    for cache in engine._step.kv_caches:
        cache.fill_(float("nan"))
    engine.overlap = False
    expected, _ = serve(engine, 5, False, EVERYTHING)
    graphs = with_graphs(engine, Rerun(seconds=lambda rows: 1e-6 * rows))
    at_start = {shape for shape, _ in graphs._graphs}
    shapes, kinds = set(), set()
    replay = graphs.replay
    monkeypatch.setattr(
        graphs, "replay", lambda shape, kind: (shapes.add(shape), kinds.add(kind), replay(shape, kind))[-1]
    )
    for overlap in (False, True):
        engine.overlap = overlap
        actual, ahead = serve(engine, 5, False, EVERYTHING)
        assert actual == expected
        is_due = graphs.is_due  # from here on at once
        monkeypatch.setattr(
            graphs, "is_due", lambda *key, ask=is_due: (setattr(graphs, "_capture_seconds", 0.0), ask(*key))[-1]
        )
    assert ahead > 20
    assert len({shape for shape in shapes if isinstance(shape, MixedShape)}) > 1 and len(kinds) > 1
    assert {shape for shape, _ in graphs._graphs} == at_start, "no shape is added in service"
    assert engine.report.mixed_cuda_graphs > 1 and engine.report.cuda_graphs[-1] == 10
    assert "for steps with prefills" in engine.report.summary()
    assert blocks is None or engine.metrics.preemptions > 0


def test_long_mixed_steps_run_in_graphs(model, monkeypatch):  # noqa: F811
    """Checked at the start, where there is memory set apart for them."""
    monkeypatch.setattr(graphs_module, "MIXED_TOKENS", (16,))
    monkeypatch.setattr(graphs_module, "MORE_TOKENS", (24, 48, 96, 192))
    config = EngineConfig(max_num_seqs=10, max_num_batched_tokens=96, enforce_eager=True)
    engine = Engine(model, config, eos_token_ids=(5, 6))
    expected, _ = serve(engine, 5, False, EVERYTHING)
    engine._sized = engine._sized._replace(long_graphs=1 << 20)
    checked, replayed = [], set()
    check, replay = GraphRunner.check, GraphRunner.replay
    monkeypatch.setattr(
        GraphRunner, "check", lambda self, batch, shape, kind: (checked.append(shape), check(self, batch, shape, kind))
    )
    graphs = with_graphs(engine, Rerun(seconds=lambda rows: 1e-6 * rows))
    long = [shape for shape in graphs.mixed if is_long(shape)]
    assert [shape.tokens for shape in long] == [24, 48, 96] and set(long) < set(checked)
    assert not graphs._unchecked & set(long)
    monkeypatch.setattr(
        GraphRunner, "replay", lambda self, shape, kind: (replayed.add(shape), replay(self, shape, kind))[1]
    )
    monkeypatch.setattr(GraphRunner, "is_due", lambda self, shape, kind: not self.captured(shape, kind))
    engine.overlap = True
    assert serve(engine, 5, False, EVERYTHING)[0] == expected
    assert replayed >= set(long)


def test_rows_of_a_mixed_step_without_a_graph_are_as_many_as_in_one(model, monkeypatch):  # noqa: F811
    """Libraries' kernels for so many rows were then met at the start."""
    monkeypatch.setattr(graphs_module, "MIXED_TOKENS", (32,))
    config = EngineConfig(max_num_seqs=10, max_num_batched_tokens=96, enforce_eager=True)
    engine = Engine(model, config, eos_token_ids=(5, 6))
    expected, _ = serve(engine, 5, False, EVERYTHING)
    graphs = with_graphs(engine, Rerun(seconds=lambda rows: 1e-6 * rows))
    engine.overlap, run, rows = True, engine._run, set()

    def counted(batch, shape, half):
        if shape is None:
            rows.add(len(batch.seq_lens))
            assert batch.tokens.shape[1] > 32 >= batch.num_rows
        return run(batch, shape, half)

    monkeypatch.setattr(engine, "_run", counted)
    assert serve(engine, 5, False, EVERYTHING)[0] == expected
    assert len(rows) > 1 and rows <= set(graphs.sizes)


def test_an_engine_goes_on_when_captures_run_out_of_memory(model):  # noqa: F811
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, enforce_eager=True)
    engine = Engine(model, config, eos_token_ids=(5, 6))
    expected, _ = serve(engine, 5, False, EVERYTHING)
    with_graphs(engine, Rerun(room=1))
    engine.overlap = True
    assert serve(engine, 5, False, EVERYTHING)[0] == expected
    assert engine.report.cuda_graphs == [4]
    assert any("there is no memory for" in note and "4 stay" in note for note in engine.report.notes)


@given(st.data())
def test_a_mixed_batch_holds_the_step(data):
    """Rows and tokens of the layout that `MixedShape` describes, against the scheduler's own lists."""
    from fusecomp.runtime.batch import BatchBuilder
    from fusecomp.runtime.kv_cache import KVCacheManager
    from fusecomp.runtime.scheduler import Scheduler, SequenceState

    draw = random.Random(data.draw(st.integers(0, 2**32)))
    scheduler = Scheduler(6, 64, 200, KVCacheManager(200, 4))
    builder = BatchBuilder(6, 64, 50, 4, "cpu")
    for i in range(30):
        scheduler.add(SequenceState(str(i), [1 + i] * draw.randint(1, 40), SamplingParams(max_tokens=8)))
    while (step := scheduler.schedule()) is not None:
        n, nd, used = len(step.seqs), step.num_decodes, step.num_tokens
        if step.decode_only:
            builder.build(step, draw.randint(n, 6))
        else:
            least = max(used, 6)
            shape = MixedShape(draw.randint(least, 64), draw.randint(nd, 6), draw.randint(n - nd + 1, MOST_PREFILLS))
            batch = builder.build(step, shape)
            gap = shape.decodes - nd
            assert batch.tokens.shape == (3, shape.tokens) and batch.seq_lens.shape == (shape.rows,)
            assert batch.tokens[:, used:].tolist() == [[0] * (shape.tokens - used)] * 2 + [[-1] * (shape.tokens - used)]
            cu, lengths = batch.cu_q_lens.tolist(), batch.seq_lens.tolist()
            tables = batch.block_tables.tolist()
            for row, (seq, size, start, _) in enumerate(step.entries):
                at = row if row < nd else row + gap
                first = sum(step.num_new_tokens[:row])
                assert (cu[at], cu[at + 1], lengths[at]) == (first, first + size, start + size)
                assert tables[at][: len(seq.blocks)] == seq.blocks
                assert batch.tokens[0, first : first + size].tolist() == seq.token_ids[start : start + size]
                assert batch.logit_indices[row] == first + size - 1 and batch.rows[row] == seq.row
            assert lengths[nd : shape.decodes] == [0] * gap
            assert (cu[n + gap], cu[n + gap + 1], lengths[n + gap]) == (used, shape.tokens, shape.tokens - used)
            assert set(cu[n + gap + 1 :]) == {shape.tokens} and not any(lengths[n + gap + 1 :])
            assert batch.rows[n:].tolist() == [6] * (shape.rows - n)
            assert batch.host_meta.tolist() == [shape.decodes, shape.tokens, 200, shape.rows]
        scheduler.update(step, [3] * n, ())
