"""Experts: the canonical op that Hugging Face's experts interface emitted, checked and counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.experts import Activation
from fusecomp.patterns.base import BITWISE, Example, PassContext, Pattern, fake_value
from fusecomp.patterns.raw_attention import is_call

EXPERTS = (OPS.experts, OPS.experts.default)


@dataclass(frozen=True)
class ExpertsCall:
    """One canonical experts node."""

    node: Node


class Experts(Pattern):
    """One `experts` node per mixture-of-experts layer."""

    name = "experts"
    numerics = BITWISE

    def find(self, graph: torch.fx.Graph) -> Iterable[ExpertsCall]:
        return [ExpertsCall(node) for node in graph.nodes if is_call(node, EXPERTS)]

    def guard(self, candidate: ExpertsCall, context: PassContext) -> str | None:
        up, down = candidate.node.args[3], candidate.node.args[5]
        act, gated, _, transposed = candidate.node.args[7:11]
        assert isinstance(act, str)
        up_shape, down_shape = fake_value(up).shape, fake_value(down).shape  # type: ignore[arg-type]
        inner = up_shape[2] if transposed else up_shape[1]
        try:
            Activation.parse(act, gated)  # type: ignore[arg-type]
        except ValueError as error:
            return str(error)
        if up_shape[0] != down_shape[0] or (inner // 2 if gated else inner) != down_shape[1 if transposed else 2]:
            return f"expert weights {tuple(up_shape)} and {tuple(down_shape)} do not fit together"
        return None

    def emit(self, candidate: ExpertsCall, gm: GraphModule, context: PassContext) -> str:
        _, index, _, up, *_ = candidate.node.args
        act, gated = candidate.node.args[7:9]
        experts, top_k = fake_value(up).shape[0], fake_value(index).shape[1]  # type: ignore[arg-type]
        return f"{experts} experts, top-{top_k}, {act}{' gated' if gated else ''}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import experts_examples

        return experts_examples()
