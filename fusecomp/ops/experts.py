"""The canonical experts op: every token through its top-k experts, weighted and summed.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops.library import define
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

# gate clamped to at most `limit`, up to +-limit: (up + 1) * gate * sigmoid(alpha * gate), as gpt-oss has it.
GPT_OSS = "gpt_oss"
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_GPT_OSS_TEXT = re.compile(rf"{GPT_OSS}\({_NUMBER},\s*{_NUMBER}\)")


def gpt_oss(alpha: float, limit: float) -> str:
    """Text of gpt-oss's clamped gate."""
    return f"{GPT_OSS}({alpha!r},{limit!r})"


@dataclass(frozen=True)
class Activation:
    """An expert's activation: one of `ACTIVATIONS`, or `GPT_OSS` with its two numbers."""

    name: str
    alpha: float = 0.0
    limit: float = 0.0

    @classmethod
    def parse(cls, text: str, gated: bool) -> Activation:
        """The activation that the op's `act` names.

        Raises:
            ValueError: text that names none, or a gated one without a gate.
        """
        if text in ACTIVATIONS:
            return cls(text)
        match = _GPT_OSS_TEXT.fullmatch(text)
        if match is None:
            known = ", ".join([*sorted(ACTIVATIONS), f"{GPT_OSS}(alpha,limit)"])
            raise ValueError(f"experts: activation {text!r} is none of {known}")
        alpha, limit = (float(number) for number in match.groups())
        if not gated or not math.isfinite(alpha) or not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"experts: activation {text!r} needs gated experts, a finite alpha and a positive limit")
        return cls(GPT_OSS, alpha, limit)

    def glu(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activated gate times up."""
        if self.name != GPT_OSS:
            return ACTIVATIONS[self.name](gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


@dataclass(frozen=True)
class CodesShape:
    """What the choice of kernels for experts of codes depends on, besides the number of tokens.

    Attributes:
        experts, top_k, hidden, width: E, K, C and F.
        up_cols, down_cols: columns that share a scale; 0 for all.
        bits: of a code.
        itemsize: bytes of an activation.
    """

    experts: int
    top_k: int
    hidden: int
    width: int
    kind: str
    bits: int
    up_cols: int
    down_cols: int
    itemsize: int

    @property
    def codes(self) -> str:
        """As the tables name a layout: "fp8", "fp8 blocks", "int4 blocks" and so on."""
        name = f"{self.kind}{self.bits}" if self.kind == INT else self.kind
        return f"{name} blocks" if self.up_cols else name

    def __str__(self) -> str:
        sizes = f"{self.experts} x {self.top_k} x {self.hidden} x {self.width}"
        return f"quant_experts {sizes} {self.kind}{self.bits} {self.up_cols}, {self.down_cols} of {self.itemsize} bytes"

    @classmethod
    def parse(cls, text: str) -> CodesShape | None:
        """The shape that `str` gave, or None for another text."""
        kinds, number = "|".join((INT, FP8, FP4, NF4)), r"(\d+)"
        sizes = " x ".join([number] * 4)
        found = re.fullmatch(rf"quant_experts {sizes} ({kinds})(\d) {number}, {number} of {number} bytes", text)
        if not found:
            return None
        experts, top_k, hidden, width, kind, *rest = found.groups()
        return cls(int(experts), int(top_k), int(hidden), int(width), kind, *map(int, rest))


def codes_shape(up: WeightSpec, down: WeightSpec, sizes: tuple[int, int, int, int], itemsize: int) -> CodesShape:
    """The shape of a call; sizes are (E, K, C, F). Layouts of different kinds count as that of the first."""
    return CodesShape(*sizes, up.kind, up.bits, up.cols, down.cols, itemsize)


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    weight = weight.transpose(-1, -2) if transposed else weight
    return F.linear(x, weight, bias)


def _activate(up: Tensor, act: str, gated: bool, interleaved: bool) -> Tensor:
    activation = Activation.parse(act, gated)
    if not gated:
        return ACTIVATIONS[activation.name](up)
    gate, up = (up[..., ::2], up[..., 1::2]) if interleaved else up.chunk(2, dim=-1)
    return activation.glu(gate, up)


def experts_reference(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """residual[t] + sum over k of weight[t, k] * expert_{index[t, k]}(x[t]); x, residual [T, C] -> [T, C], as x.

    up [E, F or 2F, C] (gate and up rows when `gated`), down [E, C, F]; with `transposed` both are stored [E, in, out].
    `act` is what `Activation.parse` reads. An index equal to E is a sentinel (an expert of another rank), which adds
    nothing.
    """

    def run(rows: Tensor, expert: int) -> Tensor:
        bias = None if up_bias is None else up_bias[expert]
        hidden = _activate(_expert_linear(x[rows], up[expert], bias, transposed), act, gated, interleaved)
        return _expert_linear(hidden, down[expert], None if down_bias is None else down_bias[expert], transposed)

    return _combined(x, top_k_index, top_k_weights, up.shape[0], run, residual)


def quant_experts_reference(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    up_spec: str,
    down_spec: str,
    residual: Tensor | None = None,
) -> Tensor:
    """`experts` by weights of codes [E, N, K] with scales [E, ...], as `dequantize` takes them.

    Only experts that some token chose are dequantized, one after the other.
    """

    def run(rows: Tensor, expert: int) -> Tensor:
        first, second = (
            dequantize_reference(q[expert], scale[expert], None if zero is None else zero[expert], spec)
            for q, scale, zero, spec in ((up, up_scale, up_zero, up_spec), (down, down_scale, down_zero, down_spec))
        )
        bias = None if up_bias is None else up_bias[expert]
        hidden = _activate(_expert_linear(x[rows], first, bias, transposed), act, gated, interleaved)
        return _expert_linear(hidden, second, None if down_bias is None else down_bias[expert], transposed)

    return _combined(x, top_k_index, top_k_weights, up.shape[0], run, residual)


def _combined(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    run: Callable[[Tensor, int], Tensor],
    residual: Tensor | None,
) -> Tensor:
    """residual + the weighted sum of what `run(rows of x, expert)` gives for each token's experts."""
    T, K = top_k_index.shape
    flat, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    # The combine runs in fp32 (fp64 for fp64) over k in routing order: the result does not depend on experts' order.
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = torch.zeros(T * K, x.shape[1], dtype=wide, device=x.device)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[begin : begin + count]
            parts[rows] = run(rows // K, expert).to(wide)
        begin += count
    total = (parts.view(T, K, x.shape[1]) * top_k_weights.to(wide)[..., None]).sum(1)
    return (total if residual is None else total + residual.to(wide)).to(x.dtype)


define(
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor up, Tensor? up_bias, Tensor down, "
    "Tensor? down_bias, str act, bool gated, bool interleaved, bool transposed, Tensor? residual=None) -> Tensor",
    experts_reference,
    lambda x, *_: x.new_empty(x.shape),
)
define(
    "quant_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor up, Tensor up_scale, Tensor? up_zero, "
    "Tensor? up_bias, Tensor down, Tensor down_scale, Tensor? down_zero, Tensor? down_bias, str act, bool gated, "
    "bool interleaved, bool transposed, str up_spec, str down_spec, Tensor? residual=None) -> Tensor",
    quant_experts_reference,
    lambda x, *_: x.new_empty(x.shape),
)
