"""Two canonical linears, the second with a norm of what the first gives -> one canonical op.

A lowering then knows, where it sums the first's product, that a norm follows. What the first gives stays a result: the
residual stream.
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
from fusecomp.ops.linear_pair import PairShape
from fusecomp.ops.quant import TENSOR, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import QuantShape, quant_shape
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import is_call, not_before, skip_reshapes
from fusecomp.patterns.quant_activations import ACTIVATION, PROGRAM, SPEC

UNQUANTIZED = (None, "")  # what `quant_linear` takes last, where activations keep their values


@dataclass(frozen=True)
class LinearPairCandidate:
    """A linear with a norm, whose activations another linear gives.

    Attributes:
        node: the second.
        first: what it reads.
    """

    node: Node
    first: Node


class LinearPair(Pattern):
    """A linear and the next one that reads its result through a norm, whose sums a lowering may order otherwise."""

    name = "linear_pair"
    numerics = TOLERANCE
    linear: ClassVar[Any] = OPS.linear.default
    pair: ClassVar[Any] = OPS.linear_pair.default
    program: ClassVar[int] = 5  # which argument

    def find(self, graph: torch.fx.Graph) -> Iterable[LinearPairCandidate]:
        for node in list(graph.nodes):
            if is_call(node, self.linear) and self._program(node).norm is not None:
                first = skip_reshapes(node.args[0])  # type: ignore[arg-type]
                if is_call(first, self.linear):
                    yield LinearPairCandidate(node, first)

    def guard(self, candidate: LinearPairCandidate, context: PassContext) -> str | None:
        node, first = candidate.node, candidate.first
        if fake_value(node.args[0]).shape != fake_value(first).shape:
            return "the second reads the first's result in another shape"
        if later := not_before(first, node.args[1:]):
            return f"the second also reads a result of {op_name(later)}, which is not there before the first"
        return None

    def emit(self, candidate: LinearPairCandidate, gm: GraphModule, context: PassContext) -> str:
        node, first = candidate.node, candidate.first
        with gm.graph.inserting_before(first):
            args = (*self._arguments(first), *self._arguments(node)[1:])
            new = functional.call(gm.graph, self.pair, args, node)
            h, z = (functional.call(gm.graph, operator.getitem, (new, i), like) for i, like in enumerate((first, node)))
        details = [self._program(linear).describe() for linear in (first, node)]
        replace_and_prune(first, h)
        replace_and_prune(node, z)
        return ", then ".join(details)

    def operation(self, candidate: LinearPairCandidate) -> str:
        return str(PairShape(self._shape(candidate.first), self._shape(candidate.node)))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.linear_pair_examples import linear_pair_examples

        return linear_pair_examples()

    def _program(self, node: Node) -> Program:
        return Program.from_text(node.args[self.program])  # type: ignore[arg-type]

    def _shape(self, node: Node) -> LinearShape | QuantShape:
        return linear_shape(node)

    def _arguments(self, node: Node) -> tuple:
        """All of a linear's arguments, defaults included."""
        return node.args


class QuantLinearPair(LinearPair):
    """The same of quantized linears, where the second makes codes of what it reads."""

    name = "quant_linear_pair"
    linear = OPS.quant_linear.default
    pair = OPS.quant_linear_pair.default
    program = PROGRAM

    def find(self, graph: torch.fx.Graph) -> Iterable[LinearPairCandidate]:
        return (found for found in super().find(graph) if self._arguments(found.node)[-1])

    def operation(self, candidate: LinearPairCandidate) -> str:
        activation = ActivationSpec.from_text(self._arguments(candidate.node)[-1])
        # Whether a scale of all values follows from all of them, a shape does not say.
        return "" if activation.granularity == TENSOR else super().operation(candidate)

    def examples(self) -> list[Example]:
        from fusecomp.patterns.linear_pair_examples import quant_linear_pair_examples

        return quant_linear_pair_examples()

    def _shape(self, node: Node) -> LinearShape | QuantShape:
        return quant_linear_shape(node)

    def _arguments(self, node: Node) -> tuple:
        return quant_arguments(node)


def linear_shape(node: Node) -> LinearShape:
    """Of a `linear`."""
    program, weight = Program.from_text(node.args[LinearPair.program]), fake_value(node.args[1])  # type: ignore[arg-type]
    dtype = str(weight.dtype).removeprefix("torch.")
    return LinearShape(weight.shape[0] // program.groups, weight.shape[1], program.groups, program.kind, dtype)


def quant_linear_shape(node: Node) -> QuantShape:
    """Of a `quant_linear`."""
    args: tuple[Any, ...] = quant_arguments(node)
    spec, activation = WeightSpec.from_text(args[SPEC]), args[ACTIVATION]
    codes = ActivationSpec.from_text(activation) if activation else None
    return quant_shape(spec.torch_dtype, fake_value(args[1]), args[3], Program.from_text(args[PROGRAM]), spec, codes)


def quant_arguments(node: Node) -> tuple:
    """All arguments of a `quant_linear`, defaults included."""
    return node.args if len(node.args) > ACTIVATION else (*node.args, *UNQUANTIZED)
