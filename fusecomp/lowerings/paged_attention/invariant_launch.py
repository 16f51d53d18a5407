"""Launches of the attention whose sums do not depend on the batch.

Legend: as in `invariant.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention import heuristics, lowering, pieces
from fusecomp.lowerings.paged_attention.heuristics import Target, cdiv, next_power_of_2
from fusecomp.lowerings.paged_attention.invariant import invariant_attention_kernel
from fusecomp.lowerings.paged_attention.lowering import NewTokens
from fusecomp.ops.kv_cache import KVLayout
from fusecomp.ops.rope import Rope

SEGMENT = 512  # keys; a multiple of every tile
PROGRAMS_PER_SM = 2  # of decode, before rows are enough not to share one out


@dataclass(frozen=True)
class InvariantAttention:
    """The tile of every row of a layer.

    Attributes:
        queries: queries of a tile, so that `queries` times the padded heads of a kv head are its rows.
        segment: keys that are summed by themselves.
    """

    queries: int
    block_n: int
    num_warps: int
    num_stages: int
    segment: int = SEGMENT


@cache
def invariant_attention(target: Target, *, head_dim: int, itemsize: int, group: int) -> InvariantAttention:
    """The tile of a layer, whatever the step: 64 rows, which Hopper's widest matrix instruction takes, in 16 bits."""
    dp, rp = heuristics.padded_dim(head_dim), next_power_of_2(group)
    if itemsize == 4:  # products without matrix units, whose operands are in registers
        return InvariantAttention(max(1, 16 // rp), 16, 4 if max(16, rp) * dp <= 4096 else 8, 2)
    block_n = 64 if dp <= 128 else 32
    if not target.has_tma:  # accumulators and operands share the registers
        block_n = 32
    stages = 2 if dp > 128 or not target.has_tma else 3
    return InvariantAttention(max(1, 64 // rp), block_n, 8 if dp > 64 else 4, 1 if target.backend == "hip" else stages)


def launch_invariant_attention(
    q: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    config: InvariantAttention | None = None,
) -> Tensor:
    """Attention [T, H, D] of a packed step whose keys and values are in the cache, the step's own among them.

    Safe under CUDA-graph capture: grids depend on shapes and on `host_meta`.

    Args:
        config: the tile; what `invariant_attention` says by default.

    Raises:
        ValueError: for a shape, dtype or stride that `lowering.supports` or the contract excludes.
    """
    lowering.require_support(q, kv_cache, scale, window, softcap)
    if q.stride(-1) != 1:
        q = q.contiguous()
    lowering.require_unit_stride(kv_cache=kv_cache)
    num_decodes, max_q_len, _, num_rows = host_meta.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    layout = KVLayout.of(kv_cache, q.shape[2])
    target, group = target_of(q), q.shape[1] // layout.heads
    config = config or invariant_attention(
        target, head_dim=layout.head_dim, itemsize=q.element_size(), group=group
    )  # fmt: skip

    def run(first: int, rows: int, tiles: int, segments: int) -> None:
        pre, post = pieces.score_factors(scale, softcap)
        use_pdl, pairs = uses_pdl(q), rows * layout.heads
        shared = segments > 0
        part_acc = part_ml = arrivals = None
        if shared:
            part_acc = torch.empty(pairs * segments * group * layout.head_dim, dtype=torch.float32, device=q.device)
            part_ml = torch.empty(pairs * segments * 2 * group, dtype=torch.float32, device=q.device)
            arrivals = lowering.arrivals(kv_cache, pairs)
        launch(
            invariant_attention_kernel, (pairs, tiles),
            q, kv_cache, out, part_acc, part_ml, arrivals, cu_q_lens, seq_lens, block_tables, sinks, first, pre, post,
            window, segments, q.stride(0), q.stride(1), *lowering.cache_strides(kv_cache, layout.head_dim),
            block_tables.stride(0),
            H=q.shape[1], G=layout.heads, D=layout.head_dim, DP=heuristics.padded_dim(layout.head_dim),
            PAGE=layout.page_size, QUERIES=config.queries, BLOCK_N=config.block_n, SEGMENT=config.segment,
            SHARED=shared, CODES=lowering.codes_of(kv_cache), USE_PDL=use_pdl, num_warps=config.num_warps,
            num_stages=config.num_stages, enable_fp_fusion=False,
            **lowering.hooks(q.dtype, window, softcap, sinks), **lowering.launch_options(use_pdl),
        )  # fmt: skip

    if num_decodes:
        capacity = block_tables.shape[1] * layout.page_size
        segments = cdiv(capacity, config.segment)
        if window > 0:
            segments = min(segments, cdiv(window, config.segment) + 1)
        shares = min(segments, cdiv(PROGRAMS_PER_SM * target.num_sms, num_decodes * layout.heads))
        run(0, num_decodes, shares, segments if shares > 1 else 0)
    if num_rows > num_decodes:
        run(num_decodes, num_rows - num_decodes, cdiv(max_q_len, config.queries), 0)
    return out


def launch_invariant_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    kv_cache: Tensor,
    slots: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    rope: str,
) -> Tensor:
    """`launch_rope_attention` of tokens that do not depend on the batch: rotation and cache write, then attention."""
    from fusecomp.lowerings.paged_attention.rope import launch_rope_cache, require_rope

    parsed = require_rope(Rope.parse(rope), q, k, v, kv_cache, cos, sin, q_norm, k_norm)
    new = NewTokens(k, v, cos, sin, q_norm, k_norm, slots, parsed)
    block = rope_block(q.shape[2])
    rotated, _, _ = launch_rope_cache(q, new, kv_cache, block)
    return launch_invariant_attention(
        rotated, kv_cache, cu_q_lens, seq_lens, block_tables, host_meta, scale, window, softcap, sinks
    )  # fmt: skip


def rope_block(head_dim: int) -> tuple[int, int]:
    """(tokens, heads) per program of the rotation, for any number of tokens: they decide the order of a norm's sums."""
    return max(1, min(4, 1024 // heuristics.padded_dim(head_dim))), 2
