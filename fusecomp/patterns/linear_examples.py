"""Callables in which linears share an input, and in which they must stay apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusecomp.ops import OPS
from fusecomp.ops.quant import FP8, INT, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.quant_examples import random_weight, texts

T, K = 5, 24


class Projections(nn.Module):
    """Linears of one input, combined by `combine`."""

    def __init__(
        self, widths: Sequence[int], combine: Callable, biases: Sequence[bool] = (), tied: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        biases = biases or [False] * len(widths)
        layers = [nn.Linear(K, n, bias=b) for n, b in zip(widths, biases, strict=True)]
        self.layers = nn.ModuleList(layers)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / K**0.5
        if tied:
            self.layers[1].weight = self.layers[0].weight
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.combine(x.to(next(self.parameters()).dtype), *self.layers)


class QuantizedProjection(nn.Module):
    """A linear whose parameters are codes, scales and zero points."""

    def __init__(self, n: int, spec: WeightSpec, zero: bool, seed: int) -> None:
        super().__init__()
        self.texts = texts(spec)
        parts = random_weight((n, K), spec, torch.float32, zero=zero, seed=seed)
        self.q, self.scale, self.zero = (None if p is None else nn.Parameter(p, requires_grad=False) for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, OPS.dequantize(self.q, self.scale, self.zero, self.texts[x.dtype]))


class QuantizedProjections(nn.Module):
    """Quantized linears of one input, combined by `combine`; given one spec or one for each."""

    def __init__(self, widths: Sequence[int], combine: Callable, *specs: WeightSpec, zero: bool = False) -> None:
        super().__init__()
        each = specs * (len(widths) // len(specs))
        layers = [QuantizedProjection(n, s, zero, i) for i, (n, s) in enumerate(zip(widths, each, strict=True))]
        self.layers = nn.ModuleList(layers)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.combine(x, *self.layers)


def _separate(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in layers)


def _gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    return F.silu(gate(x)) * up(x)


def _parallel_block(x: Tensor, q: nn.Module, gate: nn.Module, k: nn.Module, up: nn.Module) -> tuple[Tensor, ...]:
    return q(x), k(x), F.gelu(gate(x), approximate="tanh") * up(x)


def _changed_between(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, Tensor]:
    x = x.clone()
    a = first(x)
    x.mul_(2.0)
    return a, second(x)


def _other_user(x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, ...]:
    return first(x), second(x), first.weight.sum()  # type: ignore[operator,union-attr]


def _inputs(dtype: torch.dtype) -> tuple:
    return (torch.randn(1, T, K, generator=torch.Generator().manual_seed(1)).to(dtype),)


def merging_examples() -> list[Example]:
    """Groups of every kind that models use, and what must be left alone."""

    def example(
        name: str, widths: Sequence[int], combine: Callable, *, matches: int = 1, reason: str = "", **facts: object
    ) -> Example:
        return Example(name, Projections(widths, combine, **facts), _inputs, matches, reason)  # type: ignore[arg-type]

    def quantized(
        name: str, widths: Sequence[int], combine: Callable, *specs: WeightSpec, zero: bool = False, **facts: Any
    ) -> Example:
        return Example(name, QuantizedProjections(widths, combine, *specs, zero=zero), _inputs, **facts)

    int4, int8, one, block = (
        WeightSpec(*f, "float32") for f in ((INT, 4, 1, 8), (INT, 8, 1, 0), (FP8, 8, 0, 0), (FP8, 8, 8, 8))
    )
    return [
        example("qkv", (16, 8, 8), _separate),
        example("biased", (16, 8), _separate, biases=(True, True)),
        example("one_bias", (16, 8), _separate, biases=(False, True)),
        example("gate_up", (32, 32), _gated),
        example("parallel_block", (16, 32, 8, 32), _parallel_block, matches=2),
        example("changed_between", (8, 8), _changed_between, matches=0, reason="changed in place"),
        example("other_user", (8, 8), _other_user, matches=0, reason="is used 2 times"),
        example("tied", (8, 8), _separate, matches=0, reason="used 2 times", tied=True),
        quantized("int4_qkv", (16, 8, 8), _separate, int4),
        quantized("int4_zero_gate_up", (32, 32), _gated, int4, zero=True),
        quantized("fp8_one_scale_gate_up", (32, 32), _gated, one),
        quantized("fp8_blocks", (16, 8, 12), _separate, block),
        quantized("fp8_one_scale_qkv", (16, 8, 8), _separate, one, matches=0, reason="they differ in height"),
        quantized("fp8_broken_block", (12, 8), _separate, block, matches=0, reason="a scale serves 8 rows"),
        quantized("two_kinds", (8, 8), _separate, int4, int8, matches=0),
    ]
