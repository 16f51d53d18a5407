"""The last launch of the experts: each token's parts, weighted and summed, with the residual stream added.

A launch of its own takes the place of the addition that follows a layer of experts, and leaves the matmul before it
without atomics: sums inside the down projection took longer from 256 tokens on. Where a norm of the sum is read next,
a program does a whole row and writes that too, which leaves out the norm's launch.

Legend: T tokens, K experts per token, E experts, C hidden size, R = T * K routed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention.heuristics import next_power_of_2
from fusecomp.ops.norm import RMS, NormSpec

# More are launched in order: their programs would take the multiprocessors of the matmul they wait for.
MAX_DEPENDENT_TOKENS = 256
MAX_NORMED = 8192  # columns of a row that one program holds


@triton.jit
def combine_kernel(
    parts,  # [R, C] contiguous
    index,  # [R]
    routing_weights,  # [R]
    residual,  # [T, C], last dim contiguous, or None
    out,  # [T, C] contiguous
    norm_weight,  # [C], or None
    normed,  # [T, C] contiguous, or None without a norm
    eps,
    stride_r,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,  # with a norm, at least N
    PLUS_ONE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out[t] = residual[t] + sum over k, in order and in fp32, of routing_weights[t, k] * parts[t * K + k].

    normed = out, as it is stored, * rsqrt(mean of its squares + eps) * norm_weight, or 1 + norm_weight.
    Rows of sentinels were not written and add nothing. Bytes: (R + T or 2T, and T with a norm) * C * itemsize.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = feature < N
    at = parts + token * (K * N) + feature
    if USE_PDL:
        gdc_launch_dependents()
    if norm_weight is not None:
        factor = tl.load(norm_weight + feature, mask=mask, other=0.0).to(tl.float32)
        if PLUS_ONE:
            factor += 1.0
    if USE_PDL:
        gdc_wait()
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(index + token * K + k)
        scale = tl.load(routing_weights + token * K + k).to(tl.float32)
        part = tl.load(at + k * N, mask=mask, other=0.0).to(tl.float32)
        # The part is loaded whether or not it was written, so that it waits for no index.
        total += tl.where((expert >= 0) & (expert < E), part * scale, 0.0)
    if residual is not None:
        total += tl.load(residual + token * stride_r + feature, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + token * N + feature, total, mask=mask)
    if normed is not None:
        tl.static_assert(BLOCKS == 1)
        value = total.to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, 0) / N + eps)
        if norm_weight is not None:
            value *= factor
        tl.store(normed + token * N + feature, value.to(normed.dtype.element_ty), mask=mask)


def combine_block(tokens: int, hidden: int, num_sms: int, normed: bool = False) -> tuple[int, int]:
    """(features of a program, warps): whole rows for a norm, otherwise small programs until they fill the card."""
    if normed:
        block = next_power_of_2(hidden)
        return block, max(1, min(16, block // 256))
    if tokens * triton.cdiv(hidden, 256) <= 16 * num_sms:
        return 256, 1
    return 1024, 4


def norm_refusal(hidden: int, norm: NormSpec, bias: Tensor | None) -> str | None:
    """Why `combine_kernel` does not compute this norm, or None."""
    if norm.kind != RMS or bias is not None:
        return "its norm has a mean or a bias"
    if hidden > MAX_NORMED:
        return f"rows of {hidden} are longer than {MAX_NORMED}"
    return None


def launch_combine(
    parts: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    residual: Tensor | None,
    experts: int,
    num_sms: int,
    use_pdl: bool,
    norm: tuple[NormSpec, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`combine_kernel` on parts [T * K, C] -> (out, its norm or None), both [T, C].

    Args:
        norm: the norm of the sum that is wanted too, which `norm_refusal` must let through, and its weight [C].
    """
    (tokens, top_k), hidden = index.shape, parts.shape[1]
    out = torch.empty((tokens, hidden), dtype=parts.dtype, device=parts.device)
    normed = None if norm is None else torch.empty_like(out)
    spec, norm_weight = norm or (NormSpec(RMS, 0.0), None)
    block_n, num_warps = combine_block(tokens, hidden, num_sms, norm is not None)
    use_pdl = use_pdl and tokens <= MAX_DEPENDENT_TOKENS
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        combine_kernel, (tokens * triton.cdiv(hidden, block_n),),
        parts, index, routing_weights, residual, out, norm_weight, normed, spec.eps,
        0 if residual is None else residual.stride(0),
        E=experts, K=top_k, N=hidden, BLOCK_N=block_n, PLUS_ONE=spec.plus_one, USE_PDL=use_pdl, num_warps=num_warps,
        **options,
    )  # fmt: skip
    return out, normed
