"""Callables in which activations are quantized, and look-alikes that must stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.quant import BLOCK, FP8, INT, TENSOR, TOKEN, ActivationSpec, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.functional_examples import rms
from fusecomp.patterns.quant_examples import FP8_BLOCK, INT4, INT8, K, N, T, draw, random_weight, texts

INT_TOKEN = ActivationSpec(INT, 8, TOKEN)
FP8_TOKEN, FP8_BLOCKS = ActivationSpec(FP8, 8, TOKEN), ActivationSpec(FP8, 8, BLOCK, 32)
STATIC, DYNAMIC = ActivationSpec(FP8, 8, TENSOR, 0, False), ActivationSpec(FP8, 8, TENSOR)
FP8_ROWS = WeightSpec(FP8, 8, 1, 0, "float32")
INT_STATIC = ActivationSpec(INT, 8, TENSOR, 0, False)
SPECS = {
    "int8_token": INT_TOKEN,
    "int8_static": INT_STATIC,
    "fp8_token": FP8_TOKEN,
    "fp8_block": FP8_BLOCKS,
    "fp8_tensor": DYNAMIC,
    "fp8_static": STATIC,
}


def _round_trip(spec: ActivationSpec) -> Callable:
    """x as codes, and what these stand for."""
    text, back = spec.to_text(), texts(spec.dequantized("float32"))

    def function(x: Tensor, scale: Tensor | None = None) -> Tensor:
        codes, scales = OPS.quantize(x, scale, text)
        return OPS.dequantize(codes, scales, None, back[x.dtype])

    return function


def _fake(spec: ActivationSpec) -> Callable:
    """The same in one op."""
    text = spec.to_text()
    return lambda x, scale=None: OPS.fake_quantize(x, scale, text)


def fake_quantize_examples() -> list[Example]:
    """Every granularity, and pairs that are no rounding."""

    def case(name: str, spec: ActivationSpec, ending: Callable, **facts: object) -> Example:
        def inputs(dtype: torch.dtype) -> tuple:
            return (*draw(dtype, (1, T, K)), torch.tensor([0.01]))

        def function(x: Tensor, scale: Tensor) -> object:
            return ending(x, None if spec.dynamic else scale)

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    text, back, rounded = INT_TOKEN.to_text(), texts(INT_TOKEN.dequantized("float32")), _round_trip(INT_TOKEN)
    whole, by_token = ActivationSpec(INT, 8, TENSOR).to_text(), texts(INT8)
    other = WeightSpec(INT, 8, 1, 0, "float64").to_text()

    def codes_too(x: Tensor, _: Tensor | None) -> object:
        codes, scales = OPS.quantize(x, None, text)
        return OPS.dequantize(codes, scales, None, back[x.dtype]), codes.to(torch.int32)

    def another_scale(x: Tensor, _: Tensor | None) -> Tensor:
        codes, scales = OPS.quantize(x, None, text)
        return OPS.dequantize(codes, scales * 2, None, back[x.dtype])

    def another_layout(x: Tensor, _: Tensor | None) -> Tensor:
        codes, scales = OPS.quantize(x, None, whole)
        return OPS.dequantize(codes, scales.expand(1, T, 1).contiguous(), None, by_token[x.dtype])

    def another_dtype(x: Tensor, _: Tensor | None) -> Tensor:
        codes, scales = OPS.quantize(x, None, text)
        return OPS.dequantize(codes, scales, None, other).to(x.dtype)

    return [
        *[case(name, spec, _round_trip(spec)) for name, spec in SPECS.items()],
        case("read_twice", INT_TOKEN, lambda x, s: (rounded(x, s) * 2, rounded(x + 1, s)), matches=2),
        case("codes_read", INT_TOKEN, codes_too, matches=0, reason="the codes are also read by"),
        case("another_scale", INT_TOKEN, another_scale, matches=0, reason="not those of one quantize"),
        case("another_layout", INT_TOKEN, another_layout, matches=0, reason="not those of one quantize"),
        case("another_dtype", INT_TOKEN, another_dtype, matches=0, reason="float64"),
    ]  # fmt: skip


Ending = Callable[[Callable, Tensor, Tensor, Tensor], object]  # of a rounding, x, the weight and a vector [K]


def _linear_case(
    name: str, activations: ActivationSpec, weights: WeightSpec, ending: Ending, *, make: Callable = _fake,
    zero: bool = False, **facts: object,
) -> Example:  # fmt: skip
    """`ending` of what rounds activations, of x, a dequantized weight [N, K] and a vector [K]."""
    rounding, by_dtype = make(activations), texts(weights)

    def function(x: Tensor, gain: Tensor, q: Tensor, scale: Tensor, *rest: Tensor) -> object:
        weight = OPS.dequantize(q, scale, rest[0] if zero else None, by_dtype[x.dtype])
        return ending(lambda y: rounding(y, *(() if activations.dynamic else rest[-1:])), x, weight, gain)

    def inputs(dtype: torch.dtype) -> tuple:
        parts = [p for p in random_weight((N, K), weights, dtype, zero=zero) if p is not None]
        static = () if activations.dynamic else (torch.tensor([0.01]),)
        return (*draw(dtype, (1, T, K), (K,)), *parts, *static)

    return Example(name, function, inputs, **facts)  # type: ignore[arg-type]


def _plain(rounded: Callable, x: Tensor, w: Tensor, _: Tensor) -> Tensor:
    return F.linear(rounded(x), w)


def _read_elsewhere(rounded: Callable, x: Tensor, w: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    y = rounded(x)
    return F.linear(y, w), y * 2


def _two_linears(rounded: Callable, x: Tensor, w: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    y = rounded(x)
    return F.linear(y, w), F.linear(y, w).relu()


def scaled_linear_examples() -> list[Example]:
    """Every granularity of activations, by weights of their kind, in either spelling; and what must be left alone."""
    case, fewer = _linear_case, replace(INT_TOKEN, least_tokens=T + 1)
    weights = {"fp8_block": FP8_BLOCK, "int8_token": INT8, "int8_static": INT8}
    return [
        *[case(name, spec, weights.get(name, FP8_ROWS), _plain) for name, spec in SPECS.items()],
        case("two_ops", FP8_TOKEN, FP8_ROWS, _plain, make=_round_trip),
        case("two_static_ops", STATIC, FP8_ROWS, _plain, make=_round_trip),
        case("enough_tokens", replace(INT_TOKEN, least_tokens=T), INT8, _plain),
        case("too_few_tokens", fewer, INT8, _plain),
        case("residual", INT_TOKEN, INT8, lambda r, x, w, _: F.linear(r(x), w) + 1.5),
        case("two_linears", INT_TOKEN, INT8, _two_linears),
        case("two_linears_static", STATIC, FP8_ROWS, _two_linears),
        case("two_linears_in_some_steps", fewer, INT8, _two_linears),
        case("int4_weight", INT_TOKEN, INT4, _plain, matches=0, reason="activations are int8, the weight int4"),
        case("other_kind", FP8_TOKEN, INT8, _plain, matches=0, reason="activations are fp8, the weight int8"),
        case("zero_points", INT_TOKEN, INT8, _plain, zero=True, matches=0, reason="zero points"),
        case("read_elsewhere", INT_TOKEN, INT8, _read_elsewhere, matches=0, reason="is read by mul"),
        case("no_linear", INT_TOKEN, INT8, lambda r, x, w, _: r(x) * w.sum(), matches=0, reason="is read by mul"),
        case("plain_linear", INT_TOKEN, INT8, lambda r, x, w, _: F.linear(r(x), x[0]) + w.sum(), matches=0,
             reason="no quantized linear"),
    ]  # fmt: skip


def norm_quantize_examples() -> list[Example]:
    """Norms before every granularity, with what surrounds a linear; and norms that are read elsewhere."""

    def case(name: str, ending: Ending, spec: ActivationSpec = FP8_TOKEN, **facts: object) -> Example:
        weights = FP8_BLOCK if spec.block else FP8_ROWS if spec.kind == FP8 else INT8
        return _linear_case(name, spec, weights, ending, **facts)  # type: ignore[arg-type]

    def normed(rounded: Callable, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return F.linear(rounded(rms(x, g)), w)

    def layer(rounded: Callable, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return F.linear(rounded(F.layer_norm(x, (K,), g)), w)

    def also_read(rounded: Callable, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y = rms(x, g)
        return F.linear(rounded(y), w), y * 2

    def two(rounded: Callable, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y = rounded(rms(x, g))
        return F.linear(y, w), F.linear(y, w).relu()

    return [
        *[case(name, normed, spec) for name, spec in SPECS.items()],
        case("two_ops", normed, make=_round_trip),
        case("layer", layer),
        case("residual", lambda r, x, w, g: F.linear(r(rms(x, g)), w).relu() + x[..., :N]),
        case("some_steps", normed, replace(INT_TOKEN, least_tokens=T)),
        case("other_steps", normed, replace(INT_TOKEN, least_tokens=T + 1)),
        case("also_read", also_read, matches=0, reason="the norm's result is also read by mul"),
        case("two_linears", two, replace(INT_TOKEN, least_tokens=T), matches=0, reason="also read by quant_linear"),
        case("shared_codes", two, matches=0),
        case("no_norm", _plain, matches=0),
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
