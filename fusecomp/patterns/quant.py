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
from fusecomp.ops.experts import codes_shape
from fusecomp.ops.linear import Program
from fusecomp.ops.quant import WeightSpec
from fusecomp.ops.quant_linear import quant_shape
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import FLOATS, is_call, skip_reshapes

aten = torch.ops.aten
DEQUANTIZE, QUANTIZE = OPS.dequantize.default, OPS.quantize.default
LINEAR, QUANT_LINEAR = OPS.linear.default, OPS.quant_linear.default
EXPERTS, QUANT_EXPERTS = OPS.experts.default, OPS.quant_experts.default
UP, DOWN = 3, 5  # arguments of `experts`
TURNS = (aten.permute.default, aten.transpose.int)
CHOICES = (aten.gather.default, aten.index.Tensor, aten.index_select.default)
REORDERINGS = (
    *CHOICES, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default,
)  # fmt: skip


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
            if is_call(node, DEQUANTIZE) and not _is_activation(node) and not _feeds_experts(node):
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
class ExpertWeight:
    """A weight of experts, and the dequantize that it comes from.

    Attributes:
        argument: what the experts read.
        between: the nodes from the dequantize, left out, to the argument, included.
    """

    argument: Node
    dequantize: Node | None
    between: tuple[Node, ...]

    @staticmethod
    def of(argument: Any) -> ExpertWeight:
        node, between = argument, []
        while isinstance(node, Node) and is_call(node, *REORDERINGS, *TURNS):
            between.append(node)
            node = node.args[0]
        return ExpertWeight(argument, node if is_call(node, DEQUANTIZE) else None, tuple(between))

    @property
    def turned(self) -> bool:
        """Whether what is dequantized is [E, N, K], and the experts read [E, K, N]."""
        return len(self.between) == 1 and _swaps_last_dims(self.between[0])

    def reason(self, experts: Node) -> str | None:
        """Why the experts cannot read its codes, or None."""
        if self.dequantize is None:
            return "are not quantized, the others are"
        if self.between and not self.turned:
            how = op_name(next((node for node in self.between if is_call(node, *CHOICES)), self.between[-1]))
            return f"are put in another order after they are dequantized (by {how}, as act-order asks for)"
        for node, reader in zip((*self.between, self.dequantize), (experts, *self.between), strict=True):
            others = [op_name(user) for user in node.users if user is not reader]
            if others or sum(a is node for a in reader.args) > 1:
                return f"are also read by {(others or ['itself'])[0]}"
        if fake_value(self.dequantize).dtype != fake_value(experts).dtype:
            return f"are {fake_value(self.dequantize).dtype}"
        return None


@dataclass(frozen=True)
class QuantExpertsCandidate:
    """Canonical experts, of whose weights at least one is dequantized."""

    node: Node

    @property
    def weights(self) -> tuple[ExpertWeight, ExpertWeight]:
        return ExpertWeight.of(self.node.args[UP]), ExpertWeight.of(self.node.args[DOWN])


class QuantExperts(Pattern):
    """Experts by dequantized weights become quantized experts: only those that tokens chose are dequantized."""

    name = "quant_experts"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantExpertsCandidate]:
        for node in list(graph.nodes):
            if is_call(node, EXPERTS) and any(ExpertWeight.of(node.args[at]).dequantize for at in (UP, DOWN)):
                yield QuantExpertsCandidate(node)

    def guard(self, candidate: QuantExpertsCandidate, context: PassContext) -> str | None:
        up, down = candidate.weights
        for name, weight in (("up", up), ("down", down)):
            if reason := weight.reason(candidate.node):
                return f"its {name} weights {reason}"
            assert weight.dequantize is not None
            if reason := DequantizedWeight(weight.dequantize).reason():
                return f"of its {name} weights, {reason}"
        if up.turned != down.turned:
            return "codes of one of its weights run along the inputs, of the other along the outputs"
        return None

    def emit(self, candidate: QuantExpertsCandidate, gm: GraphModule, context: PassContext) -> str:
        node = candidate.node
        up, down = (DequantizedWeight(weight.dequantize) for weight in candidate.weights)  # type: ignore[arg-type]
        x, index, weights, _, up_bias, _, down_bias, *form, transposed = node.args[:11]
        transposed = transposed != candidate.weights[0].turned
        residual = node.args[11:]
        specs = (up.node.args[3], down.node.args[3])
        args = (x, index, weights, *up.parts, up_bias, *down.parts, down_bias, *form, transposed, *specs, *residual)
        with gm.graph.inserting_before(node):
            new = functional.call(gm.graph, QUANT_EXPERTS, args, node)
        replace_and_prune(node, new)
        return f"up {up.spec.describe()}; down {down.spec.describe()}"

    def operation(self, candidate: QuantExpertsCandidate) -> str:
        up, down = (DequantizedWeight(weight.dequantize) for weight in candidate.weights)  # type: ignore[arg-type]
        experts, hidden, width = down.spec.shape(fake_value(down.parts[0]).shape)
        sizes = (experts, int(fake_value(candidate.node.args[1]).shape[1]), hidden, width)
        return str(codes_shape(up.spec, down.spec, sizes, fake_value(candidate.node).element_size()))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_examples import quant_experts_examples

        return quant_experts_examples()


def _flat_reason(candidate: DequantizedWeight) -> str | None:
    q = fake_value(candidate.parts[0])
    return None if q.dim() == 2 else f"its codes have shape {tuple(q.shape)}, a linear's are [N, K]"


def _feeds_experts(node: Node) -> bool:
    """Whether what a node makes, as it is or in another order, is a weight of experts."""
    return any(is_call(u, EXPERTS) or (is_call(u, *REORDERINGS, *TURNS) and _feeds_experts(u)) for u in node.users)


def _swaps_last_dims(node: Node) -> bool:
    """Whether a permute or transpose of a [E, N, K] exchanges its last two dims."""
    dims = node.args[1] if is_call(node, aten.permute.default) else node.args[1:]
    if is_call(node, aten.permute.default):
        return [d % 3 for d in dims] == [0, 2, 1]  # type: ignore[union-attr, operator]
    return is_call(node, aten.transpose.int) and {d % 3 for d in dims} == {1, 2}  # type: ignore[union-attr, operator]


def _reads(argument: Any, node: Node) -> bool:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return node in found


def _is_activation(node: Node) -> bool:
    """Whether the codes that a dequantize reads were made in the graph by a quantize."""
    return any(is_call(source, QUANTIZE) for part in node.all_input_nodes for source in (part, *part.all_input_nodes))
