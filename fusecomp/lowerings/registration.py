"""Binds GPU kernels to the canonical ops. A call that a kernel refuses runs the eager reference, counted.

Ops of codes are in `quant_registration.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.launch import computed
from fusecomp.ops.attention import attention_reference, paged_attention_reference
from fusecomp.ops.kv_cache import KVLayout
from fusecomp.ops.library import implement, record_fallback
from fusecomp.ops.linear import Program, linear_reference
from fusecomp.ops.linear_experts import NORM, NORM_WEIGHT, RESIDUAL, mixture_args, without_norm
from fusecomp.ops.linear_pair import LINEAR_ARGS
from fusecomp.ops.mode import batch_invariant
from fusecomp.ops.norm import NormSpec, norm_reference
from fusecomp.ops.rope import Rope, rope_attention_reference
from fusecomp.ops.router import RouteSpec, route_reference, router_reference
from fusecomp.ops.sampling import greedy_reference


def unit_stride(x: Tensor) -> Tensor:
    """`x` with a contiguous last dim. Inductor is free to choose layouts, and now and then picks another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _cache_write(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    from fusecomp.lowerings.paged_attention.lowering import launch_cache_write

    launch_cache_write(unit_stride(k), unit_stride(v), kv_cache, slots)


def _attention_refusal(q: Tensor, k: Tensor, kv_cache: Tensor, scale: float, window: int, softcap: float) -> str | None:
    from fusecomp.lowerings.paged_attention.lowering import supports

    layout = KVLayout.of(kv_cache, q.shape[2])
    return supports(
        dtype=q.dtype,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        page_size=layout.page_size,
        scale=scale,
        window=window,
        softcap=softcap,
        quantized=layout.quantized,
    )


def _paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    from fusecomp.lowerings.paged_attention.lowering import launch_paged_attention

    args = (kv_cache, cu_q_lens, seq_lens, block_tables, host_meta, scale, window, softcap, sinks)
    reason = _attention_refusal(q, k, kv_cache, scale, window, softcap)
    if reason:
        record_fallback("paged_attention", reason)
        return paged_attention_reference(q, k, v, *args)
    if batch_invariant():
        from fusecomp.lowerings.paged_attention.invariant_launch import launch_invariant_attention

        return computed(launch_invariant_attention(q, *args))
    return computed(launch_paged_attention(q, unit_stride(k), unit_stride(v), *args))


def _rope_attention(
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
    from fusecomp.lowerings.paged_attention.rope import launch_rope_attention, supports

    rest = (kv_cache, slots, cu_q_lens, seq_lens, block_tables, host_meta, scale, window, softcap, sinks, rope)
    reason = supports(Rope.parse(rope), head_dim=q.shape[2], cos=cos, sin=sin)
    reason = reason or _attention_refusal(q, k, kv_cache, scale, window, softcap)
    if reason:
        record_fallback("rope_attention", reason)
        return rope_attention_reference(q, k, v, cos, sin, q_norm, k_norm, *rest)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    cos, sin, q_norm, k_norm = (None if x is None else unit_stride(x) for x in (cos, sin, q_norm, k_norm))
    if batch_invariant():
        from fusecomp.lowerings.paged_attention.invariant_launch import launch_invariant_rope_attention

        return computed(launch_invariant_rope_attention(q, k, v, cos, sin, q_norm, k_norm, *rest))
    return computed(launch_rope_attention(q, k, v, cos, sin, q_norm, k_norm, *rest))


def run_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
) -> Tensor:
    from fusecomp.lowerings.linear.lowering import launch_linear, supports

    parsed = Program.from_text(program)
    reason = supports(x, weight, operands, parsed)
    if reason:
        record_fallback("linear", reason)
        return linear_reference(x, weight, norm_weight, norm_bias, operands, program)
    return computed(launch_linear(x, weight, norm_weight, norm_bias, operands, parsed))


def run_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: str) -> Tensor:
    from fusecomp.lowerings.linear.lowering import DTYPES, launch_norm_op

    if x.dtype not in DTYPES:
        record_fallback("norm", f"dtype {x.dtype} is none of fp32, fp16, bf16")
        return norm_reference(x, weight, bias, spec)
    return computed(launch_norm_op(x, weight, bias, NormSpec.from_text(spec)))


def _linear_pair(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from fusecomp.lowerings.linear.lowering import launch_linear_pair, supports

    first, then = args[:LINEAR_ARGS], args[LINEAR_ARGS:]
    programs = [Program.from_text(given[-1]) for given in (first, then)]
    h = x.new_empty(0, dtype=programs[0].torch_dtype)
    if supports(x, first[0], first[3], programs[0]) or supports(h, then[0], then[3], programs[1]):
        h = run_linear(x, *first)  # which counts why
        return h, run_linear(h, *then)
    given: Any = (*first[:-1], programs[0], *then[:-1], programs[1])
    h, z = launch_linear_pair(x, *given)
    return computed(h), computed(z)


def _experts(*args: Any) -> Tensor:
    from fusecomp.lowerings.experts.lowering import launch_experts

    return computed(launch_experts(*args))


def _greedy(logits: Tensor) -> Tensor:
    from fusecomp.lowerings.sampling.greedy import launch_greedy

    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        record_fallback("greedy", f"dtype {logits.dtype} is none of fp32, fp16, bf16")
        return greedy_reference(logits)
    return computed(launch_greedy(unit_stride(logits)))


def _route(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    from fusecomp.lowerings.device import uses_pdl
    from fusecomp.lowerings.route.kernel import launch_route, supports

    parsed = RouteSpec.from_text(spec)
    if reason := supports(logits.dtype, logits.shape[1], parsed):
        record_fallback("route", reason)
        return route_reference(logits, bias, spec)
    bias = None if bias is None else unit_stride(bias)
    ids, weights = launch_route(unit_stride(logits), bias, parsed, uses_pdl(logits))
    return computed(ids), computed(weights)


def run_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: str,
    logits: str,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fusecomp::router` on CUDA; what its kernels refuse runs the reference, counted."""
    from fusecomp.lowerings.route.lowering import launch_router_op, supports

    normed, parsed = NormSpec.from_text(norm) if norm else None, RouteSpec.from_text(spec)
    if reason := supports(x, weight, parsed):
        record_fallback("router", reason)
        return router_reference(x, weight, bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    y, ids, weights = launch_router_op(
        unit_stride(x), weight, bias, norm_weight, norm_bias, route_bias, normed, getattr(torch, logits), parsed
    )  # fmt: skip
    return computed(y), computed(ids), computed(weights)


def _routed_experts(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: str,
    logits: str,
    spec: str,
    *args: Any,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from fusecomp.lowerings.experts.routed import launch_routed_experts

    given = (router, router_bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    given_all = (unit_stride(x), *given, *args)
    found = None if batch_invariant() else launch_routed_experts(*given_all, later=later)
    if found is not None:
        return computed(found[0]), computed(found[1])
    y, ids, weights = run_router(x, *given)
    return y, _experts(y if norm else x, ids, weights, *args)


def _experts_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The two halves; the first knows what the second will read."""
    *routed, weight, norm_weight, norm_bias, operands, program = args
    y, out = _routed_experts(x, *routed, later=weight)
    return y, out, run_linear(out, weight, norm_weight, norm_bias, operands, program)


def _linear_experts(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    h, y, rest = _before_experts(x, args)
    normed, out = _routed_experts(h if y is None else y, *rest)
    return h, normed if y is None else y, out


def _linear_experts_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, y, rest = _before_experts(x, args)
    normed, out, z = _experts_linear(h if y is None else y, *rest)
    return h, normed if y is None else y, out, z


def _before_experts(x: Tensor, args: tuple) -> tuple[Tensor, Tensor | None, list[Any]]:
    """(h, y, rest): a linear's result, norm(h) or None, and the mixture's arguments behind what it reads.

    Where the linear's sums are left to another kernel, that one makes the router's norm: the mixture reads y and has no
    norm of its own. Elsewhere it reads h.
    """
    from fusecomp.lowerings.linear.lowering import sums_of, supports
    from fusecomp.lowerings.linear.sum_norm import launch_sum_norm

    first, norm, y = args[:LINEAR_ARGS], args[LINEAR_ARGS + NORM], None
    program = Program.from_text(first[-1])
    if norm and not supports(x, first[0], first[3], program):
        given: Any = (*first[:-1], program)
        if (sums := sums_of(unit_stride(x), *given)) is not None:
            weight, bias = args[LINEAR_ARGS + NORM_WEIGHT :][:2]
            h, y = map(computed, launch_sum_norm(sums, NormSpec.from_text(norm), weight, bias))
    if y is None:
        h = run_linear(x, *first)
    rest = mixture_args(args, LINEAR_ARGS, RESIDUAL, h)
    return h, y, rest if y is None else without_norm(rest)


@cache
def register() -> None:
    """Bind what this file has, once per process. Triton is imported when a kernel first runs, not here."""
    implement("cache_write", _cache_write, "CUDA")
    implement("paged_attention", _paged_attention, "CUDA")
    implement("rope_attention", _rope_attention, "CUDA")
    implement("linear", run_linear, "CUDA")
    implement("linear_pair", _linear_pair, "CUDA")
    implement("norm", run_norm, "CUDA")
    implement("greedy", _greedy, "CUDA")
    implement("route", _route, "CUDA")
    implement("router", run_router, "CUDA")
    implement("experts", _experts, "CUDA")
    implement("routed_experts", _routed_experts, "CUDA")
    implement("experts_linear", _experts_linear, "CUDA")
    implement("linear_experts", _linear_experts, "CUDA")
    implement("linear_experts_linear", _linear_experts_linear, "CUDA")
    implement("attention", attention_reference, "CUDA")
