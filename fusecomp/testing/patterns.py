"""What pattern authors use: capture a callable, rewrite it, run it, count what matched, measure the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fusecomp._compat import dynamo_settings
from fusecomp.patterns.base import Example, PassContext, Pattern
from fusecomp.report import FusionReport
from fusecomp.runtime.verify import relative_error


def run_rewritten(function: Callable, inputs: tuple, rewrite: Callable[[GraphModule], None]) -> tuple[Any, GraphModule]:
    """Capture `function` in one full graph, apply `rewrite` to it as a backend would, and run the result eagerly."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        rewrite(gm)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with dynamo_settings(), torch.no_grad():
        output = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    assert len(graphs) == 1, f"captured {len(graphs)} graphs"
    return output, graphs[0]


def new_context(**facts: Any) -> PassContext:
    """A pass context with an empty report."""
    return PassContext(FusionReport(model="test"), **facts)


def check_pattern(
    pattern: Pattern, example: Example, context: PassContext, dtype: torch.dtype, after: Callable[[GraphModule], None]
) -> None:
    """Assert the contract of one example: match count, reasons, and numerics against fp32.

    Args:
        after: what turns the rewritten graph into a runnable one (later passes, marker removal).

    Raises:
        AssertionError: wrong number of matches, a refusal without the expected reason, or an error against fp32
            above 1.5 times that of the graph it replaced.
    """
    inputs = example.inputs(dtype)

    def rewrite(gm: GraphModule) -> None:
        pattern.apply(gm, context)
        if example.matches:
            after(gm)
        else:
            gm.forward = lambda *_: tuple(torch.zeros(()) for _ in range(4))  # type: ignore[method-assign]

    output, _ = run_rewritten(example.function, inputs, rewrite)
    report = context.report
    assert report.count(pattern.name) == example.matches, report.summary()
    if example.matches == 0:
        assert not example.reason or any(example.reason in m.reason for m in report.near_misses), report.near_misses
        return
    assert not report.near_misses, report.near_misses
    exact_inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    reference = example.reference or example.function
    with torch.no_grad():
        exact, unfused = reference(*exact_inputs), reference(*inputs)
    limit = max(1.5 * relative_error(unfused, exact), 2e-6)
    assert relative_error(output, exact) <= limit, (relative_error(output, exact), limit)
