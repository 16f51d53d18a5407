"""The attention kernels at real sizes, on a GPU."""

from __future__ import annotations

import pytest
import torch

from fusecomp.lowerings.paged_attention import lowering
from tests.lowerings.steps import check_attention, make_step

pytestmark = pytest.mark.gpu


def run(step, scale, window=0, softcap=0.0, sinks=None):
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    return lowering.launch_paged_attention(*step.attention_inputs(), scale, window, softcap, sinks)


@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("mode", ["plain", "window", "softcap", "sinks"])
def test_mixed_step(head_dim, page_size, mode):
    step = make_step(
        [(4095, 1), (0, 1), (777, 1), (1000, 700), (0, 1111), (5, 2)],
        heads=8, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    window, softcap = 300 * (mode == "window"), 20.0 * (mode == "softcap")
    sinks = torch.randn(8, device="cuda") if mode == "sinks" else None
    out = run(step, head_dim**-0.5, window, softcap, sinks)
    check_attention(step, out, head_dim**-0.5, window, softcap, sinks)


def test_long_context():
    step = make_step(
        [(32767, 1), (16384, 4097)],
        heads=4, kv_heads=1, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    check_attention(step, run(step, 0.1), 0.1, 0, 0.0, None)


def test_one_graph_serves_any_length():
    """A captured decode step, replayed with other lengths, matches eager launches bitwise."""
    step = make_step(
        [(2047, 1), (500, 1), (1, 1)],
        padding=1, heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    run(step, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lowering.launch_paged_attention(*step.attention_inputs(), 0.1, 0, 0.0, None)
    for lengths in ([2048, 501, 2, 0], [1, 1, 1, 0], [700, 0, 0, 0], [2048, 17, 0, 0]):
        step.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        expected = lowering.launch_paged_attention(*step.attention_inputs(), 0.1, 0, 0.0, None)
        assert torch.equal(out, expected)
