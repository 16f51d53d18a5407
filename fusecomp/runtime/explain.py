"""Which kernels an engine's steps take, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusecomp.ops.experts import CodesShape
from fusecomp.ops.linear import LinearShape
from fusecomp.ops.linear_experts import NormedShape
from fusecomp.ops.linear_pair import PairShape
from fusecomp.ops.quant_linear import QuantShape
from fusecomp.report import FusionReport

if TYPE_CHECKING:
    from fusecomp.lowerings.paged_attention.heuristics import Target


def explain_lowerings(report: FusionReport, target: Target, counts: Sequence[int]) -> None:
    """Say which kernels linears and experts of codes take, for steps of `counts` tokens."""
    from fusecomp.lowerings.experts.quant_heuristics import explain_choices as explain_experts
    from fusecomp.lowerings.linear.lowering import explain_choices
    from fusecomp.lowerings.quant.lowering import explain_choices as explain_quantized
    from fusecomp.lowerings.quant.pair import explain_normed, explain_pair

    for operation in dict.fromkeys(match.operation for match in report.matches):
        if pair := PairShape.parse(operation):
            report.lowerings[operation] = explain_pair(target, pair, counts)
        elif normed := NormedShape.parse(operation):
            report.lowerings[operation] = explain_normed(target, normed, counts)
        elif shape := LinearShape.parse(operation):
            report.lowerings[operation] = explain_choices(target, shape, counts)
        elif quantized := QuantShape.parse(operation):
            report.lowerings[operation] = explain_quantized(target, quantized, counts)
        elif experts := CodesShape.parse(operation):
            report.lowerings[operation] = explain_experts(target, experts, counts)
