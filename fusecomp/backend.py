"""The Dynamo backend: ordered passes over the captured graph, then Inductor (or eager, on request).

`fusecomp` is the registered backend for `torch.compile(module, backend="fusecomp")`, stateless. `StepBackend`
is the engine's: the same canonicalization, then paging.
"""

from __future__ import annotations

import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecomp import lowerings
from fusecomp._compat import inductor_compile, traced_guards
from fusecomp.errors import UnsupportedModelError
from fusecomp.ops.cost import ZERO, Cost, op_cost
from fusecomp.patterns.attention import (
    InterfaceAttention,
    PagedAttention,
    StatelessAttention,
    attention_calls,
    remove_step_marker,
    step_marker,
)
from fusecomp.patterns.base import PassContext, Pattern, count_ops, fake_value, module_path, op_name, own_graph
from fusecomp.patterns.linear import MergedLinears
from fusecomp.patterns.moe import Experts
from fusecomp.patterns.raw_attention import SdpaAttention, SoftmaxAttention, is_call
from fusecomp.patterns.raw_moe import RawExperts
from fusecomp.patterns.shared_quantize import SharedQuantize
from fusecomp.pieces import CompiledPieces, compile_pieces
from fusecomp.report import FusionReport

lowerings.register()

CANONICALIZE: tuple[Pattern, ...] = (
    InterfaceAttention(),
    SdpaAttention(),
    SoftmaxAttention(),
    RawExperts(),
    Experts(),
)
PAGE: tuple[Pattern, ...] = (PagedAttention(),)
MERGE: tuple[Pattern, ...] = (SharedQuantize(), MergedLinears())
STATELESS: tuple[Pattern, ...] = (StatelessAttention(),)


def enabled(patterns: Sequence[Pattern], disabled: Sequence[str]) -> tuple[Pattern, ...]:
    """`patterns` without those named in `disabled`."""
    return tuple(p for p in patterns if p.name not in disabled)


def run_passes(gm: GraphModule, patterns: Sequence[Pattern], context: PassContext) -> None:
    """Apply `patterns` in order, recording op counts of the first and last state."""
    report = context.report
    if not report.ops_before:
        report.ops_before = count_ops(gm.graph)
    for pattern in patterns:
        pattern.apply(gm, context)
        report.sources[pattern.name] = pattern.key()
    report.ops_after = count_ops(gm.graph)


def count_by_place(graph: torch.fx.Graph) -> dict[str, Counter[str]]:
    """Calls per target, by the path of the module they were traced in."""
    places: dict[str, Counter[str]] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            places.setdefault(module_path(node), Counter())[op_name(node)] += 1
    return places


def total_cost(nodes: Iterable[Node]) -> Cost:
    """Symbolic bytes and FLOPs of the canonical ops among `nodes`."""
    total = ZERO
    for node in nodes:
        name = str(node.target).removeprefix("fusecomp.").split(".")[0]
        if node.op == "call_function" and str(node.target).startswith("fusecomp."):
            total = total + op_cost(
                name, tuple(fake_value(a) if isinstance(a, torch.fx.Node) else a for a in node.args)
            )
    return total


class StepBackend:
    """Compiles the packed step. One instance serves one capture; `context.layers` then lists its KV tensors.

    Args:
        inductor: compile, rather than run the rewritten graph as it is.
        merge: patterns that lay weights out anew.
        fuse: patterns of the fuse stage, on the ATen graph of each piece.
        artifacts: compile pieces in the form that can be saved.

    Raises:
        UnsupportedModelError: some attention could not be paged; the message lists every reason.
    """

    def __init__(
        self,
        context: PassContext,
        *,
        inductor: bool,
        merge: Sequence[Pattern] = (),
        fuse: Sequence[Pattern] = (),
        artifacts: bool = False,
    ) -> None:
        self.context = context
        self.inductor = inductor
        self.merge, self.fuse, self.artifacts = merge, fuse, artifacts
        self.graphs: list[GraphModule] = []
        # Of the last capture: what it was compiled to, its inputs, what it read, ops by module before the passes.
        self.pieces: CompiledPieces | None = None
        self.inputs: list[Any] = []
        self.read: list[str] = []
        self.ops_by_place: dict[str, Counter[str]] = {}

    def __call__(self, gm: GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
        report, start = self.context.report, time.perf_counter()
        gm = own_graph(gm)  # Dynamo reads its graph's inputs again after the backend returns
        self.read = traced_guards()
        self.ops_by_place = count_by_place(gm.graph)
        run_passes(gm, (*CANONICALIZE, *PAGE, *self.merge), self.context)
        self._require_all_paged(gm)
        self._require_positions(gm)
        remove_step_marker(gm)
        cost = total_cost(gm.graph.nodes)
        report.cost_bytes, report.cost_flops = str(cost.bytes), str(cost.flops)
        report.graphs += 1
        self.graphs.append(gm)
        report.seconds["passes"] = time.perf_counter() - start
        if not self.inductor:
            return self._with_merged(gm.forward)
        start = time.perf_counter()
        self.pieces = compile_pieces(gm, self.fuse, report, artifacts=self.artifacts)
        self.inputs = [*example_inputs, *(merged.tensor for merged in self.context.merged)]
        report.seconds["inductor"] = time.perf_counter() - start
        kinds, pieces = len(self.pieces.artifacts), len(self.pieces.kinds)
        report.notes.append(f"compiled {kinds} kinds of {pieces} pieces, cut after each attention")
        return self._with_merged(self.pieces.whole.forward)

    def _with_merged(self, function: Callable) -> Callable:
        """`function`, given the stacked weights that passes appended to the graph's inputs."""
        appended = [merged.tensor for merged in self.context.merged]
        return (lambda *args: function(*args, *appended)) if appended else function

    def _require_all_paged(self, gm: GraphModule) -> None:
        report = self.context.report
        paged = report.count(PagedAttention.name)
        if (
            attention_calls(gm.graph)
            or paged == 0
            or any(
                miss.pattern in (p.name for p in (InterfaceAttention, SdpaAttention, SoftmaxAttention, PagedAttention))
                for miss in report.near_misses
            )
        ):
            reasons = "; ".join(f"{m.where}: {m.reason}" for m in report.near_misses) or "no attention was recognised"
            raise UnsupportedModelError(
                "attention cannot be rewritten to the paged kernel",
                where=report.model,
                why=reasons,
                remedy="run the model with stock transformers, or give it an attention that can be proven",
            )

    def _require_positions(self, gm: GraphModule) -> None:
        """Refuse a model that ignores its positions and counts tokens itself: it would count across rows."""
        marker = step_marker(gm.graph)
        assert marker is not None
        reads = [n for n in marker.users if is_call(n, (operator.getitem,)) and n.args[1] == slice(1, 2, None)]
        counts = [n.name for n in gm.graph.nodes if is_call(n, (torch.arange, torch.cumsum), "cumsum") and n.users]
        if not any(n.users for n in reads) and counts:
            raise UnsupportedModelError(
                "the model ignores the positions it is given",
                where=self.context.report.model,
                why=f"it computes its own ({', '.join(counts)}), which would run on across packed sequences",
                remedy="use the position_ids argument of forward",
            )


# The reports of the most recent stateless compilations, newest last: torch.compile gives a backend no other way out.
last_reports: deque[FusionReport] = deque(maxlen=8)


def fusecomp(gm: GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
    """The backend of `torch.compile(module, backend="fusecomp")`: canonicalize, fuse what is proven, compile."""
    context = PassContext(FusionReport(model="torch.compile"))
    run_passes(gm, (*CANONICALIZE, *STATELESS), context)
    last_reports.append(context.report)
    return inductor_compile(gm, example_inputs)
