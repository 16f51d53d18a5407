"""A linear in front of a mixture for tests: rows come through it with their experts still beyond doubt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.linear_experts import NORM
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP8, INT, ActivationSpec, WeightSpec
from tests.lowerings.routed_cases import make_mixture, make_quant_mixture

RESIDUAL = Program(1, (FULL,), (("add", "i0", "a0"),), "float32")
ACTIVATIONS = {"fp8": ActivationSpec(FP8), "int8": ActivationSpec(INT)}


def make_linear_experts(name: str, T: int, **sizes: object) -> tuple[Tensor, tuple, tuple]:
    """(x, arguments of `linear`, those of `routed_experts` without x and without a residual)."""
    x, *args = make_mixture(name, max(T, 1), **sizes)  # type: ignore[arg-type]
    x = x[:T]
    program = replace(RESIDUAL, dtype=str(x.dtype).removeprefix("torch."))
    first = torch.eye(x.shape[1]).to(x), None, None, [_small(x)], program.to_text()
    return x, first, (*args[:-1], None)


def make_quant_linear_experts(name: str, T: int, layout: str, **sizes: object) -> tuple[Tensor, tuple, tuple]:
    """The same of `quant_linear` by codes of x, and of `routed_quant_experts`."""
    (x, *args), _ = make_quant_mixture(name, max(T, 1), layout=layout, **sizes)  # type: ignore[arg-type]
    x = x[:T]
    dtype, size = str(x.dtype).removeprefix("torch."), x.shape[1]
    activation = replace(ACTIVATIONS[layout], least_tokens=8)
    spec = WeightSpec(activation.kind, 8, 1, 0, dtype)
    q = torch.eye(size, device=x.device).to(activation.codes_dtype)
    weight = q, torch.ones(size, 1, device=x.device), None
    program = replace(RESIDUAL, dtype=dtype).to_text()
    first = (*weight, None, None, [_small(x)], program, spec.to_text(), None, activation.to_text())
    return x, first, (*args[:-1], None)


def norm_of(args: tuple) -> tuple[Tensor | None, NormSpec]:
    """The norm's weight and spec among a mixture's arguments behind x."""
    return args[2], NormSpec.from_text(args[NORM])


def _small(x: Tensor) -> Tensor:
    """A residual that no choice depends on."""
    g = torch.Generator(x.device).manual_seed(5)
    return torch.randn(x.shape, generator=g, device=x.device).to(x.dtype) / 64
