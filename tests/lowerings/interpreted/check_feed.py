"""The kernels that feed a step and deliver its tokens under Triton's interpreter, against their eager references."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import feed
from fusecomp.lowerings.letter import BLOCK, NOWHERE, Letter, deliver_reference, feed_reference

PAGES = 7


@settings(deadline=None, max_examples=40)
@given(
    size=st.sampled_from([1, 3, 64, 256, 257, 600]),
    moved=st.sampled_from([0, 1, 5, 300, 700]),
    fresh=st.booleans(),
    half=st.sampled_from([NOWHERE, 0, 1]),
    data=st.data(),
)
def test_feeds_a_step(size, moved, fresh, half, data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    rows = -(-(size + 140) // BLOCK) * BLOCK  # as many entries of block tables may have moved

    def ints(low, high, count, dtype=torch.int64):
        return torch.randint(low, high, (count,), generator=draw).to(dtype)

    moved = min(moved, rows)
    at = torch.randperm(rows * PAGES, generator=draw)[:rows].to(torch.int32)
    lists = ints(0, 2**30, rows, torch.int32), ints(-1, 2**40, rows), ints(0, 2**30, rows, torch.int32)
    letter = *lists, at, ints(0, 2**30, rows, torch.int32), ints(-1, rows, rows, torch.int32)
    ids = ints(-1, 2**20, rows)
    seen, count = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, size))
    header = torch.tensor([seen + fresh, count, moved, half])

    def run(launch):
        """What was written, one tensor after the other."""
        words = [torch.tensor([value]) for value in (seen, seen, -7)]  # taken, seen, half
        taken, seen_, half_ = words
        tokens, tables = torch.full((3 * rows,), -7), torch.full((rows, PAGES), -7, dtype=torch.int32)
        lens = torch.full((rows,), -7, dtype=torch.int32)
        launch(Letter(header, taken, *letter), ids, seen_, half_, tokens, lens, tables, size)
        return [t.tolist() for t in (*words, tokens, lens, tables)]

    expected = run(feed_reference)
    assert run(feed.launch_feed) == expected
    assert expected[:3] == [[seen + fresh], [seen + fresh], [half if fresh else NOWHERE]]
    untouched = [-7] * (3 * (rows - size) if fresh else 3 * rows)
    assert expected[3][len(expected[3]) - len(untouched) :] == untouched


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 600), st.sampled_from([NOWHERE, 0, 1]))
def test_delivers_ids(size, half):
    def run(launch):
        ids, host = torch.full((size + 3,), -7), torch.full((2, size + 3), -7)
        launch(torch.arange(size) - 1, torch.tensor([half]), ids, host)
        return ids.tolist(), host.tolist()

    expected = run(deliver_reference)
    assert run(feed.launch_deliver) == expected
    there, nothing = [*range(-1, size - 1), -7, -7, -7], [-7] * (size + 3)
    assert expected[0] == (nothing if half < 0 else there)
    assert expected[1] == [there if each == half else nothing for each in (0, 1)]
