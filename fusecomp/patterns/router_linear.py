"""(norm ->) linear -> canonical `route` becomes canonical `router`: the whole way from hidden states to experts.

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
from fusecomp.patterns.functional import RESHAPES, is_call, skip_reshapes

LINEAR, NORM, ROUTE, ROUTER = OPS.linear.default, OPS.norm.default, OPS.route.default, OPS.router.default


@dataclass(frozen=True)
class RouterCandidate:
    """A canonical route of a canonical linear's result.

    Attributes:
        node: the route.
        linear: what its logits are.
        norm: the canonical norm that the linear reads, where the router can stand in its place, or None.
    """

    node: Node
    linear: Node
    norm: Node | None

    @property
    def program(self) -> Program:
        return Program.from_text(self.linear.args[5])  # type: ignore[arg-type]

    @property
    def bias(self) -> Node | None:
        operands: Any = self.linear.args[4]
        return operands[0] if operands else None


class RouterLinear(Pattern):
    """The linear that makes a router's logits, and the norm before it, become part of the router."""

    name = "router_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[RouterCandidate]:
        for node in list(graph.nodes):
            if is_call(node, ROUTE) and is_call(linear := skip_reshapes(node.args[0]), LINEAR):
                yield RouterCandidate(node, linear, _norm_before(node, linear))

    def guard(self, candidate: RouterCandidate, context: PassContext) -> str | None:
        program, weight = candidate.program, fake_value(candidate.linear.args[1])
        if program.groups != 1 or program.kind not in ("identity", "bias") or program.norm is not None:
            return f"the linear before it computes {program.describe()}"
        if is_call(candidate.linear.args[1], OPS.dequantize.default):
            return "its weight is quantized, a router's is not"
        if program.torch_dtype != weight.dtype:
            return f"its logits are {program.torch_dtype}, the linear's weight {weight.dtype}"
        stack = [candidate.linear]
        while stack:
            for user in stack.pop().users:
                if is_call(user, *RESHAPES):
                    stack.append(user)
                elif user is not candidate.node:
                    return f"its logits are also read by {op_name(user)}"
        return None

    def emit(self, candidate: RouterCandidate, gm: GraphModule, context: PassContext) -> str:
        route, linear, norm = candidate.node, candidate.linear, candidate.norm
        given: Any = (linear.args[0], None, None, "") if norm is None else norm.args
        source, norm_weight, norm_bias, spec = given
        rest: Any = route.args
        _, route_bias, route_spec = rest
        with gm.graph.inserting_before(norm or route):
            rows = functional.as_rows(source, fake_value(linear.args[1]).shape[1])
            args = (rows, linear.args[1], candidate.bias, norm_weight, norm_bias, route_bias, spec, route_spec)
            new = functional.call(gm.graph, ROUTER, args, route)
            y, *chosen = (functional.call(gm.graph, operator.getitem, (new, i), route) for i in range(3))
            if norm is not None:
                y = functional.reshaped(y, norm)
        for user in list(route.users):
            replace_and_prune(user, chosen[user.args[1]])  # type: ignore[index]
        if norm is not None:
            replace_and_prune(norm, y)
        detail = RouteSpec.from_text(route_spec).describe()
        return detail if norm is None else f"{NormSpec.from_text(spec).describe()} -> {detail}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.router_examples import router_linear_examples

        return router_linear_examples()


def _norm_before(route: Node, linear: Node) -> Node | None:
    """The norm that `linear` reads, if all else that the router reads is there before it."""
    norm = skip_reshapes(linear.args[0])  # type: ignore[arg-type]
    others: Any = (linear.args[1], *linear.args[4], route.args[1])  # type: ignore[misc]
    if is_call(norm, NORM) and all(other is None or other.op == "placeholder" for other in others):
        return norm
    return None
