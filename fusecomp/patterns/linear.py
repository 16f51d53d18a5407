"""Parallel linears that share an input -> one linear by the weights stacked, on Dynamo's graph.

The stacked weight is laid out once, at capture: the parameters become views of it, so no second copy stays and
`state_dict` keeps its names. It enters the graph as a further input. Projections whose outputs meet in a product (gate
and up) are merged with each other, in their order; all others that share the input are merged together.

Legend: T tokens, K input features, N output features of one linear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusecomp.patterns.base import TOLERANCE, Example, MergedWeight, PassContext, Pattern, fake_value, module_path
from fusecomp.patterns.evaluate import writers
from fusecomp.patterns.functional import size_key
from fusecomp.patterns.raw_attention import argument, is_call

PRODUCTS = (operator.mul, torch.mul)
MAX_CHAIN = 32


@dataclass
class LinearGroup:
    """Linears to merge. `node` is the first of them in graph order."""

    node: Node
    linears: list[Node]
    refusal: str = field(default="")

    @property
    def weights(self) -> list[Node]:
        return [argument(n, 1, "weight") for n in self.linears]

    @property
    def biases(self) -> list[Node | None]:
        return [argument(n, 2, "bias") for n in self.linears]


class MergedLinears(Pattern):
    """Two or more linears on one input, each by parameters of its own."""

    name = "merged_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[LinearGroup]:
        by_input: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            if is_call(node, (F.linear,)):
                by_input.setdefault(argument(node, 0, "input"), []).append(node)
        groups = []
        for linears in by_input.values():
            groups += [LinearGroup(part[0], part) for part in partition(linears) if len(part) > 1]
        return groups

    def guard(self, candidate: LinearGroup, context: PassContext) -> str | None:
        weights, biases = candidate.weights, [b for b in candidate.biases if b is not None]
        for node in (*weights, *biases):
            name = getattr(node, "name", node)
            if not isinstance(node, Node) or not isinstance(parameter(node), nn.Parameter):
                return f"{name} is no parameter"
            if len(node.users) > 1:
                return f"{name} is used {len(node.users)} times"
        tensors = [parameter(n) for n in (*weights, *biases)]
        if len({(t.dtype, t.device) for t in tensors}) > 1:
            return "their parameters differ in dtype or device"
        if any(not parameter(w).is_contiguous() for w in weights):
            return "a weight is not contiguous"
        memories = [(t.untyped_storage().data_ptr(), t.storage_offset()) for t in tensors]
        if len(set(memories)) < len(memories):
            return "two of them share their memory"
        source = argument(candidate.node, 0, "input")
        order = {node: i for i, node in enumerate(source.graph.nodes)}
        last = max(order[n] for n in candidate.linears)
        if any(order[candidate.node] < order[w] < last for w in writers(source)):
            return f"{source.name} is changed in place between them"
        return None

    def emit(self, candidate: LinearGroup, gm: GraphModule, context: PassContext) -> str:
        graph, first = gm.graph, candidate.node
        source = argument(first, 0, "input")
        weight = self._append(gm, candidate.weights, candidate, context)
        bias = None
        if any(b is not None for b in candidate.biases):
            bias = self._append(gm, candidate.biases, candidate, context)
        widths = [fake_value(w).shape[0] for w in candidate.weights]
        with graph.inserting_before(first):
            merged = graph.call_function(F.linear, (source, weight, bias))
            fake = fake_value(source)
            _describe(merged, first, fake.new_empty((*fake.shape[:-1], sum(widths))))
        start = 0
        for old, width in zip(candidate.linears, widths, strict=True):
            with graph.inserting_before(old):
                where: Any = (Ellipsis, slice(start, start + width))
                part = graph.call_function(operator.getitem, (merged, where))
                _describe(part, old, fake_value(merged)[where])
            old.replace_all_uses_with(part)
            graph.erase_node(old)
            start += width
        names = " + ".join(module_path(n).rpartition(".")[2] for n in candidate.linears)
        return f"{names}: {' + '.join(map(str, widths))} rows of one weight"

    def _append(self, gm: GraphModule, parts: Sequence[Node | None], group: LinearGroup, context: PassContext) -> Node:
        """A new placeholder, after the last, for the stack of `parts`; a missing bias is zeros."""
        rows = [fake_value(w).shape[0] for w in group.weights]
        like = parameter(next(p for p in parts if p is not None))
        given = [None if part is None else parameter(part) for part in parts]
        tensor = stack_parameters(given, rows, like)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        with gm.graph.inserting_after(placeholders[-1]):
            node = gm.graph.placeholder(f"merged_{len(context.merged)}")
        fakes = [fake_value(p) for p in parts if p is not None]
        # A fake tensor is made from another: there may be no fake mode to enter here.
        node.meta["example_value"] = fakes[0].new_empty((sum(rows), *fakes[0].shape[1:]))
        names = tuple(None if p is None else parameter_name(p) for p in parts)
        context.merged.append(MergedWeight(names, tensor))
        return node

    def examples(self) -> list[Example]:
        from fusecomp.patterns.linear_examples import merging_examples

        return merging_examples()


def _describe(node: Node, like: Node, fake: Any) -> None:
    node.meta.update({k: v for k, v in like.meta.items() if k != "tensor_dict"})
    node.meta["example_value"] = fake


def parameter(node: Any) -> Any:
    """The real tensor behind a placeholder while Dynamo's backend runs, or None."""
    if not isinstance(node, Node) or node.op != "placeholder":
        return None
    return getattr(node.meta.get("grapharg"), "example", None)


def parameter_name(node: Node) -> str:
    """How Dynamo names the source of a placeholder."""
    name = node.meta["grapharg"].source.name
    return str(name() if callable(name) else name)  # a method in torch 2.11, a property in 2.13


def partition(linears: list[Node]) -> list[list[Node]]:
    """Groups to merge: pairs whose outputs meet in a product first, then all that remain."""
    rest, groups = list(linears), []
    for gate in linears:
        for up in linears:
            if gate in rest and up in rest and gate is not up and _meets(gate, up):
                groups.append([gate, up])
                rest = [n for n in rest if n not in (gate, up)]
    return [*groups, rest] if rest else groups


def _meets(gate: Node, up: Node) -> bool:
    """Whether some function of `gate`'s output, in its own shape, is multiplied by `up`'s output itself."""
    shape = [size_key(s) for s in fake_value(gate).shape]
    if shape != [size_key(s) for s in fake_value(up).shape]:
        return False
    seen, stack = {gate}, [gate]
    while stack and len(seen) < MAX_CHAIN:
        node = stack.pop()
        for user in node.users:
            if is_call(user, PRODUCTS, "mul") and up in user.args:
                return True
            fake = fake_value(user)
            if user not in seen and isinstance(fake, Tensor) and [size_key(s) for s in fake.shape] == shape:
                seen.add(user)
                stack.append(user)
    return False


def stack_parameters(parts: Sequence[nn.Parameter | None], rows: Sequence[int], like: Tensor) -> Tensor:
    """Stack parameters along dim 0 and make each a view of the result; None becomes zeros.

    Parameters that are adjacent views already (of an earlier engine on the same model) are taken as they lie.
    """
    owned = [p for p in parts if p is not None]
    if len(owned) == len(parts) and _adjacent(owned):
        shape = (sum(rows), *like.shape[1:])
        return owned[0].detach().as_strided(shape, like.stride(), owned[0].storage_offset())
    with torch.no_grad():
        tensor = torch.zeros((sum(rows), *like.shape[1:]), dtype=like.dtype, device=like.device)
        start = 0
        for part, count in zip(parts, rows, strict=True):
            if part is not None:
                tensor[start : start + count].copy_(part)
                part.data = tensor[start : start + count]
            start += count
    return tensor


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the tensors lie one behind the other in one storage."""
    storage, at = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != at or not part.is_contiguous():
            return False
        at += part.numel()
    return True
