"""Weights that are dequantized in the graph -> canonical ops that read their codes.

By now a dequantized weight has been treated as any other: its linear has an epilogue and a norm. Only the weight itself
is replaced: by its codes, scales and zero points.

Legend: T tokens, N output features, K input features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.linear import Program
from fusecomp.ops.quant import WeightSpec
from fusecomp.ops.quant_linear import quant_shape
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import FLOATS, is_call, skip_reshapes

DEQUANTIZE, QUANTIZE = OPS.dequantize.default, OPS.quantize.default
LINEAR, QUANT_LINEAR = OPS.linear.default, OPS.quant_linear.default
EXPERTS, QUANT_EXPERTS = OPS.experts.default, OPS.quant_experts.default
UP, DOWN = 3, 5  # arguments of `experts`


@dataclass(frozen=True)
class DequantizedWeight:
    """A dequantize whose result is a weight, and all that read it."""

    node: Node

    @property
    def spec(self) -> WeightSpec:
        return WeightSpec.from_text(self.node.args[3])  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """Codes, scales, and zero points or None."""
        q, scale, zero = self.node.args[:3]
        return q, scale, zero

    def reason(self) -> str | None:
        """Why its parts cannot stand in for the weight, or None."""
        names = ("codes", "scales", "zero points")
        for name, part in zip(names, self.parts, strict=True):
            if part is not None and (not isinstance(part, Node) or part.op not in ("placeholder", "get_attr")):
                return f"its {name} are computed by {op_name(part)}, they are no weight"
            if part is not None and not fake_value(part).is_contiguous():
                return f"its {name} are not contiguous"
        values: Any = [None if part is None else fake_value(part) for part in self.parts]
        q, scale, zero = values
        if q.dtype != self.spec.codes_dtype:
            return f"its codes are {q.dtype}, those of {self.spec.describe()} are {self.spec.codes_dtype}"
        wanted = (*q.shape[:-2], *self.spec.scales(*self.spec.shape(q.shape)[-2:]))
        one = wanted == (1, 1) and tuple(scale.shape) == (1,)
        if tuple(scale.shape) != wanted and not one:
            return f"its scales {tuple(scale.shape)} are not {wanted} as {self.spec.describe()} has them"
        if scale.dtype not in (*FLOATS, torch.uint8):
            return f"its scales are {scale.dtype}"
        if zero is not None and (zero.shape != scale.shape or zero.dtype not in (*FLOATS, torch.float8_e4m3fn)):
            return f"its zero points are {zero.dtype} {tuple(zero.shape)}, its scales {tuple(scale.shape)}"
        return None


class QuantLinear(Pattern):
    """Every linear by one dequantized weight becomes a quantized linear."""

    name = "quant_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[DequantizedWeight]:
        for node in list(graph.nodes):
            if (
                is_call(node, DEQUANTIZE)
                and not _is_activation(node)
                and not any(is_call(u, EXPERTS) for u in node.users)
            ):
                yield DequantizedWeight(node)

    def guard(self, candidate: DequantizedWeight, context: PassContext) -> str | None:
        node = candidate.node
        for user in node.users:
            others = [*user.args[:1], *user.args[2:]]
            if not is_call(user, LINEAR) or user.args[1] is not node or any(_reads(a, node) for a in others):
                return f"what it makes is read by {op_name(user)}, which is no linear by it"
        if not node.users:
            return "nothing reads what it makes"
        return candidate.reason() or _flat_reason(candidate)

    def emit(self, candidate: DequantizedWeight, gm: GraphModule, context: PassContext) -> str:
        node, parts, found = candidate.node, candidate.parts, []
        for linear in list(node.users):
            x, _, norm_weight, norm_bias, operands, program = linear.args
            with gm.graph.inserting_before(linear):
                args = (x, *parts, norm_weight, norm_bias, operands, program, node.args[3])
                new = functional.call(gm.graph, QUANT_LINEAR, args, linear)
            replace_and_prune(linear, new)
            found.append(Program.from_text(program).describe())  # type: ignore[arg-type]
        zero = ", with zero points" if parts[2] is not None else ""
        return f"{candidate.spec.describe()}{zero}: {'; '.join(found)}"

    def operation(self, candidate: DequantizedWeight) -> str:
        linear = next(iter(candidate.node.users))
        if is_call(skip_reshapes(linear.args[0]), OPS.fake_quantize.default):  # type: ignore[arg-type]
            return ""  # it becomes a linear of codes by codes, which says its own
        program = Program.from_text(linear.args[5])  # type: ignore[arg-type]
        q, _, zero = candidate.parts
        return str(quant_shape(fake_value(candidate.node).dtype, fake_value(q), zero, program, candidate.spec))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_examples import quant_linear_examples

        return quant_linear_examples()


@dataclass(frozen=True)
class QuantExpertsCandidate:
    """Canonical experts, of whose weights at least one is dequantized."""

    node: Node

    @property
    def weights(self) -> tuple[Node, Node]:
        return self.node.args[UP], self.node.args[DOWN]  # type: ignore[return-value]


class QuantExperts(Pattern):
    """Experts by dequantized weights become quantized experts: only those that tokens chose are dequantized."""

    name = "quant_experts"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantExpertsCandidate]:
        for node in list(graph.nodes):
            if is_call(node, EXPERTS) and any(is_call(node.args[at], DEQUANTIZE) for at in (UP, DOWN)):
                yield QuantExpertsCandidate(node)

    def guard(self, candidate: QuantExpertsCandidate, context: PassContext) -> str | None:
        for name, weight in zip(("up", "down"), candidate.weights, strict=True):
            if not is_call(weight, DEQUANTIZE):
                return f"its {name} weights are not quantized, the others are"
            others = [op_name(user) for user in weight.users if user is not candidate.node]
            if others or sum(a is weight for a in candidate.node.args) > 1:
                return f"its dequantized {name} weights are also read by {(others or ['itself'])[0]}"
            if fake_value(weight).dtype != fake_value(candidate.node).dtype:
                return f"its {name} weights are {fake_value(weight).dtype}"
            if reason := DequantizedWeight(weight).reason():
                return f"of its {name} weights, {reason}"
        return None

    def emit(self, candidate: QuantExpertsCandidate, gm: GraphModule, context: PassContext) -> str:
        node = candidate.node
        up, down = (DequantizedWeight(weight) for weight in candidate.weights)
        x, index, weights, _, up_bias, _, down_bias, *form = node.args[:11]
        residual = node.args[11:]
        specs = (up.node.args[3], down.node.args[3])
        args = (x, index, weights, *up.parts, up_bias, *down.parts, down_bias, *form, *specs, *residual)
        with gm.graph.inserting_before(node):
            new = functional.call(gm.graph, QUANT_EXPERTS, args, node)
        replace_and_prune(node, new)
        return f"up {up.spec.describe()}; down {down.spec.describe()}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_examples import quant_experts_examples

        return quant_experts_examples()


def _flat_reason(candidate: DequantizedWeight) -> str | None:
    q = fake_value(candidate.parts[0])
    return None if q.dim() == 2 else f"its codes have shape {tuple(q.shape)}, a linear's are [N, K]"


def _reads(argument: Any, node: Node) -> bool:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return node in found


def _is_activation(node: Node) -> bool:
    """Whether the codes that a dequantize reads were made in the graph by a quantize."""
    return any(is_call(source, QUANTIZE) for part in node.all_input_nodes for source in (part, *part.all_input_nodes))
