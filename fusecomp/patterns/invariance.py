"""The check behind `deterministic=True` on a GPU: every op of a compiled graph gives a token the same bits in any step.

Runs last in the fuse stage and rewrites nothing. An op is let through when it is a canonical one with a batch-invariant
kernel, when it treats elements one by one or moves them, or when it reduces dims of a known size, which the number of
tokens is not: Inductor then compiles one kernel, with one order of sums, for all steps. Anything else is a near miss,
and the engine refuses the model with it: a product that no pattern made a `linear` of would go to a library whose order
of sums follows the number of rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecomp.patterns.base import BITWISE, Example, PassContext, Pattern, fake_value, op_name

INVARIANT = {
    *("cache_write", "paged_attention", "rope_attention", "linear", "norm", "experts", "route", "router"),
    *("routed_experts", "experts_linear", "linear_experts", "linear_experts_linear", "linear_pair", "greedy"),
    "dequantize",
}
MOVES = {
    *("clone", "_to_copy", "convert_element_type", "cat", "index", "index_select", "embedding", "gather", "full"),
    *("full_like", "empty", "arange", "iota", "scalar_tensor", "slice_scatter", "select_scatter", "copy", "copy_"),
    *(
        "repeat",
        "constant_pad_nd",
        "device_put",
        "lift_fresh_copy",
        "zeros_like",
        "ones_like",
        "flip",
        "split",
        "unbind",
    ),
    *("split_with_sizes", "reshape", "_unsafe_view", "polar", "auto_functionalized", "auto_functionalized_v2"),
}
ASSERTIONS = {"_assert_scalar", "_assert_async", "_assert_tensor_metadata", "sym_constrain_range_for_size"}
# Reductions, and where they name their dims.
REDUCES = {"sum": 1, "mean": 1, "amax": 1, "amin": 1, "var": 1, "var_mean": 1, "prod": 1, "any": 1, "all": 1}
REDUCES |= {"_softmax": 1, "softmax": 1, "_log_softmax": 1, "logsumexp": 1, "argmax": 1}
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # their two factors


@dataclass(frozen=True)
class Refused:
    node: Node
    reason: str


class BatchInvariance(Pattern):
    name = "batch_invariance"
    numerics = BITWISE

    def find(self, graph: torch.fx.Graph) -> Iterator[Refused]:
        for node in graph.nodes:
            if node.op == "call_function" and (reason := refusal(node)):
                yield Refused(node, reason)

    def guard(self, candidate: Refused, context: PassContext) -> str:
        return candidate.reason

    def emit(self, candidate: Refused, gm: GraphModule, context: PassContext) -> str:
        raise AssertionError("nothing passes the guard")

    def _dtype_reason(self, candidate: Refused) -> None:
        return None

    def examples(self) -> list[Example]:
        def inputs(dtype: torch.dtype) -> tuple:
            return torch.randn(5, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype)

        return [Example("a product of a library", lambda x, w: x @ w, inputs, 0, "mm sums in an order")]


def refusal(node: Node) -> str | None:
    """Why a call may give a token other bits in another step, or None."""
    target: Any = node.target
    name = op_name(node).split(".")[0]
    if target is operator.getitem or not _is_tensor(fake_value(node)) or name in ASSERTIONS:
        return None
    if name.startswith("auto_functionalized"):
        target = node.args[0]
        name = str(target).split(".")[1]
    if str(target).startswith("fusecomp."):
        name = str(target).removeprefix("fusecomp.").split(".")[0]
        return None if name in INVARIANT else f"{name} has no batch-invariant kernel"
    if name in MOVES or getattr(target, "is_view", False) or torch.Tag.pointwise in getattr(target, "tags", ()):
        return None
    if name in PRODUCTS:
        inner = fake_value(node.args[PRODUCTS[name][0]]).shape[-1]
        if isinstance(inner, int) and inner == 1:  # one product an element, nothing to add up
            return None
        return f"{name} sums in an order that follows the number of rows"
    if name in REDUCES:
        return None if _known_dims(node, REDUCES[name]) else f"{name} reduces a dim of unknown size"
    return f"{name} is not known to be batch-invariant"


def _known_dims(node: Node, place: int) -> bool:
    x = fake_value(node.args[0])
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
    dims = range(x.dim()) if given is None else [given] if isinstance(given, int) else list(given)
    return all(isinstance(x.shape[dim], int) for dim in dims or range(x.dim()))


def _is_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_tensor, value))
    return value is None or isinstance(value, torch.Tensor)  # None: nothing was recorded
