"""`linear` whose sums do not depend on the batch: one kernel and one order of sums for any number of tokens.

K is cut into segments, a number fixed by the weight's shape and the GPU. A segment is summed by the matrix units in
steps of BK columns; segments are then added in order, starting from zero. Few tokens: a program a segment, so that a
small weight is read by many, and the last of them to arrive adds up. Many tokens: one program does all segments, in
registers. Both add the same numbers in the same order.

Why the number of tokens may choose the tile's width: features are the M side of the matrix instructions and tokens the
N side. The rows of a weight tile and the warps fix which instruction runs (`wgmma` of 64 rows by 16 columns of K on
Hopper), and an element of its result is a sum over K of its own row and column: other columns have no part in it. That
is how matrix units are documented to work, not a promise; `tests/test_deterministic_gpu.py` tries it on the card.
Products are not contracted with additions (`enable_fp_fusion`), so the epilogue has one rounding too.

Legend: T tokens, N features of the output, K inputs, G groups, BR, BK rows and columns of a weight tile, BT tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides, unit_stride
from fusecomp.lowerings.linear.norm import launch_norm
from fusecomp.lowerings.linear.skinny import split_scratch, split_steps
from fusecomp.lowerings.linear.skinny_heuristics import skinny_config
from fusecomp.lowerings.linear.skinny_pieces import load_weight, weight_rows
from fusecomp.lowerings.linear.skinny_tile import finish_tile, load_tokens, prefetch, tile_place
from fusecomp.lowerings.paged_attention.heuristics import Target, cdiv
from fusecomp.ops.linear import Program

TUNED_FOR = 32  # tokens of the skinny table's entry whose weight tile is taken
BLOCKS_T = (16, 32, 64, 128)
SPLIT_LIMIT = 64  # tokens up to which segments are programs of their own


@dataclass(frozen=True)
class InvariantConfig:
    """What fixes the sums of a weight, for any number of tokens.

    Attributes:
        block_r, block_k: rows and columns of a weight tile.
        segments: parts of K, of `per_segment` tiles each; the last may have fewer.
    """

    block_r: int
    block_k: int
    num_warps: int
    segments: int
    per_segment: int


@triton.jit(do_not_specialize=["num_tokens"])
def invariant_kernel(
    x,  # [T, K], last dim contiguous
    weight,  # [G * N, K] contiguous
    out,  # [T, N], last dim contiguous
    partials,  # [programs, BR, BT] fp32, scratch of SPLIT
    counters,  # [programs / SEGMENTS] int32, zero before and after the launch
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    num_tokens,
    n,
    k,
    stride_x,
    stride_out,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PER_SEGMENT: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out[T, N] = EPILOGUE(x @ weight^T); a program has BN = BR / G features of BT tokens, and with SPLIT one segment.

    dtypes: x and weight one of fp32, fp16, bf16; sums fp32. Bytes: G * N * K * itemsize, times T / BT, plus the inputs
    from the L2 per BN features, plus 8 * SEGMENTS * G * N * BT of partials with SPLIT. FLOPs: 2 * T * G * N * K.
    """
    BLOCK_N: tl.constexpr = BLOCK_R // G
    PARTS: tl.constexpr = SEGMENTS if SPLIT else 1
    t_block, t_blocks, part, block, first, _, _ = tile_place(
        num_tokens, PER_SEGMENT, k, BLOCK_T, BLOCK_N, BLOCK_K, PARTS
    )
    t = (t_block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    live = t < num_tokens
    row_at = weight + weight_rows(first, n, BLOCK_R, G)[:, None] * k
    cols = tl.arange(0, BLOCK_K)
    x_at = x + t * stride_x + cols[:, None]
    if USE_PDL:
        gdc_launch_dependents()
        if BLOCK_K * weight.dtype.element_ty.primitive_bitwidth >= 1024:  # lines of the L2
            prefetch(row_at, part * PER_SEGMENT * BLOCK_K, k, BLOCK_K)
        gdc_wait()
    squares = tl.zeros([8, BLOCK_T], tl.float32)  # `finish_tile` takes those of a norm, of which there is none
    if SPLIT:
        total = _segment(row_at, x_at, cols, live, part, k, BLOCK_R, BLOCK_T, BLOCK_K, PER_SEGMENT, EVEN_K)
    else:
        total = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
        for segment in range(SEGMENTS):
            total += _segment(row_at, x_at, cols, live, segment, k, BLOCK_R, BLOCK_T, BLOCK_K, PER_SEGMENT, EVEN_K)
    finish_tile(
        total, squares, out, args, strides, partials, partials, counters, block, t_block, t_blocks, part, first, t,
        live, n, k, 0.0, stride_out, G, PARTS, False, EPILOGUE,
    )  # fmt: skip


@triton.jit
def _segment(
    row_at,
    x_at,
    cols,
    live,
    segment,
    k,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SEGMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """[BR, BT] products of one segment of K."""
    acc = tl.zeros([BLOCK_R, BLOCK_T], tl.float32)
    lo = segment * PER_SEGMENT
    for tile in range(lo, tl.minimum(lo + PER_SEGMENT, tl.cdiv(k, BLOCK_K))):
        start = tile * BLOCK_K
        w = load_weight(row_at + cols[None, :] + start, (start + cols < k)[None, :], EVEN_K)
        v = load_tokens(x_at + start, start + cols[:, None], live, k, EVEN_K)
        acc = tl.dot(w, v, acc, input_precision="ieee")
    return acc


@cache
def invariant_config(target: Target, *, n: int, k: int, groups: int, itemsize: int) -> InvariantConfig:
    """The weight tile and the segments of one weight: those that serve `TUNED_FOR` tokens well."""
    tuned = skinny_config(target, n=n, k=k, groups=groups, tokens=TUNED_FOR, itemsize=itemsize)
    block_k = min(tuned.block_k, 128)
    per_segment, segments = split_steps(cdiv(k, block_k), tuned.splits)
    return InvariantConfig(tuned.block_r, block_k, tuned.num_warps, segments, per_segment)


@cache
def token_tile(target: Target, config: InvariantConfig, tokens: int, itemsize: int) -> tuple[int, int, int]:
    """(tokens of a tile, warps, stages of the pipeline) for this many tokens, within registers and shared memory.

    Nothing that a sum depends on: warps beyond the configuration's take other tokens.
    """
    widest = BLOCKS_T[-1] if itemsize == 2 else 32  # fp32 products hold their operands in registers
    block_t = next((b for b in BLOCKS_T if b >= min(tokens, widest)), widest)

    def fits(block: int, stages: int) -> bool:
        return stages * (config.block_r + block) * config.block_k * itemsize <= target.smem_bytes - 1024

    most = 2 if target.backend == "hip" else 4
    for block in (b for b in reversed(BLOCKS_T) if b <= block_t):
        for stages in range(most, 1, -1):
            if fits(block, stages):
                return block, max(config.num_warps, 8) if block > 64 else config.num_warps, stages
    return BLOCKS_T[0], config.num_warps, 1


def launch_invariant_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
) -> Tensor:
    """epilogue(norm(x)[T, K] @ weight[G * N, K]^T): [T, N] contiguous; arguments as `launch_linear`'s.

    A row's result depends on that row alone, bit for bit. Safe under CUDA-graph capture.
    """
    x = unit_stride(x)
    if (norm := program.norm) is not None:
        x = launch_norm(x, norm_weight, norm_bias, norm.eps, norm.kind, norm.plus_one)
    n = weight.shape[0] // program.groups
    config = invariant_config(target_of(x), n=n, k=x.shape[1], groups=program.groups, itemsize=x.element_size())
    args = full_rows(operands, program)
    out = torch.empty((x.shape[0], n), dtype=program.torch_dtype, device=x.device)
    run_invariant(
        config, x, weight, out, epilogue_hook(program), args, operand_strides(program, args), program.groups,
        uses_pdl(x),
    )  # fmt: skip
    return out


def run_invariant(
    config: InvariantConfig,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Any,
    args: Sequence[Tensor],
    strides: Sequence[int],
    groups: int,
    use_pdl: bool,
) -> None:
    """out[T, N] = epilogue(x[T, K] @ weight[G * N, K]^T), launched as `config` and the number of tokens say."""
    (tokens, k), n = x.shape, out.shape[1]
    if tokens == 0:
        return
    block_t, num_warps, num_stages = token_tile(target_of(x), config, tokens, x.element_size())
    split = config.segments > 1 and tokens <= SPLIT_LIMIT
    teams = cdiv(n, config.block_r // groups) * cdiv(tokens, block_t)
    parts = config.segments if split else 1
    partials, _, counters = split_scratch(x, teams, parts, config.block_r, block_t)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        invariant_kernel, (teams * parts,),
        x, weight, out, partials, counters, tuple(args), tuple(strides), tokens, n, k, x.stride(0), out.stride(0),
        G=groups, BLOCK_T=block_t, BLOCK_R=config.block_r, BLOCK_K=config.block_k, SEGMENTS=config.segments,
        PER_SEGMENT=config.per_segment, SPLIT=split, EVEN_K=k % config.block_k == 0, EPILOGUE=epilogue,
        USE_PDL=use_pdl, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **options,
    )  # fmt: skip
