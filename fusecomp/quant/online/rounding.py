"""Weights -> codes: fp8 and int8 with a scale a row, int4 with a scale a group of columns.

Legend: N rows, K columns, G groups of columns, C columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.ops.quant import INT, INT4_OFFSET, WeightSpec
from fusecomp.quant.codes import Codes, pack, zero_points
from fusecomp.quant.online.schemes import Scheme, scale_dtype

LARGEST_INT8, LARGEST_FP8, TOP_INT4 = 127.0, 448.0, 15
# A symmetric code of 4 bits spans -8..7: the largest magnitude lies half a code beyond the smaller end.
HALF_INT4 = 7.5
# Weights in fp32 at a time: experts are rounded some at a time.
MOST_ELEMENTS = 64 << 20


def make_codes(
    weight: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    symmetric: bool = True,
    clip: Tensor | None = None,
    prepare: Callable[[Tensor, slice], Tensor] | None = None,
) -> Codes:
    """Codes of a weight [..., N, K], at most three dims.

    Args:
        dtype: of the model, which the codes dequantize to.
        symmetric: of int4: without zero points.
        clip: of int4: [..., N, G], the share of each group's range that codes span; None for all of it.
        prepare: called with some of the weight's experts in fp32 and which they are; gives what is rounded.
    """
    n, k = weight.shape[-2:]
    step = max(1, MOST_ELEMENTS // (n * k)) if weight.dim() == 3 else 1
    parts = []
    for start in range(0, weight.shape[0] if weight.dim() == 3 else 1, step):
        here = slice(start, start + step)
        values = (weight[here] if weight.dim() == 3 else weight).to(torch.float32)
        values = values if prepare is None else prepare(values, here)
        share = clip if clip is None or weight.dim() == 2 else clip[here]
        parts.append(_round(values, scheme, scale_dtype(dtype, scheme.grouped), symmetric, share))
    q, scale, zero = (None if part[0] is None else _joined(part) for part in zip(*parts, strict=True))
    assert q is not None and scale is not None
    cols = scheme.group(k)
    assert cols is not None
    if zero is not None:
        zero = zero_points(zero, 4, cols, scale.dtype)
    spec = WeightSpec(scheme.kind, scheme.bits, 1, cols, str(dtype).removeprefix("torch."))
    return Codes(q, scale, zero, spec)


def round_trip(
    weight: Tensor, scheme: Scheme, dtype: torch.dtype, symmetric: bool, clip: Tensor | None = None
) -> Tensor:
    """What the codes of a weight [..., N, K] fp32 stand for, in fp32 and without making codes."""
    if not scheme.grouped:
        values, scale, _ = _scaled_rows(weight, scheme, scale_dtype(dtype, False))
        return (values.to(torch.float32)) * scale
    cols = scheme.group(weight.shape[-1])
    assert cols is not None
    codes, scale, zero = _scaled_groups(weight.unflatten(-1, (-1, cols)), symmetric, scale_dtype(dtype, True), clip)
    return ((codes - zero) * scale).flatten(-2)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _round(
    values: Tensor, scheme: Scheme, stored: torch.dtype, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not scheme.grouped:
        codes, scale, _ = _scaled_rows(values, scheme, stored)
        return codes.to(torch.int8 if scheme.kind == INT else torch.float8_e4m3fn), scale.to(stored), None
    cols = scheme.group(values.shape[-1])
    assert cols is not None
    codes, scale, zero = _scaled_groups(values.unflatten(-1, (-1, cols)), symmetric, stored, clip)
    q = pack(codes.to(torch.uint8).flatten(-2))
    return q, scale.squeeze(-1).to(stored), None if symmetric else zero.squeeze(-1)


def _stored(scale: Tensor, stored: torch.dtype) -> Tensor:
    """A scale as it will be read: rounding it before codes are made costs no accuracy. Never 0."""
    return scale.to(stored).to(torch.float32).clamp(min=torch.finfo(stored).tiny)


def _scaled_rows(values: Tensor, scheme: Scheme, stored: torch.dtype) -> tuple[Tensor, Tensor, None]:
    """Codes [..., N, K] and scale [..., N, 1]; integers are fp32 here."""
    largest = LARGEST_INT8 if scheme.kind == INT else LARGEST_FP8
    scale = _stored(values.abs().amax(-1, keepdim=True) / largest, stored)
    codes = (values / scale).clamp(-largest, largest)
    return codes.round() if scheme.kind == INT else codes.to(torch.float8_e4m3fn), scale, None


def _scaled_groups(
    values: Tensor, symmetric: bool, stored: torch.dtype, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 [..., N, G, C], scale and zero [..., N, G, 1] of values of that shape, all fp32."""
    share = 1.0 if clip is None else clip.unsqueeze(-1)
    if symmetric:
        scale = _stored(values.abs().amax(-1, keepdim=True) * share / HALF_INT4, stored)
        codes = (values / scale).round().clamp(-INT4_OFFSET, INT4_OFFSET - 1) + INT4_OFFSET
        return codes, scale, torch.full_like(scale, INT4_OFFSET)
    low = values.amin(-1, keepdim=True).clamp(max=0) * share
    high = values.amax(-1, keepdim=True).clamp(min=0) * share
    scale = _stored((high - low) / TOP_INT4, stored)
    zero = (-low / scale).round().clamp(0, TOP_INT4)
    codes = ((values / scale).round() + zero).clamp(0, TOP_INT4)
    return codes, scale, zero
