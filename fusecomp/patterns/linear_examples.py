"""Callables in which linears share an input, and in which they must stay apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusecomp.patterns.base import Example

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

    return [
        example("qkv", (16, 8, 8), _separate),
        example("biased", (16, 8), _separate, biases=(True, True)),
        example("one_bias", (16, 8), _separate, biases=(False, True)),
        example("gate_up", (32, 32), _gated),
        example("parallel_block", (16, 32, 8, 32), _parallel_block, matches=2),
        example("changed_between", (8, 8), _changed_between, matches=0, reason="changed in place"),
        example("other_user", (8, 8), _other_user, matches=0, reason="is used 2 times"),
        example("tied", (8, 8), _separate, matches=0, reason="used 2 times", tied=True),
    ]
