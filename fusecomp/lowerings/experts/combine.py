"""The last launch of the experts: each token's parts, weighted and summed, with the residual stream added.

A launch of its own takes the place of the addition that follows a layer of experts, and leaves the matmul before it
without atomics: sums inside the down projection took longer from 256 tokens on.

Legend: T tokens, K experts per token, E experts, C hidden size, R = T * K routed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.paged_attention.heuristics import cdiv

# More are launched in order: their programs would take the multiprocessors of the matmul they wait for.
MAX_DEPENDENT_TOKENS = 256


@triton.jit
def combine_kernel(
    parts,  # [R, C] contiguous
    index,  # [R]
    routing_weights,  # [R]
    residual,  # [T, C], last dim contiguous, or None
    out,  # [T, C] contiguous
    stride_r,
    E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out[t] = residual[t] + sum over k, in order and in fp32, of routing_weights[t, k] * parts[t * K + k].

    Rows of sentinels were not written and add nothing. Bytes: (R + T or 2T) * C * itemsize.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    feature = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = feature < N
    at = parts + token * (K * N) + feature
    if USE_PDL:
        gdc_launch_dependents()
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
    store_rows(out + token * N + feature, total.to(out.dtype.element_ty), mask, tl.num_programs(0) // BLOCKS)


def combine_block(tokens: int, hidden: int, num_sms: int) -> tuple[int, int]:
    """(features of a program, warps): small programs until they fill the card."""
    if tokens * cdiv(hidden, 256) <= 16 * num_sms:
        return 256, 1
    return 1024, 4


def launch_combine(
    parts: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    residual: Tensor | None,
    experts: int,
    num_sms: int,
    use_pdl: bool,
) -> Tensor:
    """`combine_kernel` on parts [T * K, C] -> [T, C]."""
    (tokens, top_k), hidden = index.shape, parts.shape[1]
    out = torch.empty((tokens, hidden), dtype=parts.dtype, device=parts.device)
    block_n, num_warps = combine_block(tokens, hidden, num_sms)
    use_pdl = use_pdl and tokens <= MAX_DEPENDENT_TOKENS
    options = ({"launch_pdl": True} if use_pdl else {}) | rounding_options()
    launch(
        combine_kernel, (tokens * cdiv(hidden, block_n),),
        parts, index, routing_weights, residual, out, 0 if residual is None else residual.stride(0),
        E=experts, K=top_k, N=hidden, BLOCK_N=block_n, USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return out
