"""Callables on which `routed_experts` and `routed_quant_experts` must match, and on which they must refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.quant import INT, WeightSpec
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.quant_examples import random_weight, texts

T, K, E, C, WIDTH = 7, 2, 5, 16, 24
NORM = NormSpec(RMS, 1e-6).to_text()
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
FORM = ("silu", True, False, False)
CODES = WeightSpec(INT, 4, 1, 8, "float32")  # with zero points
CODES_TEXTS = texts(CODES)
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


def _quant_inputs(dtype: torch.dtype) -> tuple:
    """As `_inputs`, with codes, scales and zero points of up and down instead."""
    up, down = (
        random_weight(shape, CODES, dtype, zero=True, seed=seed)
        for seed, shape in enumerate(((E, 2 * WIDTH, C), (E, C, WIDTH)))
    )
    return *_inputs(dtype)[:3], *up, *down


def _plain(y: Tensor, ids: Tensor, weights: Tensor, given: list[Tensor], residual: Tensor | None) -> Tensor:
    up, down = given
    return OPS.experts(y, ids, weights, up, None, down, None, *FORM, residual)


def _quantized(y: Tensor, ids: Tensor, weights: Tensor, given: list[Tensor], residual: Tensor | None) -> Tensor:
    spec = CODES_TEXTS[y.dtype]
    return OPS.quant_experts(y, ids, weights, *given[:3], None, *given[3:], None, *FORM, spec, spec, residual)


def _case(
    op: Callable[..., Tensor], inputs: Callable, name: str, ending: Callable[..., object], norm: str = NORM,
    **facts: object,
) -> Example:  # fmt: skip
    """`ending(experts, x, y, ids, weights)`, where experts(y, ids, weights) runs `op`; [T, C], all of them rows."""

    def function(x: Tensor, scale: Tensor, router: Tensor, *given: Tensor) -> object:
        rows = x.view(T, C)
        args = (scale if norm else None, None, None, norm, DTYPES[x.dtype], SPECS[x.dtype])
        y, ids, weights = OPS.router(rows, router, None, *args)

        def experts(y: Tensor, ids: Tensor, weights: Tensor, first: int = 0, residual: Tensor | None = None) -> Tensor:
            return op(y, ids, weights, [t[first:] for t in given] if first else list(given), residual)

        return ending(experts, rows, y if norm else rows, ids, weights)

    return Example(name, function, inputs, **facts)  # type: ignore[arg-type]


def routed_experts_examples() -> list[Example]:
    """Router and experts as the passes before leave them, and what must stay apart."""
    return _examples(partial(_case, _plain, _inputs))


def routed_quant_experts_examples() -> list[Example]:
    """The same of quantized experts."""
    return _examples(partial(_case, _quantized, _quant_inputs))


def _examples(case: Callable[..., Example]) -> list[Example]:
    return [
        case("norm", lambda run, x, y, ids, weights: run(y, ids, weights)),
        case("residual", lambda run, x, y, ids, weights: run(y, ids, weights, residual=x)),
        case("residual reshaped", lambda run, x, y, ids, weights: run(y, ids, weights, residual=x[None].view(T, C))),
        case("no norm", lambda run, x, y, ids, weights: run(y, ids, weights), norm=""),
        case("reshaped", lambda run, x, y, ids, weights: run(y.view(1, T, C).view(T, C), ids.view(T, K), weights)),
        case("a shared expert", lambda run, x, y, ids, weights: run(y, ids, weights, residual=x) + y.relu()),
        case(
            "a shared expert first", lambda run, x, y, ids, weights: run(y, ids, weights, residual=y.relu()),
            matches=0, reason="comes after the router",
        ),
        case(
            "ids returned", lambda run, x, y, ids, weights: (run(y, ids, weights), ids), matches=0,
            reason="ids chosen are also read by output",
        ),
        case(
            "weights read", lambda run, x, y, ids, weights: run(y, ids, weights) * weights.sum(), matches=0,
            reason="weights chosen are also read by sum",
        ),
        case(
            "other rows", lambda run, x, y, ids, weights: run(x, ids, weights), matches=0, reason="other rows",
        ),
        case(
            "other weights", lambda run, x, y, ids, weights: run(y, ids, weights.sqrt()), matches=0,
            reason="not those of one router",
        ),
        case(
            "experts elsewhere", lambda run, x, y, ids, weights: run(y, ids, weights, 1), matches=0,
            reason="some are elsewhere",
        ),
    ]  # fmt: skip
