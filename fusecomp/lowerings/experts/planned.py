"""The choice of a few tokens' experts and the plan of their tiles, in one launch of one program.

It takes the place of `route_kernel` and `routing_kernel`, between the router's matmul and the experts' first: with so
few tokens a launch is mostly waiting for the one before.

Legend: T tokens, K experts per token, E experts, BB tokens padded to a power of two, BT rows of a tile; see `routing.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.experts.routing import HEADER, TILE, tile_capacity
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.paged_attention.heuristics import next_power_of_2
from fusecomp.lowerings.route.kernel import triton_dtype
from fusecomp.lowerings.route.pieces import choose, constants, expert_numbers
from fusecomp.ops.router import RouteSpec

MAX_TOKENS = 16


@triton.jit(do_not_specialize=["num_tokens", "capacity"])
def plan_kernel(
    parts,  # [SPLITS, T, E] fp32, of the logits
    added,  # [E], to the logits, or None
    bias,  # [E] or None
    ids,  # [T, K] int64
    weights,  # [T, K]
    plan,  # int32, see `routing.py`
    num_tokens,
    capacity,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,  # to which logits are rounded
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
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """As `route_kernel` and `routing_kernel`. Bytes: T * E * 4 * SPLITS, by one program."""
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.arange(0, BLOCK_B)
    e = expert_numbers(E, G, BLOCK_G, BLOCK_S)
    at = token[:, None, None] * E + e
    if E // G % 4 == 0 and E % 4 == 0:  # four to a thread: then a token is a warp's, and its choice meets no barrier
        at = tl.max_contiguous(tl.multiple_of(at, [1, 1, 4]), [1, 1, 4])
    at = parts + at
    mask = (token < num_tokens)[:, None, None] & (e < E)
    z = tl.load(at, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLITS):
        z += tl.load(at + i * num_tokens * E, mask=mask, other=0.0)
    if added is not None:
        z += tl.load(added + e, mask=e < E, other=0.0).to(tl.float32)
    z = z.to(DTYPE).to(tl.float32)
    rank, weight = choose(z, bias, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G, CHOSEN)
    # Along the second dimension experts follow each other in order, with gaps where groups are padded.
    expert = tl.reshape(e, [1, BLOCK_G * BLOCK_S])
    row = token[:, None] * K + rank
    hit = (rank < K) & (token < num_tokens)[:, None]
    tl.store(ids + row, expert.to(tl.int64), mask=hit)
    tl.store(weights + row, weight, mask=hit)

    ones = hit.to(tl.int32)
    counts = tl.sum(ones, 0)[None, :]
    tiles = tl.cdiv(counts, BLOCK_T)
    tile = tl.cumsum(tiles, 1) - tiles
    first = tl.cumsum(counts, 1) - counts
    tl.store(plan + tl.arange(0, 1), tl.sum(tiles, 1))
    for i in tl.static_range((BLOCK_B + BLOCK_T - 1) // BLOCK_T):
        at = plan + 4 + 2 * (tile + i)
        tl.store(at, expert, mask=i < tiles)
        tl.store(at + 1, first + i * BLOCK_T, mask=i < tiles)
    slots = plan + 4 + 2 * capacity + tile * BLOCK_T
    tl.store(slots + tl.cumsum(ones, 0) - 1, row, mask=hit)
    padding = counts + tl.arange(0, BLOCK_T)[:, None]
    tl.store(slots + padding, tl.full(padding.shape, -1, tl.int32), mask=padding < tiles * BLOCK_T)


def launch_plan(
    parts: Tensor,
    logits: torch.dtype,
    added: Tensor | None,
    bias: Tensor | None,
    spec: RouteSpec,
    block_t: int,
    use_pdl: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, int]]:
    """(ids, weights, (plan, capacity)) of logits that are the sum of parts [splits, T, E] fp32 and of `added` [E].

    Args:
        logits: to which they are rounded.
        bias: of the choice.
        block_t: rows of a tile.
    """
    splits, tokens, experts = parts.shape
    capacity = tile_capacity(tokens * spec.k, experts, block_t)
    plan = torch.empty(HEADER + (TILE + block_t) * capacity, dtype=torch.int32, device=parts.device)
    ids = torch.empty(tokens, spec.k, dtype=torch.int64, device=parts.device)
    weights = torch.empty(tokens, spec.k, dtype=getattr(torch, spec.dtype), device=parts.device)
    options = ({"launch_pdl": True} if use_pdl else {}) | rounding_options()
    launch(
        plan_kernel, (1,),
        parts, added, bias, ids, weights, plan, tokens, capacity, DTYPE=triton_dtype(logits), USE_PDL=use_pdl,
        **plan_constants(spec, experts, splits, tokens, block_t), num_warps=plan_warps(tokens, experts), **options,
    )  # fmt: skip
    return ids, weights, (plan, capacity)


def plan_constants(spec: RouteSpec, experts: int, splits: int, tokens: int, block_t: int) -> dict[str, object]:
    """The constexpr arguments that follow from shapes."""
    block_b = next_power_of_2(tokens)
    return {**constants(spec, experts), "SPLITS": splits, "BLOCK_B": block_b, "BLOCK_T": block_t}


def plan_warps(tokens: int, experts: int) -> int:
    """One for each token, so that its choice meets no barrier, if each thread then has few experts."""
    return max(4 if experts <= 256 else 8, next_power_of_2(tokens))
