"""Scores, groups, top-k and weights of a router, in registers: what its kernels share.

Legend: B tokens of a tile, E experts, K chosen per token, G groups of S = E / G experts; BG, BS, BK those padded to
powers of two.
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
    z,  # [B, BG, BS] fp32 logits, -inf where there is no expert
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
    BLOCK_K: tl.constexpr,
):
    """(experts, weights) [B, BK] of each token, the first K of them meant.

    Equal scores are taken in the order of experts; experts stay below E whatever the logits are.
    """
    B: tl.constexpr = z.shape[0]
    BLOCK_G: tl.constexpr = z.shape[1]
    e = expert_numbers(E, G, BLOCK_G, z.shape[2])
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
    choice = tl.where(e < E, choice, float("-inf"))
    if G > 1:
        group = tl.arange(0, BLOCK_G)[None, :]
        best = tl.max(choice, 2)
        if GROUP_SCORE == "top2":
            at = tl.min(tl.where(choice == best[:, :, None], e, E), 2)
            best = best + tl.max(tl.where(e == at[:, :, None], float("-inf"), choice), 2)
        best = tl.where(group < G, best, float("-inf"))
        alive = group + tl.zeros([B, 1], tl.int32) < 0
        for _ in tl.static_range(CHOSEN):
            first = tl.min(tl.where(best == tl.max(best, 1)[:, None], group, BLOCK_G), 1)[:, None]
            alive = alive | (group == first)
            best = tl.where(group == first, float("-inf"), best)
        choice = tl.where(alive[:, :, None], choice, float("-inf"))

    k = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros([B, BLOCK_K], tl.int32)
    weight = tl.zeros([B, BLOCK_K], tl.float32)
    for i in tl.static_range(K):
        top = _over_experts(choice, True)
        at = tl.minimum(tl.min(tl.min(tl.where(choice == top, e, E), 2), 1), E - 1)[:, None]  # NaN equals nothing
        if KIND == "sparsemixer":
            hidden = (top - z) / tl.maximum(tl.abs(z), top) > THRESHOLD
            value = 1.0 / _over_experts(tl.where(hidden, 0.0, tl.exp(choice - top)), False)
        elif bias is None:
            value = top
        else:
            value = _over_experts(tl.where(e == at[:, :, None], scores, 0.0), False)
        chosen = tl.where(k == i, at, chosen)
        weight = tl.where(k == i, tl.reshape(value, [B, 1]), weight)
        choice = tl.where(e == at[:, :, None], float("-inf"), choice)
    if NORMALISE == "sum":
        weight = weight / tl.maximum(tl.sum(weight, 1)[:, None] + EPS, FLOOR)
    elif NORMALISE == "softmax":
        weight = tl.where(k < K, weight, float("-inf"))
        weight = tl.exp(weight - tl.max(weight, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    return chosen, weight * SCALE


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
        "BLOCK_K": triton.next_power_of_2(spec.k),
    }
