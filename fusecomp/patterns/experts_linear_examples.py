"""Callables on which `experts_linear` must match, and on which it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.linear import FULL, ROW, Program
from fusecomp.ops.norm import LAYER, RMS, NormSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.routed_experts_examples import DTYPES, NORM, SPECS, C, T
from fusecomp.patterns.routed_experts_examples import _inputs as mixture_inputs

N = 12
ADD = (("add", "a0", "i0"),)
LINEARS = {  # operands, steps, norm
    "plain": ((), (), NormSpec(RMS, 1e-5)),
    "bias": ((ROW,), ADD, NormSpec(RMS, 1e-5)),
    "residual": ((FULL,), ADD, NormSpec(RMS, 1e-5)),
    "layer norm": ((), (), NormSpec(LAYER, 1e-5)),
    "no norm": ((), (), None),
}
PROGRAMS = {
    (name, dtype): Program(1, operands, steps, text, norm).to_text()
    for dtype, text in DTYPES.items()
    for name, (operands, steps, norm) in LINEARS.items()
}


def _inputs(dtype: torch.dtype) -> tuple:
    """Those of a mixture, and a residual [1, T, C], the next norm's weight [C], a linear's [N, C] and its bias [N]."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    return *mixture_inputs(dtype), randn(1, T, C), 1 + randn(C) / 4, randn(N, C) / C**0.5, randn(N)


def _case(name: str, ending: Callable[..., object], norm: str = NORM, **facts: object) -> Example:
    """`ending(out, y, linear, residual, bias)`; linear(x, kind, *operands) is one of `LINEARS`."""

    def function(
        x: Tensor, scale: Tensor, router: Tensor, up: Tensor, down: Tensor, residual: Tensor, after: Tensor,
        weight: Tensor, bias: Tensor,
    ) -> object:  # fmt: skip
        rows, dtype = x.view(T, C), DTYPES[x.dtype]
        args = (scale if norm else None, None, None, norm, dtype, SPECS[x.dtype])
        form = (up, None, down, None, "silu", True, False, False)
        y, out = OPS.routed_experts(rows, router, None, *args, *form, residual.view(T, C))

        def linear(x: Tensor, kind: str = "plain", *operands: Tensor, biased: bool = False) -> Tensor:
            scale = None if kind == "no norm" else after
            return OPS.linear(x, weight, scale, after if biased else None, operands, PROGRAMS[kind, x.dtype])

        return ending(out, y if norm else rows, linear, residual, bias)

    return Example(name, function, _inputs, **facts)  # type: ignore[arg-type]


def experts_linear_examples() -> list[Example]:
    """Layers as models go on after experts, and what must be left alone."""
    return [
        _case("next projection", lambda out, y, linear, r, b: (linear(out), out)),
        _case("reshaped", lambda out, y, linear, r, b: (linear(out.view(1, T, C).view(T, C)), out.view(1, T, C))),
        _case("bias", lambda out, y, linear, r, b: (linear(out, "bias", b), out)),
        _case("shared experts", lambda out, y, linear, r, b: (linear(out), out, y.relu())),
        _case("no norm before", lambda out, y, linear, r, b: (linear(out), out), norm=""),
        _case("two linears", lambda out, y, linear, r, b: (linear(out), linear(out, "bias", b))),
        _case("layer norm", lambda out, y, linear, r, b: linear(out, "layer norm")),
        _case("norm with a bias", lambda out, y, linear, r, b: linear(out, "layer norm", biased=True)),
        _case("no norm", lambda out, y, linear, r, b: linear(out, "no norm")),
        _case(
            "operand of the experts",
            lambda out, y, linear, r, b: linear(out, "residual", out.sum(1)[:, None] * b),
            matches=0, reason="comes after the experts",
        ),
        _case("rows of the router", lambda out, y, linear, r, b: (linear(y), out), matches=0),
    ]  # fmt: skip
