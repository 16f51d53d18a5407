"""Launch of the kernel of one token that reads words of codes, alone and as one of two with a norm between.

Legend: N output features, K input features, G accumulator groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.quant.word_vector import word_vector_kernel
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant_linear import QuantShape

# Else ptxas takes up to 176 for what needs no more, and half of the programs wait for the others to end.
BETWEEN_REGISTERS = 128


@dataclass(frozen=True)
class Between:
    """The norm between two linears of one token, of which the first does a half: see `word_vector.py`.

    Attributes:
        squares: of the second linear's x, which is the first's `next_x`.
        next_x, next_squares: to be written by the first, [N] and [programs].
        next_weight: of the norm, [N], or None where it has none.
        scheme: NORM of the norm; 0 in the second linear.
    """

    squares: Tensor | None = None
    next_weight: Tensor | None = None
    next_x: Tensor | None = None
    next_squares: Tensor | None = None
    scheme: int = 0


NOTHING = Between()


def run_words(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    args: tuple[Tensor, ...],
    strides: tuple[int, ...],
    out: Tensor,
    shape: QuantShape,
    eps: float,
    scale_columns: int,
    programs: int,
    between: Between,
    options: dict[str, Any],
) -> None:
    """out [1, N] from x [1, K], or what is left of a norm, by codes [G * N, K].

    Args:
        args, strides: of the epilogue.
        options: constants of the kernel, and of the launch.
    """
    launch(
        word_vector_kernel, (programs,),
        _quads(x), codes.view(torch.int32), scale, out, None if norm_weight is None else _quads(norm_weight), args,
        strides, between.squares, between.next_weight, between.next_x, between.next_squares, shape.n, shape.k, eps,
        scale_columns, DTYPE=getattr(tl, shape.dtype), WARPS=options["num_warps"],
        SQUARES=0 if between.squares is None else len(between.squares), NEXT=between.scheme, **options,
    )  # fmt: skip


def norm_scheme(norm: NormSpec | None, weight: Tensor | None) -> int:
    """NORM of the kernels: 0 no norm, 1 RMSNorm without weight, 2 with weight w, 3 with 1 + w."""
    return 0 if norm is None else 1 if weight is None else 3 if norm.plus_one else 2


def _quads(x: Tensor) -> Tensor:
    """One token, or a norm's weight, [K] as words of four 16-bit numbers."""
    x = x.reshape(-1)
    return (x if x.storage_offset() % 4 == 0 else x.clone()).view(torch.int64)
