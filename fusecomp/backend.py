"""The Dynamo backend: ordered passes over the captured graph, then Inductor (or eager, on request).

`fusecomp` is the registered backend for `torch.compile(module, backend="fusecomp")`, stateless. `StepBackend`
is the engine's: the same canonicalization, then paging.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule

from fusecomp import lowerings
from fusecomp._compat import inductor_compile
from fusecomp.errors import UnsupportedModelError
from fusecomp.ops.cost import ZERO, op_cost
from fusecomp.patterns.attention import (
    InterfaceAttention,
    PagedAttention,
    StatelessAttention,
    attention_calls,
    remove_step_marker,
    step_marker,
)
from fusecomp.patterns.base import PassContext, Pattern, count_ops, fake_value, own_graph
from fusecomp.patterns.linear import MergedLinears
from fusecomp.patterns.moe import Experts
from fusecomp.patterns.raw_attention import SdpaAttention, SoftmaxAttention, is_call
from fusecomp.pieces import compile_pieces
from fusecomp.report import FusionReport

lowerings.register()

CANONICALIZE: tuple[Pattern, ...] = (InterfaceAttention(), SdpaAttention(), SoftmaxAttention(), Experts())
PAGE: tuple[Pattern, ...] = (PagedAttention(),)
MERGE: tuple[Pattern, ...] = (MergedLinears(),)
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


def total_cost(graph: torch.fx.Graph) -> tuple[str, str]:
    """Symbolic bytes and FLOPs of all canonical ops of a step."""
    total = ZERO
    for node in graph.nodes:
        name = str(node.target).removeprefix("fusecomp.").split(".")[0]
        if node.op == "call_function" and str(node.target).startswith("fusecomp."):
            total = total + op_cost(
                name, tuple(fake_value(a) if isinstance(a, torch.fx.Node) else a for a in node.args)
            )
    return str(total.bytes), str(total.flops)


class StepBackend:
    """Compiles the packed step. One instance serves one capture; `context.layers` then lists its KV tensors.

    Args:
        inductor: compile, rather than run the rewritten graph as it is.
        merge: patterns that lay weights out anew.
        fuse: patterns of the fuse stage, on the ATen graph of each piece.

    Raises:
        UnsupportedModelError: some attention could not be paged; the message lists every reason.
    """

    def __init__(
        self, context: PassContext, *, inductor: bool, merge: Sequence[Pattern] = (), fuse: Sequence[Pattern] = ()
    ) -> None:
        self.context = context
        self.inductor = inductor
        self.merge, self.fuse = merge, fuse
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
        report, start = self.context.report, time.perf_counter()
        gm = own_graph(gm)  # Dynamo reads its graph's inputs again after the backend returns
        run_passes(gm, (*CANONICALIZE, *PAGE, *self.merge), self.context)
        self._require_all_paged(gm)
        self._require_positions(gm)
        remove_step_marker(gm)
        report.cost_bytes, report.cost_flops = total_cost(gm.graph)
        report.graphs += 1
        self.graphs.append(gm)
        report.seconds["passes"] = time.perf_counter() - start
        if not self.inductor:
            return self._with_merged(gm.forward)
        start = time.perf_counter()
        compiled, pieces, kinds = compile_pieces(gm, self.fuse, report)
        report.seconds["inductor"] = time.perf_counter() - start
        report.notes.append(f"compiled {kinds} kinds of {pieces} pieces, cut after each attention")
        return self._with_merged(compiled)

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
