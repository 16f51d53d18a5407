"""Launches of norm, rotation, cache write and attention as one op: the CUDA implementation of `rope_attention`.

A step of decodes only is one kernel, `decode_kernel` with NEW_KEY or `decode_apart_kernel`. Any other step runs
`rope_cache_kernel` and then the decode and prefill kernels on the rotated queries and keys. The choice reads
`host_meta` alone, so a captured CUDA graph keeps it.

Legend: T tokens, S rows, H query heads, G kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.paged_attention import heuristics, lowering
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.lowerings.paged_attention.lowering import NewTokens, rope_constants
from fusecomp.lowerings.paged_attention.rope_cache import rope_cache_kernel
from fusecomp.ops.kv_cache import KVLayout
from fusecomp.ops.rope import Rope


def supports(rope: Rope, *, head_dim: int, cos: Tensor | None, sin: Tensor | None) -> str | None:
    """Why the kernels cannot norm and rotate so, or None; what the attention itself needs is `lowering.supports`."""
    if rope.dims > head_dim:
        return f"{rope.dims} rotated dims, but heads of {head_dim}"
    for name, table in (("cos", cos), ("sin", sin)):
        if not rope.dims:
            continue
        if table is None or table.dim() != 2 or table.shape[1] < rope.columns():
            return f"{name} is not a table of {rope.columns()} columns"
        if table.dtype not in lowering.DTYPES:
            return f"{name} has dtype {table.dtype}"
    return None


def require_rope(
    rope: Rope,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> Rope:
    """`rope`; ValueError where `supports` or the strides of these exclude it."""
    if reason := supports(rope, head_dim=q.shape[2], cos=cos, sin=sin):
        raise ValueError(f"rope_attention: {reason}")
    vectors = {"q": q, "k": k, "v": v, "kv_cache": kv_cache, "cos": cos, "sin": sin, "q_norm": q_norm, "k_norm": k_norm}
    lowering.require_unit_stride(**{name: tensor for name, tensor in vectors.items() if tensor is not None})
    return rope


def launch_rope_cache(
    q: Tensor, new: NewTokens, kv_cache: Tensor, block: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [T, H, D], and k and v [T, G, D] as the cache returns them; they are in it at `new.slots` afterwards.

    All are contiguous, but a plain cache's v, which is the given one.

    Args:
        block: tokens and heads per program; the heuristics' choice by default.
    """
    num_tokens, num_heads, head_dim = q.shape
    layout = KVLayout.of(kv_cache, head_dim)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(new.k.shape, dtype=new.k.dtype, device=q.device)
    v_out = torch.empty(new.v.shape, dtype=new.v.dtype, device=q.device) if layout.quantized else None
    if num_tokens == 0:
        return q_out, k_out, new.v
    block_t, block_h = block or heuristics.rope_cache_block(num_tokens, head_dim)
    grid = (cdiv(num_tokens, block_t), cdiv(num_heads, block_h) + cdiv(layout.heads, block_h))
    pdl = uses_pdl(q)
    *tensors, slots = new.tensors()
    launch(
        rope_cache_kernel, grid,
        q, *tensors, q_out, k_out, v_out, kv_cache, slots, new.rope.eps, num_tokens, q.stride(0), q.stride(1),
        *new.strides(), *lowering.cache_strides(kv_cache, head_dim),
        H=num_heads, G=layout.heads, D=head_dim, DP=heuristics.padded_dim(head_dim), PAGE=layout.page_size,
        **rope_constants(new.rope), BLOCK_T=block_t, BLOCK_H=block_h, USE_PDL=pdl,
        CODES=lowering.codes_of(kv_cache), num_warps=4, **lowering.launch_options(pdl), **rounding_options(),
    )  # fmt: skip
    return q_out, k_out, new.v if v_out is None else v_out


def launch_rope_attention(
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
    """Attention [T, H, D] of a packed step from its raw q, k, v; arguments are those of `fusecomp::rope_attention`.

    Raises:
        ValueError: for a shape, dtype or stride that `supports`, `lowering.supports` or the contract excludes.
    """
    parsed = require_rope(Rope.parse(rope), q, k, v, kv_cache, cos, sin, q_norm, k_norm)
    new = NewTokens(k, v, cos, sin, q_norm, k_norm, slots, parsed)
    num_decodes, _, _, num_rows = host_meta.tolist()
    mode = (scale, window, softcap, sinks)
    if num_rows > num_decodes:
        q, k, v = launch_rope_cache(q, new, kv_cache)
        return lowering.launch_paged_attention(
            q, k, v, kv_cache, cu_q_lens, seq_lens, block_tables, host_meta, *mode, as_cached=True
        )  # fmt: skip
    lowering.require_support(q, kv_cache, scale, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_decodes:
        config = lowering.decode_config(q, kv_cache, block_tables, num_decodes, new_key=lowering.has_words(kv_cache))
        lowering.run_decode(config, q, kv_cache, out, seq_lens, block_tables, num_decodes, *mode, new=new)
    return out
