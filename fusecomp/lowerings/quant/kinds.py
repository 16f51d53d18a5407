"""Which KIND of codes a GPU's kernels read: see `pieces.py`."""

from __future__ import annotations

from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant import pieces
from fusecomp.ops.quant import FP4, INT, NF4


def code_kind(kind: str, bits: int, target: Target) -> int:
    """KIND of the kernels for a `WeightSpec`'s codes: the GPUs that have fp8 convert it themselves."""
    native = target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89
    fp8 = pieces.NATIVE_FP8 if native else pieces.FP8
    return {(INT, 8): pieces.INT8, (INT, 4): pieces.INT4, (FP4, 4): pieces.FP4, (NF4, 4): pieces.NF4}.get(
        (kind, bits), fp8
    )
