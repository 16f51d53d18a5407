"""Parallel linears that share an input -> one linear by the weights stacked, on Dynamo's graph.

The stacked weight is laid out once, at capture: the parameters become views of it, so no second copy stays and
`state_dict` keeps its names. It enters the graph as a further input. Projections whose outputs meet in a product (gate
and up) are merged with each other, in their order; all others that share the input are merged together. Of a
dequantized weight its codes, scales and zero points are stacked, each as a weight.

Legend: T tokens, K input features, N output features of one linear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.quant import WeightSpec
from fusecomp.patterns.base import TOLERANCE, Example, MergedWeight, PassContext, Pattern, fake_value, module_path
from fusecomp.patterns.evaluate import writers
from fusecomp.patterns.functional import size_key
from fusecomp.patterns.raw_attention import argument, is_call

PRODUCTS = (operator.mul, torch.mul)
DEQUANTIZE = (OPS.dequantize, OPS.dequantize.default)
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
    def parts(self) -> list[list[Node | None]]:
        """What is stacked, each of all linears: the weights; or their codes, scales and zero points, if there are."""
        if not is_call(self.weights[0], DEQUANTIZE):
            return [list(self.weights)]
        named = [[argument(w, i, name) for w in self.weights] for i, name in enumerate(("q", "scale", "zero"))]
        return [part for part in named if part[0] is not None]

    @property
    def biases(self) -> list[Node | None]:
        return [argument(n, 2, "bias") for n in self.linears]


class MergedLinears(Pattern):
    """Two or more linears on one input, each by parameters of its own."""

    name = "merged_linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[LinearGroup]:
        by_input: dict[tuple, list[Node]] = {}
        for node in graph.nodes:
            if is_call(node, (F.linear,)):
                key = (argument(node, 0, "input"), *_layout(argument(node, 1, "weight")))
                by_input.setdefault(key, []).append(node)
        groups = []
        for linears in by_input.values():
            groups += [LinearGroup(part[0], part) for part in partition(linears) if len(part) > 1]
        return groups

    def guard(self, candidate: LinearGroup, context: PassContext) -> str | None:
        parts, biases = candidate.parts, [b for b in candidate.biases if b is not None]
        weights = [node for part in parts for node in part]
        if is_call(candidate.weights[0], DEQUANTIZE):
            if shared := next((w for w in candidate.weights if len(w.users) > 1), None):
                return f"{shared.name} is used {len(shared.users)} times"
            merged = _merged_spec(candidate)
            if isinstance(merged, str):
                return merged
        for node in (*weights, *biases):
            name = getattr(node, "name", node)
            if not isinstance(node, Node) or not isinstance(parameter(node), nn.Parameter):
                return f"{name} is no parameter"
            if len(node.users) > 1:
                return f"{name} is used {len(node.users)} times"
        stacks: list[list[Any]] = [*parts, biases]
        for part in stacks:
            kinds = {(parameter(n).dtype, parameter(n).device, parameter(n).shape[1:]) for n in part}
            if len(kinds) > 1:
                return "their parameters differ in dtype, width or device"
        tensors = [parameter(n) for n in (*weights, *biases)]
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
        graph, first, old_weights = gm.graph, candidate.node, candidate.weights
        source = argument(first, 0, "input")
        widths = [fake_value(w).shape[0] for w in old_weights]
        stacked = [
            self._append(gm, part, [fake_value(node).shape[0] for node in part], context) for part in candidate.parts
        ]
        weight, bias, spec = stacked[0], None, _merged_spec(candidate)
        if any(b is not None for b in candidate.biases):
            bias = self._append(gm, candidate.biases, widths, context)
        with graph.inserting_before(first):
            if is_call(old := old_weights[0], DEQUANTIZE):
                assert isinstance(spec, WeightSpec)
                args = (*stacked, *[None] * (3 - len(stacked)), spec.to_text())
                weight = graph.call_function(DEQUANTIZE[1], args)
                _describe(weight, old, fake_value(old).new_empty((sum(widths), *fake_value(old).shape[1:])))
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
        for old in old_weights:
            if is_call(old, DEQUANTIZE):
                graph.erase_node(old)
        names = " + ".join(module_path(n).rpartition(".")[2] for n in candidate.linears)
        return f"{names}: {' + '.join(map(str, widths))} rows of one weight"

    def _append(self, gm: GraphModule, parts: Sequence[Node | None], rows: list[int], context: PassContext) -> Node:
        """A new placeholder, after the last, for the stack of `parts` of so many rows; a missing bias is zeros."""
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


def _layout(weight: Any) -> tuple:
    """What weights must have in common to be stacked: none of them is dequantized, or all are and in the same way."""
    if not is_call(weight, DEQUANTIZE):
        return ("",)
    return argument(weight, 3, "spec"), argument(weight, 2, "zero") is None


def _merged_spec(group: LinearGroup) -> WeightSpec | str | None:
    """How the stack of dequantized weights is dequantized, or why it cannot be; None for plain weights."""
    if not is_call(group.weights[0], DEQUANTIZE):
        return None
    spec = WeightSpec.from_text(argument(group.weights[0], 3, "spec"))
    heights = [fake_value(w).shape[0] for w in group.weights]
    if any(fake_value(node).dim() != 2 for part in group.parts for node in part if node is not None):
        return "their codes or scales are no matrices"
    if spec.rows == 0:
        # One scale for all rows of each: in the stack, for as many rows of it.
        same = len(set(heights)) == 1
        return replace(spec, rows=heights[0]) if same else "each has one scale, and they differ in height"
    if any(height % spec.rows for height in heights[:-1]):
        return f"a scale serves {spec.rows} rows, heights are {', '.join(map(str, heights))}"
    return spec


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
