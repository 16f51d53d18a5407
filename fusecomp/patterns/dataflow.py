"""What depends on what in Dynamo's graph, which is not functional: a value also depends on writes to its memory.

`a.index_add_(...)` followed by a use of `a` has no edge between the two; here it has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusecomp.patterns.base import fake_value, mutates, op_name
from fusecomp.patterns.evaluate import SHAPE_ONLY as SHAPES_AND_ATTRIBUTES

SHAPE_ONLY = SHAPES_AND_ATTRIBUTES - {"getattr"}  # an attribute may be x.T


def storages(node: Any) -> set[int]:
    """Identities of the memory behind a node's value, or behind the values of a tuple."""
    found: set[int] = set()
    stack = [fake_value(node)] if isinstance(node, Node) else []
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.add(value.untyped_storage()._cdata)
        elif isinstance(value, tuple | list):
            stack.extend(value)
    return found


def written(node: Node) -> list[Node]:
    """The inputs that `node` writes to."""
    if not mutates(node):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        found = [given.get(name) for name in names]
    else:
        out = node.kwargs.get("out")
        found = [out] if out is not None else list(node.args[:1])
    nodes = [value for value in found if isinstance(value, Node)]
    return nodes or list(node.all_input_nodes)


def is_size(node: Node) -> bool:
    """Whether a node's value is a size, or a tuple of sizes, known without running anything."""
    value = fake_value(node)
    parts = value if isinstance(value, tuple) and value else (value,)
    return all(isinstance(part, int | torch.SymInt) and not isinstance(part, bool) for part in parts)


COUNTS = ("item", "tolist", "_local_scalar_dense", "_local_scalar_dense.default")


@dataclass(frozen=True)
class Cut:
    """Part of a graph that computes one value.

    Attributes:
        members: its nodes in graph order, what they write included; the last one is the value.
        leaves: what they read from outside.
    """

    members: tuple[Node, ...]
    leaves: tuple[Node, ...]


class Dataflow:
    """Dependencies of one graph as it is now."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.order: dict[Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self._memory: dict[Node, set[int]] = {}
        self._writes: dict[int, list[Node]] = {}
        self._sources: dict[Node, dict[Node, tuple[Node, ...]]] = {}  # node -> input -> who wrote to it in between
        self._readers: dict[Node, list[Node]] = {}
        self._counted: set[Node] = set()  # sizes that are computed from the values of tensors
        for node in graph.nodes:
            if is_size(node) and (op_name(node) in COUNTS or self._counted & {*node.all_input_nodes}):
                self._counted.add(node)
            self._memory[node] = storages(node)
            # What was written before a view was made, the view's own sources tell.
            self._sources[node] = {
                source: tuple(w for w in self._writers(source) if self.order[w] > self.order[source])
                for source in node.all_input_nodes
            }
            for source in self.sources(node):
                self._readers.setdefault(source, []).append(node)
            for target in written(node):
                for memory in self._memory[target]:
                    self._writes.setdefault(memory, []).append(node)

    def _writers(self, node: Node) -> dict[Node, None]:
        return dict.fromkeys(w for memory in self._memory[node] for w in self._writes.get(memory, ()))

    def sources(self, node: Node) -> list[Node]:
        """What `node` reads, and whoever wrote to that memory before it."""
        found = self._sources[node]
        return list(dict.fromkeys((*found, *(w for writers in found.values() for w in writers))))

    def descendants(self, node: Node) -> set[Node]:
        """Everything whose value depends on `node`, itself excluded."""
        seen: set[Node] = set()
        stack = [node]
        while stack:
            for reader in self._readers.get(stack.pop(), ()):
                if reader not in seen:
                    seen.add(reader)
                    stack.append(reader)
        return seen

    def latest_sources(self, node: Node, limit: int) -> list[Node]:
        """Up to `limit` nodes that `node` depends on, latest first."""
        found: list[Node] = []
        open_nodes = {node}
        while open_nodes and len(found) < limit:
            latest = max(open_nodes, key=self.order.__getitem__)
            open_nodes.remove(latest)
            found.append(latest)
            open_nodes.update(self.sources(latest))
        return found[1:]

    def cut(self, value: Node, stops: set[Node], limit: int) -> Cut | None:
        """What computes `value` from `stops`, sizes and the graph's inputs; None if it is longer than `limit`."""
        members, leaves, stack = {value}, dict[Node, None](), [value]
        while stack:
            node = stack.pop()
            for source, writers in self._sources[node].items():
                inner = source.op in ("call_function", "call_method") and op_name(node) not in SHAPE_ONLY
                is_leaf = source in stops or (is_size(source) and source not in self._counted)
                if is_leaf or not inner:
                    leaves[source] = None
                    continue
                for needed in (source, *writers):
                    if needed in stops:
                        if needed is not source:
                            return None  # it changes a value that the cut needs as it was before
                    elif needed not in members:
                        members.add(needed)
                        stack.append(needed)
                        if len(members) > limit:
                            return None
        outside = tuple(leaf for leaf in leaves if leaf not in members)
        return Cut(tuple(sorted(members, key=self.order.__getitem__)), outside)

    def changed_leaf(self, cut: Cut) -> str | None:
        """Why a leaf's value is not the same wherever the cut reads it, or None."""
        last = self.order[cut.members[-1]]
        for leaf in cut.leaves:
            if reads_shape_only(cut, leaf):
                continue
            first = min(self.order[node] for node in cut.members if leaf in self._sources[node])
            for writer in self._writers(leaf):
                if first <= self.order[writer] <= last:
                    return f"{leaf.name} is changed in place by {op_name(writer)}"
        return None

    def escapes(self, cut: Cut) -> tuple[str | None, set[Node], set[Node]]:
        """Who else reads what the cut computes.

        Returns: why the cut cannot be replaced, or None; nodes that go with it, which check its sizes or write where
            nobody reads; other names of the final value's memory, by which it is read.
        """
        value, members = cut.members[-1], set(cut.members)
        outside = {memory for leaf in cut.leaves for memory in self._memory[leaf]}
        checks: set[Node] = set()
        renamed: set[Node] = set()
        for node in cut.members[:-1]:
            for user in node.users:
                if user in members or user in checks:
                    continue
                if (ends := _only_checked(user)) is not None:
                    checks |= ends
                elif self._writes_in_vain(user, outside):
                    checks.add(user)
                elif self._same_value(node, value) and self.order[user] > self.order[value]:
                    renamed.add(node)
                else:
                    return f"the value {node.name} is also read by {op_name(user)}", set(), set()
        return None, checks, renamed

    def _writes_in_vain(self, node: Node, outside: set[int]) -> bool:
        """Whether `node` only changes memory that nobody reads afterwards, and none of `outside`."""
        targets = written(node)
        private = not any(self._memory[target] & outside for target in targets)
        return bool(targets) and private and not node.users and not self._readers.get(node)

    def _same_value(self, node: Node, value: Node) -> bool:
        ours, final = fake_value(node), fake_value(value)
        if not isinstance(ours, Tensor) or not isinstance(final, Tensor) or self._memory[node] != self._memory[value]:
            return False
        layouts = [(str(t.shape), str(t.stride()), str(t.storage_offset()), t.dtype) for t in (ours, final)]
        return layouts[0] == layouts[1]


def reads_shape_only(cut: Cut, leaf: Node) -> bool:
    """Whether a cut reads nothing of a leaf but its shape."""
    return all(op_name(node) in SHAPE_ONLY for node in cut.members if leaf in node.all_input_nodes)


def _only_checked(node: Node, limit: int = 16) -> set[Node] | None:
    """`node` and all that follows from it, if that is nothing but assertions and what nobody reads."""
    found, stack = {node}, [node]
    while stack:
        at = stack.pop()
        name = op_name(at)
        if at.op == "output" or (mutates(at) and "assert" not in name):
            return None
        for user in at.users:
            if user not in found:
                found.add(user)
                stack.append(user)
        if len(found) > limit:
            return None
    return found


def erase(nodes: Iterable[Node], order: dict[Node, int]) -> None:
    """Erase nodes that only each other read."""
    for node in sorted(nodes, key=order.__getitem__, reverse=True):
        node.graph.erase_node(node)
