"""Rows of bf16 numbers as two fp8 digits each, made once for all programs that multiply them by fp8 codes.

The kernel of `digits.py` makes them of its own inputs, for a step's columns.

Legend: T rows, N columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.quant import pieces
from fusecomp.lowerings.quant.digits import digits_along
from fusecomp.lowerings.quant.kinds import code_kind
from fusecomp.ops.quant import FP8


class Digits(NamedTuple):
    """Rows [T, N] of bf16 numbers as (codes[:, 0] + codes[:, 1] / 16) * units, a power of two for each.

    Attributes:
        codes: [T, 2, N] e4m3fn, or their bytes under the interpreter; contiguous.
        units: [T] fp32; NaN for a row with a number that is not finite.
    """

    codes: Tensor
    units: Tensor


def empty_digits(rows: int, columns: int, like: Tensor) -> Digits:
    """Of rows [T, N] on the device of a tensor, nothing in it written."""
    dtype = torch.uint8 if digits_kind(like) == pieces.FP8 else torch.float8_e4m3fn
    return Digits(
        torch.empty((rows, 2, columns), dtype=dtype, device=like.device),
        torch.empty(rows, dtype=torch.float32, device=like.device),
    )


def digits_kind(tensor: Tensor) -> int:
    """KIND of digits on a tensor's device."""
    return code_kind(FP8, 8, target_of(tensor)) if tensor.is_cuda else pieces.FP8


@triton.jit
def store_digits(y, codes, units, row, n, live, N: tl.constexpr, KIND: tl.constexpr):
    """Digits of rows y [B, C] of fp32 that hold bf16 numbers, zero behind N and where not live, which are not stored.

    Args:
        codes, units: of `Digits`.
        row: [B, 1] of them, int64.
        n: [1, C], from 0 on.
        live: [B, 1].
    """
    high, low, unit = digits_along(y, 1, KIND)
    at, within = codes + row * (2 * N) + n, live & (n < N)
    tl.store(at, high.to(codes.dtype.element_ty, bitcast=True), mask=within, eviction_policy=KEEP)
    tl.store(at + N, low.to(codes.dtype.element_ty, bitcast=True), mask=within, eviction_policy=KEEP)
    tl.store(units + row, unit, mask=live, eviction_policy=KEEP)
