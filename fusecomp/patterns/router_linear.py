"""(norm ->) matmul -> canonical `route` becomes canonical `router`: the whole way from hidden states to experts.

The norm's result is read by the experts too. It becomes one of the router's, so that few tokens need one launch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.router import RouteSpec
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import CAST, RESHAPES, aten, is_call, skip_reshapes, token_shape

LINEAR, NORM, ROUTE, ROUTER = OPS.linear.default, OPS.norm.default, OPS.route.default, OPS.router.default


@dataclass(frozen=True)
class RouterCandidate:
    """A canonical route of a matmul's result.

    Attributes:
        node: the route.
        matmul: what its logits are: a canonical linear, or a product of widened activations and a widened weight.
        x, weight: operands of the matmul, before they are widened.
        norm: the canonical norm that the matmul reads, where the router can stand in its place, or None.
    """

    node: Node
    matmul: Node
    x: Node
    weight: Node
    norm: Node | None

    @property
    def program(self) -> Program | None:
        return Program.from_text(self.matmul.args[5]) if is_call(self.matmul, LINEAR) else None  # type: ignore[arg-type]

    @property
    def bias(self) -> Node | None:
        operands: Any = self.matmul.args[4] if self.program else ()
        return operands[0] if operands else None


class RouterLinear(Pattern):
    """The matmul that makes a router's logits, and the norm before it, become part of the router.

    Many models widen a router's operands to fp32. A product of two such numbers is exact, so the matrix units, which
    sum in fp32, compute the same from the narrow ones; the logits stay fp32.
    """

    name = "router_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[RouterCandidate]:
        for node in list(graph.nodes):
            if is_call(node, ROUTE):
                matmul = skip_reshapes(node.args[0])
                operands: Any = matmul.args[:2] if is_call(matmul, LINEAR) else _widened_operands(matmul)
                if operands:
                    x, weight = operands
                    yield RouterCandidate(node, matmul, x, weight, _norm_before(node, matmul, x, weight))

    def guard(self, candidate: RouterCandidate, context: PassContext) -> str | None:
        program, weight = candidate.program, fake_value(candidate.weight)
        if program is not None:
            if program.groups != 1 or program.kind not in ("identity", "bias") or program.norm is not None:
                return f"the linear before it computes {program.describe()}"
            if is_call(candidate.weight, OPS.dequantize.default):
                return "its weight is quantized, a router's is not"
            if program.torch_dtype != weight.dtype:
                return f"its logits are {program.torch_dtype}, the linear's weight {weight.dtype}"
        stack = [candidate.matmul]
        while stack:
            for user in stack.pop().users:
                if is_call(user, *RESHAPES):
                    stack.append(user)
                elif user is not candidate.node:
                    return f"its logits are also read by {op_name(user)}"
        return None

    def emit(self, candidate: RouterCandidate, gm: GraphModule, context: PassContext) -> str:
        route, matmul, norm = candidate.node, candidate.matmul, candidate.norm
        given: Any = (candidate.x, None, None, "") if norm is None else norm.args
        source, norm_weight, norm_bias, spec = given
        rest: Any = route.args
        _, route_bias, route_spec = rest
        weight, logits = candidate.weight, str(fake_value(matmul).dtype).removeprefix("torch.")
        with gm.graph.inserting_before(norm or route):
            rows = functional.as_rows(source, fake_value(weight).shape[1])
            args = (rows, weight, candidate.bias, norm_weight, norm_bias, route_bias, spec, logits, route_spec)
            new = functional.call(gm.graph, ROUTER, args, route)
            y, *chosen = (functional.call(gm.graph, operator.getitem, (new, i), route) for i in range(3))
            if norm is not None:
                y = functional.reshaped(y, norm)
        for user in list(route.users):
            replace_and_prune(user, chosen[user.args[1]])  # type: ignore[index]
        if norm is not None:
            replace_and_prune(norm, y)
        detail = f"{logits} logits -> {RouteSpec.from_text(route_spec).describe()}"
        return detail if norm is None else f"{NormSpec.from_text(spec).describe()} -> {detail}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.router_examples import router_linear_examples

        return router_linear_examples()


def _widened_operands(matmul: Node) -> tuple[Node, Node] | None:
    """(x [T, C], weight [E, C]) of a product of the one by the transpose of the other, both widened to fp32 before."""
    if not is_call(matmul, aten.mm.default):
        return None
    x, transposed = (arg for arg in matmul.args if isinstance(arg, Node))
    wide = skip_reshapes(x)
    weight, turns, casts = transposed, 0, 0
    while is_call(weight, aten.t.default, aten.permute.default, CAST):
        turns += not is_call(weight, CAST)
        casts += functional.is_widening(weight)
        weight = weight.args[0]  # type: ignore[assignment]
    if not functional.is_widening(wide) or (turns, casts) != (1, 1) or weight.op != "placeholder":
        return None
    narrow: Node = wide.args[0]  # type: ignore[assignment]
    fake = fake_value(weight)
    if token_shape(narrow) is None or fake.dtype != fake_value(narrow).dtype or not fake.is_contiguous():
        return None
    return narrow, weight


def _norm_before(route: Node, matmul: Node, x: Node, weight: Node) -> Node | None:
    """The norm that gives `x`, if all else that the router reads is there before it."""
    norm = skip_reshapes(x)
    bias: Any = matmul.args[4] if is_call(matmul, LINEAR) else ()
    others: Any = (weight, *bias, route.args[1])
    if is_call(norm, NORM) and all(other is None or other.op == "placeholder" for other in others):
        return norm
    return None
