"""What a product leaves to another kernel, and the norm that the next product begins with, in one launch.

The sum over splits of K, the epilogue (in most models the residual), and the norm of the result.

Legend: T tokens, N features, G accumulator groups, S splits of K.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.large_heuristics import MAX_BLOCK_K, sum_block
from fusecomp.lowerings.linear.norm import parameters, require_norm, scaled
from fusecomp.lowerings.linear.pointwise import epilogue_of_sums, require_sums
from fusecomp.ops.norm import LAYER, NormSpec


class Sums(NamedTuple):
    """A product [T, G * N] of which the epilogue is still to be computed.

    Attributes:
        acc: [T, G * N], or fp32 parts of it [S, T, G * N]; contiguous.
        dtype: of the result.
        epilogue: a Triton function (accs, args, strides, m, n, mask) -> fp32 tile.
        args, strides: its operands and their row strides in elements.
        groups: G.
    """

    acc: Tensor
    dtype: torch.dtype
    epilogue: Any
    args: tuple[Tensor, ...]
    strides: tuple[int, ...]
    groups: int

    @property
    def shape(self) -> tuple[int, int]:
        """(T, N)."""
        return self.acc.shape[-2], self.acc.shape[-1] // self.groups


@triton.jit
def row_of_sums(
    acc, total, args, strides, num_tokens, m, n, N: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Row m of EPILOGUE(groups of the sum of acc[S, T, G * N] over S), stored in total[T, N]: as stored, in fp32."""
    within = n < N
    stored = epilogue_of_sums(acc, args, strides, num_tokens, m, n, within, N, G, SPLITS, EPILOGUE)
    stored = stored.to(total.dtype.element_ty)
    store_rows(total + m * N + n, stored, within, num_tokens)
    return tl.where(within, stored.to(tl.float32), 0.0)


@triton.jit
def store_normed(
    value, given, y, m, n, eps, num_tokens, N: tl.constexpr, CENTERED: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Row m of y[T, N], the norm of a row `value` [1, B] that is zero behind its end; as stored."""
    within = n < N
    if CENTERED:
        value = tl.where(within, value - tl.sum(value, 1)[:, None] / N, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 1)[:, None] / N + eps)
    stored = scaled(value, given, WEIGHT, BIAS, PLUS_ONE).to(y.dtype.element_ty)
    store_rows(y + m * N + n, stored, within, num_tokens)
    return stored


@triton.jit(do_not_specialize=["num_tokens"])
def sum_norm_kernel(
    acc,  # [S, T, G * N], contiguous
    total,  # [T, N], contiguous
    y,  # [T, N], contiguous, of total's dtype
    weight,  # [N] of the norm, or None
    bias,  # [N] of the norm, or None
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    eps,
    num_tokens,
    N: tl.constexpr,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CENTERED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """total = EPILOGUE(sums over S of acc's groups) and y = norm(total) * weight + bias; program i does row i.

    BLOCK_N holds a row. The norm is that of total as stored; statistics in fp32. CENTERED subtracts the mean
    (LayerNorm); PLUS_ONE scales by 1 + weight.
    Bytes: S G T N of acc, 2 T N, and the operands.
    """
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    m = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    within = n < N
    given = parameters(weight, bias, n, within)
    if USE_PDL:
        # What follows moves in when the matmul has ended, not while it runs: waiting there, it would slow it down.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = row_of_sums(acc, total, args, strides, num_tokens, m, n, N, G, SPLITS, EPILOGUE)
    store_normed(value, given, y, m, n, eps, num_tokens, N, CENTERED, weight is not None, bias is not None, PLUS_ONE)


def fits_a_row(n: int) -> bool:
    """Whether a program holds a row of so many features."""
    return n <= MAX_BLOCK_K


def launch_sum_norm(sums: Sums, norm: NormSpec, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(total, norm(total)), [T, N] contiguous in the sums' dtype: total is their epilogue; `fits_a_row(N)`.

    Args:
        weight, bias: the norm's, [N] contiguous, or None.

    Raises:
        ValueError: the sums, weight or bias are not as above.
    """
    num_tokens, n = sums.shape
    splits = require_sums(sums.acc, num_tokens, n, sums.groups)
    require_norm(norm.kind, n, weight, bias)
    total = torch.empty((num_tokens, n), dtype=sums.dtype, device=sums.acc.device)
    y = torch.empty_like(total)
    if num_tokens == 0:
        return total, y
    block_n, num_warps = sum_block(num_tokens, n)
    use_pdl = uses_pdl(sums.acc)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        sum_norm_kernel, (num_tokens,),
        sums.acc, total, y, weight, bias, sums.args, sums.strides, norm.eps, num_tokens, N=n, G=sums.groups,
        SPLITS=splits, BLOCK_N=block_n, CENTERED=norm.kind == LAYER, PLUS_ONE=norm.plus_one, EPILOGUE=sums.epilogue,
        USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return total, y
