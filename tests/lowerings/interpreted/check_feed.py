"""The kernels between steps under Triton's interpreter, against what they are to write, element by element."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import feed

PAGES = 7


@settings(deadline=None, max_examples=30)
@given(size=st.sampled_from([1, 3, 64, 256, 257, 600]), moved=st.sampled_from([0, 1, 5, 300, 700]), data=st.data())
def test_feeds_a_step(size, moved, data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    rows = size + 40

    def ints(low, high, count, dtype=torch.int64):
        return torch.randint(low, high, (count,), generator=draw).to(dtype)

    staged, lens = ints(-1, 2**40, 3 * rows), ints(0, 2**30, rows, torch.int32)
    at = torch.randperm(rows * PAGES, generator=draw)[: min(moved, rows * PAGES)].to(torch.int32)
    to, count = ints(0, 2**30, len(at), torch.int32), data.draw(st.integers(0, size))
    sampled, continues = ints(-1, 2**20, rows), ints(-1, rows, rows)
    tokens, seq_lens = torch.full((3 * rows,), -7), torch.full((rows,), -7, dtype=torch.int32)
    tables = torch.full((rows, PAGES), -7, dtype=torch.int32)
    wanted, wanted_tables = staged[: 3 * size].tolist(), tables.flatten().tolist()
    for row in range(count):
        if continues[row] >= 0:
            wanted[row] = max(int(sampled[continues[row]]), 0)
    for place, block in zip(at.tolist(), to.tolist(), strict=True):
        wanted_tables[place] = block
    given_ids = sampled if count else None
    feed.launch_feed(staged, lens, (at, to), continues, given_ids, tokens, seq_lens, tables, size, count, len(at))
    assert tokens.tolist() == wanted + [-7] * (3 * rows - 3 * size)
    assert seq_lens.tolist() == lens[:size].tolist() + [-7] * (rows - size)
    assert tables.flatten().tolist() == wanted_tables


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 600))
def test_delivers_ids(size):
    host = torch.full((size + 3,), -7)
    feed.launch_deliver(torch.arange(size) - 1, host[:size])
    assert host.tolist() == [*range(-1, size - 1), -7, -7, -7]
