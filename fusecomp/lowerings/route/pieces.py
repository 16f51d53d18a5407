"""Scores, groups, top-k and weights of a router, in registers: what its kernels share.

Legend: B tokens of a tile, E experts, K chosen per token, G groups of S = E / G experts; BG and BS, G and S padded
to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.paged_attention.heuristics import next_power_of_2
from fusecomp.ops.router import RouteSpec

LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
TAKEN: tl.constexpr = tl.constexpr(-(2**31))  # below the key of every number


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
    """(rank, weight) [B, BG * BS]: an expert's place among those chosen, K if it is not, and what it weighs if it is.

    Equal scores are taken in the order of experts, and so are those that are not numbers, after all that are: K experts
    are chosen whatever the logits are.
    """
    B: tl.constexpr = z.shape[0]
    WIDTH: tl.constexpr = z.shape[1] * z.shape[2]
    z, scores, left = _candidates(z, bias, KIND, GROUP_SCORE, E, G, CHOSEN)
    lane = tl.arange(0, WIDTH)[None, :]
    weight = scores
    rank = tl.full([B, WIDTH], K, tl.int32)
    key = _key(left)
    for i in tl.static_range(K):
        top = tl.max(key, 1)[:, None]
        this = lane == _first_largest(key, lane)
        if KIND == "sparsemixer":
            largest = _ordered(top).to(tl.float32, bitcast=True)
            hidden = (largest - z) / tl.maximum(tl.abs(z), largest) > THRESHOLD
            others = tl.where(hidden | (rank < K), 0.0, tl.exp(left - largest))
            gate = 1.0 / tl.sum(others, 1)[:, None]
            weight = tl.where(this, gate, weight)
        rank = tl.where(this, i, rank)
        key = tl.where(this, TAKEN, key)
    if NORMALISE == "sum":
        weight = weight / tl.maximum(tl.sum(tl.where(rank < K, weight, 0.0), 1)[:, None] + EPS, FLOOR)
    elif NORMALISE == "softmax":
        weight = tl.where(rank < K, weight, float("-inf"))
        weight = tl.exp(weight - tl.max(weight, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    return rank, weight * SCALE


@triton.jit
def chosen_expert(
    z, bias, place, KIND: tl.constexpr, GROUP_SCORE: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
    CHOSEN: tl.constexpr,
):  # fmt: skip
    """[B, 1] the expert whose rank, as `choose` has it, is `place`: as many steps, and no weights."""
    S: tl.constexpr = E // G
    BLOCK_S: tl.constexpr = z.shape[2]
    WIDTH: tl.constexpr = z.shape[1] * z.shape[2]
    _, _, left = _candidates(z, bias, KIND, GROUP_SCORE, E, G, CHOSEN)
    lane, key = tl.arange(0, WIDTH)[None, :], _key(left)
    this = _first_largest(key, lane)
    for _ in range(place):
        key = tl.where(lane == this, TAKEN, key)
        this = _first_largest(key, lane)
    return this // BLOCK_S * S + this % BLOCK_S


@triton.jit
def _candidates(
    z, bias, KIND: tl.constexpr, GROUP_SCORE: tl.constexpr, E: tl.constexpr, G: tl.constexpr, CHOSEN: tl.constexpr
):
    """(logits, scores, what experts are chosen by: -inf where one may not be), [B, BG * BS] each."""
    B: tl.constexpr = z.shape[0]
    BLOCK_G: tl.constexpr = z.shape[1]
    WIDTH: tl.constexpr = z.shape[1] * z.shape[2]
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
    allowed = e < E
    choice = tl.where(allowed & (choice > float("-inf")), choice, float("-inf"))  # not for NaN
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
        allowed = allowed & alive[:, :, None]
        choice = tl.where(allowed, choice, float("-inf"))

    # Numbers stay above what is no number but a candidate, and candidates above all else.
    left = tl.reshape(tl.where(choice > LOWEST, choice, tl.where(allowed, LOWEST, float("-inf"))), [B, WIDTH])
    return tl.reshape(z, [B, WIDTH]), tl.reshape(scores, [B, WIDTH]), left


@triton.jit
def _key(left):
    """int32 in the order of what experts are chosen by."""
    return _ordered(tl.where(left == 0, 0.0, left).to(tl.int32, bitcast=True))


@triton.jit
def _first_largest(key, lane):
    """[B, 1] the first lane that has a row's largest key."""
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], lane, key.shape[1]), 1)[:, None]


@triton.jit
def _ordered(bits):
    """Bits of fp32 as int32 of the same order, and back: the largest of a warp's integers is one instruction."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
        "BLOCK_G": next_power_of_2(spec.groups),
        "BLOCK_S": next_power_of_2(experts // spec.groups),
    }
