"""Batch-invariant kernels: what fixes their sums."""

from __future__ import annotations

import itertools

import pytest

from fusecomp.lowerings.experts.heuristics import invariant_experts_config
from fusecomp.lowerings.linear.invariant import BLOCKS_T, invariant_config, token_tile
from fusecomp.lowerings.paged_attention.heuristics import TARGETS
from fusecomp.lowerings.paged_attention.invariant_launch import SEGMENT, invariant_attention

TOKENS = (1, 2, 16, 17, 64, 65, 200, 8192)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_tile_that_fits(target):
    for n, k, groups, itemsize in itertools.product((1, 1000, 4096, 128256), (48, 1001, 14336), (1, 2), (2, 4)):
        config = invariant_config(target, n=n, k=k, groups=groups, itemsize=itemsize)
        assert (config.segments - 1) * config.per_segment * config.block_k < k
        assert config.segments * config.per_segment * config.block_k >= k
        for tokens in TOKENS:
            block_t, _, stages = token_tile(target, config, tokens, itemsize)
            assert block_t in BLOCKS_T
            assert stages * (config.block_r + block_t) * config.block_k * itemsize <= target.smem_bytes


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_experts_keep_their_weight_tile(target):
    shape = {"experts": 128, "top_k": 8, "hidden": 2048, "width": 768}
    for itemsize in (2, 4):
        configs = [invariant_experts_config(target, **shape, tokens=t, itemsize=itemsize) for t in TOKENS]
        assert {(c.method, c.swap, c.up.block_n, c.up.block_d, c.down.block_n, c.down.block_d) for c in configs} == {
            (configs[0].method, True, *(x for t in (configs[0].up, configs[0].down) for x in (t.block_n, t.block_d)))
        }


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_segments_are_whole_tiles(target):
    for head_dim, itemsize, group in itertools.product((32, 80, 128, 256), (2, 4), (1, 3, 8, 64)):
        config = invariant_attention(target, head_dim=head_dim, itemsize=itemsize, group=group)
        assert SEGMENT % config.block_n == 0 and config.queries >= 1
