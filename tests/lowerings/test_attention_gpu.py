"""The attention kernels at real sizes, on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fusecomp.lowerings.paged_attention import heuristics, lowering
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig
from fusecomp.lowerings.paged_attention.rope import launch_rope_attention
from fusecomp.ops.rope import Rope
from tests.lowerings.steps import check_attention, check_rope_attention, make_rope, make_step

pytestmark = pytest.mark.gpu


def run(step, scale, window=0, softcap=0.0, sinks=None):
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    return lowering.launch_paged_attention(*step.attention_inputs(), scale, window, softcap, sinks)


caches = pytest.mark.parametrize("quantized", [False, True], ids=["plain_cache", "fp8_cache"])


@caches
@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("mode", ["plain", "window", "softcap", "sinks"])
def test_mixed_step(head_dim, page_size, mode, quantized):
    step = make_step(
        [(4095, 1), (0, 1), (777, 1), (1000, 700), (0, 1111), (5, 2)],
        heads=8, kv_heads=2, head_dim=head_dim, page_size=page_size, dtype=torch.bfloat16, device="cuda",
        quantized=quantized,
    )  # fmt: skip
    window, softcap = 300 * (mode == "window"), 20.0 * (mode == "softcap")
    sinks = torch.randn(8, device="cuda") if mode == "sinks" else None
    out = run(step, head_dim**-0.5, window, softcap, sinks)
    check_attention(step, out, head_dim**-0.5, window, softcap, sinks)


@caches
def test_long_context(quantized):
    step = make_step(
        [(32767, 1), (16384, 4097)],
        heads=4, kv_heads=1, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda", quantized=quantized,
    )  # fmt: skip
    check_attention(step, run(step, 0.1), 0.1, 0, 0.0, None)


@caches
def test_one_graph_serves_any_length(quantized):
    """A captured decode step, replayed with other lengths, matches eager launches bitwise."""
    step = make_step(
        [(2047, 1), (500, 1), (1, 1)],
        padding=1, heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda",
        quantized=quantized,
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


@caches
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    "rule",
    ["none", "half:64:full", "half:32:pairs rms:1e-06", "interleaved:64:full rms+1:1e-05", "interleaved:32:pairs"],
)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("mode", ["plain", "window", "softcap sinks"])
def test_rope_attention(head_dim, rule, kind, mode, quantized):
    rows = [(4095, 1), (0, 1), (777, 1), (255, 1), (256, 1)]
    rows += [(1000, 700), (0, 1111), (5, 2)] if kind == "mixed" else []
    step = make_step(
        rows, padding=0 if kind == "mixed" else 2,
        heads=8, kv_heads=2, head_dim=head_dim, page_size=16, dtype=torch.bfloat16, device="cuda", quantized=quantized,
    )  # fmt: skip
    inputs = make_rope(step, Rope.parse(rule), table_dtype=torch.bfloat16)
    sinks = torch.randn(8, device="cuda") if "sinks" in mode else None
    options = (head_dim**-0.5, 300 * (mode == "window"), 20.0 * ("softcap" in mode), sinks)
    before = replace(step, kv_cache=step.kv_cache.clone())
    out = launch_rope_attention(*inputs.arguments(step, options))
    check_rope_attention(before, step, inputs, out, options)
    for _ in range(5):
        assert torch.equal(out, launch_rope_attention(*inputs.arguments(step, options))), "a race"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize(
    ("head_dim", "warps", "keys", "page_size", "rule", "mode"),
    [
        (128, 8, 32, 16, "half:64:full", "sinks"),
        (128, 8, 16, 1, "half:32:pairs rms:1e-06", "window"),
        (128, 4, 32, 64, "interleaved:32:pairs", "window"),
        (128, 4, 16, 8, "none", "plain"),
        (64, 8, 32, 32, "interleaved:64:full rms+1:1e-05", "softcap sinks"),
        (64, 4, 16, 16, "half:64:full rms:1e-06", "plain"),
    ],
)
def test_warps_apart(monkeypatch, head_dim, warps, keys, page_size, group, rule, mode, dtype):
    """Ends of rows in every place of a step, of a warp and of a tile; one to many splits; one to many trips."""
    tile = keys * warps
    cached = [0, 1, 2, 14, 15, 16, 17, keys, tile - 1, tile, tile + 1, 3 * tile - 1, 777, 4095]
    step = make_step(
        [(n, 1) for n in cached], padding=2, heads=2 * group, kv_heads=2, head_dim=head_dim, page_size=page_size,
        dtype=dtype, device="cuda",
    )  # fmt: skip
    inputs = make_rope(step, Rope.parse(rule), table_dtype=dtype)
    sinks = torch.randn(2 * group, device="cuda") if "sinks" in mode else None
    options = (head_dim**-0.5, 300 * (mode == "window"), 20.0 * ("softcap" in mode), sinks)
    original = step.kv_cache.clone()
    before = replace(step, kv_cache=original)
    every_stages = (1, 2) if keys == 16 else (1,)
    for stages, (splits, least) in itertools.product(every_stages, ((1, 1), (3, 2), (32, 1))):
        config = DecodeConfig(tile, warps, stages, splits, least * tile, apart=keys)
        monkeypatch.setattr(heuristics, "decode_config", lambda *_, found=config, **__: found)
        step.kv_cache.copy_(original)
        out = launch_rope_attention(*inputs.arguments(step, options))
        check_rope_attention(before, step, inputs, out, options)
        for _ in range(5):
            assert torch.equal(out, launch_rope_attention(*inputs.arguments(step, options))), "a race"


@pytest.mark.parametrize(
    ("quantized", "apart"),
    [(False, 0), (True, 0), (False, 32), (False, 16)],
    ids=["plain", "fp8", "apart", "apart, a tile ahead"],
)
def test_one_graph_of_the_fused_op_serves_any_length(monkeypatch, quantized, apart):
    """Captured behind ordinary kernels and a memset, replayed with other lengths, bitwise as eager launches."""
    step = make_step(
        [(2047, 1), (500, 1), (1, 1)],
        padding=1, heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=torch.bfloat16, device="cuda",
        quantized=quantized,
    )  # fmt: skip
    if apart:
        config = DecodeConfig(8 * apart, 8, 32 // apart, 8, 256, apart=apart)
        monkeypatch.setattr(heuristics, "decode_config", lambda *_, **__: config)
    inputs = make_rope(step, Rope("half", 128), table_dtype=torch.float32)
    arguments = inputs.arguments(step, (0.1, 0, 0.0, None))
    launch_rope_attention(*arguments)
    graph, scratch = torch.cuda.CUDAGraph(), torch.empty(1000, device="cuda")
    with torch.cuda.graph(graph):
        scratch.zero_()
        for _ in range(3):
            out = launch_rope_attention(*arguments)
    for lengths in ([2048, 501, 2, 0], [1, 1, 1, 0], [700, 0, 0, 0], [2048, 17, 0, 0]):
        step.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, launch_rope_attention(*arguments))


def test_the_gpu_converts_codes_as_bits_do(monkeypatch):
    """The GPU's own conversions, in both directions, against the moving of bits that other GPUs get."""
    rows = [(4095, 1), (777, 1), (1000, 700), (0, 1111)]
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 16, "dtype": torch.bfloat16, "device": "cuda"}
    results = []
    for native in (True, False):
        step = make_step(rows, quantized=True, **shape)
        step.k[3], step.v[5, 1, 7] = float("nan"), float("inf")
        if not native:
            monkeypatch.setattr(lowering, "codes_of", lambda _: 1)
        out = run(step, 0.1)
        results.append((out.nan_to_num(7.0), step.kv_cache))
    (out, cache), (other_out, other_cache) = results
    assert torch.equal(cache, other_cache)
    torch.testing.assert_close(out, other_out, rtol=1e-2, atol=1e-3)
