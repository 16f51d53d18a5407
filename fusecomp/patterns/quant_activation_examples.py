"""Callables in which activations are quantized, and look-alikes that must stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.quant import BLOCK, FP8, INT, TENSOR, TOKEN, ActivationSpec, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.quant_examples import FP8_BLOCK, INT4, INT8, K, N, T, draw, random_weight, texts

INT_TOKEN = ActivationSpec(INT, 8, TOKEN)
FP8_TOKEN, FP8_BLOCKS = ActivationSpec(FP8, 8, TOKEN), ActivationSpec(FP8, 8, BLOCK, 32)
STATIC, DYNAMIC = ActivationSpec(FP8, 8, TENSOR, 0, False), ActivationSpec(FP8, 8, TENSOR)
FP8_ROWS = WeightSpec(FP8, 8, 1, 0, "float32")


def _round_trip(spec: ActivationSpec) -> Callable:
    """x as codes, and what these stand for."""
    text, back = spec.to_text(), texts(spec.dequantized("float32"))

    def function(x: Tensor, scale: Tensor | None = None) -> Tensor:
        codes, scales = OPS.quantize(x, scale, text)
        return OPS.dequantize(codes, scales, None, back[x.dtype])

    return function


def scaled_linear_examples() -> list[Example]:
    """Every granularity of activations, by weights of their kind; and what must be left alone."""

    def case(
        name: str, activations: ActivationSpec, weights: WeightSpec, ending: Callable = F.linear,
        *, zero: bool = False, **facts: object,
    ) -> Example:  # fmt: skip
        quantized, by_dtype = _round_trip(activations), texts(weights)

        def function(x: Tensor, q: Tensor, scale: Tensor, *rest: Tensor) -> object:
            zeros = rest[0] if zero else None
            weight = OPS.dequantize(q, scale, zeros, by_dtype[x.dtype])
            return ending(quantized(x, *(() if activations.dynamic else rest[-1:])), weight)

        def inputs(dtype: torch.dtype) -> tuple:
            parts = [p for p in random_weight((N, K), weights, dtype, zero=zero) if p is not None]
            static = () if activations.dynamic else (torch.tensor([0.01]),)
            return (*draw(dtype, (1, T, K)), *parts, *static)

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    def read_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w), x * 2

    return [
        case("int8_token", INT_TOKEN, INT8),
        case("fp8_token", FP8_TOKEN, FP8_ROWS),
        case("fp8_block", FP8_BLOCKS, FP8_BLOCK),
        case("fp8_tensor", DYNAMIC, FP8_ROWS),
        case("fp8_static", STATIC, FP8_ROWS),
        case("residual", INT_TOKEN, INT8, lambda x, w: F.linear(x, w) + 1.5),
        case("two_linears", INT_TOKEN, INT8, lambda x, w: (F.linear(x, w), F.linear(x, w).relu())),
        case("int4_weight", INT_TOKEN, INT4, matches=0, reason="activations are int8, the weight int4"),
        case("zero_points", INT_TOKEN, INT8, zero=True, matches=0, reason="zero points"),
        case("read_elsewhere", INT_TOKEN, INT8, read_elsewhere, matches=0, reason="is read by mul"),
        case("fake_quantization", INT_TOKEN, INT8, lambda x, w: x * w.sum(), matches=0, reason="is read by mul"),
    ]


def round_trip_examples() -> list[Example]:
    """Codes made of codes, and pairs that do not cancel."""

    def case(
        name: str, first: ActivationSpec, second: ActivationSpec, *, other: bool = False, **facts: object
    ) -> Example:
        one, text, back = _round_trip(first), second.to_text(), texts(second.dequantized("float32"))

        def function(x: Tensor, scale: Tensor, another: Tensor) -> Tensor:
            codes, scales = OPS.quantize(one(x, scale), None if second.dynamic else another if other else scale, text)
            return OPS.dequantize(codes, scales, None, back[x.dtype])

        def inputs(dtype: torch.dtype) -> tuple:
            return *draw(dtype, (1, T, K)), torch.tensor([0.01]), torch.tensor([0.02])

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    whole = ActivationSpec(INT, 8, TENSOR, 0, False)
    return [
        case("fp8", STATIC, STATIC),
        case("int8", whole, whole),
        case("another_scale", STATIC, STATIC, other=True, matches=0, reason="the scales are not the same"),
        case("another_kind", STATIC, whole, matches=0, reason="and quantizes static int8"),
        case("dynamic", STATIC, FP8_TOKEN, matches=0, reason="follows from the values"),
    ]
