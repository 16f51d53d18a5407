"""Callables on which `experts_residual` must match, and on which it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.patterns.base import Example

T, K, E, C, WIDTH = 7, 2, 4, 16, 24


def _inputs(dtype: torch.dtype) -> tuple:
    """x, residual [1, T, C], ids and weights [T, K], up and down."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    ids = torch.rand(T, E, generator=g).argsort(1)[:, :K]
    weights = torch.rand(T, K, generator=g).softmax(1).to(dtype)
    return randn(T, C), randn(1, T, C), ids, weights, randn(E, 2 * WIDTH, C), randn(E, C, WIDTH)


def _experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return OPS.experts(x, ids, weights, up, None, down, None, "silu", True, False, False)


def _case(name: str, ending: Callable[[Tensor, Tensor], object], **facts: object) -> Example:
    """`ending` of the experts' result [T, C] and the residual [1, T, C]."""

    def function(x: Tensor, residual: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> object:
        return ending(_experts(x, ids, weights, up, down), residual)

    return Example(name, function, _inputs, **facts)  # type: ignore[arg-type]


def experts_residual_examples() -> list[Example]:
    """Additions as models write them, and what must be left alone."""
    return [
        _case("residual", lambda y, r: r + y.view(1, T, C)),
        _case("residual second", lambda y, r: y.view(1, T, C) + r),
        _case("rows", lambda y, r: y + r[0]),
        _case("read twice", lambda y, r: (r + y.view(1, T, C), y.relu()), matches=0, reason="also read by"),
        _case("doubled", lambda y, r: (y + y, r), matches=0, reason="also read by"),
        _case("one value a feature", lambda y, r: y + r[0, 0], matches=0, reason="has shape"),
        _case("another dtype", lambda y, r: y + r[0].double(), matches=0, reason="torch.float64"),
        _case("a number", lambda y, r: (y + 1, r), matches=0),
    ]
