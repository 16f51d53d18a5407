"""Weights of experts in Dynamo's graph: three-dimensional ones, the product by one of which feeds that by another.

Legend: E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusecomp.patterns.base import fake_value, module_path, mutates, op_name
from fusecomp.patterns.dataflow import Dataflow
from fusecomp.patterns.functional import FLOATS

PRODUCTS = {"bmm", "matmul", "einsum", "baddbmm", "linear", "mm", "addmm", "tensordot"} | {
    *("_grouped_mm", "grouped_mm", "grouped_mm_fallback", "transformers.grouped_mm_fallback")
}
VIEWS = ("view", "reshape", "unflatten", "flatten")
MAX_BETWEEN = 80


@dataclass(frozen=True)
class Layout:
    """How expert weights lie: N up rows, F, and which of up and down is stored [E, in, out]."""

    rows: int
    inner: int
    transposed: tuple[bool, bool]


@dataclass
class WeightPair:
    """Expert weights that belong together.

    Attributes:
        node: the first product by `down`.
        ups: one weight, or a gate's and an up projection's.
        products: every product by `down`.
        proven: what the guard finds them to make.
    """

    node: Node
    ups: list[Node]
    down: Node
    products: list[Node]
    proven: Any = None


def layouts(up: Any, down: Any, hidden: int) -> list[Layout]:
    """Readings of weights' shapes as experts from `hidden` features to `hidden`; several where sizes are equal."""
    found = []
    for up_in, down_in in ((True, True), (False, False), (True, False), (False, True)):
        (c, n), (f, out) = (tuple(s[1:]) if t else (s[2], s[1]) for s, t in ((up, up_in), (down, down_in)))
        if up[0] == down[0] and c == out == hidden and n in (f, 2 * f):
            found.append(Layout(n, f, (up_in, down_in)))
    return found


def weight_pairs(graph: torch.fx.Graph) -> list[WeightPair]:
    """Expert weights that belong together, in the order of their last products."""
    flow = Dataflow(graph)
    products = {stack: _products(stack, flow) for node in graph.nodes for stack in _stacks(node)}
    owners: dict[Node, list[Node]] = {}  # a graph's other inputs may be three-dimensional as well
    for stack, nodes in products.items():
        for node in nodes:
            owners.setdefault(node, []).append(stack)
    pairs: list[WeightPair] = []
    taken: set[Node] = set()
    for down in sorted((s for s in products if products[s]), key=lambda s: flow.order[products[s][0]]):
        feeding = [up for up in _feeding(products[down][0], owners, down, flow) if up not in taken]
        ups = [up for up in feeding if _fits(up, down)]
        if len(ups) == 1 or (len(ups) == 2 and fake_value(ups[0]).shape == fake_value(ups[1]).shape):
            taken |= {*ups, down}
            pairs.append(WeightPair(products[down][0], ups, down, products[down]))
    return pairs


@dataclass
class SeparateWeights:
    """Experts of one layer that each have parameters of their own. `node` is the first one's first linear."""

    node: Node
    experts: list[str]


def separate_weights(graph: torch.fx.Graph) -> list[SeparateWeights]:
    """Modules of a list that read the same value by equal linears, and have more linears behind these."""
    linears = [node for node in graph.nodes if op_name(node) == "linear" and "nn_module_stack" in node.meta]
    paths = {node: module_path(node) for node in linears}
    lists: dict[tuple, dict[str, Node]] = {}
    for node in linears:
        parts = paths[node].split(".")
        for at in (i for i, part in enumerate(parts) if part.isdigit()):
            key = (_viewed(node.args[0]), at, *parts[:at], "*", *parts[at + 1 :])
            lists.setdefault(key, {})[".".join(parts[: at + 1])] = node
    found: dict[str, SeparateWeights] = {}
    for experts in lists.values():
        first, node = next(iter(experts.items()))
        inside = [
            n for n in linears if paths[n].startswith(f"{first}.") and _viewed(n.args[0]) is not _viewed(node.args[0])
        ]
        if len(experts) > 1 and inside:
            found.setdefault(first, SeparateWeights(node, list(experts)))
    return list(found.values())


def _viewed(node: Any) -> Any:
    while op_name(node) in VIEWS:
        node = node.args[0]
    return node


def _stacks(node: Node) -> list[Node]:
    """Three-dimensional weights that a graph input is, or is viewed as."""
    fake = fake_value(node)
    if node.op not in ("placeholder", "get_attr") or not isinstance(fake, Tensor) or fake.dtype not in FLOATS:
        return []
    if any(not isinstance(size, int) for size in fake.shape):
        return []
    if fake.dim() == 3:
        return [node]
    views = [user for user in node.users if op_name(user) in VIEWS]
    return [view for view in views if fake.dim() == 2 and fake_value(view).dim() == 3]


def _products(stack: Node, flow: Dataflow) -> list[Node]:
    """Matmuls by a weight, or by what is selected of it, in graph order."""
    derived, found, waiting = {stack}, set[Node](), [stack]
    while waiting:
        for user in waiting.pop().users:
            other = any(_is_float(n) and n not in derived for n in user.all_input_nodes)
            if other and op_name(user).removesuffix(".default") in PRODUCTS:
                found.add(user)
            elif not other and user.op in ("call_function", "call_method") and user not in derived:
                derived.add(user)
                waiting.append(user)
    return sorted(found, key=flow.order.__getitem__)


def _is_float(node: Node) -> bool:
    value = fake_value(node)
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _feeding(product: Node, owners: dict[Node, list[Node]], down: Node, flow: Dataflow) -> list[Node]:
    """Other weights whose products reach `product` through a few operations on floats."""
    found, seen, stack = dict[Node, None](), {product}, [product]
    while stack and len(seen) < MAX_BETWEEN:
        for source in flow.sources(stack.pop()):
            if source in seen or not (_is_float(source) or mutates(source)):
                continue
            seen.add(source)
            if others := [stack for stack in owners.get(source, ()) if stack is not down]:
                found.update(dict.fromkeys(others))
            else:
                stack.append(source)
    return list(found)


def _fits(up: Node, down: Node) -> bool:
    """Whether shapes allow experts from some hidden size to the same."""
    up_shape, down_shape = tuple(fake_value(up).shape), tuple(fake_value(down).shape)
    return any(layouts(up_shape, down_shape, hidden) for hidden in up_shape[1:])
