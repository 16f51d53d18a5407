"""Rows that are chosen from the end of a stack of row-wise ops are chosen before them.

Logits are wanted of a few tokens of a step, yet a model computes its last layer for all of them. Whatever lies between
the last op that mixes tokens, which is an attention, and the choice treats each token by itself: output projection,
norms, experts, residuals. With the choice in front of them they are computed for the tokens whose logits are wanted.

Every op let through gives a row from that row alone. Its kernel is chosen by the number of rows, so the order of sums
may be another one, and activations that become codes from some number of tokens on keep their values below it.

Legend: T tokens of the step, S chosen rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.quant import TENSOR, ActivationSpec
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name, replace_and_prune
from fusecomp.patterns.functional import RESHAPES, aten, is_call, members_in_order, size_key
from fusecomp.patterns.rows import SELECTIONS, row_arguments

# What is worth moving a choice over.
PRODUCTS = (
    OPS.linear.default, OPS.quant_linear.default, OPS.experts.default, OPS.quant_experts.default,
    OPS.routed_experts.default, OPS.routed_quant_experts.default, OPS.experts_linear.default,
)  # fmt: skip
# Of token tensors [T, ...]; what else they take are parameters.
CANONICAL = (*PRODUCTS, OPS.norm.default, OPS.route.default, OPS.router.default)
# Gives codes; where its activations are in its arguments.
QUANTIZE = {OPS.quantize.default: 2, OPS.fake_quantize.default: 2, OPS.quant_linear.default: 10}
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
ALONG_A_DIM = (*SPLITS, aten.slice.Tensor, aten.cat.default)


@dataclass(frozen=True)
class HoistedRowsCandidate:
    """A choice of rows from what row-wise ops gave.

    Attributes:
        node: the choice.
        region: the row-wise ops that only it reads, directly or through one another, in graph order.
        tokens: T, as `size_key` gives it.
    """

    node: Node
    region: list[Node]
    tokens: Any


class HoistedRows(Pattern):
    """Row-wise ops -> rows becomes rows -> row-wise ops."""

    name = "hoisted_rows"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[HoistedRowsCandidate]:
        for node in list(graph.nodes):
            if is_call(node, *SELECTIONS) and (tokens := _chosen_from(node)) is not None:
                region = _region(node, tokens)
                if any(is_call(n, *PRODUCTS) for n in region):
                    yield HoistedRowsCandidate(node, region, tokens)

    def guard(self, candidate: HoistedRowsCandidate, context: PassContext) -> str | None:
        if isinstance(arguments := row_arguments(candidate.node), str):
            return arguments
        for node in candidate.region:
            for source in node.all_input_nodes:
                value = fake_value(source)
                if source in candidate.region:
                    continue
                if other := _other_size(value, candidate.tokens):
                    return f"{op_name(node)} reads {op_name(source)} of size {other}, which may be the number of tokens"
                if not _follows(value, candidate.tokens):
                    continue
                if isinstance(value, torch.SymInt) and size_key(value) != candidate.tokens:
                    return f"{op_name(node)} takes a size of {size_key(value)}"
                if isinstance(value, Tensor) and token_dim(value, candidate.tokens) is None:
                    return f"{op_name(node)} reads {op_name(source)}, of which tokens are not one dim"
        return None

    def emit(self, candidate: HoistedRowsCandidate, gm: GraphModule, context: PassContext) -> str:
        node, tokens, graph = candidate.node, candidate.tokens, gm.graph
        chosen: dict[Node, Any] = {}
        with graph.inserting_before(node):
            for old in candidate.region:
                for source in old.all_input_nodes:
                    if source not in chosen and token_dim(fake_value(source), tokens) is not None:
                        chosen[source] = _rows_of(source, node, tokens)
                for source in old.all_input_nodes:
                    if isinstance(value := fake_value(source), torch.SymInt) and size_key(value) == tokens:
                        chosen[source] = _size(chosen, tokens)
                args = torch.fx.node.map_arg(old.args, lambda n: chosen.get(n, n))
                chosen[old] = functional.call(graph, old.target, args, old, **old.kwargs)
        _keep_sizes(candidate)
        result = chosen[node.args[0]]  # type: ignore[index]
        assert [*map(size_key, fake_value(result).shape)] == [*map(size_key, fake_value(node).shape)]
        replace_and_prune(node, result)
        _erase_unread(candidate.region, graph)
        moved = [op_name(n).split(".")[0] for n in candidate.region if is_call(n, *PRODUCTS)]
        return f"rows chosen before {', '.join(moved)}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.hoisted_rows_examples import hoisted_rows_examples

        return hoisted_rows_examples()


def _erase_unread(region: list[Node], graph: torch.fx.Graph) -> None:
    """Erase what is left of the region: ops of several results of which one was never read, and what they read."""
    left = set(graph.nodes)
    for node in reversed(region):
        for user in list(node.users):
            if is_call(user, operator.getitem) and not user.users:
                graph.erase_node(user)
        if node in left and not node.users:
            graph.erase_node(node)


def token_dim(value: Any, tokens: Any) -> int | None:
    """The dim of a tensor that counts tokens; None if there is none, or another size follows their number too."""
    if not isinstance(value, Tensor):
        return None
    dims = [dim for dim, size in enumerate(value.shape) if _depends(size, tokens)]
    return dims[0] if len(dims) == 1 and size_key(value.shape[dims[0]]) == tokens else None


def _chosen_from(node: Node) -> Any:
    """T of what a choice is made from, where it is unknown and not the number of chosen rows."""
    before, after = fake_value(node.args[0]).shape, fake_value(node).shape
    if len(before) != len(after):
        return None
    changed = [a for a, b in zip(before, after, strict=True) if size_key(a) != size_key(b)]
    return size_key(changed[0]) if len(changed) == 1 and isinstance(changed[0], torch.SymInt) else None


def _region(node: Node, tokens: Any) -> list[Node]:
    """The row-wise ops that `node` alone reads, directly or through one another, in graph order."""
    members: set[Node] = set()
    stack = [node.args[0]]
    while stack:
        source = stack.pop()
        if isinstance(source, Node) and source not in members and _is_row_wise(source, tokens):
            members.add(source)
            stack.extend(source.all_input_nodes)
    # Whoever is read by others is computed for all tokens anyway, and so is what it reads.
    while others := {n for n in members if any(u is not node and u not in members and _reads(u) for u in n.users)}:
        members -= others
    # A reshape of what is read stays where it is: rows are chosen from [T, K].
    while first := {n for n in members if is_call(n, *RESHAPES) and n.args[0] not in members}:
        members -= first
    return members_in_order(members)


def _is_row_wise(node: Node, tokens: Any) -> bool:
    """Whether a row of what `node` gives follows from the same row of the token tensors it reads."""
    if node.op != "call_function" or any(isinstance(v, Node) for v in node.kwargs.values()):
        return False
    value, target = fake_value(node), node.target
    read = [fake_value(n) for n in node.all_input_nodes if isinstance(fake_value(n), Tensor | tuple | list)]
    if is_call(node, operator.getitem):
        return _is_row_wise(node.args[0], tokens)  # type: ignore[arg-type]
    if target in QUANTIZE and not _quantizes_rows(node):
        return False
    values = [v for v in value if v is not None] if isinstance(value, tuple | list) else [value]
    if not values or any(token_dim(v, tokens) is None for v in values):
        return False
    if target in CANONICAL or target in QUANTIZE:
        followers = [v for v in read if _follows(v, tokens)]
        return all(token_dim(v, tokens) == 0 for v in (*followers, *values))
    dim = token_dim(values[0], tokens)
    assert dim is not None
    followers = [v for v in read if _follows(v, tokens)]
    if not followers or not all(isinstance(v, Tensor) and token_dim(v, tokens) is not None for v in followers):
        return False
    if target in RESHAPES:  # a row stays whole if as many elements lie around it as before
        return _outer(values[0], dim) == _outer(followers[0], token_dim(followers[0], tokens)) is not None
    if torch.Tag.pointwise in getattr(target, "tags", ()) or target is functional.CAST:
        from_right = values[0].dim() - dim
        return all(v.dim() - token_dim(v, tokens) == from_right for v in followers)  # type: ignore[operator]
    if target in ALONG_A_DIM:
        along: Any = (*node.args[2 if target in SPLITS else 1 :], 0)[0]
        return along % followers[0].dim() != token_dim(followers[0], tokens)
    return False


def _quantizes_rows(node: Node) -> bool:
    """Whether an op that makes codes of activations does so row by row: no scale follows from all of them."""
    at = QUANTIZE[node.target]  # type: ignore[index]
    text: Any = node.args[at] if len(node.args) > at else ""
    spec = ActivationSpec.from_text(text) if text else None
    return spec is None or not (spec.dynamic and spec.granularity == TENSOR)


def _outer(value: Tensor, dim: int | None) -> int | None:
    sizes = value.shape[:dim]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _depends(size: Any, tokens: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols & tokens.free_symbols)


def _follows(value: Any, tokens: Any) -> bool:
    """Whether a value, or its shape, follows the number of tokens."""
    if isinstance(value, tuple | list):
        return any(_follows(v, tokens) for v in value)
    return any(_depends(s, tokens) for s in value.shape) if isinstance(value, Tensor) else _depends(value, tokens)


def _other_size(value: Any, tokens: Any) -> Any:
    """A size of `value`, or `value` itself, that is not known and not a function of T; None if there is none."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    unknown = [size_key(s) for s in sizes if isinstance(s, torch.SymInt)]
    return next((s for s in unknown if not s.free_symbols <= tokens.free_symbols), None)


def _reads(user: Node) -> bool:
    """Whether a user of a value needs its rows: not for its size, nor for a result that nobody uses."""
    return not is_call(user, aten.sym_size.int) and not (is_call(user, operator.getitem) and not user.users)


def _keep_sizes(candidate: HoistedRowsCandidate) -> None:
    """Read T, where it was read off the region, off a value that the region reads instead."""
    region = set(candidate.region)
    leaf, dim = next(
        (n, dim) for n in functional.leaves(region) if (dim := token_dim(fake_value(n), candidate.tokens)) is not None
    )
    for size in [u for n in candidate.region for u in n.users if is_call(u, aten.sym_size.int)]:
        if size_key(fake_value(size)) == candidate.tokens:
            size.args = (leaf, dim)


def _rows_of(source: Node, node: Node, tokens: Any) -> Node:
    """The choice that `node` makes, made from the token tensor `source`, inserted at the current point.

    It is made from [T, K]: of a result of four or five dims, Inductor of torch 2.11 asks whether it is in channels-last
    order, which nobody knows as long as S is unknown.
    """
    value, dim = fake_value(source), token_dim(fake_value(source), tokens)
    assert dim is not None
    if value.dim() == 2 or _outer(value, dim) != 1:
        return functional.call(source.graph, node.target, (source, *row_arguments(node, dim)), node)
    width = math.prod(value.shape[dim + 1 :])
    flat = functional.call(
        source.graph, aten.reshape.default, (source, [functional.size_node(source, dim), width]), source
    )
    rows = functional.call(source.graph, node.target, (flat, *row_arguments(node)), node)
    sizes = [*value.shape[:dim], functional.size_node(rows, 0), *value.shape[dim + 1 :]]
    return functional.call(source.graph, aten.reshape.default, (rows, sizes), source)


def _size(chosen: dict[Node, Any], tokens: Any) -> Any:
    """S, of a value that was chosen."""
    old, new = next((o, n) for o, n in chosen.items() if token_dim(fake_value(o), tokens) is not None)
    return functional.size_node(new, token_dim(fake_value(old), tokens))  # type: ignore[arg-type]
