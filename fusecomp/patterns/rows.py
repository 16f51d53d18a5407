"""Rows that are chosen from a norm's result are chosen before the norm: only they are normalised.

Logits are wanted of a few tokens of a step. A model normalises all of them, chooses the rows, and multiplies by its
head; with the rows chosen first, the norm stands in front of a linear, which takes it in like any other.

It is exact: a norm is a function of each row alone, whichever rows are chosen and however often.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.patterns import functional
from fusecomp.patterns.base import (
    TOLERANCE,
    Example,
    PassContext,
    Pattern,
    fake_value,
    module_path,
    op_name,
    replace_and_prune,
)
from fusecomp.patterns.functional import RESHAPES, aten, is_call, size_key, skip_reshapes
from fusecomp.patterns.norm import LINEAR, NORM, NormCandidate, activations, identify, norm_reason, read_norm

SELECTIONS = (aten.index.Tensor, aten.index_select.default, aten.slice.Tensor)


@dataclass(frozen=True)
class SelectedRowsCandidate:
    """Rows of a norm's result that a linear reads.

    Attributes:
        node: the selection.
        norm: what it selects from.
    """

    node: Node
    norm: NormCandidate


class SelectedRows(Pattern):
    """norm -> rows -> linear becomes rows -> canonical `norm` -> linear."""

    name = "selected_rows"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[SelectedRowsCandidate]:
        read = [activations(node) for node in graph.nodes if is_call(node, LINEAR)]
        for node in dict.fromkeys(read):
            if is_call(node, *SELECTIONS) and (norm := read_norm(skip_reshapes(node.args[0]))):  # type: ignore[arg-type]
                yield SelectedRowsCandidate(node, norm)

    def guard(self, candidate: SelectedRowsCandidate, context: PassContext) -> str | None:
        chosen = row_arguments(candidate.node)
        if isinstance(chosen, str):
            return chosen
        if reader := _other_reader(candidate.norm.node, candidate.node):
            return f"the norm's result is also read by {op_name(reader)}"
        return norm_reason(candidate.norm)

    def emit(self, candidate: SelectedRowsCandidate, gm: GraphModule, context: PassContext) -> str:
        node, norm, graph = candidate.node, candidate.norm, gm.graph
        found, arguments = identify(norm), row_arguments(node)
        assert found is not None and not isinstance(arguments, str)
        spec, weight, bias = found
        with graph.inserting_before(node):
            rows = functional.as_rows(norm.source, fake_value(node).shape[-1])
            # Reshaped before the norm: a size read off the norm's result would be a second reader of it.
            chosen = functional.reshaped(functional.call(graph, node.target, (rows, *arguments), node), node)
            new = functional.call(graph, NORM, (chosen, weight, bias, spec.to_text()), norm.node)
        replace_and_prune(node, new)
        return f"rows chosen before the {spec.describe()}"

    def where(self, candidate: SelectedRowsCandidate) -> str:
        return module_path(candidate.norm.node)

    def examples(self) -> list[Example]:
        from fusecomp.patterns.functional_examples import selected_rows_examples

        return selected_rows_examples()


def row_arguments(node: Node, at: int = 0) -> tuple | str:
    """What follows the tensor in a call that makes the same choice along dim `at`, or why there is no such call."""
    shape, given = fake_value(node.args[0]).shape, node.args[1:]
    if is_call(node, aten.index.Tensor):
        indices: Any = given[0]
        dims = [dim for dim, index in enumerate(indices) if index is not None]
        arguments: tuple = ([*[None] * at, indices[dims[0]]],)
    else:
        dim: Any = given[0] if given else 0
        dims, arguments = [dim % len(shape)], (at, *given[1:])
    others = [size_key(size) for dim, size in enumerate(shape[:-1]) if dim not in dims]
    if node.kwargs or len(dims) != 1 or dims[0] == len(shape) - 1 or others != [1] * (len(shape) - 2):
        return "it does not choose whole rows of tokens"
    index = next((a for a in node.all_input_nodes[1:] if isinstance(fake_value(a), Tensor)), None)
    if index is not None and not _counts_rows(fake_value(index)):
        return f"its index {fake_value(index).dtype} {tuple(fake_value(index).shape)} is no list of row numbers"
    return arguments


def _counts_rows(index: Tensor) -> bool:
    """Whether `index` is one-dimensional and of numbers: a mask of rows gives an unknown number of them."""
    return index.dim() == 1 and index.dtype in (torch.int32, torch.int64)


def _other_reader(norm: Node, selection: Node) -> Node | None:
    """A reader of the value of `norm`, under any reshape, that is not `selection`."""
    stack = [norm]
    while stack:
        for user in stack.pop().users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif user is not selection:
                return user
    return None
