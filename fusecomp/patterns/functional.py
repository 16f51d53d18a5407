"""Reading Inductor's functional ATen graphs: views that keep the order of elements, pointwise operations, regions.

A packed step holds one row of features per token. In these graphs such a value is [T, N], or the same with
dimensions of size 1 in front or between; a *token tensor* is any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusecomp.patterns.base import fake_value

aten = torch.ops.aten
prims = torch.ops.prims

RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.alias.default,
)
CAST = prims.convert_element_type.default
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def size_key(size: Any) -> Any:
    """A size that compares equal for equal expressions, without adding a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def token_shape(node: Node) -> tuple[Any, int] | None:
    """(T, N) of a token tensor, T as `size_key` gives it; None for any other value."""
    fake = fake_value(node)
    if not isinstance(fake, Tensor) or fake.dim() < 2 or not isinstance(fake.shape[-1], int):
        return None
    rows = [key for key in map(size_key, fake.shape[:-1]) if key != 1]
    return (rows[0] if rows else 1, fake.shape[-1]) if len(rows) <= 1 else None


def is_widening(node: Node) -> bool:
    """Whether `node` casts a float tensor to a wider float type."""
    if not is_call(node, CAST):
        return False
    source = fake_value(node.args[0])
    return source.dtype in FLOATS and fake_value(node).dtype == torch.float32 != source.dtype


def skip_reshapes(node: Node) -> Node:
    """The value that `node` shows, under reshapes that keep rows of features whole."""
    while is_call(node, *RESHAPES):
        source = node.args[0]
        assert isinstance(source, Node)
        if token_shape(source) is None or token_shape(source) != token_shape(node):
            return node
        node = source
    return node


def not_before(node: Node, args: Any) -> Node | None:
    """One of the nodes among `args` that the graph does not compute before `node`, or None."""
    given: list[Node] = []
    torch.fx.node.map_arg(args, given.append)
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    return next((other for other in given if order[other] >= order[node]), None)


def descendants(node: Node) -> set[Node]:
    """Every node whose value depends on `node`, itself included."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def cone(target: Node, stop: Callable[[Node], bool], limit: int) -> list[Node] | None:
    """Nodes that `target` is computed from, in graph order, ending at (and without) those for which `stop` holds.

    None when there are more than `limit`.
    """
    seen, stack = {target}, [target]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen and not stop(source):
                seen.add(source)
                stack.append(source)
                if len(seen) > limit:
                    return None
    return [node for node in target.graph.nodes if node in seen]


def leaves(region: Iterable[Node]) -> list[Node]:
    """Inputs of a region, in order of first use."""
    members = set(region)
    return list(
        dict.fromkeys(arg for node in members_in_order(members) for arg in node.all_input_nodes if arg not in members)
    )


def members_in_order(members: set[Node]) -> list[Node]:
    """The members in graph order."""
    return [node for node in next(iter(members)).graph.nodes if node in members] if members else []


def evaluate_region(region: Sequence[Node], given: dict[Node, Any]) -> Any:
    """Value of the region's last node; see `region_values`."""
    return region_values(region, given)[region[-1]]


def region_values(region: Sequence[Node], given: dict[Node, Any]) -> dict[Node, Any]:
    """Value of each node of a region on the CPU in fp64, with casts between float types left out.

    Args:
        region: nodes in graph order.
        given: a value for each leaf.
    """
    values = dict(given)
    for node in region:
        if is_call(node, CAST) and node.args[1] in FLOATS:
            source = values[node.args[0]]  # type: ignore[index]
            values[node] = source if source.is_floating_point() else source.double()
            continue
        args, kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: values[a] if isinstance(a, Node) else a
        )
        values[node] = node.target(*args, **_in_fp64_on_cpu(kwargs))  # type: ignore[operator]
    return values


def _in_fp64_on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    changed = {"dtype": torch.float64} if kwargs.get("dtype") in FLOATS else {}
    return {**kwargs, **changed, **({"device": torch.device("cpu")} if "device" in kwargs else {})}


def size_node(tensor: Node, dim: int) -> Any:
    """Size of `dim` as an argument for a call: a number, or a node inserted at the current point."""
    size = fake_value(tensor).shape[dim]
    if isinstance(size, int):
        return size
    node = tensor.graph.call_function(aten.sym_size.int, (tensor, dim))
    node.meta["val"] = size
    return node


def call(graph: torch.fx.Graph, target: Any, args: tuple, like: Node | None = None, **kwargs: Any) -> Node:
    """Insert a call and infer its fake value; `like` gives it the metadata of the code it stands for."""
    node = graph.call_function(target, args, kwargs)
    fake_args = torch.fx.node.map_aggregate(args, lambda a: fake_value(a) if isinstance(a, Node) else a)
    if like is not None:
        node.meta.update(
            {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", "original_aten")}
        )
    with torch.no_grad():
        node.meta["val"] = target(*fake_args, **kwargs)
    return node


def reshaped(source: Node, like: Node) -> Node:
    """`source` [T, N] in the shape of token tensor `like`, inserted at the current point; itself if equal."""
    shape = [size_key(s) for s in fake_value(like).shape]
    if shape == [size_key(s) for s in fake_value(source).shape]:
        return source
    rows, _ = token_shape(like)  # type: ignore[misc]
    sizes = [size_node(source, 0) if key == rows and rows != 1 else key for key in shape[:-1]]
    return call(source.graph, aten.reshape.default, (source, [*sizes, shape[-1]]), like)


def as_rows(source: Node, width: int) -> Node:
    """Token tensor `source` as [T, width], inserted at the current point; itself if it is that."""
    if fake_value(source).dim() == 2:
        return source
    fake = fake_value(source)
    at = next((i for i, s in enumerate(fake.shape[:-1]) if size_key(s) != 1), None)
    if at is None:
        return call(source.graph, aten.reshape.default, (source, [1, width]), source)
    return call(source.graph, aten.reshape.default, (source, [size_node(source, at), width]), source)
