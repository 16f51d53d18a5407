"""Equal quantizations of one value are one, on Dynamo's graph: linears that read them may then be merged.

Each quantized layer of a model rounds its own input, and q, k and v, or gate and up, have the same one. Their static
scales are one parameter where a checkpoint's were equal (`Placement.fill`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.quant import ActivationSpec
from fusecomp.patterns.base import BITWISE, Example, PassContext, Pattern
from fusecomp.patterns.evaluate import writers
from fusecomp.patterns.raw_attention import argument, is_call

QUANTIZE = (OPS.quantize, OPS.quantize.default)
FAKE_QUANTIZE = (OPS.fake_quantize, OPS.fake_quantize.default)
DEQUANTIZE = (OPS.dequantize, OPS.dequantize.default)


@dataclass(frozen=True)
class EqualQuantization:
    """`node` computes what `first`, before it in the graph, has computed, unless there is a refusal."""

    node: Node
    first: Node
    refusal: str | None = None


class SharedQuantize(Pattern):
    """The same quantize or fake_quantize of the same value, again: its readers read the first."""

    name = "shared_quantize"
    numerics = BITWISE

    def find(self, graph: torch.fx.Graph) -> Iterable[EqualQuantization]:
        found: dict[tuple, Node] = {}
        by_value: dict[tuple, Node] = {}
        for node in list(graph.nodes):
            for calls in (QUANTIZE, FAKE_QUANTIZE):
                if is_call(node, calls):
                    key = (calls, *(argument(node, i, name) for i, name in enumerate(("x", "scale", "spec"))))
                    first = found.setdefault(key, node)
                    if first is not node:
                        yield EqualQuantization(node, first)
                        continue
                    other = by_value.setdefault((calls, key[1], key[3]), node)
                    if other is not node:  # scales of equal value are one parameter, where a checkpoint is loaded
                        yield EqualQuantization(node, other, f"its static scale is another than {other.name}'s")

    def guard(self, candidate: EqualQuantization, context: PassContext) -> str | None:
        if candidate.refusal:
            return candidate.refusal
        source = argument(candidate.node, 0, "x")
        order = {node: i for i, node in enumerate(source.graph.nodes)}
        between = range(order[candidate.first], order[candidate.node])
        if any(order[writer] in between for writer in writers(source)):
            return f"{source.name} is changed in place between them"
        for node in (candidate.first, *candidate.first.users, candidate.node, *candidate.node.users):
            if node.op == "call_function" and is_call(node, (*FAKE_QUANTIZE, operator.getitem)) and writers(node):
                return f"{node.name} is changed in place"
        return None

    def emit(self, candidate: EqualQuantization, gm: GraphModule, context: PassContext) -> str:
        node, first = candidate.node, candidate.first
        node.replace_all_uses_with(first)
        gm.graph.erase_node(node)
        if is_call(first, QUANTIZE):
            _unite(first, (operator.getitem,))
            for part in list(first.users):
                _unite(part, DEQUANTIZE)
        return ActivationSpec.from_text(argument(first, 2, "spec")).describe()

    def examples(self) -> list[Example]:
        from fusecomp.patterns.shared_quantize_examples import shared_quantize_examples

        return shared_quantize_examples()


def _unite(node: Node, calls: tuple) -> None:
    """Of readers of `node` that make the same one of `calls`, leave the first."""
    found: dict[tuple, Node] = {}
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    for user in sorted(node.users, key=order.__getitem__):
        if is_call(user, calls):
            first = found.setdefault((user.args, tuple(user.kwargs.items())), user)
            if first is not user:
                user.replace_all_uses_with(first)
                user.graph.erase_node(user)
