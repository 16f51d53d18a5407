"""One quantized weight in canonical form, and the arithmetic of packed codes that several formats share.

Legend: N rows, K columns, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecomp.ops.quant import FOLDS, INT, INT4_OFFSET, ActivationSpec, WeightSpec, fits_fold, fold_codes
from fusecomp.quant.files import TensorFiles

# With fewer columns to a scale, zeros as wide as scales would outgrow the checkpoint, which packs them.
NARROW_GROUP = 64


@dataclass
class Codes:
    """A weight [N, K] as `fusecomp::dequantize` takes it.

    Attributes:
        q: [N, K], or [N, K / 2] for 4-bit codes.
        scale: [ceil(N / rows), ceil(K / cols)].
        zero: as scale, or None.
        spec: what the codes stand for.
        order: column i of q is column order[i] of the weight, int64 [K]; None when they are the same.
        activation: how the checkpoint wants the layer's input quantized; None if not.
        input_scale: [1] fp32 when that is static.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: WeightSpec
    order: Tensor | None = None
    activation: ActivationSpec | None = None
    input_scale: Tensor | None = None


def nibbles(packed: Tensor) -> Tensor:
    """Codes [..., 2 M] of bytes [..., M], the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Bytes [..., M] of 4-bit codes [..., 2 M] uint8, the low nibble first."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def prepared(codes: Codes) -> Codes:
    """The same weight as the kernels read it fastest.

    4-bit integers are folded where their shape allows it. Scales of whole rows of 8-bit codes become fp32, exactly:
    the library's products of codes take no other, and would have them converted in every step.
    """
    spec = codes.spec
    if spec.bits == 8 and (spec.rows, spec.cols) == (1, 0) and codes.scale.dtype in (torch.float16, torch.bfloat16):
        return replace(codes, scale=codes.scale.float())
    if (spec.kind, spec.bits) != (INT, 4) or spec.fold:
        return codes
    k = spec.shape(codes.q.shape)[-1]
    fold = next((fold for fold in FOLDS if fits_fold(k, spec.cols, fold)), 0)
    return replace(codes, q=fold_codes(codes.q, fold), spec=replace(spec, fold=fold)) if fold else codes


def compact(tensor: Tensor) -> Tensor:
    """The tensor with the strides of a new one, which `contiguous` does not give to a last dimension of one element."""
    usual = tensor.is_contiguous() and tensor.stride()[-1:] in ((1,), ())
    return tensor if usual else tensor.clone(memory_format=torch.contiguous_format)


def byte_view(words: Tensor) -> Tensor:
    """Bytes [..., 4 M] of 32-bit words [..., M], the lowest first."""
    return compact(words).view(torch.uint8)


def word_codes(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes [..., M * 32 / bits] uint8 of 32-bit words [..., M], the lowest bits first; 4 or 8 bits."""
    return nibbles(byte_view(words)) if bits == 4 else byte_view(words)


def signed(codes: Tensor) -> Tensor:
    """Unsigned 8-bit codes less 128, int8."""
    return (codes ^ 128).view(torch.int8)


def zero_points(zero: Tensor, bits: int, cols: int, dtype: torch.dtype) -> Tensor | None:
    """Zero points of unsigned codes [N, G], as `Codes` keeps them: None when they are the middle of the range.

    4-bit ones are at most 16, 8-bit ones lose 128 as their codes do: all are exact in every float type used. `dtype` is
    that of the scales.
    """
    zero = zero.to(torch.int32)
    default = INT4_OFFSET if bits == 4 else 128
    if bool((zero == default).all()):
        return None
    if dtype == torch.float32:
        dtype = torch.float16
    if bits == 8:
        zero = zero - 128
    elif 0 < cols < NARROW_GROUP:
        dtype = torch.float8_e4m3fn
    return compact(zero.to(torch.float32).to(dtype))


def column_order(files: TensorFiles, name: str, k: int, groups: int, size: int) -> Tensor | None:
    """The order that brings the columns of each group together: None when they lie so already.

    Args:
        name: int32 tensor [K]: the group of every column.
        size: columns of every group but the last.

    Raises:
        CheckpointError: a group has another number of columns.
    """
    index = files.get(name, ("I32", "I64"), (k,)).to(torch.int64)
    in_place = torch.arange(k) // size
    if torch.equal(index, in_place):
        return None
    if int(index.min()) < 0 or int(index.max()) >= groups:
        why = f"values {int(index.min())} to {int(index.max())}"
        raise files.error(f"tensor {name!r} names groups that do not exist; there are {groups}", why)
    order = index.argsort(stable=True)
    if not torch.equal(index[order], in_place):
        counts = torch.bincount(index, minlength=groups)
        odd = int((counts != torch.bincount(in_place, minlength=groups)).nonzero()[0])
        raise files.error(f"tensor {name!r} puts {int(counts[odd])} columns into group {odd}; groups have {size}")
    return order
