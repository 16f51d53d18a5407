"""Quantized activations: roundings to codes, before the linears that multiply codes by codes, become part of them.

A graph says it in two ways: quantize, then dequantize; or fake_quantize. The first becomes the second, a linear by
codes of the same kind takes that in, and the norm before it, so that x is normed, quantized and multiplied in one op.

Legend: T tokens, K input features.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP8, TENSOR, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import is_codes, quant_shape
from fusecomp.patterns import functional
from fusecomp.patterns.base import (
    BITWISE,
    QUANTIZING,
    TOLERANCE,
    Example,
    PassContext,
    Pattern,
    fake_value,
    op_name,
    replace_and_prune,
)
from fusecomp.patterns.functional import RESHAPES, aten, is_call, skip_reshapes
from fusecomp.patterns.quant import DEQUANTIZE, QUANT_LINEAR, QUANTIZE

FAKE_QUANTIZE, NORM = OPS.fake_quantize.default, OPS.norm.default
PROGRAM, SPEC, X_SCALE, ACTIVATION = 7, 8, 9, 10  # arguments of `quant_linear`


@dataclass(frozen=True)
class QuantizedActivation:
    """Activations [..., T, K] that are rounded to what their codes stand for.

    `node` is a quantize, a dequantize of one's codes, or a fake_quantize; which, the pattern says.
    """

    node: Node

    @property
    def spec(self) -> ActivationSpec:
        """Of a quantize or a fake_quantize."""
        return ActivationSpec.from_text(self.node.args[2])  # type: ignore[arg-type]

    @property
    def quantize(self) -> Node | None:
        """What made both the codes and the scale that a dequantize reads, if one quantize did."""
        q, scale = self.node.args[:2]
        made = is_call(q, operator.getitem) and is_call(scale, operator.getitem)
        if not made or (q.args[1], scale.args[1]) != (0, 1) or q.args[0] is not scale.args[0]:  # type: ignore[union-attr]
            return None
        return q.args[0] if is_call(q.args[0], QUANTIZE) else None  # type: ignore[union-attr, return-value]


class FakeQuantize(Pattern):
    """quantize -> dequantize is fake_quantize, which is defined as that."""

    name = "fake_quantize"
    numerics = BITWISE

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantizedActivation]:
        for node in list(graph.nodes):
            made = [a for a in node.all_input_nodes if is_call(a, operator.getitem) and is_call(a.args[0], QUANTIZE)]
            if is_call(node, DEQUANTIZE) and made:
                yield QuantizedActivation(node)

    def guard(self, candidate: QuantizedActivation, context: PassContext) -> str | None:
        node, quantize = candidate.node, candidate.quantize
        if quantize is None or node.args[2] is not None:
            return "its codes and its scale are not those of one quantize"
        if reader := _reader_besides(node, quantize):
            return f"the codes are also read by {op_name(reader)}"
        spec = QuantizedActivation(quantize).spec
        text, wanted = str(node.args[3]), spec.dequantized(_dtype_name(quantize.args[0]))  # type: ignore[arg-type]
        if WeightSpec.from_text(text) != wanted:
            found = WeightSpec.from_text(text)
            return f"it dequantizes {found.describe()} to {found.dtype}, of {wanted.dtype} by {spec.describe()}"
        return None

    def emit(self, candidate: QuantizedActivation, gm: GraphModule, context: PassContext) -> str:
        node, quantize = candidate.node, candidate.quantize
        assert quantize is not None
        with gm.graph.inserting_before(node):
            new = functional.call(gm.graph, FAKE_QUANTIZE, quantize.args, node)
        spec = QuantizedActivation(quantize).spec
        replace_and_prune(node, new)
        return spec.describe()

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_activation_examples import fake_quantize_examples

        return fake_quantize_examples()


class ScaledLinear(Pattern):
    """fake_quantize -> quantized linear by codes of its kind: the linear quantizes what it reads, and scales its sums.

    Several linears share the codes, which then stay an op of their own, if every step has them.
    """

    name = "scaled_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantizedActivation]:
        return (QuantizedActivation(node) for node in list(graph.nodes) if is_call(node, FAKE_QUANTIZE))

    def guard(self, candidate: QuantizedActivation, context: PassContext) -> str | None:
        node, spec = candidate.node, candidate.spec
        linears = _linears(node)
        if isinstance(linears, Node):
            return f"what it makes is read by {op_name(linears)}, which is no quantized linear"
        if not linears:
            return "nothing reads what it makes"
        for linear in linears:
            weight = WeightSpec.from_text(linear.args[SPEC])  # type: ignore[arg-type]
            if (weight.kind, weight.bits) != (spec.kind, spec.bits):
                return f"activations are {spec.codes}, the weight {weight.describe()}"
            if linear.args[3] is not None:
                return "the weight has zero points"
            if Program.from_text(linear.args[PROGRAM]).norm is not None:  # type: ignore[arg-type]
                return "a norm stands between the codes and the linear"
        return None

    def emit(self, candidate: QuantizedActivation, gm: GraphModule, context: PassContext) -> str:
        node, spec, linears = candidate.node, candidate.spec, _linears(candidate.node)
        assert not isinstance(linears, Node)
        x, scale = node.args[:2]
        shared = len(linears) > 1 and not spec.least_tokens
        if shared:
            with gm.graph.inserting_before(node):
                made = functional.call(gm.graph, QUANTIZE, (x, scale, spec.to_text()), node)
                x, scale = (functional.call(gm.graph, operator.getitem, (made, i), node) for i in range(2))
        for linear in linears:
            with gm.graph.inserting_before(linear):
                rows = functional.as_rows(x, fake_value(linear.args[0]).shape[1])  # type: ignore[arg-type]
                scales = scale
                if shared and spec.granularity != TENSOR:
                    scales = functional.as_rows(scale, fake_value(scale).shape[-1])  # type: ignore[arg-type]
                args = (rows, *linear.args[1:X_SCALE], scales, spec.to_text())
                new = functional.call(gm.graph, QUANT_LINEAR, args, linear)
            replace_and_prune(linear, new)
        how = f"{len(linears)} linears read the codes" if shared else "quantized inside"
        return f"{spec.describe()}: {how}"

    def operation(self, candidate: QuantizedActivation) -> str:
        linears = _linears(candidate.node)
        assert not isinstance(linears, Node)
        linear: Any = linears[0]
        program, weight = Program.from_text(linear.args[PROGRAM]), WeightSpec.from_text(linear.args[SPEC])
        dtype = fake_value(candidate.node).dtype
        return str(quant_shape(dtype, fake_value(linear.args[1]), None, program, weight, candidate.spec))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_activation_examples import scaled_linear_examples

        return scaled_linear_examples()


class NormQuantize(Pattern):
    """norm -> linear that quantizes what it reads: the linear norms it too.

    The normed value is no longer rounded to its 16 bits before it is quantized, so a code may be its neighbour.
    """

    name = "norm_quantize"
    numerics = QUANTIZING

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantizedActivation]:
        for node in list(graph.nodes):
            if is_call(node, QUANT_LINEAR) and len(node.args) > ACTIVATION and node.args[ACTIVATION]:
                source = skip_reshapes(node.args[0])  # type: ignore[arg-type]
                if is_call(source, NORM) and not is_codes(fake_value(node.args[0])):
                    yield QuantizedActivation(node)

    def guard(self, candidate: QuantizedActivation, context: PassContext) -> str | None:
        node = candidate.node
        norm = skip_reshapes(node.args[0])  # type: ignore[arg-type]
        if others := [reader for reader in _readers(norm) if reader is not node]:
            return f"the norm's result is also read by {op_name(others[0])}"
        if len(_readers(norm)) > 1 or node.args[0] in _flat(node.args[1:]):
            return "the norm's result is also an operand of the linear"
        return None

    def emit(self, candidate: QuantizedActivation, gm: GraphModule, context: PassContext) -> str:
        node: Any = candidate.node
        source, weight, bias, text = skip_reshapes(node.args[0]).args
        spec = NormSpec.from_text(text)  # type: ignore[arg-type]
        program = replace(Program.from_text(node.args[PROGRAM]), norm=spec)
        with gm.graph.inserting_before(node):
            rows = functional.as_rows(source, fake_value(node.args[0]).shape[1])  # type: ignore[arg-type]
            args = (rows, *node.args[1:4], weight, bias, node.args[6], program.to_text(), *node.args[SPEC:])
            new = functional.call(gm.graph, QUANT_LINEAR, args, node)
        replace_and_prune(node, new)
        return f"{spec.describe()}, then {ActivationSpec.from_text(node.args[ACTIVATION]).describe()}, in the linear"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_activation_examples import norm_quantize_examples

        return norm_quantize_examples()


class QuantizeRoundTrip(Pattern):
    """quantize of what the same codes stand for, by the same static scale, is those codes.

    code * scale is off by half a unit of its 8 bits at most, which is less than half a code away: rounding gives the
    code back. Scales outside of the normal numbers, where products vanish or overflow, are not such.
    """

    name = "quantize_round_trip"
    numerics = QUANTIZING
    dtypes = (torch.int8, torch.float8_e4m3fn)

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantizedActivation]:
        for node in list(graph.nodes):
            if is_call(node, QUANTIZE) and is_call(skip_reshapes(node.args[0]), DEQUANTIZE):  # type: ignore[arg-type]
                yield QuantizedActivation(node)

    def guard(self, candidate: QuantizedActivation, context: PassContext) -> str | None:
        node, spec = candidate.node, candidate.spec
        source = skip_reshapes(node.args[0])  # type: ignore[arg-type]
        codes, _, zero, text = source.args
        if spec.dynamic:
            return "its scale follows from the values"
        if WeightSpec.from_text(text) != spec.dequantized(_dtype_name(source)) or zero is not None:  # type: ignore[arg-type]
            return f"it dequantizes {WeightSpec.from_text(text).describe()}, and quantizes {spec.describe()}"  # type: ignore[arg-type]
        if fake_value(source).dtype not in (torch.float32, torch.bfloat16):
            return f"{fake_value(source).dtype} between them may overflow"
        first = QuantizedActivation(source).quantize
        if first is None or first.args[1] is not node.args[1]:
            return "the scales are not the same"
        if spec.kind != FP8 and fake_value(codes).dtype != spec.codes_dtype:
            return f"its codes are {fake_value(codes).dtype}"
        return None

    def emit(self, candidate: QuantizedActivation, gm: GraphModule, context: PassContext) -> str:
        node = candidate.node
        source = skip_reshapes(node.args[0])  # type: ignore[arg-type]
        parts = source.args[:2]
        for user in list(node.users):
            part = parts[user.args[1]]  # type: ignore[index]
            with gm.graph.inserting_before(user):
                new = functional.reshaped(part, user) if user.args[1] == 0 else part  # type: ignore[arg-type]
            replace_and_prune(user, new)  # type: ignore[arg-type]
        return "the codes that it was dequantized from"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_activation_examples import round_trip_examples

        return round_trip_examples()


def _dtype_name(node: Node) -> str:
    return str(fake_value(node).dtype).removeprefix("torch.")


def _reader_besides(node: Node, quantize: Node) -> Node | None:
    """A reader of a quantize's codes or scale that is not `node` nor another dequantize of both."""
    for part in quantize.users:
        if not is_call(part, operator.getitem):
            return part
        for user in part.users:
            if user is not node and not (is_call(user, DEQUANTIZE) and user.args[:3] == node.args[:3]):
                return user
    return None


def _readers(node: Node) -> list[Node]:
    """What reads the value of `node`, under any reshape; a size that only reshapes are told is not read."""
    found, stack = [], [node]
    while stack:
        for user in stack.pop().users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif not (is_call(user, aten.sym_size.int) and all(is_call(u, *RESHAPES) for u in user.users)):
                found.append(user)
    return found


def _linears(node: Node) -> list[Node] | Node:
    """Quantized linears that read `node`, under any reshape, as their activations; or another reader."""
    found, stack = [], [node]
    while stack:
        value = stack.pop()
        for user in value.users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif is_call(user, QUANT_LINEAR) and len(user.args) <= ACTIVATION and value not in _flat(user.args[1:]):
                found.append(user)
            else:
                return user
    return found


def _flat(argument: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return found
