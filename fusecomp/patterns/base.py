"""The Pattern contract, and the driver that applies patterns and records what happened.

A pattern finds candidates in an FX graph, guards each one (a reason means no match), and rewrites those
that pass. A refusal is never silent: it becomes a near miss in the report.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fusecomp.patterns.masks import MaskSpec
from fusecomp.report import FusionReport, Match, NearMiss

IN_PLACE_OPERATORS = {"setitem", *(f"i{op}" for op in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "pow"))}
PURE_DESPITE_NAME = {"and_", "or_", "not_", "is_"}  # the operator module's keywords
BITWISE, TOLERANCE, QUANTIZING = "bitwise", "tolerance", "quantizing"


@dataclass(frozen=True)
class MergedWeight:
    """A stacked weight (or bias) that a rewritten graph takes as a further input, after all others.

    Attributes:
        names: the parameters it is made of, in order, as Dynamo names their sources; None stands for zeros.
        tensor: the stacked tensor, whose parts the parameters now view.
    """

    names: tuple[str | None, ...]
    tensor: torch.Tensor


@dataclass
class PassContext:
    """What passes know beyond the graph.

    Attributes:
        report: receives matches and near misses.
        masks: mask proven by the probe per `layer_idx`, for attention that came through HF's interface.
        calls: `layer_idx` of each attention call that comes through HF's interface, in order; when empty, each layer of
            `masks` makes one.
        proof_length: longest context that inline masks are evaluated to.
        layers: attention call sites in graph order, filled by canonicalization: (layer, kv heads, head dim).
        merged: inputs that passes appended to the graph, in order.
    """

    report: FusionReport
    masks: dict[int, MaskSpec] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    proof_length: int = 1024
    layers: list[tuple[int, int, int]] = field(default_factory=list)
    merged: list[MergedWeight] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """A callable and inputs on which a pattern must match (`matches` times) or must not (`reason` names why).

    `reference` computes the same eagerly, where `function` itself only has meaning inside a captured graph.
    """

    name: str
    function: Callable
    inputs: Callable[[torch.dtype], tuple]
    matches: int = 1
    reason: str = ""
    reference: Callable | None = None


class Pattern(ABC):
    """One rewrite of a captured graph. Subclasses are stateless; facts live in the candidate and the context."""

    name: ClassVar[str]
    numerics: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)

    @abstractmethod
    def find(self, graph: torch.fx.Graph) -> Iterable[Any]:
        """Candidates in graph order. A candidate has `node`, the node that identifies it.

        A generator is resumed after each candidate was rewritten or refused, and sees the graph as it is then.
        """

    @abstractmethod
    def guard(self, candidate: Any, context: PassContext) -> str | None:
        """Why the candidate must not be rewritten, or None."""

    @abstractmethod
    def emit(self, candidate: Any, gm: GraphModule, context: PassContext) -> str:
        """Rewrite the candidate and return the proven facts as text."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """Callables that match exactly, and at least one that must not."""

    def numerics_of(self, candidate: Any, context: PassContext) -> str:
        """What the rewrite of this candidate does to the numbers, where that is not the same for all."""
        return self.numerics

    def operation(self, candidate: Any) -> str:
        """The op that `emit` makes with its sizes, where a lowering chooses its kernel by them; otherwise empty."""
        return ""

    def where(self, candidate: Any) -> str:
        """Name of the place for the report."""
        return module_path(candidate.node)

    def key(self) -> str:
        """Hash of the sources the pattern is made of, named in the report beside what it did.

        Passes on Dynamo's graph need it in no cache key: Inductor hashes the rewritten graph itself.
        """
        package, sources, stack = __name__.rpartition(".")[0], {}, [type(self).__module__]
        while stack:
            name = stack.pop()
            if name in sources:
                continue
            sources[name] = inspect.getsource(sys.modules[name])
            homes = {getattr(value, "__module__", None) or "" for value in vars(sys.modules[name]).values()}
            stack.extend(home for home in homes if home.startswith(f"{package}."))
        return hashlib.sha256("".join(sources[name] for name in sorted(sources)).encode()).hexdigest()

    def apply(self, gm: GraphModule, context: PassContext) -> int:
        """Run the pattern over `gm`; returns the number of matches."""
        matched = 0
        for candidate in self.find(gm.graph):
            where = self.where(candidate)
            reason = self._dtype_reason(candidate) or self.guard(candidate, context)
            if reason:
                context.report.near_misses.append(NearMiss(self.name, where, reason))
                continue
            operation, numerics = self.operation(candidate), self.numerics_of(candidate, context)
            detail = self.emit(candidate, gm, context)
            context.report.matches.append(Match(self.name, where, detail, numerics, operation))
            matched += 1
        if matched:
            gm.graph.lint()
            gm.recompile()
        return matched

    def _dtype_reason(self, candidate: Any) -> str | None:
        value = fake_value(candidate.node)
        if isinstance(value, torch.Tensor) and value.dtype not in self.dtypes:
            return f"dtype {value.dtype} is not one of {', '.join(map(str, self.dtypes))}"
        return None


def mutates(node: Node) -> bool:
    """Whether `node` may write to an input: `x.add_(...)`, `x[...] = ...`, `inplace=True`, `out=`, a mutable op."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    schema = getattr(node.target, "_schema", None)
    return (
        (name.endswith("_") and not name.endswith("__") and name not in PURE_DESPITE_NAME)
        or name in IN_PLACE_OPERATORS
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
        or (schema is not None and schema.is_mutable)
    )


def replace_and_prune(node: Node, new: Node) -> None:
    """Put `new` in place of `node`, then erase `node` and whatever only it needed.

    Dynamo's graph is not functional: a node without users may exist for what it writes. Those stay.
    """
    node.replace_all_uses_with(new)
    stack, erased = [node], set()
    while stack:
        dead = stack.pop()
        if dead in erased or dead.users or dead.op not in ("call_function", "call_method") or mutates(dead):
            continue
        inputs = dead.all_input_nodes
        dead.graph.erase_node(dead)
        erased.add(dead)
        stack.extend(inputs)


def fake_value(node: Any) -> Any:
    """The fake tensor (or SymInt) that tracing recorded for `node`."""
    return node.meta.get("example_value", node.meta.get("val"))


def own_graph(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with a graph of its own, so that whoever holds the original sees no change."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


def module_path(node: Node) -> str:
    """Dotted path of the module a node was traced in, without Dynamo's decorations."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    for text in ("L['self'].", "L['model'].", "L['args'][0].", "_modules['", "']"):
        path = path.replace(text, "")
    return path.replace("._modules[", ".").replace("model.model.", "model.")


def op_name(node: Node) -> str:
    """Readable name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def count_ops(graph: torch.fx.Graph) -> dict[str, int]:
    """Calls per target, by readable name."""
    names = Counter(op_name(node) for node in graph.nodes if node.op in ("call_function", "call_method"))
    return dict(sorted(names.items()))
