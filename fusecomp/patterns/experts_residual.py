"""experts + residual -> canonical `experts` with the residual: the sum over a token's experts adds it.

Legend: T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import RESHAPES, aten, is_call, skip_reshapes, token_shape

EXPERTS = OPS.experts.default


@dataclass(frozen=True)
class ResidualCandidate:
    """An addition to what a layer of experts computes.

    Attributes:
        node: the addition.
        experts: the canonical op, without a residual.
        residual: the other addend, [T, C] under any reshape.
    """

    node: Node
    experts: Node
    residual: Node


class ExpertsResidual(Pattern):
    """One addition of a token tensor to the result of `experts`."""

    name = "experts_residual"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[ResidualCandidate]:
        for node in list(graph.nodes):
            if is_call(node, aten.add.Tensor) and not node.kwargs and all(isinstance(a, Node) for a in node.args):
                for ours, other in (node.args, node.args[::-1]):
                    experts = skip_reshapes(ours)
                    if is_call(experts, EXPERTS) and len(experts.args) == 11:
                        yield ResidualCandidate(node, experts, other)
                        break

    def guard(self, candidate: ResidualCandidate, context: PassContext) -> str | None:
        node, experts, residual = candidate.node, candidate.experts, candidate.residual
        if token_shape(residual) is None or token_shape(residual) != token_shape(experts):
            return f"what is added has shape {tuple(fake_value(residual).shape)}"
        dtypes = {fake_value(n).dtype for n in (node, experts, residual)}
        if len(dtypes) > 1:
            return f"it adds {fake_value(residual).dtype} to {fake_value(experts).dtype}"
        if reader := _other_reader(experts, node):
            return f"the experts' result is also read by {op_name(reader)}"
        return None

    def emit(self, candidate: ResidualCandidate, gm: GraphModule, context: PassContext) -> str:
        node, experts = candidate.node, candidate.experts
        with gm.graph.inserting_before(node):
            rows = functional.as_rows(candidate.residual, fake_value(experts).shape[1])
            new = functional.call(gm.graph, EXPERTS, (*experts.args, rows), experts)
            new = functional.reshaped(new, node)
        replace_and_prune(node, new)
        return "the residual is added where a token's experts are summed"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.experts_residual_examples import experts_residual_examples

        return experts_residual_examples()


def _other_reader(experts: Node, addition: Node) -> Node | None:
    """A reader of the value of `experts`, under any reshape, other than one addend of `addition`."""
    stack, found = [experts], 0
    while stack:
        value = stack.pop()
        for user in value.users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif user is not addition:
                return user
            else:
                found += user.args.count(value)
    return addition if found > 1 else None
