"""What pattern authors use: capture a callable, rewrite it, run it, count what matched, measure the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fusecomp._compat import dynamo_settings, functional_backend
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


def run_fused(function: Callable, inputs: tuple, rewrite: Callable[[GraphModule], None]) -> tuple[Any, GraphModule]:
    """As `run_rewritten`, on the functional ATen graph that Inductor would compile."""
    graphs: list[GraphModule] = []

    def rewrite_once(gm: GraphModule) -> None:
        rewrite(gm)
        graphs.append(gm)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        return functional_backend(gm, list(example_inputs), rewrite_once)

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
    """Assert the contract of one example of a pattern on Dynamo's graph: match count, reasons, numerics against fp32.

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
    check_outcome(pattern, example, context, inputs, output)


def check_fused(
    pattern: Pattern, example: Example, context: PassContext, dtype: torch.dtype, before: Sequence[Pattern] = ()
) -> None:
    """As `check_pattern`, for a pattern of the fuse stage; `before` are the stage's earlier patterns."""
    inputs = example.inputs(dtype)

    def rewrite(gm: GraphModule) -> None:
        for earlier in before:
            earlier.apply(gm, new_context())
        pattern.apply(gm, context)

    output, _ = run_fused(example.function, inputs, rewrite)
    check_outcome(pattern, example, context, inputs, output)


def check_outcome(pattern: Pattern, example: Example, context: PassContext, inputs: tuple, output: Any) -> None:
    """What both checks assert, once the rewritten graph has run."""
    report = context.report
    assert report.count(pattern.name) == example.matches, report.summary()
    if example.matches == 0:
        assert not example.reason or any(example.reason in m.reason for m in report.near_misses), report.near_misses
        return
    assert not report.near_misses, report.near_misses
    exact_inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    reference = example.reference or example.function
    with torch.no_grad():
        exact, unfused = flat(reference(*exact_inputs)), flat(reference(*inputs))
    for actual, wanted, plain in zip(flat(output), exact, unfused, strict=True):
        limit = max(1.5 * relative_error(plain, wanted), 2e-6)
        assert relative_error(actual, wanted) <= limit, (relative_error(actual, wanted), limit)


def flat(output: Any) -> list[torch.Tensor]:
    """Every tensor of a nested output."""
    return [output] if isinstance(output, torch.Tensor) else [x for part in output for x in flat(part)]
