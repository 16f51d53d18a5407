"""Which shapes get a CUDA graph, and that steps padded to them give the same tokens. Without a GPU: a replay runs the
captured function again, on the same static buffers, so a wrong layout shows as it would on a GPU."""

from __future__ import annotations

import random
from dataclasses import replace

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
from fusecomp.runtime.graphs import GraphRunner, bucket_sizes, is_long, mixed_shapes, shapes_to_meet
from fusecomp.runtime.scheduler import ScheduledStep
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

    def run(batch, shape, kind):
        return Sampled(logits(batch).argmax(1))

    return GraphRunner(logits, run, sizes, mixed, [].append if notes is None else notes.append, recorder, **options)


def capture(graphs: GraphRunner, *sizes: int) -> bool:
    return all(graphs.capture(Padding(size), size, Kind()) for size in sizes)


def start(graphs: GraphRunner) -> list:
    """Capture what is wanted at the start; returns it."""
    asked = []
    for shape in graphs.wanted():
        asked.append(shape)
        rows = shape if isinstance(shape, int) else shape.rows
        graphs.capture(Padding(rows), shape, Kind())
    return asked


@given(st.integers(1, 700), st.lists(st.floats(0, 1e-3), min_size=40, max_size=40), st.booleans())
def test_sizes_of_decodes_cost_little_more_than_all_sizes_would(largest, increases, steep):
    """Whatever a size costs, as long as more rows cost no less: a step takes at most 2% longer than in its own size."""
    sizes = bucket_sizes(largest)
    cost, total = {}, 1e-3
    for size, more in zip(sizes, increases, strict=False):
        total += more if steep else more / 100
        cost[size] = total
    graphs = runner(Rerun(seconds=cost.__getitem__), sizes)
    asked = start(graphs)
    assert len(asked) == len(set(asked)) and graphs.sizes == sorted(asked) and set(asked) <= set(sizes)
    for rows in range(1, largest + 1):
        best = min(cost[size] for size in sizes if size >= rows)
        assert cost[graphs.bucket(rows)] <= best / (1 - graphs_module.LEAST_GAIN) + 1e-12


def test_sizes_that_bring_nothing_are_not_captured():
    graphs = runner(Rerun(seconds=lambda rows: 3e-3 + 1e-7 * rows), bucket_sizes(256))
    assert start(graphs) == [256, 1]
    assert start(runner(Rerun(), bucket_sizes(1))) == [1]


def test_rows_run_in_the_fastest_size_that_holds_them():
    """Kernels of a size may suit it badly: a larger one that was measured to take less serves its rows."""
    cost = {1: 1e-3, 2: 1.1e-3, 4: 1.5e-3, 8: 1.4e-3}
    graphs = runner(Rerun(seconds=cost.__getitem__), [1, 2, 4, 8])
    assert capture(graphs, 8, 4, 2, 1)
    assert [graphs.bucket(rows) for rows in range(1, 10)] == [1, 2, 8, 8, 8, 8, 8, 8, None]


def test_a_variant_is_captured_once_its_launches_have_taken_as_long():
    """10 ms a capture and 2 ms a launch: the sixth step is captured, so captures take no longer than launches did."""
    graphs = runner(Rerun(), [4])
    capture(graphs, 4)
    graphs._capture_seconds, graphs._launch_seconds = 0.010, 0.002
    kind = Kind("plain")
    assert [graphs.is_due(4, kind) for _ in range(6)] == [False] * 5 + [True]
    assert graphs.is_due(4, kind), "until it is captured"
    assert graphs.capture(Padding(4), 4, kind) and not graphs.is_due(4, kind) and not graphs.is_due(4, Kind())
    assert not graphs.is_due(4, Kind("filtered")), "each variant counts for itself"
    graphs.full = "no memory"
    assert not any(graphs.is_due(4, Kind("filtered")) for _ in range(20))


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


def test_mixed_shapes_hold_every_short_step():
    shapes = [shape for shape in mixed_shapes(256, 8192) if not is_long(shape)]
    assert len(shapes) <= 16 and shapes == sorted(shapes) == mixed_shapes(256, 8192, long=False)
    for tokens in range(2, graphs_module.MIXED_TOKENS[-1] + 1):
        for decodes in (0, 1, 16, 17, 64, 65, 100, 256):
            for prefills in (1, 7, 8, 31):
                if decodes + prefills <= tokens:
                    shape = next(s for s in shapes if s.holds(tokens, decodes, prefills))
                    assert shape.tokens < 2 * max(tokens, 64) and shape.tokens - tokens <= 256
                    assert decodes > 64 or shape.decodes == 64
    assert mixed_shapes(4, 20) == []


@pytest.mark.parametrize("most", [1500, 8192, 10_000, 50_000])
def test_long_steps_are_padded_by_less_than_they_have(most):
    shapes = mixed_shapes(256, most)
    graphs = runner(Rerun(), [256], shapes)
    start(graphs)
    assert graphs.mixed == shapes == sorted(shapes)
    for tokens in {*range(1025, min(most, 16_384) + 1, 37), min(most, 16_384)}:
        for decodes, prefills in ((0, 1), (256, 63), (40, 20)):
            step = ScheduledStep([None] * (decodes + prefills), [], [], [], decodes, tokens, 0)
            shape = graphs.choose(step)
            assert tokens <= shape.tokens <= min(most, 2 * tokens) and shape.holds(tokens, decodes, prefills)
    assert shapes[-1].tokens == min(most, graphs_module.MORE_TOKENS[-1]), "full steps are not padded"
    graphs._most_padding = 100
    for tokens in (300, 1_025, most - 101, most - 100):
        shape = graphs.choose(ScheduledStep([None], [], [], [], 0, tokens, 0))
        assert shape is None or tokens <= shape.tokens <= tokens + 100, "padding is one prompt, no longer than others"
    assert shape is None or shape.tokens == min(most, graphs_module.MORE_TOKENS[-1])
    graphs.mixed = [shape for shape in shapes if shape.tokens > 128]
    assert graphs.choose(ScheduledStep([None], [], [], [], 0, 100, 0)) is None, "where the next one has no graph"


def test_mixed_steps_run_in_what_was_captured_at_the_start():
    shapes = [MixedShape(64, 4, 8), MixedShape(128, 4, 8)]
    graphs = runner(Rerun(), [4], shapes)
    step = ScheduledStep([None] * 4, [0] * 4, [1, 1, 40, 30], [True] * 4, 2, 72, 0)
    assert graphs.choose(step) is None
    assert start(graphs) == [4, *reversed(shapes)] and graphs.mixed == shapes
    assert graphs.choose(step) == shapes[1]
    assert graphs.choose(replace(step, num_tokens=129)) is None
    assert graphs.choose(replace(step, num_new_tokens=[1] * 4, num_decodes=4, num_tokens=4)) == 4


@pytest.mark.parametrize("launch, asked, kept", [(0.003, 0, 0), (0.006, 1, 0), (0.009, 1, 1), (0.020, 2, 2)])
def test_mixed_steps_that_hide_the_next_launches_get_no_graph(launch, asked, kept):
    """4 rows take 10 ms, by the rate of a prefill 2,048 and 4,096 tokens 15 and 30, of which the first turn out 20."""
    shapes = [MixedShape(2048, 4, 16), MixedShape(4096, 4, 17)]
    seconds = {4: 0.010, 20: 0.020, 21: 0.031}
    graphs = runner(Rerun(seconds=seconds.__getitem__), [4], shapes, tokens_per_s=2048 / 0.015)
    found = []
    for shape in graphs.wanted():
        found.append(shape)
        graphs.capture(Padding(shape if shape == 4 else shape.rows), shape, Kind())
        graphs._launch_seconds = launch
    assert found == [4, *reversed(shapes[:asked])]
    assert sum(not graphs._hidden(graphs.seconds[shape]) for shape in shapes[:asked]) == kept


def test_no_memory_for_long_mixed_steps_leaves_short_ones_theirs():
    notes: list[str] = []
    shapes = mixed_shapes(4, 4096)
    recorder = Rerun()
    graphs = runner(recorder, [4], shapes, notes=notes)
    record = recorder.record
    for shape in (found := graphs.wanted()):
        long = not isinstance(shape, int) and is_long(shape)
        recorder.record = record if not long else Rerun(room=0).record
        graphs.capture(Padding(4 if shape == 4 else shape.rows), shape, Kind())
    assert next(found, None) is None and not graphs.full
    assert graphs.mixed == mixed_shapes(4, 4096, long=False)
    assert len(notes) == 1 and "longer mixed steps run without" in notes[0] and "4096 tokens" in notes[0]


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


def test_kernels_of_every_size_are_met_at_the_start():
    shapes = mixed_shapes(256, 8192)
    met = shapes_to_meet(shapes, 8192)
    assert {s.tokens for s in met} == {s.tokens for s in shapes}
    short = mixed_shapes(256, 8192, long=False)
    assert {s.tokens for s in shapes_to_meet(short, 8192)} == {s.tokens for s in short} | {2048, 4096}
    assert {s.decodes for s in met} >= {s.decodes for s in shapes} and all(s.decodes <= s.tokens for s in met)
    assert shapes_to_meet([], 8192) == []


def test_launches_are_chosen_for_sizes_of_graphs():
    from fusecomp.lowerings.paged_attention.heuristics import FEW_ROWS, rows_of_choice

    sizes = {*range(1, FEW_ROWS + 1), *bucket_sizes(1024)}
    assert all(rows <= rows_of_choice(rows) and rows_of_choice(rows) in sizes for rows in range(1, 1025))
    assert {rows_of_choice(size) for size in sizes} == sizes


@pytest.mark.parametrize("capacity", [2112, 40960])
@pytest.mark.parametrize(
    "head_dim, kv_heads, group", [(64, 8, 4), (128, 8, 4), (128, 4, 8), (128, 8, 2), (256, 4, 2), (128, 3, 8)]
)
def test_no_number_of_decodes_wants_a_kernel_that_was_not_met(head_dim, kv_heads, group, capacity):
    """What the decode kernel is specialized on, for every number of decodes beside a prefill."""
    from fusecomp.lowerings.paged_attention import heuristics

    def variant(rows: int) -> tuple:
        config = heuristics.decode_config(
            heuristics.SM90, head_dim=head_dim, itemsize=2, num_kv_heads=kv_heads, page_size=16, num_rows=rows,
            capacity=capacity, group=group,
        )  # fmt: skip
        tiles, early = config.min_tiles(), heuristics.launches_early(rows, kv_heads)
        splits = heuristics.next_power_of_2(config.num_splits)
        launch = config.block_n, config.num_warps, config.num_stages, splits
        return *launch, early, tiles == 1, tiles % 16 == 0

    met = {variant(shape.decodes) for shape in shapes_to_meet(mixed_shapes(256, 8192), 8192)}
    assert {rows: variant(rows) for rows in range(1, 257) if variant(rows) not in met} == {}
