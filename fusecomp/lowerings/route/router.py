"""The matmul of a router for few tokens, with the norm in front of it: parts of the logits, which `route_kernel` sums.

Programs take a part of the hidden size each, so that a small weight is read by many. The normalised rows, which the
experts read, are written on the way.

Legend: T tokens, C hidden size, E experts, BT and BD tokens and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention.heuristics import cdiv, next_power_of_2
from fusecomp.lowerings.route.kernel import launch_route_parts
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.router import RouteSpec

BLOCK_T = 16  # the least that the matrix units take
NUM_STAGES = 2
NORM_BLOCK = 256  # columns of the rows that are squared at once
# One token, and many, are better served by the kernels of `linear`: on an H200 a router of 128 x 2048 took 4.1 us by
# them at one token and 4.6 by this one, but 6.0 and 5.0 at 8, 8.2 and 5.8 at 64.
MAX_TOKENS, MAX_EXPERTS, MAX_COLUMNS = 512, 512, 16384


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    x,  # [T, C], last dim contiguous
    weight,  # [E, C] contiguous
    norm_weight,  # [C] or None
    y,  # [T, C] contiguous, or None without a norm
    parts,  # [splits, T, E] fp32
    lists,  # of `kernel.py`, or None
    eps,
    num_tokens,
    stride_x,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """parts[s] = norm(x) @ weight^T over the columns of split s. Every program norms its rows whole.

    Counts of lists are set to zero, once the launches before this one are over: one may use the same memory.

    Bytes: the weight once, x from the L2 for every split, T * C written with a norm. FLOPs: 2 * T * C * E.
    """
    STEPS: tl.constexpr = (D + SPLITS * BLOCK_D - 1) // (SPLITS * BLOCK_D)
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (token < num_tokens)[:, None]
    x_rows = x + token.to(tl.int64)[:, None] * stride_x
    w_rows = weight + tl.minimum(tl.arange(0, BLOCK_E), E - 1)[:, None] * D
    cols = split * STEPS * BLOCK_D + tl.arange(0, BLOCK_D)
    if USE_PDL:
        gdc_launch_dependents()
    w = tl.load(w_rows + cols[None, :], mask=(cols < D)[None, :], other=0.0)
    if USE_PDL:
        gdc_wait()
    if lists is not None:
        count = tl.arange(0, 2 * BLOCK_E)
        tl.store(lists + count, tl.zeros([2 * BLOCK_E], tl.int32), mask=(count < 2 * E) & (tl.program_id(0) == 0))
        tl.store(lists + 2 * E, 0, mask=tl.program_id(0) == 0)
    if NORM:
        squares = tl.zeros([BLOCK_T, NORM_BLOCK], tl.float32)
        for start in tl.static_range(0, D, NORM_BLOCK):
            c = (start + tl.arange(0, NORM_BLOCK))[None, :]
            v = tl.load(x_rows + c, mask=live & (c < D), other=0.0).to(tl.float32)
            squares += v * v
        rstd = tl.rsqrt(tl.sum(squares, 1) / D + eps)
    else:
        rstd = tl.zeros([BLOCK_T], tl.float32)
    y_rows = None if y is None else y + token.to(tl.int64)[:, None] * D
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    v = _normalised(x_rows, y_rows, norm_weight, rstd, live, cols, NORM, PLUS_ONE, D)
    acc = tl.dot(v, w.T, acc, input_precision="ieee")
    for _ in range(1, STEPS):
        cols += BLOCK_D
        w = tl.load(w_rows + cols[None, :], mask=(cols < D)[None, :], other=0.0)
        v = _normalised(x_rows, y_rows, norm_weight, rstd, live, cols, NORM, PLUS_ONE, D)
        acc = tl.dot(v, w.T, acc, input_precision="ieee")
    column = tl.arange(0, BLOCK_E)[None, :]
    tl.store(
        parts + (split * num_tokens + token)[:, None] * E + column, acc, mask=live & (column < E), eviction_policy=KEEP
    )


@triton.jit
def _normalised(
    x_rows, y_rows, norm_weight, rstd, live, cols, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, D: tl.constexpr
):
    """[BT, BD] of the rows that are multiplied; with a norm, also written to y."""
    inside = live & (cols < D)[None, :]
    v = tl.load(x_rows + cols[None, :], mask=inside, other=0.0)
    if NORM:
        normed = v.to(tl.float32) * rstd[:, None]
        if norm_weight is not None:
            scale = tl.load(norm_weight + cols, mask=cols < D, other=0.0).to(tl.float32)
            normed *= (scale + 1.0 if PLUS_ONE else scale)[None, :]
        v = normed.to(v.dtype)
        tl.store(y_rows + cols[None, :], v, mask=inside, eviction_policy=KEEP)
    return v


@dataclass(frozen=True)
class RouterConfig:
    """How `router_kernel` runs.

    Attributes:
        splits: parts of the hidden size.
        block_d: columns of a tile.
    """

    splits: int
    block_d: int
    num_warps: int


def router_config(tokens: int, experts: int, hidden: int, itemsize: int, num_sms: int) -> RouterConfig:
    """About a program for each multiprocessor, and tiles of at most 32 KiB."""
    tiles, lanes = cdiv(tokens, BLOCK_T), max(16, next_power_of_2(experts))
    block_d = max(32, min(128, 32768 // (lanes * itemsize)))
    splits = max(1, min(16, cdiv(hidden, block_d), num_sms // tiles))
    return RouterConfig(splits, block_d, 4 if itemsize == 2 else 8)


def supports_router(tokens: int, weight: Tensor, norm: NormSpec | None, norm_bias: Tensor | None) -> str | None:
    """Why `router_kernel` does not serve this router, or None."""
    experts, hidden = weight.shape
    if not 1 < tokens <= MAX_TOKENS:
        return f"{tokens} tokens are not 2 to {MAX_TOKENS}"
    if experts > MAX_EXPERTS or hidden > MAX_COLUMNS:
        return f"a router {experts} x {hidden} is larger than {MAX_EXPERTS} x {MAX_COLUMNS}"
    if norm is not None and (norm.kind != "rms" or norm_bias is not None):
        return "its norm has a mean or a bias"
    return None


def launch_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    route_bias: Tensor | None,
    norm: NormSpec | None,
    logits: torch.dtype,
    spec: RouteSpec,
    use_pdl: bool,
    lists: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, ids, weights) of x [T, C]; `supports_router` must hold. y is norm(x) [T, C], or empty without a norm.

    Args:
        lists: from `kernel.empty_lists`, to be filled, or None.
    """
    (tokens, hidden), experts = x.shape, len(weight)
    config = router_config(tokens, experts, hidden, x.element_size(), target_of(x).num_sms)
    y = torch.empty((tokens, hidden) if norm else (0,), dtype=x.dtype, device=x.device)
    parts = torch.empty((config.splits, tokens, experts), dtype=torch.float32, device=x.device)
    options = {"launch_pdl": True} if use_pdl else {}
    if tokens:
        launch(
            router_kernel, (cdiv(tokens, BLOCK_T) * config.splits,),
            x, weight, norm_weight, y if norm else None, parts, lists, norm.eps if norm else 0.0, tokens, x.stride(0),
            **router_constants(config, experts, hidden), NORM=norm is not None,
            PLUS_ONE=norm is not None and norm.plus_one, USE_PDL=use_pdl, num_warps=config.num_warps,
            num_stages=NUM_STAGES, **options,
        )  # fmt: skip
    return y, *launch_route_parts(parts, logits, bias, route_bias, spec, lists, use_pdl)


def router_constants(config: RouterConfig, experts: int, hidden: int) -> dict[str, int]:
    """The constexpr arguments that say how it runs."""
    return {
        "E": experts, "D": hidden, "BLOCK_T": BLOCK_T, "BLOCK_E": max(16, next_power_of_2(experts)),
        "BLOCK_D": config.block_d, "NORM_BLOCK": min(NORM_BLOCK, next_power_of_2(hidden)), "SPLITS": config.splits,
    }  # fmt: skip
