"""Which shapes get a CUDA graph, and in which one a step runs. Steps in them: `test_graph_steps.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.errors import VerificationError
from fusecomp.runtime import graphs as graphs_module
from fusecomp.runtime.choice import Kind, Sampled
from fusecomp.runtime.graphs import GraphRunner, bucket_sizes, is_long, mixed_shapes, shapes_to_meet
from fusecomp.runtime.scheduler import ScheduledStep
from fusecomp.runtime.step_batch import MixedShape
from tests.runtime.graph_device import Rerun


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
