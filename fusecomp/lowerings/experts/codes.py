"""Expert weights that are codes, as launches hand them to the kernels.

Legend: E experts, N rows and D columns of one expert's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.experts.quant_pieces import PLAIN
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant import pieces
from fusecomp.lowerings.quant.kinds import code_kind
from fusecomp.lowerings.quant.launches import zero_points
from fusecomp.ops.quant import INT4_OFFSET, WeightSpec


@dataclass(frozen=True)
class Codes:
    """What codes [E, N, D], or bytes [E, N, D / 2], of an expert weight stand for; see `ops/quant.py`.

    Attributes:
        scale: [E, ceil(N / rows), ceil(D / cols)] contiguous.
        zero: as scale, or None.
    """

    scale: Tensor
    zero: Tensor | None
    spec: WeightSpec


def kernel_weight(
    weight: Tensor, codes: Codes | None
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, int | float]]:
    """(weight, scale, zero points) as the kernels read them, and their constants."""
    if codes is None:
        return weight, None, None, {"KIND": PLAIN, "OFFSET": 0.0, "ROWS": 0, "COLS": 0}
    constants = code_constants(codes.spec, codes.zero is not None, target_of(weight))
    if constants["KIND"] == pieces.NATIVE_FP8 and not weight.is_cuda:
        constants["KIND"] = pieces.FP8  # the interpreter, which stands for GPUs without a conversion of fp8
    q = weight.view(torch.uint8) if constants["KIND"] == pieces.FP8 else weight
    return q, codes.scale, zero_points(codes.zero), constants


def code_constants(spec: WeightSpec, has_zero: bool, target: Target) -> dict[str, Any]:
    """KIND, OFFSET, ROWS and COLS of a layout."""
    kind = code_kind(spec.kind, spec.bits, target)
    offset = float(INT4_OFFSET) if kind == pieces.INT4 and not has_zero else 0.0
    return {"KIND": kind, "OFFSET": offset, "ROWS": spec.rows, "COLS": spec.cols}
