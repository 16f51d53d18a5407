"""Canonical quantized linear: `linear` by a weight of codes, dequantized where it is multiplied.

`out[T, N] = epilogue(norm(x)[T, K] @ dequantize(q)[G * N, K]^T)`; with an activation spec x itself is codes, and the
product is of codes and then scaled.

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
from fusecomp.ops.quant import FP4, FP8, INT, NF4, ActivationSpec, WeightSpec, dequantize_reference


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

    def __str__(self) -> str:
        groups = f"{self.groups} x " if self.groups > 1 else ""
        layout = f"{self.kind}{self.bits} {self.rows}x{self.cols}{' zero' if self.zero else ''}"
        return f"quant_linear {groups}{self.n} x {self.k} {layout} {self.dtype}"

    @classmethod
    def parse(cls, text: str) -> QuantShape | None:
        """The shape that `str` gave, or None for another text."""
        kinds = "|".join((INT, FP8, FP4, NF4))
        found = re.fullmatch(rf"quant_linear (?:(\d+) x )?(\d+) x (\d+) ({kinds})(\d) (\d+)x(\d+)( zero)? (\w+)", text)
        if not found:
            return None
        groups, n, k, kind, bits, rows, cols, zero, dtype = found.groups()
        return cls(int(n), int(k), int(groups or 1), dtype, kind, int(bits), int(rows), int(cols), bool(zero))


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
        x: [T, K]; codes if there is an activation spec.
        q, scale, zero: the weight's, as `dequantize` takes them.
        program: `linear`'s.
        spec: the weight's `WeightSpec`.
        x_scale: of x's codes, as `quantize` gives it.
        activation: the `ActivationSpec` of x's codes, or empty.

    Raises:
        ValueError: an activation spec together with a norm, or without the codes' scale.
    """
    if activation:
        if x_scale is None or Program.from_text(program).norm is not None:
            raise ValueError("quant_linear: codes need their scale, and are of normed values already")
        x = dequantize_reference(
            x, x_scale, None, ActivationSpec.from_text(activation).dequantized("float32").to_text()
        )
    weight = dequantize_reference(q, scale, zero, replace(WeightSpec.from_text(spec), dtype="float32").to_text())
    return linear_reference(x, weight, norm_weight, norm_bias, operands, program)


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


def quant_shape(x_dtype: torch.dtype, q: Tensor, zero: Any, program: Program, spec: WeightSpec) -> QuantShape:
    """The `QuantShape` of a call; only the shape of `q` is read, and whether there is a `zero`."""
    rows, k = spec.shape(q.shape)
    dtype = str(x_dtype).removeprefix("torch.")
    layout = (spec.kind, spec.bits, spec.rows, spec.cols)
    return QuantShape(rows // program.groups, k, program.groups, dtype, *layout, zero is not None)


define(
    "quant_linear(Tensor x, Tensor q, Tensor scale, Tensor? zero, Tensor? norm_weight, Tensor? norm_bias, "
    'Tensor[] operands, str program, str spec, Tensor? x_scale=None, str activation="") -> Tensor',
    quant_linear_reference,
    _fake,
)
