"""A matrix product with one term to every sum -> a broadcast multiplication, which Inductor fuses with its neighbours.

Hugging Face's rotary embedding is one: frequencies [1, D/2, 1] by positions [1, 1, T]. As a matmul it is a library call
between pointwise kernels; as a multiplication, it and the whole cos and sin table are one kernel.

It is exact: a matmul that accumulates in fp32 rounds the one product once to the output's dtype, and so does a
multiplication, which never goes through TF32. Only the sign of a zero may differ (a sum starts at +0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fusecomp.patterns import functional
from fusecomp.patterns.base import BITWISE, Example, PassContext, Pattern, fake_value, replace_and_prune
from fusecomp.patterns.functional import aten, is_call, size_key

PRODUCTS = (aten.mm.default, aten.bmm.default)
PRODUCTS_WITH_ADDEND = (aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class OuterCandidate:
    """`node` is a matrix product whose contracted size is 1."""

    node: Node


class OuterProduct(Pattern):
    """`mm` or `bmm` of [..., M, 1] by [..., 1, N] -> `mul`."""

    name = "outer_product"
    numerics = BITWISE

    def find(self, graph: torch.fx.Graph) -> Iterable[OuterCandidate]:
        products = [node for node in graph.nodes if is_call(node, *PRODUCTS, *PRODUCTS_WITH_ADDEND)]
        return [OuterCandidate(node) for node in products if 1 in map(size_key, _contracted(node))]

    def guard(self, candidate: OuterCandidate, context: PassContext) -> str | None:
        if is_call(candidate.node, *PRODUCTS_WITH_ADDEND):
            return "it adds to the product before it rounds, a multiplication and an addition round twice"
        return None

    def emit(self, candidate: OuterCandidate, gm: GraphModule, context: PassContext) -> str:
        node, graph = candidate.node, gm.graph
        with graph.inserting_before(node):
            new = functional.call(graph, aten.mul.Tensor, node.args, node)
            if _strides(new) != _strides(node):  # a multiplication lays its result out as its operands are
                new = functional.call(graph, aten.clone.default, (new,), node, memory_format=torch.contiguous_format)
        replace_and_prune(node, new)
        return "one product per element: a multiplication"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.functional_examples import outer_examples

        return outer_examples()


def _contracted(node: Node) -> tuple:
    """The contracted size as both operands give it: either proves it, since they are equal."""
    a, b = map(fake_value, node.args[-2:])
    return a.shape[-1], b.shape[-2]


def _strides(node: Node) -> list:
    return [size_key(stride) for stride in fake_value(node).stride()]
