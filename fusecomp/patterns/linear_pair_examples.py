"""Callables with two linears and a norm between, and look-alikes that must stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.quant import ActivationSpec, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.functional_examples import rms
from fusecomp.patterns.quant_activation_examples import FP8_BLOCKS, FP8_ROWS, FP8_TOKEN, INT_TOKEN, STATIC
from fusecomp.patterns.quant_examples import FP8_BLOCK, INT4, INT8, K, N, T, draw, random_weight, texts

MANY = 64  # tokens where values are rounded to codes: one that falls on another code weighs less

# Of x [1, T, K], a residual of its shape, a gain [K], and the linears: one to K features, one to N.
Ending = Callable[[Tensor, Tensor, Tensor, Callable, Callable], object]


def _swiglu(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def _residual(x: Tensor, r: Tensor, g: Tensor, first: Callable, then: Callable) -> tuple[Tensor, Tensor]:
    h = r + first(x)
    return then(rms(h, g)), h


def _layer_norm(x: Tensor, r: Tensor, g: Tensor, first: Callable, then: Callable) -> Tensor:
    return then(F.layer_norm(r + first(x), (K,), g))


def _read_twice(x: Tensor, r: Tensor, g: Tensor, first: Callable, then: Callable) -> object:
    h = r + first(x)
    return then(rms(h, g)), then(rms(h, g + 1)), h


def _no_norm(x: Tensor, r: Tensor, g: Tensor, first: Callable, then: Callable) -> object:
    return then(r + first(x))


def _computed(x: Tensor, r: Tensor, g: Tensor, first: Callable, then: Callable) -> object:
    h = r + first(x)
    return then(rms(h, g)) + h.sum(-1)[0, :, None]


def _itself(x: Tensor, r: Tensor, g: Tensor, first: Callable, then: Callable) -> object:
    h = r + first(x)
    return h + first(rms(h, g))


def linear_pair_examples() -> list[Example]:
    """Layers as models go on after a residual, and what must be left alone."""

    def case(name: str, ending: Ending, **facts: object) -> Example:
        def function(x: Tensor, r: Tensor, g: Tensor, one: Tensor, two: Tensor) -> object:
            return ending(x, r, g, lambda x: F.linear(x, one), lambda x: F.linear(x, two))

        def inputs(dtype: torch.dtype) -> tuple:
            x, r, g, one, two = draw(dtype, (1, T, K), (1, T, K), (K,), (K, K), (N, K))
            return x, r, g, one / K**0.5, two / K**0.5

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    return [
        case("residual", _residual),
        case("no_residual", lambda x, r, g, first, then: then(rms(first(x), g))),
        case("swiglu", lambda x, r, g, first, then: _swiglu(then(rms(r + first(x), g)))),
        case("layer_norm", _layer_norm),
        case("norm_before", lambda x, r, g, first, then: then(rms(r + first(rms(x, g)), g))),
        case("three", lambda x, r, g, first, then: then(rms(first(rms(first(x), g)), g))),
        case("read_twice", _read_twice),
        case("no_norm", _no_norm, matches=0),
        case("computed_operand", _computed, matches=0, reason="which is not there before the first"),
        case("itself", _itself, matches=0, reason="which is not there before the first"),
    ]


def quant_linear_pair_examples() -> list[Example]:
    """The same by codes of activations and weights; without codes of activations there is nothing to pair."""

    def case(
        name: str, ending: Ending, activations: ActivationSpec | None, weights: WeightSpec, **facts: object
    ) -> Example:
        by_dtype, text = texts(weights), activations.to_text() if activations else ""

        def function(x: Tensor, r: Tensor, g: Tensor, *parts: Tensor) -> object:
            static = parts[4] if len(parts) > 4 else None

            def linear(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
                rounded = OPS.fake_quantize(x, static, text) if text else x
                return F.linear(rounded, OPS.dequantize(q, scale, None, by_dtype[x.dtype]))

            return ending(x, r, g, lambda x: linear(x, *parts[:2]), lambda x: linear(x, *parts[2:4]))

        def inputs(dtype: torch.dtype) -> tuple:
            one, two = (random_weight((n, K), weights, dtype, seed=n)[:2] for n in (K, N))
            static = (torch.tensor([0.01]),) if activations and not activations.dynamic else ()
            return (*draw(dtype, (1, MANY, K), (1, MANY, K), (K,)), *one, *two, *static)

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    return [
        case("fp8_token", _residual, FP8_TOKEN, FP8_ROWS),
        case("fp8_block", _residual, FP8_BLOCKS, FP8_BLOCK),
        case("fp8_static", _residual, STATIC, FP8_ROWS),
        case("int8_token", _residual, INT_TOKEN, INT8),
        case("other_steps", _residual, replace(INT_TOKEN, least_tokens=MANY + 1), INT8),
        case("layer_norm", _layer_norm, INT_TOKEN, INT8),
        case("swiglu", lambda x, r, g, first, then: _swiglu(then(rms(r + first(x), g))), FP8_TOKEN, FP8_ROWS),
        case("weight_only", _residual, None, INT4, matches=0),
        case("no_norm", _no_norm, INT_TOKEN, INT8, matches=0),
        case("itself", _itself, INT_TOKEN, INT8, matches=0, reason="which is not there before the first"),
    ]
