"""Evaluates a subgraph of a captured graph on concrete positions, on the CPU, to learn what it computes.

Only position-like inputs, lengths and non-parameter buffers may feed it: a value that depends on weights or
activations has no meaning outside a run, and asking for it raises `NotProvable`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusecomp.ops import OPS
from fusecomp.patterns.base import fake_value, mutates


class NotProvable(Exception):
    """The subgraph depends on something that evaluation cannot supply; the message says on what."""


@dataclass(frozen=True)
class Inputs:
    """Concrete values for one evaluation: `length` positions, and token ids drawn with `seed`."""

    length: int
    seed: int = 0

    def tokens(self) -> Tensor:
        """A packed step [3, length] of one sequence that starts at position 0."""
        ids = torch.randint(0, 97, (self.length,), generator=torch.Generator().manual_seed(self.seed))
        positions = torch.arange(self.length)
        return torch.stack([ids, positions, positions])


def step_tokens(graph: torch.fx.Graph) -> Node | None:
    """The placeholder holding the packed step's tokens, when the graph has the step marker."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (OPS.step_inputs, OPS.step_inputs.default):
            return node.args[0]
    return None


# What these return depends on the shape of their argument, not on its values.
SHAPE_ONLY = {f"{prefix}{kind}" for kind in ("ones", "zeros", "full", "empty") for prefix in ("new_", "")} | {
    *("ones_like", "zeros_like", "full_like", "empty_like", "size", "dim", "numel", "sym_size", "getattr")
}


def _reads_ids(node: Node) -> bool:
    """Whether `node` is the packed step's row of token ids."""
    source = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
    return (
        isinstance(source, Node)
        and source.target in (OPS.step_inputs, OPS.step_inputs.default)
        and node.args[1] in (0, slice(0, 1, None))
    )


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def storage(node: Any) -> int | None:
    """Identity of the memory behind a node's value: views of one tensor share it."""
    value = fake_value(node) if isinstance(node, Node) else None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def writers(node: Node) -> list[Node]:
    """Nodes that change the value of `node` in place, through itself or through any view of the same memory."""
    memory = storage(node)
    return [
        other
        for other in node.graph.nodes
        if mutates(other) and any(arg is node or (memory is not None and storage(arg) == memory) for arg in other.args)
    ]


def static_length(tensor: Tensor, dim: int) -> int | None:
    """Size of `dim` when the graph fixes it."""
    size = tensor.shape[dim]
    return size if isinstance(size, int) else None


def evaluate(target: Node, length_like: Any, inputs: Inputs, given: dict[Node, Tensor] | None = None) -> Any:
    """Value of `target` at `inputs.length` positions.

    Args:
        length_like: the (symbolic) size that stands for the number of positions.
        given: nodes whose values are supplied instead of computed.

    Raises:
        NotProvable: a parameter, an activation or an unrelated input is needed.
    """
    tokens = step_tokens(target.graph)
    values: dict[Node, Any] = dict(given or {})
    from_ids: set[Node] = set()
    # Iterative post-order: captured graphs are deeper than Python's recursion limit.
    stack: list[tuple[Node, bool]] = [(target, False)]
    while stack:
        node, ready = stack.pop()
        if node in values:
            continue
        if not ready and node.op in ("call_function", "call_method") and node is not tokens:
            if node.target in (OPS.step_inputs, OPS.step_inputs.default):
                values[node] = inputs.tokens()
                continue
            # What writes and is read by its result (x *= 2) is evaluated like any other operation.
            if writer := next((other for other in writers(node) if other is not node), None):
                raise NotProvable(f"{node.name} is changed in place by {writer.name}")
            stack.append((node, True))
            stack.extend((arg, False) for arg in node.all_input_nodes if arg not in values)
            continue
        values[node] = inputs.tokens() if node is tokens else _compute(node, values, length_like, inputs)
        tainted = any(arg in from_ids for arg in node.all_input_nodes)
        if _reads_ids(node) or (tainted and _name(node) not in SHAPE_ONLY):
            from_ids.add(node)
    if target in from_ids:
        raise NotProvable("the mask depends on token ids")
    return values[target]


def _compute(node: Node, values: dict[Node, Any], length_like: Any, inputs: Inputs) -> Any:
    if node.op == "placeholder":
        return _placeholder(node, length_like, inputs)
    if node.op == "get_attr":
        value = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
            return value.detach().cpu()
        raise NotProvable(f"depends on {node.target}")

    def concrete(arg: Any) -> Any:
        if isinstance(arg, Node):
            return values[arg]
        if isinstance(arg, torch.device) or (isinstance(arg, str) and arg.startswith("cuda")):
            return torch.device("cpu")
        return arg

    args = torch.fx.node.map_aggregate(node.args, concrete)
    kwargs = torch.fx.node.map_aggregate(node.kwargs, concrete)
    try:
        if node.op == "call_method":
            if node.target == "cuda":
                return args[0]
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # foreign subgraphs can fail in any way; failing means not proven
        raise NotProvable(f"evaluating {node.name} failed: {type(error).__name__}: {error}") from error


def _placeholder(node: Node, length_like: Any, inputs: Inputs) -> Any:
    fake = fake_value(node)
    if isinstance(fake, torch.SymInt):
        if isinstance(length_like, torch.SymInt) and fake.node.expr == length_like.node.expr:
            return inputs.length
        raise NotProvable(f"depends on the size {node.name}")
    if not isinstance(fake, Tensor):
        raise NotProvable(f"depends on the input {node.name}")
    if "position" in node.name and not fake.is_floating_point():
        return torch.arange(inputs.length).expand(*(1,) * (fake.dim() - 1), inputs.length)
    grapharg = node.meta.get("grapharg")
    source = str(getattr(grapharg, "source", ""))
    real = getattr(grapharg, "example", None) if grapharg is not None else None
    is_module_state = "_buffers" in node.name or "_buffers" in source
    if is_module_state and isinstance(real, Tensor) and not isinstance(real, torch.nn.Parameter):
        return real.detach().cpu()
    raise NotProvable(f"depends on {'a weight' if '_parameters' in node.name else 'the input'} {node.name}")
