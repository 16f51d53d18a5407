"""What `folded_digits_kernel` multiplies: rows, or their norms, as signed bytes in the order of folded codes, and sums.

Legend: T rows, K columns, P columns of a quarter of a folded tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.large_heuristics import sum_block
from fusecomp.lowerings.linear.norm import parameters, scaled
from fusecomp.lowerings.quant.fixed_point import exponent_of, fixed, magnitude, two_bytes, unit_exponent
from fusecomp.lowerings.quant.folded_digits import EXPONENT


class FoldedDigits(NamedTuple):
    """Rows [T, K] of bf16 numbers as (256 * digits[:, 0] + digits[:, 1]) times a power of two for each 2 P columns.

    Attributes:
        digits: [T, 2, K] int8, contiguous. Of 2 P columns the first and second P come in turns.
        sums: [K / 2P, T] int32: for those 2 P columns the sum of the integers, and behind it, in 8 bits, the biased
            exponent of the power of two; zeros and 255 where a number is not finite: zero times infinity.
    """

    digits: Tensor
    sums: Tensor


@triton.jit(do_not_specialize=["num_tokens"])
def folded_digit_rows_kernel(
    x,  # [T, K], last dim contiguous, bf16
    digits,  # [T, 2, K]
    sums,  # [K / 2P, T]
    weight,  # [K] of the norm, or None
    eps,
    num_tokens,
    stride_x,
    K: tl.constexpr,  # a multiple of 2 P
    BLOCK_K: tl.constexpr,
    FOLD: tl.constexpr,  # P
    NORM: tl.constexpr,  # as in `skinny_pieces.py`
    USE_PDL: tl.constexpr,
):
    """`FoldedDigits` of x, or of its RMSNorm as rounded to bf16. Program i does row i, which BLOCK_K holds.

    The largest of 2 P numbers is 2^13 to 2^14: see `fixed_point.py`.
    Bytes: 4 T K and the sums.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    row, within = tl.program_id(0).to(tl.int64), k < K
    given = parameters(weight, None, k, within)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(x + row * stride_x + k, mask=within, other=0.0).to(tl.float32)
    if NORM > 0:
        y *= tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) / K + eps)
        y = scaled(y, given, weight is not None, False, NORM == 3).to(tl.bfloat16).to(tl.float32)
    HALVES: tl.constexpr = BLOCK_K // (2 * FOLD)
    y = tl.reshape(y, [HALVES, 2 * FOLD])
    exponent = exponent_of(tl.max(magnitude(y), 1, keep_dims=True))
    whole = fixed(y, exponent)
    word = tl.sum(whole, 1, keep_dims=True) << EXPONENT | unit_exponent(exponent)
    half = tl.arange(0, HALVES)[:, None]
    tl.store(sums + half * num_tokens + row, word, mask=half < K // (2 * FOLD), eviction_policy=KEEP)
    first, second = two_bytes(whole)
    at = digits + row * (2 * K) + k
    tl.store(at, _in_turns(first.to(tl.int8), FOLD), mask=within, eviction_policy=KEEP)
    tl.store(at + K, _in_turns(second.to(tl.int8), FOLD), mask=within, eviction_policy=KEEP)


@triton.jit
def _in_turns(v, FOLD: tl.constexpr):
    """[1, BK] of [BK / 2P, 2 P]: of 2 P columns the first and the second P in turns."""
    v = tl.permute(tl.reshape(v, [v.shape[0], 2, FOLD]), [0, 2, 1])
    return tl.reshape(v, [1, 2 * FOLD * v.shape[0]])


def launch_folded_digits(x: Tensor, fold: int, norm: int, weight: Tensor | None, eps: float) -> FoldedDigits:
    """Digits of bf16 rows x [T, K] with a contiguous last dim, one or more; K is a multiple of 2 `fold`, `fits_a_row`.

    Args:
        norm: the kernel's NORM; its weight is [K] contiguous, or None.
    """
    num_tokens, k = x.shape
    digits = torch.empty((num_tokens, 2, k), dtype=torch.int8, device=x.device)
    sums = torch.empty((k // (2 * fold), num_tokens), dtype=torch.int32, device=x.device)
    block_k, num_warps = sum_block(num_tokens, k)
    use_pdl = uses_pdl(x)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        folded_digit_rows_kernel, (num_tokens,),
        x, digits, sums, weight, eps, num_tokens, x.stride(0), K=k, BLOCK_K=block_k, FOLD=fold, NORM=norm,
        USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return FoldedDigits(digits, sums)
