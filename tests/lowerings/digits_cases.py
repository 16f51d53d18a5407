"""Digits of rows by torch, and what digits stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.lowerings.quant.digit_rows import Digits


def numbers(digits: Digits) -> Tensor:
    """What digits stand for, in fp64."""
    codes = digits.codes.view(torch.float8_e4m3fn).double()
    return (codes[:, 0] + codes[:, 1] / 16) * digits.units[:, None]


def digits_of(x: Tensor) -> Digits:
    """Of rows that have a number which is not zero."""
    unit = torch.exp2(x.float().abs().amax(1).log2().floor() - 7)
    scaled = x.float() / unit[:, None]
    high = scaled.to(torch.float8_e4m3fn)
    low = ((scaled - high.float()) * 16).to(torch.float8_e4m3fn)
    codes = torch.stack([high.view(torch.uint8), low.view(torch.uint8)], 1)
    return Digits(codes.view(torch.float8_e4m3fn) if x.is_cuda else codes, unit)
