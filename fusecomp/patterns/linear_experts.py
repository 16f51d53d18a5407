"""A canonical linear and the mixture that reads its result, through the norm of its router -> one canonical op.

A lowering then knows, where it sums the linear's product, that a norm follows. What the linear gives stays a result:
the residual stream.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.linear import LinearShape, Program
from fusecomp.ops.linear_experts import QUANT_RESIDUAL, RESIDUAL, NormedShape
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant_linear import QuantShape
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import is_call, not_before, skip_reshapes
from fusecomp.patterns.linear_pair import linear_shape, quant_arguments, quant_linear_shape
from fusecomp.patterns.quant_activations import PROGRAM

NORM = 6  # which argument of a mixture describes its router's norm


@dataclass(frozen=True)
class LinearExpertsCandidate:
    """A mixture whose hidden states a linear gives.

    Attributes:
        node: the mixture.
        first: the linear.
    """

    node: Node
    first: Node


class LinearExperts(Pattern):
    """A linear and the mixture behind it, whose sums and norm a lowering may make together."""

    name = "linear_experts"
    numerics = TOLERANCE
    linear: ClassVar[Any] = OPS.linear.default
    wholes: ClassVar[dict[Any, Any]] = {
        OPS.routed_experts.default: OPS.linear_experts.default,
        OPS.experts_linear.default: OPS.linear_experts_linear.default,
    }
    program: ClassVar[int] = 5  # which argument of the linear
    residual: ClassVar[int] = 1 + RESIDUAL  # which argument of the mixture

    def find(self, graph: torch.fx.Graph) -> Iterable[LinearExpertsCandidate]:
        for node in list(graph.nodes):
            if is_call(node, *self.wholes) and node.args[NORM]:
                first = skip_reshapes(node.args[0])
                if is_call(first, self.linear):
                    yield LinearExpertsCandidate(node, first)

    def guard(self, candidate: LinearExpertsCandidate, context: PassContext) -> str | None:
        node, first = candidate.node, candidate.first
        if fake_value(node.args[0]).shape != fake_value(first).shape:
            return "the experts read the linear's result in another shape"
        args, _ = self._mixture(candidate)
        if later := not_before(first, args):
            return f"the experts also read a result of {op_name(later)}, which is not there before the linear"
        return None

    def emit(self, candidate: LinearExpertsCandidate, gm: GraphModule, context: PassContext) -> str:
        node, first = candidate.node, candidate.first
        args, adds = self._mixture(candidate)
        with gm.graph.inserting_before(first):
            whole = self.wholes[node.target]
            new = functional.call(gm.graph, whole, (*self._arguments(first), *args, adds), node)
            h = functional.call(gm.graph, operator.getitem, (new, 0), first)
            results = {
                user: functional.call(gm.graph, operator.getitem, (new, 1 + user.args[1]), user)  # type: ignore[operator]
                for user in node.users
            }
        program = Program.from_text(first.args[self.program])  # type: ignore[arg-type]
        norm = NormSpec.from_text(node.args[NORM])  # type: ignore[arg-type]
        replace_and_prune(first, h)  # before the mixture, with which it may go
        for user, result in results.items():
            replace_and_prune(user, result)
        return f"{program.describe()}, then {norm.describe()} -> experts"

    def operation(self, candidate: LinearExpertsCandidate) -> str:
        return str(NormedShape(self._shape(candidate.first)))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.linear_experts_examples import linear_experts_examples

        return linear_experts_examples()

    def _mixture(self, candidate: LinearExpertsCandidate) -> tuple[tuple, bool]:
        """The mixture's arguments behind x, all of them, and whether its residual, left out there, is the linear's."""
        node, first = candidate.node, candidate.first
        args = [*node.args, *[None] * (self.residual + 1 - len(node.args))]
        residual = args[self.residual]
        adds = isinstance(residual, Node) and skip_reshapes(residual) is first
        if adds:
            args[self.residual] = None
        return tuple(args[1:]), adds

    def _shape(self, node: Node) -> LinearShape | QuantShape:
        return linear_shape(node)

    def _arguments(self, node: Node) -> tuple:
        """All of the linear's arguments, defaults included."""
        return node.args


class QuantLinearExperts(LinearExperts):
    """The same by quantized weights, where the linear makes codes of what it reads."""

    name = "quant_linear_experts"
    linear = OPS.quant_linear.default
    wholes: ClassVar[dict[Any, Any]] = {OPS.routed_quant_experts.default: OPS.quant_linear_experts.default}
    program = PROGRAM
    residual = 1 + QUANT_RESIDUAL

    def find(self, graph: torch.fx.Graph) -> Iterable[LinearExpertsCandidate]:
        return (found for found in super().find(graph) if self._arguments(found.first)[-1])

    def examples(self) -> list[Example]:
        from fusecomp.patterns.linear_experts_examples import quant_linear_experts_examples

        return quant_linear_experts_examples()

    def _shape(self, node: Node) -> LinearShape | QuantShape:
        return quant_linear_shape(node)

    def _arguments(self, node: Node) -> tuple:
        return quant_arguments(node)
