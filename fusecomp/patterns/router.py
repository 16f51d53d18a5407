"""What lies between router logits and the experts' index and weights, recognised by what it computes.

The subgraph is evaluated in fp64 on random logits and compared with the reference of every router that its operations
and constants suggest. One that agrees on all draws is the router, however it is spelled.

Legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp._compat import real_tensors
from fusecomp.ops import OPS
from fusecomp.ops.router import (
    LOGITS,
    MAX,
    NONE,
    OVER_CHOSEN,
    SIGMOID,
    SOFTMAX,
    SPARSEMIXER,
    SUM,
    TOP2,
    RouteSpec,
    route_reference,
)
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import FLOATS, RESHAPES, aten, is_call, size_key, token_shape

EXPERTS, ROUTE = OPS.experts.default, OPS.route.default
# Where the region ends: what a router's logits come from.
SOURCES = (aten.mm.default, aten.addmm.default, aten.bmm.default, OPS.linear.default, OPS.norm.default, EXPERTS)
# These choose among values without rounding any.
SELECTIONS = (
    *RESHAPES,
    operator.getitem,
    *(aten.topk.default, aten.max.dim, aten.amax.default, aten.sort.default, aten.sort.stable),
    *(aten.scatter.value, aten.scatter.src, aten.gather.default, aten.where.self, aten.full.default),
    *(aten.expand.default, aten.clone.default, aten.slice.Tensor, aten.cat.default),
)
SIGMOIDS, SOFTMAXES = (aten.sigmoid.default,), (aten.exp.default, aten._softmax.default)
MAX_NODES, MAX_SOURCES = 100, 8
ROWS, MIN_ROWS, AGREEMENT = (48, 17), 48, 1e-9


@dataclass(frozen=True)
class Routing:
    """How an experts node comes by its index and weights.

    Attributes:
        node: the experts node.
        index, weights: its inputs [T, K].
        logits: the value [T, E] that both follow from.
        region: nodes between, in graph order.
        vectors: the region's other inputs, one value an expert.
    """

    node: Node
    index: Node
    weights: Node
    logits: Node
    region: tuple[Node, ...]
    vectors: tuple[Node, ...]

    @property
    def experts(self) -> int:
        return fake_value(self.logits).shape[-1]


@dataclass(frozen=True)
class ExpertsNode:
    """One experts node; its router is read when it is guarded."""

    node: Node


class Router(Pattern):
    """Scores, groups, top-k and weights become one op between the logits and the experts."""

    name = "router"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[ExpertsNode]:
        return [ExpertsNode(node) for node in graph.nodes if is_call(node, EXPERTS) and not _is_routed(node)]

    def guard(self, candidate: ExpertsNode, context: PassContext) -> str | None:
        found = identify(candidate.node)
        return found if isinstance(found, str) else None

    def emit(self, candidate: ExpertsNode, gm: GraphModule, context: PassContext) -> str:
        found = identify(candidate.node)
        assert not isinstance(found, str)
        routing, spec = found
        with gm.graph.inserting_before(candidate.node):
            logits = functional.as_rows(routing.logits, routing.experts)
            bias = routing.vectors[0] if routing.vectors else None
            if bias is not None and fake_value(bias).dim() != 1:
                bias = functional.call(gm.graph, aten.reshape.default, (bias, [routing.experts]), bias)
            route = functional.call(gm.graph, ROUTE, (logits, bias, spec.to_text()), routing.weights)
            index, weights = (functional.call(gm.graph, operator.getitem, (route, i)) for i in range(2))
        # The weights first: they may have been gathered by the index.
        replace_and_prune(routing.weights, weights)
        replace_and_prune(routing.index, index)
        biased = ", chosen with a bias" if bias is not None else ""
        return f"{routing.experts} experts, {spec.describe()}{biased}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.router_examples import router_examples

        return router_examples()


def _is_routed(node: Node) -> bool:
    return any(is_call(arg, operator.getitem) and is_call(arg.args[0], ROUTE) for arg in node.args[1:3])  # type: ignore[union-attr]


def identify(node: Node) -> tuple[Routing, RouteSpec] | str:
    """The router that feeds an experts node, or why there is none."""
    reasons = []
    for routing in routings(node):
        reason = shared_reason(routing) or rounding_reason(routing)
        if not reason and (spec := prove(routing)):
            return routing, spec
        reasons.append(reason)
    if not reasons:
        return "what chooses its experts does not follow from one value per token and expert"
    return next(filter(None, reasons), "what chooses its experts is no router in the vocabulary")


def routings(node: Node) -> Iterator[Routing]:
    """Ways to read an experts node's index and weights as functions of one value [T, E], earliest value first."""
    index, weights, up = node.args[1], node.args[2], node.args[3]
    if not isinstance(index, Node) or not isinstance(weights, Node) or fake_value(index).dim() != 2:
        return
    whole = _cones((index, weights), None)
    if whole is None:
        return
    shape = (size_key(fake_value(index).shape[0]), fake_value(up).shape[0])
    values = {*whole, *functional.leaves(whole)} - {index, weights}
    sources = [value for value in sorted(values) if token_shape(value) == shape and fake_value(value).dtype in FLOATS]
    for source in sources[:MAX_SOURCES]:
        region = _cones((index, weights), source)
        assert region is not None
        others = [leaf for leaf in functional.leaves(region) if leaf is not source and not _is_size(leaf, shape[0])]
        if len(others) <= 1 and all(_is_vector(leaf, shape[1]) for leaf in others):
            yield Routing(node, index, weights, source, tuple(region), tuple(others))


def _cones(targets: tuple[Node, ...], source: Node | None) -> list[Node] | None:
    """Nodes that `targets` are computed from, ending at `source` and where matmuls, inputs and random numbers are."""

    def stop(node: Node) -> bool:
        tags = getattr(node.target, "tags", ())
        return (
            node is source
            or node.op != "call_function"
            or node.target in SOURCES
            or torch.Tag.nondeterministic_seeded in tags
        )

    cones = [functional.cone(target, stop, MAX_NODES) for target in targets if not stop(target)]
    if any(cone is None for cone in cones):
        return None
    return functional.members_in_order({node for cone in cones for node in cone or ()})


def _is_size(node: Node, tokens: Any) -> bool:
    return isinstance(fake_value(node), torch.SymInt) and size_key(fake_value(node)) == tokens


def _is_vector(node: Node, width: int) -> bool:
    fake = fake_value(node)
    sizes = [size_key(size) for size in fake.shape] if isinstance(fake, Tensor) else []
    return [size for size in sizes if size != 1] == [width] and fake.dtype in FLOATS


def shared_reason(routing: Routing) -> str | None:
    """Why the region cannot be replaced: something else reads what it computes."""
    members = {*routing.region, routing.node}
    for node in routing.region:
        if reader := next((user for user in node.users if user not in members), None):
            what = {routing.index: "its index", routing.weights: "its weight"}.get(node, f"the value {node.name}")
            return f"{what} is also read by {op_name(reader)}"
    return None


def rounding_reason(routing: Routing) -> str | None:
    """Why the choice may differ: the graph rounds the scores that it chooses by, where the op would not.

    What only selects rounds nothing, nor does a cast to a wider type.
    """
    for node in _cones((routing.index,), routing.logits) or ():
        fake = fake_value(node)
        narrow = isinstance(fake, Tensor) and fake.dtype in (torch.bfloat16, torch.float16)
        if narrow and not is_call(node, *SELECTIONS):
            dtype = str(fake.dtype).removeprefix("torch.")
            return f"its experts are chosen by scores that {op_name(node)} rounds to {dtype}"
    return None


def prove(routing: Routing) -> RouteSpec | None:
    """The router that the region computes on every draw, or None."""
    with real_tensors(), torch.no_grad():
        draws = []
        for logits, bias in _inputs(routing):
            made = _evaluate(routing, logits, bias)
            if made is None:
                return None
            draws.append((logits, bias if routing.vectors else None, made))
        for spec in specs(routing):
            if all(_agrees(spec, *draw) for draw in draws):
                return spec
    return None


def _inputs(routing: Routing) -> Iterator[tuple[Tensor, Tensor]]:
    """Random logits and biases, for two numbers of tokens where the graph leaves it open.

    Sigmoids are not drawn where they are 1 in fp64, and therefore tied.
    """
    rows = fake_value(routing.index).shape[0]
    lengths = [rows] * -(-MIN_ROWS // rows) if isinstance(rows, int) else ROWS
    steep = 4 if any(is_call(node, *SIGMOIDS) for node in routing.region) else 30
    for seed, (tokens, draw) in enumerate(product(lengths, range(5))):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, routing.experts, generator=generator, dtype=torch.float64)
        bias = torch.randn(routing.experts, generator=generator, dtype=torch.float64)
        yield (
            (x, 0.5 * bias),
            (4 * x, 0.01 * bias),  # now the bias decides, now the scores do
            (1 + 0.02 * x, 0.1 * bias),  # nearly level
            (-20 * x.abs() - 40, 0.5 * bias),  # so low that what is added to a sum of scores counts
            (steep * x, 3 * bias),  # chosen by the bias against the scores, whose sum is then small
        )[draw]


def _evaluate(routing: Routing, logits: Tensor, bias: Tensor) -> Tensor | None:
    """What the region makes of them as weights [T, E], NaN where an expert is not chosen; None if it fails."""
    given: dict[Node, Any] = {routing.logits: logits.view(*[1] * (fake_value(routing.logits).dim() - 2), *logits.shape)}
    given |= {vector: bias.view(fake_value(vector).shape) for vector in routing.vectors}
    given |= {leaf: len(logits) for leaf in functional.leaves(routing.region) if leaf not in given}
    try:
        values = functional.region_values(routing.region, given)
        return _spread(values[routing.index], values[routing.weights].double(), routing.experts)
    except Exception:  # a foreign subgraph may fail in any way; then nothing is proven
        return None


def _spread(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.full((len(index), experts), torch.nan, dtype=torch.float64).scatter(1, index.long(), weights)


def specs(routing: Routing) -> Iterator[RouteSpec]:
    """Routers that the region's operations, shapes and constants suggest."""
    k, dtype = fake_value(routing.index).shape[1], str(fake_value(routing.weights).dtype).removeprefix("torch.")
    choice = _cones((routing.index,), routing.logits) or []
    constants = sorted({float(a) for node in routing.region for a in node.args if isinstance(a, int | float)})
    positive = [c for c in constants if 0 < c < torch.inf and c != 1]
    small = [c for c in positive if c < 1e-2]
    sums = [(SUM, 0.0, 0.0), *((SUM, c, 0.0) for c in small), *((SUM, 0.0, c) for c in small)]
    scales = [1.0, *positive]
    if any(is_call(node, *SIGMOIDS, *SOFTMAXES) for node in choice):
        kinds = [SIGMOID if any(is_call(node, *SIGMOIDS) for node in choice) else SOFTMAX]
        normalisations = [(NONE, 0.0, 0.0), *sums]
    else:
        kinds, normalisations = [LOGITS], [(OVER_CHOSEN, 0.0, 0.0)]
        for threshold in positive:
            yield RouteSpec(SPARSEMIXER, k, threshold=threshold, dtype=dtype)
    for kind, (normalise, eps, floor), grouping, scale in product(kinds, normalisations, _groupings(routing), scales):
        yield RouteSpec(kind, k, normalise, eps, floor, *grouping, scale, dtype=dtype)


def _groupings(routing: Routing) -> list[tuple[int, int, str]]:
    """(groups, groups chosen, how a group is scored): first none, then those of which a value [T, G, E / G] speaks."""
    shapes = [fake_value(node).shape for node in routing.region if isinstance(fake_value(node), Tensor)]
    counts = {s[-2] for s in shapes if len(s) > 2 and isinstance(s[-2], int) and s[-2] * s[-1] == routing.experts}
    found = [(1, 1, MAX)]
    for node in routing.region:
        if is_call(node, aten.topk.default) and (groups := fake_value(node.args[0]).shape[-1]) in counts:
            chosen = int(node.args[1])  # type: ignore[arg-type]
            found += [(groups, chosen, score) for score in (MAX, TOP2)]
    return list(dict.fromkeys(found))


def _agrees(spec: RouteSpec, logits: Tensor, bias: Tensor | None, made: Tensor) -> bool:
    try:
        index, weights = route_reference(logits, bias, _exact(spec))
    except (RuntimeError, IndexError):  # sizes that do not fit: more groups chosen than there are
        return False
    wanted = _spread(index, weights, logits.shape[1])
    if not torch.equal(wanted.isnan(), made.isnan()):
        return False
    wanted, made = wanted.nan_to_num(0), made.nan_to_num(0)
    return bool(((made - wanted).abs() <= AGREEMENT * wanted.abs().amax(1, keepdim=True)).all())


def _exact(spec: RouteSpec) -> str:
    return RouteSpec(**{**vars(spec), "dtype": "float64"}).to_text()
