"""What stays in the L2, and that it is decided where launches change anyway; what experts' programs wait for."""

from __future__ import annotations

import re

import pytest
import torch

from fusecomp.lowerings.aot import compile_one
from fusecomp.lowerings.experts.experts_aot import Shape, specializations
from fusecomp.lowerings.experts.grouped import down_kernel, up_kernel
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.launch import signalled_blocks
from fusecomp.lowerings.keep import KEEP, store_policy
from fusecomp.lowerings.linear import large_heuristics
from fusecomp.lowerings.linear.large_heuristics import large_config
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant import scaled_heuristics
from fusecomp.lowerings.quant.scaled_heuristics import ScaledShape, scaled_config
from fusecomp.ops.quant import FP8

LAYERS = ((4096, 4096, 1), (6144, 4096, 1), (4096, 14336, 1), (14336, 4096, 2))  # n, k, groups of Llama-8B


def tokens_of(source: str) -> int:
    """Of the table's entry."""
    return int(re.search(r"tokens=(\d+)", source).group(1))


@pytest.mark.parametrize(
    ("shape", "dtype", "kept"),
    [
        ((64, 4096), torch.bfloat16, True),
        ((256, 14336), torch.bfloat16, True),
        ((4, 256, 4096), torch.float32, True),
        ((8, 256, 4096), torch.float32, False),  # parts that would fill the L2
        ((64, 128256), torch.bfloat16, False),  # logits
        ((8192, 4096), torch.bfloat16, False),
        ((0, 4096), torch.bfloat16, True),
    ],
)
def test_small_results_stay(shape, dtype, kept):
    out = torch.empty(shape, dtype=dtype, device="meta")
    assert store_policy(out, large_heuristics.KEPT_TOKENS) == (KEEP.value if kept else "")


@pytest.mark.parametrize(("n", "k", "groups"), LAYERS)
def test_results_stay_up_to_where_another_launch_serves(n, k, groups):
    """Else a step of a size between would have its kernel compiled while it is served."""
    kind = "other" if groups == 2 else "identity" if n == 6144 else "residual"
    most = large_heuristics.KEPT_TOKENS
    last, next_one = (
        large_config(SM90, n=n, k=k, groups=groups, tokens=tokens, itemsize=2, kind=kind) for tokens in (most, most + 1)
    )
    assert tokens_of(last.source) <= 256 < tokens_of(next_one.source)
    shape, most = ScaledShape(n, k, groups, FP8, 0, kind), scaled_heuristics.KEPT_TOKENS
    last, next_one = (scaled_config(SM90, shape, tokens) for tokens in (most, most + 1))
    assert tokens_of(last.source) <= most < tokens_of(next_one.source)


def compiled(kernel, tokens: int) -> str:
    """PTX of a half of Qwen3-30B-A3B's experts."""
    shape = Shape(128, 8, 2048, 768, tokens)
    spec = next(s for s in specializations(SM90, shape) if s.kernel is kernel)
    return compile_one(spec, "sm_90")[1].asm["ptx"]


class TestExperts:
    def test_a_tile_is_waited_for_by_its_blocks_alone(self):
        up, down = compiled(up_kernel, 64), compiled(down_kernel, 64)
        stores = [m.start() for m in re.finditer(r"st\.global", up)]
        signal = re.search(r"(atom|red)\.global\.\S*release\S*", up).start()
        assert stores and max(stores) < up.rindex("bar.sync", 0, signal) < signal
        assert up.index("griddepcontrol.wait") < min(stores)
        # Down waits for the launch before only when a program has stored all it has.
        waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", down)]
        assert len(waits) == 1 and waits[0] > max(m.start() for m in re.finditer(r"st\.global", down))
        assert re.search(r"(atom|ld)\.global\.\S*acquire", down)

    def test_results_of_few_tokens_stay(self):
        for kernel in (up_kernel, down_kernel):
            ptx = compiled(kernel, 64)
            results = re.findall(r"st\.global\.\S+", ptx)
            assert results and all(".L2::cache_hint" in store for store in results)
            assert "createpolicy.fractional.L2::evict_last" in ptx

    def test_many_tokens_are_stored_and_waited_for_as_usual(self):
        up, down = compiled(up_kernel, 8192), compiled(down_kernel, 8192)
        assert "L2::evict_last" not in up and "L2::evict_last" not in down
        assert "release" not in up and "acquire" not in down and "griddepcontrol.wait" in down

    @pytest.mark.parametrize(
        ("tiles", "routed_rows", "use_pdl", "blocks"),
        [
            (Tiles(64, 128), 512, True, 24),
            (Tiles(1024, 128), 512, True, 2),  # the last is not full
            (Tiles(64, 128), 512, False, 0),
            (Tiles(64, 128), 65536, True, 0),
            (Tiles(64, 128, per_sm=2), 512, True, 0),
        ],
    )
    def test_who_signals(self, tiles, routed_rows, use_pdl, blocks):
        config = ExpertsConfig("grouped", tiles, Tiles(64, 128), 8, True)
        assert signalled_blocks(config, routed_rows, 1536, use_pdl) == blocks
