"""The epilogue of `linear` as a kernel of its own, over the result buffer of a matmul.

Legend: T tokens, N output features, G accumulator groups, S splits of K.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.large_heuristics import pointwise_block
from fusecomp.lowerings.paged_attention.heuristics import cdiv


@triton.jit
def _sum_of_splits(acc, num_tokens, m, n, mask, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    value = tl.load(acc + m * WIDTH + n, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(acc + (split * num_tokens + m) * WIDTH + n, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def epilogue_of_sums(
    acc, args, strides, num_tokens, m, n, mask, N: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """EPILOGUE(groups of the sum of acc[S, T, G * N] over S) in fp32, of rows m and columns n."""
    first = _sum_of_splits(acc, num_tokens, m, n, mask, G * N, SPLITS)
    if G == 1:
        return EPILOGUE((first,), args, strides, m, n, mask)
    else:
        second = _sum_of_splits(acc, num_tokens, m, n + N, mask, G * N, SPLITS)
        return EPILOGUE((first, second), args, strides, m, n, mask)


@triton.jit(do_not_specialize=["num_tokens"])
def pointwise_kernel(
    acc,
    out,
    args,
    strides,
    num_tokens,
    stride_o,
    N: tl.constexpr,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out[T, N] = EPILOGUE(groups of the sum of acc[S, T, G * N] over S); acc contiguous, out with a row stride.

    A program does BLOCK_T rows by BLOCK_N columns. Bytes: S G T N of acc, T N of out, and the operands.
    """
    if USE_PDL:
        # What follows moves in when the matmul has ended, not while it runs: waiting there, it would slow it down.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    m = (tl.program_id(0) // BLOCKS_N).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    n = (tl.program_id(0) % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
    mask = (m < num_tokens) & (n < N)
    result = epilogue_of_sums(acc, args, strides, num_tokens, m, n, mask, N, G, SPLITS, EPILOGUE)
    store_rows(out + m * stride_o + n, result.to(out.dtype.element_ty), mask, num_tokens)


def require_sums(acc: Tensor, num_tokens: int, n: int, groups: int) -> int:
    """Splits of acc, which must be [T, G * N] or [S, T, G * N], contiguous.

    Raises:
        ValueError: it is not.
    """
    if not acc.is_contiguous() or acc.shape[-2:] != (num_tokens, groups * n) or acc.dim() > 3:
        raise ValueError(f"epilogue: {list(acc.shape)} {acc.stride()} is no [S, {num_tokens}, {groups} * {n}]")
    return acc.shape[0] if acc.dim() == 3 else 1


def launch_pointwise(
    acc: Tensor, out: Tensor, epilogue: Any, args: tuple[Tensor, ...], strides: tuple[int, ...], groups: int
) -> Tensor:
    """out[T, N] = EPILOGUE of acc [T, G * N] or of the sum over S of acc [S, T, G * N]; acc contiguous.

    Raises:
        ValueError: acc is not contiguous, or its shape does not follow from out's and `groups`.
    """
    num_tokens, n = out.shape
    splits = require_sums(acc, num_tokens, n, groups)
    if num_tokens == 0:
        return out
    block_t, block_n, num_warps = pointwise_block(n)
    use_pdl = uses_pdl(acc)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        pointwise_kernel, (cdiv(n, block_n) * cdiv(num_tokens, block_t),),
        acc, out, args, strides, num_tokens, out.stride(0), N=n, G=groups, SPLITS=splits,
        BLOCK_T=block_t, BLOCK_N=block_n, EPILOGUE=epilogue, USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return out
