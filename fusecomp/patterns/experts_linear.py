"""Canonical `routed_experts` + a linear that reads their result -> canonical `experts_linear`.

The linear is the next layer's first, its norm inside. Whoever routes then knows what is read after the experts.

Legend: T tokens, C hidden size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.linear import Program
from fusecomp.patterns import functional
from fusecomp.patterns.base import BITWISE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import is_call, not_before, skip_reshapes

LINEAR, ROUTED, WHOLE = OPS.linear.default, OPS.routed_experts.default, OPS.experts_linear.default
ROUTED_ARGS = 18  # the residual among them


@dataclass(frozen=True)
class ExpertsLinearCandidate:
    """A canonical linear whose activations are what a mixture gives.

    Attributes:
        node: the linear.
        routed: the mixture.
    """

    node: Node
    routed: Node


class ExpertsLinear(Pattern):
    """A mixture and the first linear that reads its result, which stays a result: the residual stream."""

    name = "experts_linear"
    numerics = BITWISE

    def find(self, graph: torch.fx.Graph) -> Iterable[ExpertsLinearCandidate]:
        for node in list(graph.nodes):
            if is_call(node, LINEAR):
                source = skip_reshapes(node.args[0])  # type: ignore[arg-type]
                if is_call(source, operator.getitem) and source.args[1] == 1 and is_call(source.args[0], ROUTED):
                    yield ExpertsLinearCandidate(node, source.args[0])  # type: ignore[arg-type]

    def guard(self, candidate: ExpertsLinearCandidate, context: PassContext) -> str | None:
        node, routed = candidate.node, candidate.routed
        if later := not_before(routed, node.args[1:]):
            return f"the linear also reads a result of {op_name(later)}, which comes after the experts"
        return None

    def emit(self, candidate: ExpertsLinearCandidate, gm: GraphModule, context: PassContext) -> str:
        node, routed = candidate.node, candidate.routed
        args = (*routed.args, *[None] * (ROUTED_ARGS - len(routed.args)), *node.args[1:])
        with gm.graph.inserting_before(routed):
            new = functional.call(gm.graph, WHOLE, args, routed)
            y, out, z = (functional.call(gm.graph, operator.getitem, (new, i), routed) for i in range(3))
            assert fake_value(z).shape == fake_value(node).shape
        detail = f"experts -> {Program.from_text(node.args[5]).describe()}"  # type: ignore[arg-type]
        replace_and_prune(node, z)
        for result in list(routed.users):
            replace_and_prune(result, (y, out)[result.args[1]])  # type: ignore[index]
        return detail

    def examples(self) -> list[Example]:
        from fusecomp.patterns.experts_linear_examples import experts_linear_examples

        return experts_linear_examples()
