"""Which shapes get a CUDA graph, and that steps padded to them give the same tokens. Without a GPU: a replay runs the
captured function again, on the same static buffers, so a wrong layout shows as it would on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.config import EngineConfig
from fusecomp.errors import VerificationError
from fusecomp.request import SamplingParams
from fusecomp.runtime import graphs as graphs_module
from fusecomp.runtime.choice import Kind, Sampled
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.graphs import GraphRunner, bucket_sizes, first_sizes, mixed_shapes, shapes_to_meet
from fusecomp.runtime.step_batch import MOST_PREFILLS, MixedShape
from tests.runtime.test_overlap import EVERYTHING, model, serve  # noqa: F401


class Rerun:
    """Stands for a device: a replay runs the function again and writes its first results. Each graph takes `nbytes`;
    from the `room`-th on there is no memory."""

    def __init__(self, *, nbytes: int = 0, room: float = float("inf"), seconds=lambda shape: 1e-6) -> None:
        self.count, self.nbytes, self.room, self._seconds = 0, nbytes, room, seconds

    def record(self, run):
        if self.count >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        self.count += 1
        result = run()

        def replay() -> None:
            again = run()
            for old, new in zip(result, again, strict=True):
                if old is not None:
                    old.copy_(new)

        replay.rows = result.tokens.shape[0]
        return replay, result

    def seconds(self, replay) -> float:
        return self._seconds(replay.rows)

    def used_bytes(self) -> int:
        return self.count * self.nbytes


class Padding:
    """A batch of so many rows, of which only the size matters."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


def runner(recorder, sizes, mixed=(), notes=None, **options) -> GraphRunner:
    def logits(batch):
        return torch.eye(batch.rows, 8)

    def run(batch, kind):
        return Sampled(logits(batch).argmax(1))

    return GraphRunner(logits, run, sizes, mixed, [].append if notes is None else notes.append, recorder, **options)


def capture(graphs: GraphRunner, *sizes: int) -> bool:
    return all(graphs.capture(Padding(size), size, Kind()) for size in sizes)


def test_first_sizes_bound_the_padding():
    for largest in (1, 3, 5, 64, 100, 256, 300, 1024):
        sizes = bucket_sizes(largest)
        first = first_sizes(largest)
        assert first[0] == largest and set(first) <= set(sizes) and sizes == sorted(set(sizes))
        for rows in range(1, largest + 1):
            assert min(size for size in first if size >= rows) <= 4 * rows


def test_a_size_is_captured_when_padding_has_cost_as_much():
    """1 ms for 16 rows, 5 ms for 64, and a capture that takes 10 ms: 48 is worth 1.33 ms a step."""
    graphs = runner(Rerun(seconds=lambda rows: 1e-3 * (1 + (rows - 16) / 12)), bucket_sizes(64))
    capture(graphs, 64, 16)
    graphs._capture_seconds = 0.0099
    assert [graphs.bucket(40) for _ in range(7)] == [64] * 7
    assert graphs.bucket(16) == 16 and graphs.bucket(63) == 64
    assert graphs.bucket(40) == 48
    assert capture(graphs, 48) and graphs.bucket(40) == graphs.bucket(33) == 48


def test_a_size_that_brings_nothing_is_never_captured():
    graphs = runner(Rerun(seconds=lambda rows: 3e-3), bucket_sizes(64))
    capture(graphs, 64, 1)
    assert {graphs.bucket(rows) for rows in range(2, 65) for _ in range(1000)} == {64}


@given(st.lists(st.integers(1, 64), max_size=300), st.floats(1e-4, 1e-2))
def test_lost_time_stays_within_twice_the_best(rows_of_steps, capture_seconds):
    """Padding and captures together, against the best choice of sizes afterwards: per size, at most one capture more
    than twice the least of its padding and its capture."""

    def cost(rows: int) -> float:
        return 1e-3 + 5e-5 * rows

    sizes = bucket_sizes(64)
    graphs = runner(Rerun(seconds=cost), sizes)
    capture(graphs, *first_sizes(64))
    padded: dict[int, float] = {}
    captures: dict[int, int] = {}
    for rows in rows_of_steps:
        graphs._capture_seconds = capture_seconds
        size = graphs.bucket(rows)
        ideal = min(s for s in sizes if s >= rows)
        if size not in graphs.seconds:
            capture(graphs, size)
            captures[size] = captures.get(size, 0) + 1
        padded[ideal] = padded.get(ideal, 0.0) + cost(size) - cost(ideal)
    for size, lost in padded.items():
        assert captures.get(size, 0) <= 1
        assert lost <= capture_seconds + cost(64)


def test_out_of_memory_keeps_what_is_captured():
    notes: list[str] = []
    graphs = runner(Rerun(room=2), bucket_sizes(64), notes=notes)
    assert capture(graphs, 64, 16) and not capture(graphs, 4)
    assert not capture(graphs, 32), "no further attempt"
    assert len(notes) == 1 and "no memory for that of 4" in notes[0] and "16, 64 stay" in notes[0]
    assert [graphs.bucket(rows) for rows in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, None]


def test_no_memory_for_the_first_graph():
    notes: list[str] = []
    graphs = runner(Rerun(room=0), bucket_sizes(64), notes=notes)
    assert not capture(graphs, 64)
    assert graphs.bucket(1) is None and graphs.bucket(64) is None and "stay" not in notes[0]


def test_the_memory_budget_ends_captures():
    notes: list[str] = []
    graphs = runner(Rerun(nbytes=6 << 20), bucket_sizes(64), notes=notes, budget_bytes=10 << 20)
    assert capture(graphs, 64, 16) and not capture(graphs, 4)
    assert graphs.num_bytes == 12 << 20 and "12 MiB of 10" in notes[0]


def test_a_graph_that_samples_other_tokens_is_refused():
    graphs = runner(Rerun(), [4])
    capture(graphs, 4)
    graphs._logits = lambda batch: torch.eye(batch.rows, 8).flip(1)
    with pytest.raises(VerificationError, match="CUDA graph for batch 4 samples other tokens"):
        graphs.check(Padding(4), 4, Kind())
    graphs.check(Padding(4), 4, Kind())  # only the first replay


def test_mixed_shapes_waste_at_most_a_fourth():
    shapes = mixed_shapes(256, 8192)
    for tokens in range(24, graphs_module.MOST_MIXED_TOKENS + 1):
        for decodes in (0, 1, 16, 17, 100, 256):
            for prefills in (1, 7, 8, 31):
                if decodes + prefills > tokens:
                    continue
                shape = next((s for s in shapes if s.holds(tokens, decodes, prefills)), None)
                assert shape is not None or tokens < 32 or max(decodes, prefills) > tokens // 2
                if shape and tokens >= 32 and decodes <= 16:
                    assert shape.tokens - tokens <= max(31, tokens // 4)
    assert mixed_shapes(4, 20) == []


def test_mixed_steps_are_captured_at_their_second_use():
    graphs = runner(Rerun(), [4], [MixedShape(32, 4, 8)])
    assert [graphs._mixed_bucket(30, 2, 2) for _ in range(2)] == [None, (32, 4, 8)]
    assert graphs._mixed_bucket(33, 2, 2) is None and graphs._mixed_bucket(30, 2, 8) is None


def test_mixed_steps_that_hide_the_next_launches_run_without_a_graph():
    graphs = runner(Rerun(seconds=lambda rows: 0.010), [4], [MixedShape(32, 4, 8)])
    capture(graphs, 4)
    graphs._launch_seconds = 0.005
    assert [graphs._mixed_bucket(30, 2, 2) for _ in range(3)] == [None] * 3
    graphs._launch_seconds = 0.009
    assert graphs._mixed_bucket(30, 2, 2) is None and graphs._mixed_bucket(30, 2, 2) is not None


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
    for size in first_sizes(engine.config.max_num_seqs):
        engine._capture(engine._graphs, size, Kind())
        if engine._graphs.captured(size, Kind()):
            engine._graphs.check(engine._stand_in_decodes(size), size, Kind())
    return engine._graphs


@pytest.mark.parametrize("which", ["model", "moe"])
@pytest.mark.parametrize("blocks", [None, 12], ids=["roomy", "preempting"])
def test_padded_steps_give_the_same_tokens(request, monkeypatch, which, blocks):
    """Lazily captured, decodes and mixed, one after the other and ahead, with every option of the sampler."""
    monkeypatch.setattr(graphs_module, "MOST_MIXED_TOKENS", 96)
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
    graphs = with_graphs(engine, Rerun())
    shapes = set()
    replay = graphs.replay
    monkeypatch.setattr(graphs, "replay", lambda shape, kind: (shapes.add(shape), replay(shape, kind))[1])
    for overlap in (False, True):
        engine.overlap = overlap
        actual, ahead = serve(engine, 5, False, EVERYTHING)
        assert actual == expected
    assert ahead > 20
    assert len({shape for shape in shapes if isinstance(shape, MixedShape)}) > 1
    assert engine.report.mixed_cuda_graphs > 1 and engine.report.cuda_graphs[-1] == 10
    assert "for steps with prefills" in engine.report.summary()
    assert blocks is None or engine.metrics.preemptions > 0


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


def test_kernels_of_every_size_are_met_at_the_start():
    shapes = mixed_shapes(256, 8192)
    met = shapes_to_meet(shapes, 8192)
    assert {s.tokens for s in met} == {s.tokens for s in shapes} | {2048, 4096}
    assert {s.decodes for s in met} >= {s.decodes for s in shapes} and all(s.decodes <= s.tokens for s in met)
    assert shapes_to_meet([], 8192) == []
