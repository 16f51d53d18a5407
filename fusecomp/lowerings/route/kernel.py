"""A router behind its logits in one launch: scores, groups, top-k and weights of each token, in registers.

Legend: T tokens, E experts, K chosen per token, G groups of S = E / G experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.route.pieces import choose, constants, expert_numbers
from fusecomp.ops.router import RouteSpec

MAX_EXPERTS, MAX_CHOSEN = 2048, 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def route_kernel(
    logits,  # [T, E], last dim contiguous
    bias,  # [E] or None
    ids,  # [T, K] int64
    weights,  # [T, K]
    stride_row,
    KIND: tl.constexpr,
    NORMALISE: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program a token. Bytes: T * (E * itemsize + K * (8 + itemsize of weights))."""
    row = tl.program_id(0).to(tl.int64)
    e = expert_numbers(E, G, BLOCK_G, BLOCK_S)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    z = tl.load(logits + row * stride_row + e, mask=e < E, other=float("-inf")).to(tl.float32)
    chosen, weight = choose(
        z, bias, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G, CHOSEN, BLOCK_K
    )
    k = tl.arange(0, BLOCK_K)[None, :]
    tl.store(ids + row * K + k, chosen.to(tl.int64), mask=k < K)
    tl.store(weights + row * K + k, weight, mask=k < K)


def supports(logits: Tensor, spec: RouteSpec) -> str | None:
    """Why the kernel cannot route these logits, or None."""
    if logits.dtype not in DTYPES:
        return f"dtype {logits.dtype} is none of fp32, fp16, bf16"
    if logits.shape[1] > MAX_EXPERTS or spec.k > MAX_CHOSEN:
        return f"top-{spec.k} of {logits.shape[1]} experts is more than {MAX_CHOSEN} of {MAX_EXPERTS}"
    return None


def num_warps(experts: int) -> int:
    """One warp needs no shared memory for its reductions."""
    return 1 if experts <= 512 else 4


def launch_route(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """`fusecomp::route` on CUDA; logits [T, E] with a contiguous last dim, bias [E] contiguous."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, spec.k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, spec.k, dtype=getattr(torch, spec.dtype), device=logits.device)
    if tokens:
        use_pdl = uses_pdl(logits)
        options = {"launch_pdl": True} if use_pdl else {}
        launch(
            route_kernel, (tokens,), logits, bias, ids, weights, logits.stride(0),
            **constants(spec, experts), USE_PDL=use_pdl, num_warps=num_warps(experts), **options,
        )  # fmt: skip
    return ids, weights
