"""Scores, groups, top-k and weights of a router, in registers: what its kernels share.

Legend: B tokens of a tile, E experts, K chosen per token, G groups of S = E / G experts; BG and BS, G and S padded
to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.ops.router import RouteSpec


@triton.jit
def expert_numbers(E: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):
    """[1, BG, BS] experts, E where there is none."""
    S: tl.constexpr = E // G
    g, s = tl.arange(0, BLOCK_G)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
    return tl.where((g < G) & (s < S), g * S + s, E)


@triton.jit
def choose(
    z,  # [B, BG, BS] fp32 logits
    bias,  # [E] or None
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
):
    """(rank, weight) [B, BG, BS]: an expert's place among those chosen, K if it is not, and what it weighs if it is.

    Equal scores are taken in the order of experts, and so are those that are not numbers, after all that are: K experts
    are chosen whatever the logits are.
    """
    B: tl.constexpr = z.shape[0]
    BLOCK_G: tl.constexpr = z.shape[1]
    e = expert_numbers(E, G, BLOCK_G, z.shape[2])
    z = tl.where(e < E, z, float("-inf"))
    if KIND == "softmax":
        scores = tl.exp(z - _over_experts(z, True))
        scores = scores / _over_experts(scores, False)
    elif KIND == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-z))
    else:
        scores = z
    choice = scores
    if bias is not None:
        choice = choice + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    choice = tl.where((e < E) & (choice == choice), choice, float("-inf"))  # noqa: PLR0124 - false for NaN
    if G > 1:
        group = tl.arange(0, BLOCK_G)[None, :]
        best = tl.max(choice, 2)
        if GROUP_SCORE == "top2":
            at = tl.min(tl.where(choice == best[:, :, None], e, E), 2)
            best = best + tl.max(tl.where(e == at[:, :, None], float("-inf"), choice), 2)
        best = tl.where(group < G, best, float("-inf"))
        alive = group + tl.zeros([B, 1], tl.int32) < 0
        for _ in tl.static_range(CHOSEN):
            top = tl.max(tl.where(alive, float("-inf"), best), 1)[:, None]
            alive = alive | (group == tl.min(tl.where((best == top) & ~alive, group, BLOCK_G), 1)[:, None])
        choice = tl.where(alive[:, :, None], choice, float("-inf"))

    rank = tl.where(e < E, K, K + 1)
    left = choice
    weight = scores
    for i in tl.static_range(K):
        top = _over_experts(left, True)
        this = e == tl.min(tl.min(tl.where((left == top) & (rank == K), e, E), 2), 1)[:, None, None]
        if KIND == "sparsemixer":
            hidden = (top - z) / tl.maximum(tl.abs(z), top) > THRESHOLD
            weight = tl.where(this, 1.0 / _over_experts(tl.where(hidden, 0.0, tl.exp(left - top)), False), weight)
        rank = tl.where(this, i, rank)
        left = tl.where(this, float("-inf"), left)
    if NORMALISE == "sum":
        weight = weight / tl.maximum(_over_experts(tl.where(rank < K, weight, 0.0), False) + EPS, FLOOR)
    elif NORMALISE == "softmax":
        weight = tl.where(rank < K, weight, float("-inf"))
        weight = tl.exp(weight - _over_experts(weight, True))
        weight = weight / _over_experts(weight, False)
    return rank, weight * SCALE


@triton.jit
def _over_experts(x, MAX: tl.constexpr):
    """[B, 1, 1] largest value, or sum, of each token."""
    if MAX:
        return tl.max(tl.max(x, 2), 1)[:, None, None]
    else:
        return tl.sum(tl.sum(x, 2), 1)[:, None, None]


def constants(spec: RouteSpec, experts: int) -> dict[str, object]:
    """The constexpr arguments that say which router it is."""
    return {
        **{"KIND": spec.kind, "NORMALISE": spec.normalise, "GROUP_SCORE": spec.group_score, "EPS": spec.eps},
        **{"FLOOR": spec.floor, "SCALE": spec.scale, "THRESHOLD": spec.threshold, "E": experts, "K": spec.k},
        **{"G": spec.groups, "CHOSEN": spec.groups_chosen},
        "BLOCK_G": triton.next_power_of_2(spec.groups),
        "BLOCK_S": triton.next_power_of_2(experts // spec.groups),
    }
