"""A router in one launch: scores, groups, top-k and weights of each token, in registers.

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
    """One program a token. Equal scores are taken in the order of experts; ids stay below E whatever the logits are.

    Bytes: T * (E * itemsize + K * (8 + itemsize of weights)).
    """
    S: tl.constexpr = E // G
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    g, s = group[:, None], tl.arange(0, BLOCK_S)[None, :]
    inside = (g < G) & (s < S)
    e = tl.where(inside, g * S + s, E)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    z = tl.load(logits + row * stride_row + e, mask=inside, other=float("-inf")).to(tl.float32)

    if KIND == "softmax":
        scores = tl.exp(z - tl.max(tl.max(z, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    elif KIND == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-z))
    else:
        scores = z
    choice = scores
    if bias is not None:
        choice = choice + tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(inside, choice, float("-inf"))
    if G > 1:
        best = tl.max(choice, 1)
        if GROUP_SCORE == "top2":
            at = tl.min(tl.where(choice == best[:, None], e, E), 1)
            best = best + tl.max(tl.where(e == at[:, None], float("-inf"), choice), 1)
        best = tl.where(group < G, best, float("-inf"))
        alive = group < 0
        for _ in tl.static_range(CHOSEN):
            first = tl.min(tl.where(best == tl.max(best, 0), group, BLOCK_G), 0)
            alive = alive | (group == first)
            best = tl.where(group == first, float("-inf"), best)
        choice = tl.where(alive[:, None], choice, float("-inf"))

    k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(K):
        top = tl.max(tl.max(choice, 1), 0)
        at = tl.minimum(tl.min(tl.min(tl.where(choice == top, e, E), 1), 0), E - 1)  # NaN equals nothing
        if KIND == "sparsemixer":
            hidden = (top - z) / tl.maximum(tl.abs(z), top) > THRESHOLD
            value = 1.0 / tl.sum(tl.sum(tl.where(hidden, 0.0, tl.exp(choice - top)), 1), 0)
        else:
            value = tl.sum(tl.sum(tl.where(e == at, scores, 0.0), 1), 0)
        chosen = tl.where(k == i, at, chosen)
        weight = tl.where(k == i, value, weight)
        choice = tl.where(e == at, float("-inf"), choice)
    if NORMALISE == "sum":
        weight = weight / tl.maximum(tl.sum(weight, 0) + EPS, FLOOR)
    elif NORMALISE == "softmax":
        weight = tl.where(k < K, weight, float("-inf"))
        weight = tl.exp(weight - tl.max(weight, 0))
        weight = weight / tl.sum(weight, 0)
    tl.store(ids + row * K + k, chosen.to(tl.int64), mask=k < K)
    tl.store(weights + row * K + k, weight * SCALE, mask=k < K)


def supports(logits: Tensor, spec: RouteSpec) -> str | None:
    """Why the kernel cannot route these logits, or None."""
    if logits.dtype not in DTYPES:
        return f"dtype {logits.dtype} is none of fp32, fp16, bf16"
    if logits.shape[1] > MAX_EXPERTS or spec.k > MAX_CHOSEN:
        return f"top-{spec.k} of {logits.shape[1]} experts is more than {MAX_CHOSEN} of {MAX_EXPERTS}"
    return None


def constants(spec: RouteSpec, experts: int) -> dict[str, object]:
    """The kernel's constexpr arguments, but for programmatic launch."""
    return {
        **{"KIND": spec.kind, "NORMALISE": spec.normalise, "GROUP_SCORE": spec.group_score, "EPS": spec.eps},
        **{"FLOOR": spec.floor, "SCALE": spec.scale, "THRESHOLD": spec.threshold, "E": experts, "K": spec.k},
        **{"G": spec.groups, "CHOSEN": spec.groups_chosen},
        "BLOCK_G": triton.next_power_of_2(spec.groups),
        "BLOCK_S": triton.next_power_of_2(experts // spec.groups),
        "BLOCK_K": triton.next_power_of_2(spec.k),
    }


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
