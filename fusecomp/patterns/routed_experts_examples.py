"""Callables on which `routed_experts` must match, and on which it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec
from fusecomp.patterns.base import Example

T, K, E, C, WIDTH = 7, 2, 5, 16, 24
NORM = NormSpec(RMS, 1e-6).to_text()
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
SPECS = {dtype: RouteSpec(SOFTMAX, K, SUM, dtype=name).to_text() for dtype, name in DTYPES.items()}


def _inputs(dtype: torch.dtype) -> tuple:
    """x [1, T, C], a norm's weight [C], a router [E, C], up and down; logits lie apart, however rounded."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    # Column e of a row speaks for expert e; steps of 1 / 4 survive the norm and 8 bits.
    x = randn(1, T, C)
    x[..., :E] = torch.stack([torch.randperm(E, generator=g) for _ in range(T)]) / 4 + 0.5
    router = 2 * torch.eye(E, C)
    up, down = randn(E, 2 * WIDTH, C) / C**0.5, randn(E, C, WIDTH) / WIDTH**0.5
    return tuple(t.to(dtype) for t in (x, torch.ones(C), router, up, down))


def _case(name: str, ending: Callable[..., object], norm: str = NORM, **facts: object) -> Example:
    """`ending(experts, x, y, ids, weights)`, where experts(y, ids, weights) runs them; [T, C], all of them rows."""

    def function(x: Tensor, scale: Tensor, router: Tensor, up: Tensor, down: Tensor) -> object:
        rows = x.view(T, C)
        args = (scale if norm else None, None, None, norm, DTYPES[x.dtype], SPECS[x.dtype])
        y, ids, weights = OPS.router(rows, router, None, *args)

        def experts(y: Tensor, ids: Tensor, weights: Tensor, first: int = 0, residual: Tensor | None = None) -> Tensor:
            form = ("silu", True, False, False)
            return OPS.experts(y, ids, weights, up[first:], None, down[first:], None, *form, residual)

        return ending(experts, rows, y if norm else rows, ids, weights)

    return Example(name, function, _inputs, **facts)  # type: ignore[arg-type]


def routed_experts_examples() -> list[Example]:
    """Router and experts as the passes before leave them, and what must stay apart."""
    return [
        _case("norm", lambda run, x, y, ids, weights: run(y, ids, weights)),
        _case("residual", lambda run, x, y, ids, weights: run(y, ids, weights, residual=x)),
        _case("residual reshaped", lambda run, x, y, ids, weights: run(y, ids, weights, residual=x[None].view(T, C))),
        _case("no norm", lambda run, x, y, ids, weights: run(y, ids, weights), norm=""),
        _case("reshaped", lambda run, x, y, ids, weights: run(y.view(1, T, C).view(T, C), ids.view(T, K), weights)),
        _case("a shared expert", lambda run, x, y, ids, weights: run(y, ids, weights, residual=x) + y.relu()),
        _case(
            "a shared expert first", lambda run, x, y, ids, weights: run(y, ids, weights, residual=y.relu()),
            matches=0, reason="comes after the router",
        ),
        _case(
            "ids returned", lambda run, x, y, ids, weights: (run(y, ids, weights), ids), matches=0,
            reason="ids chosen are also read by output",
        ),
        _case(
            "weights read", lambda run, x, y, ids, weights: run(y, ids, weights) * weights.sum(), matches=0,
            reason="weights chosen are also read by sum",
        ),
        _case(
            "other rows", lambda run, x, y, ids, weights: run(x, ids, weights), matches=0, reason="other rows",
        ),
        _case(
            "other weights", lambda run, x, y, ids, weights: run(y, ids, weights.sqrt()), matches=0,
            reason="not those of one router",
        ),
        _case(
            "experts elsewhere", lambda run, x, y, ids, weights: run(y, ids, weights, 1), matches=0,
            reason="some are elsewhere",
        ),
    ]  # fmt: skip
