"""Callables that quantize one value more than once, and look-alikes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.quant import FP8, INT, TENSOR, TOKEN, ActivationSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.quant_examples import draw, texts

T, K = 5, 24


def shared_quantize_examples() -> list[Example]:
    """Both spellings, static and dynamic; other values, specs and scales."""
    token, other, static = (
        ActivationSpec(INT, 8, TOKEN), ActivationSpec(FP8, 8, TOKEN), ActivationSpec(INT, 8, TENSOR, 0, False)
    )  # fmt: skip
    text, other_text, static_text = token.to_text(), other.to_text(), static.to_text()
    back = texts(token.dequantized("float32"))

    def case(name: str, function: Callable, **facts: object) -> Example:
        def inputs(dtype: torch.dtype) -> tuple:
            return (*draw(dtype, (1, T, K)), torch.tensor([0.01]), torch.tensor([0.02]))

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    def fake(x: Tensor, s: Tensor, r: Tensor) -> object:
        return OPS.fake_quantize(x, None, text) + 1, OPS.fake_quantize(x, None, text) * 2

    def pair(x: Tensor) -> Tensor:
        codes, scale = OPS.quantize(x, None, text)
        return OPS.dequantize(codes, scale, None, back[x.dtype])

    def thrice(x: Tensor, s: Tensor, r: Tensor) -> object:
        return pair(x) + 1, pair(x) * 2, pair(x) - 3

    def given(x: Tensor, s: Tensor, r: Tensor) -> object:
        return OPS.fake_quantize(x, s, static_text) + 1, OPS.fake_quantize(x, s, static_text) * 2

    def scales(x: Tensor, s: Tensor, r: Tensor) -> object:
        return OPS.fake_quantize(x, s, static_text), OPS.fake_quantize(x, r, static_text)

    def specs(x: Tensor, s: Tensor, r: Tensor) -> object:
        return OPS.fake_quantize(x, None, text), OPS.fake_quantize(x, None, other_text)

    def values(x: Tensor, s: Tensor, r: Tensor) -> object:
        return OPS.fake_quantize(x, None, text), OPS.fake_quantize(x + 1, None, text)

    def changed(x: Tensor, s: Tensor, r: Tensor) -> object:
        y = x.clone()
        first = OPS.fake_quantize(y, None, text)
        y.mul_(2.0)
        return first, OPS.fake_quantize(y, None, text)

    def written(x: Tensor, s: Tensor, r: Tensor) -> object:
        first = OPS.fake_quantize(x, None, text)
        first.mul_(2.0)
        return first, OPS.fake_quantize(x, None, text)

    return [
        case("fake", fake),
        case("pair", thrice, matches=2),
        case("static", given),
        case("scales", scales, matches=0, reason="its static scale is another than"),
        case("specs", specs, matches=0),
        case("values", values, matches=0),
        case("changed", changed, matches=0, reason="is changed in place between them"),
        case("written", written, matches=0, reason="is changed in place"),
    ]
