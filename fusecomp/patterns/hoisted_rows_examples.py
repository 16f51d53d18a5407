"""Callables on which `hoisted_rows` must match, and on which it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusecomp._compat import mark_unbacked
from fusecomp.ops import OPS
from fusecomp.ops.linear import FULL, ROW, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.quant import FP8, INT, TENSOR, TOKEN, ActivationSpec, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.quant_examples import texts
from fusecomp.patterns.routed_experts_examples import DTYPES, NORM, SPECS

T, S, C, N, E, WIDTH = 7, 6, 16, 24, 5, 8
ADD = (("add", "a0", "i0"),)
PROGRAMS = {
    (name, dtype): Program(1, operands, steps, text, norm).to_text()
    for dtype, text in DTYPES.items()
    for name, (operands, steps, norm) in {
        "plain": ((), (), None),
        "norm": ((), (), NormSpec(RMS, 1e-6)),
        "bias": ((ROW,), ADD, None),
        "residual": ((FULL,), ADD, None),
    }.items()
}
CODES = texts(WeightSpec(INT, 8, 1, 0, "float32"))
WHOLE = ActivationSpec(FP8, 8, TENSOR).to_text()
BY_TOKEN = ActivationSpec(FP8, 8, TOKEN).to_text()


def _inputs(dtype: torch.dtype, rows: int) -> tuple:
    """x and a residual [2, 1, T, C], T not known, weights [C, C], [N, C] and [C, N], experts', and rows in no order."""
    g = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    x = 4 * randn(2, 1, T, C)
    # Column e of a row speaks for expert e; steps of 1 / 4 survive the norm and 8 bits.
    x[0, ..., :E] = torch.stack([torch.randperm(E, generator=g) for _ in range(T)]).to(dtype) / 4 + 0.5
    index = torch.tensor([0, 5, 5, 2, 6, 1, 3])[:rows].clone()
    mark_unbacked(x, 2), mark_unbacked(index, 0)
    router, up, down = 2 * torch.eye(E, C, dtype=dtype), randn(E, 2 * WIDTH, C), randn(E, C, WIDTH)
    return x, randn(C, C), randn(N, C), randn(C, N), 1 + randn(C), router, up, down, index


class _Layer:
    """The ops of a layer on [T, C], over the tensors of `_inputs`."""

    def __init__(self, x: Tensor, r: Tensor, *given: Tensor) -> None:
        self.r = r
        self.square, self.wide, self.back, self.scale, self.router, self.up, self.down, self.index = given
        self.text = DTYPES[x.dtype]
        self.dtype = x.dtype

    def linear(self, x: Tensor, weight: Tensor, kind: str = "plain", *operands: Tensor) -> Tensor:
        scale = self.scale if kind == "norm" else None
        return OPS.linear(x, weight, scale, None, operands, PROGRAMS[kind, self.dtype])

    def project(self, x: Tensor) -> Tensor:
        return self.linear(x.view(-1, C), self.square, "residual", self.r.view(-1, C))

    def experts(self, x: Tensor) -> Tensor:
        form = (self.up, None, self.down, None, "silu", True, False, False)
        args = (self.scale, None, None, NORM, self.text, SPECS[self.dtype])
        return OPS.routed_experts(x, self.router, None, *args, *form, x)[1]

    def quant_experts(self, x: Tensor) -> Tensor:
        up, down = ((64 * w.float()).round().clamp(-127, 127).to(torch.int8) for w in (self.up, self.down))
        scales = (torch.full((E, n, 1), 1 / 64, dtype=self.dtype) for n in (2 * WIDTH, C))
        form = (up, next(scales), None, None, down, next(scales), None, None, "silu", True, False, False)
        args = (self.scale, None, None, NORM, self.text, SPECS[self.dtype])
        codes = CODES[self.dtype]
        return OPS.routed_quant_experts(x, self.router, None, *args, *form, codes, codes, x)[1]

    def mlp(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x, self.wide, "norm"), self.back, "residual", x)


def _case(name: str, body: Callable[[_Layer, Tensor], object], rows: int = S, **facts: object) -> Example:
    """`body(layer, x)` with x [1, T, C], of which `rows` are chosen."""

    def function(both: Tensor, *given: Tensor) -> object:
        x, r = both
        return body(_Layer(x, r, *given), x)

    return Example(name, function, partial(_inputs, rows=rows), **facts)  # type: ignore[arg-type]


def _two_choices(layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    y = layer.project(x)
    return y[layer.index], layer.mlp(y)[:3]


def _residual_wanted(layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Only what is behind the sum that others read moves."""
    h = layer.project(x)
    return layer.mlp(h)[layer.index], h


def _mixes_tokens(layer: _Layer, x: Tensor) -> Tensor:
    """A sum over tokens in between: what is behind it moves, what is before stays."""
    h = layer.project(x)
    return layer.mlp(h.cumsum(0))[layer.index]


def _reinterpreted(layer: _Layer, x: Tensor) -> Tensor:
    """[T, C] read as [C, T] by a view, then turned: rows of it are of many tokens."""
    y = layer.project(x)
    return y.view(C, -1).t().contiguous()[layer.index]


def _another_size(layer: _Layer, x: Tensor) -> Tensor:
    """A residual of as many rows, which nothing in the graph says."""
    return layer.linear(x[0], layer.square, "residual", layer.r[0, layer.index])[layer.index]


def _quantized(layer: _Layer, x: Tensor, spec: str) -> Tensor:
    y = OPS.fake_quantize(layer.project(x), None, spec)
    return layer.mlp(y)[layer.index]


def hoisted_rows_examples() -> list[Example]:
    """Last layers as the passes before leave them, and what must stay as it is."""
    return [
        _case("linears", lambda layer, x: layer.mlp(layer.project(x))[layer.index]),
        _case("three dims", lambda layer, x: layer.mlp(layer.project(x))[None][:, layer.index]),
        _case("index_select", lambda layer, x: layer.mlp(layer.project(x)).index_select(0, layer.index)),
        _case("last token", lambda layer, x: layer.mlp(layer.project(x))[-1:]),
        _case("experts", lambda layer, x: layer.experts(layer.project(x))[layer.index]),
        _case("experts of codes", lambda layer, x: layer.quant_experts(layer.project(x))[layer.index]),
        _case("pointwise", lambda layer, x: (layer.mlp(layer.project(x)).sigmoid() * layer.scale + 1)[layer.index]),
        _case("halves", lambda layer, x: torch.cat(layer.project(x).chunk(2, 1)[::-1], 1).relu()[layer.index]),
        _case("heads", lambda layer, x: layer.project(x.view(1, -1, 4, 4).flatten(2))[layer.index]),
        _case("codes by token", lambda layer, x: _quantized(layer, x, BY_TOKEN)),
        _case("residual wanted", _residual_wanted),
        _case("mixed tokens", _mixes_tokens),
        _case("codes of one scale", lambda layer, x: _quantized(layer, x, WHOLE)),
        _case("logits", lambda layer, x: layer.linear(layer.mlp(layer.project(x))[layer.index], layer.wide, "norm")),
        _case("two choices", _two_choices, matches=1),
        _case("nothing to save", lambda layer, x: (x + layer.r)[0][layer.index], matches=0),
        _case("features", lambda layer, x: layer.project(x)[:, :4], matches=0),
        _case("all wanted", lambda layer, x: (layer.project(x), layer.project(x)[layer.index]), matches=1),
        _case("reinterpreted", _reinterpreted, matches=0),
        _case("another size", _another_size, T, matches=0, reason="which may be the number of tokens"),
        _case("two dims of rows", lambda layer, x: layer.project(x)[layer.index[None]], matches=0),
    ]  # fmt: skip
