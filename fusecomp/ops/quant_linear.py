"""Canonical quantized linear: `linear` by a weight of codes, dequantized where it is multiplied.

`out[T, N] = epilogue(norm(x)[T, K] @ dequantize(q)[G * N, K]^T)`. With an activation spec the product is of codes, and
then scaled: a floating x is quantized inside, after its norm; an x of codes comes with their scale.

Legend: T tokens, N output features, K input features, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.library import define
from fusecomp.ops.linear import Program, linear_reference
from fusecomp.ops.norm import norm_reference
from fusecomp.ops.quant import (
    BLOCK,
    FP4,
    FP8,
    INT,
    NF4,
    TENSOR,
    TOKEN,
    ActivationSpec,
    WeightSpec,
    dequantize_reference,
    fake_quantize_reference,
)


@dataclass(frozen=True)
class QuantShape:
    """What the choice of a quantized linear's kernel depends on, besides the number of tokens.

    Attributes:
        n: output features of one group.
        k: input features.
        groups: accumulators.
        dtype: of activations, as torch names it.
        kind, bits, rows, cols: the weight's, as `WeightSpec` has them.
        zero: whether it has zero points.
        granularity: of the activations' codes, as `ActivationSpec` has it; empty if activations are not quantized.
        block: columns of a block of them, otherwise 0.
        least: tokens from which they are quantized.
        epilogue: `Program.kind`, where activations are quantized.
        fold: the weight's, as `WeightSpec` has it.
    """

    n: int
    k: int
    groups: int
    dtype: str
    kind: str
    bits: int
    rows: int
    cols: int
    zero: bool
    granularity: str = ""
    block: int = 0
    least: int = 0
    epilogue: str = ""
    fold: int = 0

    def __str__(self) -> str:
        groups = f"{self.groups} x " if self.groups > 1 else ""
        layout = f"{self.kind}{self.bits} {self.rows}x{self.cols}{' zero' if self.zero else ''}"
        layout += f" fold {self.fold}" if self.fold else ""
        codes = f" by codes {self.granularity} {self.block} {self.least} {self.epilogue}" if self.granularity else ""
        return f"quant_linear {groups}{self.n} x {self.k} {layout} {self.dtype}{codes}"

    @classmethod
    def parse(cls, text: str) -> QuantShape | None:
        """The shape that `str` gave, or None for another text."""
        kinds, parts = "|".join((INT, FP8, FP4, NF4)), "|".join((TENSOR, TOKEN, BLOCK))
        found = re.fullmatch(
            rf"quant_linear (?:(\d+) x )?(\d+) x (\d+) ({kinds})(\d) (\d+)x(\d+)( zero)?(?: fold (\d+))? (\w+)"
            rf"(?: by codes ({parts}) (\d+) (\d+) (\w+))?",
            text,
        )
        if not found:
            return None
        groups, n, k, kind, bits, rows, cols, zero, fold, dtype, granularity, block, least, epilogue = found.groups()
        weight = (int(n), int(k), int(groups or 1), dtype, kind, int(bits), int(rows), int(cols), bool(zero))
        return cls(*weight, granularity or "", int(block or 0), int(least or 0), epilogue or "", int(fold or 0))


def quant_linear_reference(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
    spec: str,
    x_scale: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Epilogue(norm(x) @ dequantize(q)^T) [T, N], dequantized, accumulated and evaluated in fp32 and rounded once.

    Args:
        x: [T, K] of a float type; or, with an activation spec, codes.
        q, scale, zero: the weight's, as `dequantize` takes them.
        program: `linear`'s.
        spec: the weight's `WeightSpec`.
        x_scale: of codes, as `quantize` gives it; the static scale [1] of an x that is quantized here, or None.
        activation: the `ActivationSpec` of x's codes, or empty. A floating x is quantized after its norm, whose result
            is not rounded before, and in steps of fewer than the spec's `least_tokens` not at all.

    Raises:
        ValueError: codes together with a norm, without their scale, or of a spec with `least_tokens`.
    """
    if activation:
        parsed, program_parsed = ActivationSpec.from_text(activation), Program.from_text(program)
        if is_codes(x):
            if x_scale is None or program_parsed.norm is not None or parsed.least_tokens:
                raise ValueError("quant_linear: codes need their scale, and are of normed values in every step already")
            x = dequantize_reference(x, x_scale, None, parsed.dequantized("float32").to_text())
        else:
            x = x.to(torch.float32)
            if program_parsed.norm is not None:
                x = norm_reference(x, norm_weight, norm_bias, program_parsed.norm.to_text())
            x = fake_quantize_reference(x, x_scale, activation)
            program, norm_weight, norm_bias = replace(program_parsed, norm=None).to_text(), None, None
    weight = dequantize_reference(q, scale, zero, replace(WeightSpec.from_text(spec), dtype="float32").to_text())
    return linear_reference(x, weight, norm_weight, norm_bias, operands, program)


def is_codes(x: Tensor) -> bool:
    """Whether activations are codes rather than numbers."""
    return x.dtype in (torch.int8, torch.float8_e4m3fn)


def _fake(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Any,
    program: str,
    spec: str,
    x_scale: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    parsed = Program.from_text(program)
    return x.new_empty(x.shape[0], q.shape[0] // parsed.groups, dtype=parsed.torch_dtype)


def quant_shape(
    x_dtype: torch.dtype,
    q: Tensor,
    zero: Any,
    program: Program,
    spec: WeightSpec,
    activation: ActivationSpec | None = None,
) -> QuantShape:
    """The `QuantShape` of a call; only the shape of `q` is read, and whether there is a `zero`."""
    rows, k = spec.shape(q.shape)
    dtype = str(x_dtype).removeprefix("torch.")
    layout = (spec.kind, spec.bits, spec.rows, spec.cols)
    weight = (rows // program.groups, k, program.groups, dtype, *layout, zero is not None)
    if activation is None:
        return QuantShape(*weight, fold=spec.fold)
    facts = (activation.granularity, activation.block, activation.least_tokens, program.kind)
    return QuantShape(*weight, *facts, fold=spec.fold)


define(
    "quant_linear(Tensor x, Tensor q, Tensor scale, Tensor? zero, Tensor? norm_weight, Tensor? norm_bias, "
    'Tensor[] operands, str program, str spec, Tensor? x_scale=None, str activation="") -> Tensor',
    quant_linear_reference,
    _fake,
)
