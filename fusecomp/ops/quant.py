"""Canonical ops between real numbers and their codes: `dequantize` and `quantize`, and what describes their layout.

Legend: N rows, K columns of a weight, T tokens.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fusecomp.ops.library import define

KINDS = {"int": (4, 8), "fp8": (8,), "fp4": (4,), "nf4": (4,)}  # kind -> widths in bits
LARGEST = {"int": 127.0, "fp8": 448.0}  # of an activation's codes
INT4_OFFSET = 8  # of codes without zero points
# Values of codes 0..15: OCP e2m1, and the quantiles of a normal distribution of QLoRA's appendix E.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class WeightSpec:
    """How the codes of a tensor [..., N, K] lie and what they stand for.

    Attributes:
        kind: "int", "fp8" (e4m3fn), "fp4" (e2m1) or "nf4".
        bits: of one code: 8, or 4 with two codes in a byte along K, the low nibble first.
        rows: rows that share a scale; 0 for all.
        cols: columns that share a scale; 0 for all.
        dtype: of the result, as torch names it.
    """

    kind: str
    bits: int
    rows: int
    cols: int
    dtype: str

    def __post_init__(self) -> None:
        if self.bits not in KINDS.get(self.kind, ()):
            raise ValueError(f"weight spec: no {self.bits}-bit codes of kind {self.kind!r}; there are {KINDS}")

    def to_text(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> WeightSpec:
        """Parse `to_text`'s output."""
        return WeightSpec(**json.loads(text))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class ActivationSpec:
    """How activations [..., T, K] become codes.

    Attributes:
        kind: "int" or "fp8".
        bits: 8.
        granularity: "tensor", "token" or "block" (of a token's columns): what shares a scale.
        block: columns of a block, otherwise 0.
        dynamic: the scale follows from the values; otherwise it is given.
    """

    kind: str
    bits: int = 8
    granularity: str = "token"
    block: int = 0
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.kind not in LARGEST or self.bits != 8:
            raise ValueError(f"activation spec: no {self.bits}-bit codes of kind {self.kind!r}")
        if self.granularity not in ("tensor", "token", "block") or (self.block > 0) != (self.granularity == "block"):
            raise ValueError(f"activation spec: granularity {self.granularity!r} with blocks of {self.block}")

    def to_text(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> ActivationSpec:
        """Parse `to_text`'s output."""
        return ActivationSpec(**json.loads(text))

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn

    def dequantized(self, dtype: str) -> WeightSpec:
        """What `dequantize` calls the codes and scales of these activations."""
        return WeightSpec(self.kind, self.bits, 0 if self.granularity == "tensor" else 1, self.block, dtype)


def _values(q: Tensor, spec: WeightSpec) -> Tensor:
    """The numbers [..., N, K] that codes stand for before zero and scale, in fp32."""
    if spec.bits == 8:
        return q.to(torch.float32)
    codes = torch.stack((q & 15, q >> 4), -1).flatten(-2)
    if spec.kind == "int":
        return codes.to(torch.float32)
    return torch.tensor(FP4_VALUES if spec.kind == "fp4" else NF4_VALUES, device=q.device)[codes.int()]


def _spread(scale: Tensor, spec: WeightSpec, n: int, k: int) -> Tensor:
    """Scales (or zeros), in fp32, as something that broadcasts to [..., N, K]; bytes are e8m0 exponents."""
    if scale.dtype == torch.uint8:
        powers = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.to(torch.int32) - 127)
        scale = torch.where(scale == 255, torch.nan, powers)
    scale = scale.to(torch.float32)
    if scale.dim() < 2:
        return scale
    if spec.cols:
        scale = scale.repeat_interleave(spec.cols, -1)[..., :k]
    if spec.rows > 1:
        scale = scale.repeat_interleave(spec.rows, -2)[..., :n, :]
    return scale


def dequantize_reference(q: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    """(code - zero) * scale [..., N, K] in the spec's dtype, computed in fp32 and rounded once.

    Args:
        q: codes [..., N, K] int8 or float8_e4m3fn, or [..., N, K / 2] uint8. Leading dims are experts.
        scale: [..., ceil(N / rows), ceil(K / cols)] of a float type, or uint8 e8m0 exponents; [1] if one serves all.
        zero: as scale, or None: then 4-bit integer codes stand for code - 8.
    """
    parsed = WeightSpec.from_text(spec)
    values = _values(q, parsed)
    n, k = values.shape[-2:]
    if zero is not None:
        values = values - _spread(zero, parsed, n, k)
    elif parsed.kind == "int" and parsed.bits == 4:
        values = values - INT4_OFFSET
    return (values * _spread(scale, parsed, n, k)).to(parsed.torch_dtype)


def _dequantize_fake(q: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    parsed = WeightSpec.from_text(spec)
    return q.new_empty((*q.shape[:-1], q.shape[-1] * (8 // parsed.bits)), dtype=parsed.torch_dtype)


def quantize_reference(x: Tensor, scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """Codes [..., T, K] of x and their scale, fp32: [1], [..., T, 1] or [..., T, ceil(K / block)].

    A dynamic scale makes the largest magnitude the largest code; of zeros it is 1. Codes beyond the largest saturate.

    Args:
        scale: the static one, [1]; None if the spec is dynamic.

    Raises:
        ValueError: a scale for a dynamic spec, or none for a static one.
    """
    parsed = ActivationSpec.from_text(spec)
    if (scale is None) != parsed.dynamic:
        raise ValueError(f"quantize: {'no' if scale is None else 'a'} scale for {parsed}")
    values, largest = x.to(torch.float32), LARGEST[parsed.kind]
    if scale is None:
        scale = _dynamic_scale(values.abs(), parsed) / largest
        scale = torch.where(scale == 0, 1.0, scale)
    else:
        scale = scale.to(torch.float32).reshape(1)
    spread = scale.repeat_interleave(parsed.block, -1)[..., : x.shape[-1]] if parsed.block else scale
    codes = (values / spread).clamp(-largest, largest)
    return (codes.round() if parsed.kind == "int" else codes).to(parsed.codes_dtype), scale.clone()


def _dynamic_scale(magnitudes: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.granularity == "tensor":
        return magnitudes.amax().reshape(1)
    if spec.granularity == "block":
        padded = torch.nn.functional.pad(magnitudes, (0, -magnitudes.shape[-1] % spec.block))
        return padded.unflatten(-1, (-1, spec.block)).amax(-1)
    return magnitudes.amax(-1, keepdim=True)


def _quantize_fake(x: Tensor, scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    parsed = ActivationSpec.from_text(spec)
    blocks = -(-x.shape[-1] // parsed.block) if parsed.block else 1
    shape = (1,) if parsed.granularity == "tensor" else (*x.shape[:-1], blocks)
    return x.new_empty(x.shape, dtype=parsed.codes_dtype), x.new_empty(shape, dtype=torch.float32)


define("dequantize(Tensor q, Tensor scale, Tensor? zero, str spec) -> Tensor", dequantize_reference, _dequantize_fake)
define("quantize(Tensor x, Tensor? scale, str spec) -> (Tensor, Tensor)", quantize_reference, _quantize_fake)
