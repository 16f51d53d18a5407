"""Norms whose result is read as digits by experts, and as it is by their router: of rows, or of what a product leaves.

Legend: T tokens, N features, G accumulator groups, S splits of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.large_heuristics import sum_block
from fusecomp.lowerings.linear.norm import parameters, require_norm
from fusecomp.lowerings.linear.pointwise import require_sums
from fusecomp.lowerings.linear.sum_norm import Sums, row_of_sums, store_normed
from fusecomp.lowerings.quant.digit_rows import Digits, digits_kind, empty_digits, store_digits
from fusecomp.ops.norm import LAYER, NormSpec


@triton.jit(do_not_specialize=["num_tokens"])
def norm_digits_kernel(
    x,  # [T, N], last dim contiguous, bf16
    y,  # [T, N], contiguous, bf16; or None without a norm
    codes,  # [T, 2, N]: see `digit_rows.py`
    units,  # [T]
    weight,  # [N] of the norm, or None
    bias,  # [N] of the norm, or None
    eps,
    num_tokens,
    stride_x,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CENTERED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    KIND: tl.constexpr,  # 1 or 2, as in `pieces.py`
    USE_PDL: tl.constexpr,
):
    """y = norm(x), as `norm_kernel` has it, and digits of y as stored; of x without a norm. Program i does row i.

    BLOCK_N holds a row. Bytes: 6 T N, or 4 without a norm.
    """
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    m = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    within = n < N
    given = parameters(weight, bias, n, within)
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + m * stride_x + n, mask=within, other=0.0).to(tl.float32)
    if y is not None:
        stored = store_normed(
            value, given, y, m, n, eps, num_tokens, N, CENTERED, weight is not None, bias is not None, PLUS_ONE
        )
        value = tl.where(within, stored.to(tl.float32), 0.0)
    store_digits(value, codes, units, m, n, m < num_tokens, N, KIND)


@triton.jit(do_not_specialize=["num_tokens"])
def sum_digits_kernel(
    acc,  # [S, T, G * N], contiguous
    total,  # [T, N], contiguous
    y,  # [T, N], contiguous, bf16
    codes,  # [T, 2, N]: see `digit_rows.py`
    units,  # [T]
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
    KIND: tl.constexpr,  # 1 or 2, as in `pieces.py`
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """`sum_norm_kernel`, and digits of y as stored. Bytes: 2 T N more."""
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    m = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    within = n < N
    given = parameters(weight, bias, n, within)
    if USE_PDL:
        # What follows moves in when the matmul has ended, not while it runs: waiting there, it would slow it down.
        gdc_wait()
        gdc_launch_dependents()
    value = row_of_sums(acc, total, args, strides, num_tokens, m, n, N, G, SPLITS, EPILOGUE)
    stored = store_normed(
        value, given, y, m, n, eps, num_tokens, N, CENTERED, weight is not None, bias is not None, PLUS_ONE
    )
    store_digits(tl.where(within, stored.to(tl.float32), 0.0), codes, units, m, n, m < num_tokens, N, KIND)


def launch_norm_digits(
    x: Tensor, norm: NormSpec | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Digits]:
    """(y, digits of y) of bf16 rows x [T, N] with a contiguous last dim, one or more; `fits_a_row(N)`.

    y [T, N] is norm(x), contiguous; x itself without a norm.

    Raises:
        ValueError: weight or bias are not [N] contiguous.
    """
    num_tokens, n = x.shape
    if norm is not None:
        require_norm(norm.kind, n, weight, bias)
    y = x if norm is None else torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    digits = empty_digits(num_tokens, n, x)
    block_n, num_warps = sum_block(num_tokens, n)
    use_pdl = uses_pdl(x)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        norm_digits_kernel, (num_tokens,),
        x, None if norm is None else y, *digits, weight, bias, norm.eps if norm else 0.0, num_tokens, x.stride(0), N=n,
        BLOCK_N=block_n, CENTERED=norm is not None and norm.kind == LAYER, PLUS_ONE=norm is not None and norm.plus_one,
        KIND=digits_kind(x), USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return y, digits


def launch_sum_digits(
    sums: Sums, norm: NormSpec, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Digits]:
    """(total, y, digits of y): the first two are `launch_sum_norm`'s, bit for bit; of one bf16 token or more.

    Raises:
        ValueError: the sums, weight or bias are not as that has them.
    """
    num_tokens, n = sums.shape
    splits = require_sums(sums.acc, num_tokens, n, sums.groups)
    require_norm(norm.kind, n, weight, bias)
    total = torch.empty((num_tokens, n), dtype=sums.dtype, device=sums.acc.device)
    y, digits = torch.empty_like(total), empty_digits(num_tokens, n, total)
    block_n, num_warps = sum_block(num_tokens, n)
    use_pdl = uses_pdl(sums.acc)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        sum_digits_kernel, (num_tokens,),
        sums.acc, total, y, *digits, weight, bias, sums.args, sums.strides, norm.eps, num_tokens, N=n, G=sums.groups,
        SPLITS=splits, BLOCK_N=block_n, CENTERED=norm.kind == LAYER, PLUS_ONE=norm.plus_one, KIND=digits_kind(total),
        EPILOGUE=sums.epilogue, USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return total, y, digits
