"""Shared experts: their gate, their sum with the routed ones and the residual end in one epilogue.

Legend: T tokens, C hidden size, F width of the shared experts, E experts.
"""

from __future__ import annotations

import json
import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.fusion import FUSE
from fusecomp.ops import OPS
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec
from fusecomp.patterns.functional import RESHAPES, is_call
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import new_context, run_fused

T, C, WIDTH, E, N = 3, 16, 24, 5, 20  # as many tokens as norms are proven on: these shapes are static
SPEC = RouteSpec(SOFTMAX, 2, SUM).to_text()


def layer(
    x: Tensor, attended: Tensor, scale: Tensor, after: Tensor, router: Tensor, up: Tensor, down: Tensor, gate: Tensor,
    shared_up: Tensor, shared_down: Tensor, o: Tensor, qkv: Tensor, *, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From one attention to the next, as Qwen2-MoE (gated), DeepSeek and GLM4-MoE write it."""
    h = x + F.linear(attended, o)
    y = norm(h, scale)
    rows = y.view(T, C)
    ids, weights = OPS.route(F.linear(rows, router), None, SPEC)
    routed = OPS.experts(rows, ids, weights, up, None, down, None, "silu", True, False, False)
    both = F.linear(y, shared_up)  # as `merged_linear` leaves gate and up
    shared = F.linear(F.silu(both[..., :WIDTH]) * both[..., WIDTH:], shared_down)
    if gated:
        shared = torch.sigmoid(F.linear(y, gate)) * shared
    h = h + (routed.view(1, T, C) + shared)
    return h, F.linear(norm(h, after), qkv)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def inputs() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    return (
        randn(1, T, C) * 4, randn(1, T, C) * 4, 1 + randn(C), 1 + randn(C), randn(E, C) * 4, randn(E, 2 * WIDTH, C),
        randn(E, C, WIDTH), randn(1, C), randn(2 * WIDTH, C), randn(C, WIDTH), randn(C, C), randn(N, C),
    )  # fmt: skip


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "not gated"])
def test_one_epilogue_adds_it_all(gated):
    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return layer(*args, gated=gated)

    context = new_context()
    output, graph = run_fused(run, inputs(), lambda gm: [p.apply(gm, context) for p in FUSE])
    exact = run(*(t.double() for t in inputs()))
    for found, wanted in zip(output, exact, strict=True):
        assert relative_error(found, wanted) < 2e-6
    assert context.report.count("routed_experts") == 1
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and not is_call(n, *RESHAPES, operator.getitem)]
    kinds = Counter(n.target.name().removeprefix("fusecomp::") for n in calls)
    # Output projection with the mixture; the shared experts' first, the gate; their second with the next projection.
    assert kinds == {"linear_experts": 1, "linear": 1 + gated, "linear_pair": 1}
    linears = OPS.linear.default, OPS.linear_pair.default, OPS.linear_experts.default
    programs = [json.loads(n.args[5]) for n in calls if is_call(n, *linears)]
    sums = [program["steps"] for program in programs if len(program["operands"]) > 1]
    assert [[step[0] for step in steps] for steps in sums] == [["mul"] * gated + ["add", "add"]]
