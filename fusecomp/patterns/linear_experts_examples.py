"""Callables on which `linear_experts` and `quant_linear_experts` must match, and on which they must refuse.

The linear multiplies by the identity: experts then read rows whose choices lie apart in any precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.quant import FP8, ActivationSpec, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.routed_experts_examples import (
    CODES_TEXTS,
    DTYPES,
    FORM,
    NORM,
    SPECS,
    C,
    T,
    _inputs,
    _quant_inputs,
)

N = 12
RESIDUAL = {text: Program(1, (FULL,), (("add", "i0", "a0"),), text).to_text() for text in DTYPES.values()}
PLAIN = {text: Program(1, (), (), text).to_text() for text in DTYPES.values()}
NORMED = {text: Program(1, (), (), text, NormSpec(RMS, 1e-5)).to_text() for text in DTYPES.values()}
CODES = ActivationSpec(FP8).to_text()
ROWS = WeightSpec(FP8, 8, 1, 0, "float32")
ROWS_TEXTS = {dtype: replace(ROWS, dtype=text).to_text() for dtype, text in DTYPES.items()}

# Of linear(rows, operands), experts(h, residual) -> (y, out) and the rows [T, C].
Ending = Callable[[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]], Tensor], object]


def _case(name: str, ending: Ending, norm: str = NORM, **facts: object) -> Example:
    def function(x: Tensor, scale: Tensor, router: Tensor, up: Tensor, down: Tensor, one: Tensor) -> object:
        dtype = DTYPES[x.dtype]

        def linear(rows: Tensor, *operands: Tensor) -> Tensor:
            return OPS.linear(rows, one, None, None, operands, (RESIDUAL if operands else PLAIN)[dtype])

        def experts(h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
            args = (router, None, scale if norm else None, None, None, norm, dtype, SPECS[x.dtype])
            return OPS.routed_experts(h, *args, up, None, down, None, *FORM, residual)

        return ending(linear, experts, x.view(T, C))

    return Example(name, function, lambda dtype: (*_inputs(dtype), torch.eye(C, dtype=dtype)), **facts)  # type: ignore[arg-type]


def _quant_case(name: str, ending: Ending, activation: str = CODES, **facts: object) -> Example:
    def function(x: Tensor, scale: Tensor, router: Tensor, *given: Tensor) -> object:
        *parts, one, ones = given
        dtype, spec = DTYPES[x.dtype], CODES_TEXTS[x.dtype]

        def linear(rows: Tensor, *operands: Tensor) -> Tensor:
            program = (RESIDUAL if operands else PLAIN)[dtype]
            weight = (one, ones, None, None, None, operands, program, ROWS_TEXTS[x.dtype])
            return OPS.quant_linear(rows, *weight, None, activation) if activation else OPS.quant_linear(rows, *weight)

        def experts(h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
            args = (router, None, scale, None, None, NORM, dtype, SPECS[x.dtype])
            codes = (*parts[:3], None, *parts[3:], None)
            return OPS.routed_quant_experts(h, *args, *codes, *FORM, spec, spec, residual)

        return ending(linear, experts, x.view(T, C))

    def inputs(dtype: torch.dtype) -> tuple:
        return *_quant_inputs(dtype), torch.eye(C).to(torch.float8_e4m3fn), torch.ones(C, 1)

    return Example(name, function, inputs, **facts)  # type: ignore[arg-type]


def _stream(
    linear: Callable[..., Tensor], experts: Callable[..., tuple[Tensor, Tensor]], rows: Tensor
) -> tuple[Tensor, ...]:
    """As models go on: h = rows + linear, then h + experts of norm(h)."""
    h = linear(rows, rows / 8)
    y, out = experts(h, h)
    return h, y, out


def _endings(case: Callable[..., Example]) -> list[Example]:
    return [
        case("residual stream", _stream),
        case("no residual", lambda linear, experts, rows: experts(linear(rows))),
        case("another residual", lambda linear, experts, rows: experts(linear(rows), rows)),
        case("reshaped", lambda linear, experts, rows: experts(linear(rows)[None].view(T, C))),
        case("read before", lambda linear, experts, rows: (h := linear(rows), h.relu(), experts(h, h)[1])[1:]),
        case("a shared expert", lambda linear, experts, rows: (h := linear(rows), sum(experts(h, h)))[1]),
        case(
            "its own residual", lambda linear, experts, rows: (h := linear(rows), experts(h, h.relu()))[1],
            matches=0, reason="which is not there before the linear",
        ),
        case("another's rows", lambda linear, experts, rows: (linear(rows), *experts(rows)), matches=0),
    ]  # fmt: skip


def _with_linear() -> Example:
    """Where the mixture has taken the next layer's first linear in."""
    base = _case("", _stream)

    def function(*given: Tensor) -> object:
        x, scale, router, up, down, one, weight = given
        dtype = DTYPES[x.dtype]
        h = OPS.linear(x.view(T, C), one, None, None, (x.view(T, C) / 8,), RESIDUAL[dtype])
        args = (router, None, scale, None, None, NORM, dtype, SPECS[x.dtype], up, None, down, None, *FORM, h)
        return h, *OPS.experts_linear(h, *args, weight, scale, None, (), NORMED[dtype])

    def inputs(dtype: torch.dtype) -> tuple:
        g = torch.Generator().manual_seed(1)
        return *base.inputs(dtype), torch.randn(N, C, generator=g).to(dtype) / C**0.5

    return Example("next projection", function, inputs)


def linear_experts_examples() -> list[Example]:
    """Layers as models have them, and what must be left alone."""
    return [
        *_endings(_case),
        _with_linear(),
        _case("no norm", lambda linear, experts, rows: experts(linear(rows)), norm="", matches=0),
    ]


def quant_linear_experts_examples() -> list[Example]:
    """The same by codes of activations and weights; without codes of activations nothing is left to be summed."""
    return [*_endings(_quant_case), _quant_case("weight only", _stream, activation="", matches=0)]
