"""A router behind its logits in one launch: scores, groups, top-k and weights of each token, in registers.

It may list the rows of each expert on the way, for the kernels of `experts/listed.py`. Lists are one int32 buffer of
E counts of rows, E counts that these kernels use, the largest count of rows if it is more than MOST_FROM, all zero
before, and E lists of `capacity` rows (row r is expert r % K of token r / K), each in any order.

Legend: T tokens, E experts, K chosen per token, G groups of S = E / G experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.lowerings.route.pieces import choose, constants, expert_numbers
from fusecomp.ops.router import RouteSpec

MAX_EXPERTS, MAX_CHOSEN = 2048, 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_FROM = tl.constexpr(8)  # rows of the smallest tile: where no expert has more, nobody asks for the largest count


@triton.jit(do_not_specialize=["capacity"])
def route_kernel(
    logits,  # [T, E], last dim contiguous; or, with SPLITS, [SPLITS, T, E] fp32 parts of them
    added,  # [E], to the logits, or None
    bias,  # [E] or None
    ids,  # [T, K] int64
    weights,  # [T, K]
    lists,  # see above, or None
    stride_row,
    stride_split,
    capacity,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,  # to which sums of parts are rounded
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
    USE_PDL: tl.constexpr,
):
    """One program a token. Bytes: T * (E * itemsize * max(1, SPLITS) + K * (8 + itemsize of weights)), with lists more.

    An atomic addition for each of K places takes less than the launch that would count and sort them.
    """
    row = tl.program_id(0).to(tl.int64)
    e = expert_numbers(E, G, BLOCK_G, BLOCK_S)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = logits + row * stride_row + e
    z = tl.load(at, mask=e < E, other=0.0).to(tl.float32)
    if SPLITS:
        for i in tl.static_range(1, SPLITS):
            z += tl.load(at + i * stride_split, mask=e < E, other=0.0)
        if added is not None:
            z += tl.load(added + e, mask=e < E, other=0.0).to(tl.float32)
        z = z.to(DTYPE).to(tl.float32)
    rank, weight = choose(z, bias, KIND, NORMALISE, GROUP_SCORE, EPS, FLOOR, SCALE, THRESHOLD, E, K, G, CHOSEN)
    e = tl.reshape(e, [1, BLOCK_G * BLOCK_S])
    if lists is not None:
        chosen = rank < K
        place = tl.atomic_add(lists + e, 1, mask=chosen, sem="relaxed")
        tl.store(lists + 2 * E + 1 + e * capacity + place, row.to(tl.int32) * K + rank, mask=chosen)
        most = tl.max(tl.max(tl.where(chosen, place + 1, 0), 1), 0)
        tl.atomic_max(lists + 2 * E, most, mask=most > MOST_FROM, sem="relaxed")
    tl.store(ids + row * K + rank, e.to(tl.int64), mask=rank < K)
    tl.store(weights + row * K + rank, weight, mask=rank < K)


def supports(dtype: torch.dtype, experts: int, spec: RouteSpec) -> str | None:
    """Why the kernels cannot choose among this many experts by logits of this dtype, or None."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of fp32, fp16, bf16"
    if experts > MAX_EXPERTS or spec.k > MAX_CHOSEN:
        return f"top-{spec.k} of {experts} experts is more than {MAX_CHOSEN} of {MAX_EXPERTS}"
    return None


def num_warps(experts: int) -> int:
    """One warp needs no shared memory for its reductions."""
    return 1 if experts <= 512 else 4


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def launch_route(logits: Tensor, bias: Tensor | None, spec: RouteSpec, use_pdl: bool) -> tuple[Tensor, Tensor]:
    """`fusecomp::route` on CUDA; logits [T, E] with a contiguous last dim, bias [E] contiguous."""
    return _launch(logits, 0, logits.dtype, None, bias, spec, None, use_pdl)


def launch_route_parts(
    parts: Tensor,
    dtype: torch.dtype,
    added: Tensor | None,
    bias: Tensor | None,
    spec: RouteSpec,
    lists: Tensor | None,
    use_pdl: bool,
) -> tuple[Tensor, Tensor]:
    """The same on logits that are the sum of parts [splits, T, E] fp32 and of `added` [E], rounded to `dtype`.

    Args:
        lists: of the rows of each expert, to be filled, or None. Counts must be zero when the kernel runs.
    """
    return _launch(parts, len(parts), dtype, added, bias, spec, lists, use_pdl)


def list_capacity(tokens: int, block_t: int) -> int:
    """Rows that there is room for in each list: all tokens', in whole tiles of `block_t`."""
    return cdiv(tokens, block_t) * block_t


def empty_lists(tokens: int, experts: int, block_t: int, device: torch.device) -> Tensor:
    """A buffer of lists, nothing in it written."""
    return torch.empty(experts * (2 + list_capacity(tokens, block_t)) + 1, dtype=torch.int32, device=device)


def _launch(
    logits: Tensor,
    splits: int,
    dtype: torch.dtype,
    added: Tensor | None,
    bias: Tensor | None,
    spec: RouteSpec,
    lists: Tensor | None,
    use_pdl: bool,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape[-2:]
    ids = torch.empty(tokens, spec.k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, spec.k, dtype=getattr(torch, spec.dtype), device=logits.device)
    if tokens:
        options = ({"launch_pdl": True} if use_pdl else {}) | rounding_options()
        capacity = 0 if lists is None else (len(lists) - 1) // experts - 2
        launch(
            route_kernel, (tokens,), logits, added, bias, ids, weights, lists, logits.stride(-2), logits.stride(0),
            capacity, SPLITS=splits, DTYPE=triton_dtype(dtype), **constants(spec, experts), USE_PDL=use_pdl,
            num_warps=num_warps(experts), **options,
        )  # fmt: skip
    return ids, weights
