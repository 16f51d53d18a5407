"""Binds the GPU kernels to the canonical ops. A call that a kernel refuses runs the eager reference, counted."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from fusecomp.lowerings.experts.lowering import launch_experts
from fusecomp.ops.attention import attention_reference, paged_attention_reference
from fusecomp.ops.library import implement, record_fallback


def _cache_write(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    from fusecomp.lowerings.paged_attention.lowering import launch_cache_write

    launch_cache_write(k, v, kv_cache, slots)


def _paged_attention(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, *step: object) -> Tensor:
    from fusecomp.lowerings.paged_attention.lowering import launch_paged_attention, supports

    if reason := supports(q, k, v, kv_cache, *step):  # type: ignore[arg-type]
        record_fallback("paged_attention", reason)
        return paged_attention_reference(q, k, v, kv_cache, *step)  # type: ignore[arg-type]
    return launch_paged_attention(q, k, v, kv_cache, *step)  # type: ignore[arg-type]


@cache
def register() -> None:
    """Register once per process. Triton is imported when a kernel first runs, not here."""
    implement("cache_write", _cache_write, "CUDA")
    implement("paged_attention", _paged_attention, "CUDA")
    implement("experts", launch_experts, "CUDA")
    implement("attention", attention_reference, "CUDA")


