"""Quantized activations: products of codes by codes, and codes that are made of what the same codes stood for.

Legend: T tokens, K input features.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops.linear import Program
from fusecomp.ops.quant import FP8, TENSOR, ActivationSpec, WeightSpec
from fusecomp.patterns import functional
from fusecomp.patterns.base import (
    QUANTIZING,
    TOLERANCE,
    Example,
    PassContext,
    Pattern,
    fake_value,
    op_name,
    replace_and_prune,
)
from fusecomp.patterns.functional import RESHAPES, is_call, skip_reshapes
from fusecomp.patterns.quant import DEQUANTIZE, QUANT_LINEAR, QUANTIZE


@dataclass(frozen=True)
class QuantizedActivation:
    """Activations [..., T, K] that were quantized, and are dequantized again by `node`."""

    node: Node

    @property
    def quantize(self) -> Node | None:
        """What made both the codes and the scale, if one quantize did."""
        q, scale = self.node.args[:2]
        made = is_call(q, operator.getitem) and is_call(scale, operator.getitem)
        if not made or (q.args[1], scale.args[1]) != (0, 1) or q.args[0] is not scale.args[0]:  # type: ignore[union-attr]
            return None
        return q.args[0] if is_call(q.args[0], QUANTIZE) else None  # type: ignore[union-attr, return-value]

    @property
    def spec(self) -> ActivationSpec:
        assert self.quantize is not None
        return ActivationSpec.from_text(self.quantize.args[2])  # type: ignore[arg-type]


class ScaledLinear(Pattern):
    """quantize -> dequantize -> quantized linear: the linear reads the codes, and scales what it sums."""

    name = "scaled_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[QuantizedActivation]:
        for node in list(graph.nodes):
            made = [a for a in node.all_input_nodes if is_call(a, operator.getitem) and is_call(a.args[0], QUANTIZE)]
            if is_call(node, DEQUANTIZE) and made:
                yield QuantizedActivation(node)

    def guard(self, candidate: QuantizedActivation, context: PassContext) -> str | None:
        node = candidate.node
        if candidate.quantize is None or node.args[2] is not None:
            return "its codes and its scale are not those of one quantize"
        text, wanted = str(node.args[3]), candidate.spec.dequantized(_dtype_name(node))
        if WeightSpec.from_text(text) != wanted:
            return f"it is quantized as {candidate.spec.describe()}, dequantized as {wanted.describe()}"
        linears = _readers(node)
        if isinstance(linears, Node):
            return f"what it makes is read by {op_name(linears)}, which is no quantized linear"
        for linear in linears:
            weight = WeightSpec.from_text(linear.args[8])  # type: ignore[arg-type]
            if (weight.kind, weight.bits) != (candidate.spec.kind, candidate.spec.bits):
                return f"activations are {candidate.spec.kind}{candidate.spec.bits}, the weight {weight.describe()}"
            if linear.args[3] is not None:
                return "the weight has zero points"
            if Program.from_text(linear.args[7]).norm is not None:  # type: ignore[arg-type]
                return "a norm stands between the codes and the linear"
        return None

    def emit(self, candidate: QuantizedActivation, gm: GraphModule, context: PassContext) -> str:
        (codes, scale), spec = candidate.node.args[:2], candidate.spec
        linears: Any = _readers(candidate.node)
        for linear in linears:
            with gm.graph.inserting_before(linear):
                rows = functional.as_rows(codes, fake_value(linear.args[0]).shape[1])  # type: ignore[arg-type]
                scales = scale
                if spec.granularity != TENSOR:
                    scales = functional.as_rows(scale, fake_value(scale).shape[-1])  # type: ignore[arg-type]
                args = (rows, *linear.args[1:9], scales, spec.to_text())
                new = functional.call(gm.graph, QUANT_LINEAR, args, linear)
            replace_and_prune(linear, new)
        return f"{spec.describe()}: {len(linears)} linears read the codes"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.quant_activation_examples import scaled_linear_examples

        return scaled_linear_examples()


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
        node = candidate.node
        source, spec = skip_reshapes(node.args[0]), ActivationSpec.from_text(node.args[2])  # type: ignore[arg-type]
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


def _readers(node: Node) -> list[Node] | Node:
    """Quantized linears that read `node`, under any reshape, as their activations; or another reader."""
    found, stack = [], [node]
    while stack:
        value = stack.pop()
        for user in value.users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif is_call(user, QUANT_LINEAR) and value not in _flat(user.args[1:]):
                found.append(user)
            else:
                return user
    return found


def _flat(argument: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return found
