"""Canonical router + experts -> canonical `routed_experts`: what is chosen need not leave the chip.

The same of experts whose weights are codes is a pattern of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.router import RouteSpec
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import RESHAPES, is_call, not_before, skip_reshapes

ROUTER = OPS.router.default
CHOSEN_ARGS = 3  # rows, ids and weights, before what the experts are
RESULTS = ("rows", "ids", "weights")


@dataclass(frozen=True)
class RoutedCandidate:
    """Canonical experts whose ids come from a canonical router.

    Attributes:
        node: the experts.
        router: the op that chooses.
        form_args: arguments of the experts between what is chosen and the residual.
    """

    node: Node
    router: Node
    form_args: int

    @property
    def form(self) -> list[Any]:
        """Weights and what is done with them."""
        return list(self.node.args[CHOSEN_ARGS : CHOSEN_ARGS + self.form_args])

    @property
    def residual(self) -> list[Node]:
        """The residual under its reshapes, if there is one."""
        return [skip_reshapes(v) for v in self.node.args[CHOSEN_ARGS + self.form_args :] if isinstance(v, Node)]


class RoutedExperts(Pattern):
    """Experts with the router in front of them, its norm included, where they alone read what is chosen.

    The norm's result stays a result: shared experts read it too.
    """

    name = "routed_experts"
    numerics = TOLERANCE
    experts: ClassVar[Any] = OPS.experts.default
    routed: ClassVar[Any] = OPS.routed_experts.default
    form_args: ClassVar[int] = 8

    def find(self, graph: torch.fx.Graph) -> Iterable[RoutedCandidate]:
        for node in list(graph.nodes):
            if is_call(node, self.experts) and (router := _result_of(node.args[1])):
                yield RoutedCandidate(node, router[0], self.form_args)

    def guard(self, candidate: RoutedCandidate, context: PassContext) -> str | None:
        node, router = candidate.node, candidate.router
        x, ids, weights, up = node.args[:4]
        normed = bool(router.args[6])
        if (_result_of(ids), _result_of(weights)) != ((router, 1), (router, 2)):
            return "its ids and weights are not those of one router"
        if (_result_of(x) != (router, 0)) if normed else (skip_reshapes(x) is not skip_reshapes(router.args[0])):  # type: ignore[arg-type]
            return "the experts read other rows than the router"
        if fake_value(up).shape[0] != fake_value(router.args[1]).shape[0]:
            return f"of the router's {fake_value(router.args[1]).shape[0]} experts some are elsewhere"
        if later := not_before(router, [*candidate.form, *candidate.residual]):
            return f"the experts also read a result of {op_name(later)}, which comes after the router"
        for which, reader in _other_readers(router, node):
            return f"the {RESULTS[which]} chosen are also read by {op_name(reader)}"
        return None

    def emit(self, candidate: RoutedCandidate, gm: GraphModule, context: PassContext) -> str:
        node, router = candidate.node, candidate.router
        with gm.graph.inserting_before(router):
            rows = [functional.as_rows(value, fake_value(node).shape[1]) for value in candidate.residual]
            new = functional.call(gm.graph, self.routed, (*router.args, *candidate.form, *rows), node)
            y, out = (functional.call(gm.graph, operator.getitem, (new, i), node) for i in range(2))
        replace_and_prune(node, out)
        for result in list(router.users):
            replace_and_prune(result, y)  # only the rows are left
        norm, spec = router.args[6], RouteSpec.from_text(router.args[8])  # type: ignore[arg-type]
        return f"{NormSpec.from_text(norm).describe()} -> {spec.describe()}" if norm else spec.describe()  # type: ignore[arg-type]

    def examples(self) -> list[Example]:
        from fusecomp.patterns.routed_experts_examples import routed_experts_examples

        return routed_experts_examples()


class RoutedQuantExperts(RoutedExperts):
    """The same of quantized experts."""

    name = "routed_quant_experts"
    experts = OPS.quant_experts.default
    routed = OPS.routed_quant_experts.default
    form_args = 14

    def examples(self) -> list[Example]:
        from fusecomp.patterns.routed_experts_examples import routed_quant_experts_examples

        return routed_quant_experts_examples()


def _result_of(value: Any) -> tuple[Node, int] | None:
    """(a canonical router, which of its results `value` is, under reshapes), or None."""
    while is_call(value, *RESHAPES) and fake_value(value).shape[-1:] == fake_value(value.args[0]).shape[-1:]:
        value = value.args[0]
    if is_call(value, operator.getitem) and is_call(value.args[0], ROUTER):
        return value.args[0], value.args[1]
    return None


def _other_readers(router: Node, experts: Node) -> Iterable[tuple[int, Node]]:
    """Readers of the ids and weights, under any reshape, other than one argument each of `experts`."""
    for result in router.users:
        stack, which = [result], int(result.args[1])  # type: ignore[arg-type]
        while stack and which:
            value = stack.pop()
            for user in value.users:
                if is_call(user, *RESHAPES):
                    stack.append(user)
                elif user is not experts or [i for i, arg in enumerate(user.args) if arg is value] != [which]:
                    yield which, user
