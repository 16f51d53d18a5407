"""Canonical norm op: RMSNorm and LayerNorm over the last dimension, in the variants that models use."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fusecomp.ops.library import define

RMS, LAYER = "rms", "layer"


@dataclass(frozen=True)
class NormSpec:
    """One norm. y = z * rsqrt(mean(z^2) + eps) * w + b, with z = x (rms) or x - mean(x) (layer).

    Attributes:
        kind: "rms" or "layer".
        eps: added under the root.
        plus_one: the factor is 1 + w (Gemma).
    """

    kind: str
    eps: float
    plus_one: bool = False

    def to_text(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> NormSpec:
        """Parse `to_text`'s output."""
        return NormSpec(**json.loads(text))

    def describe(self) -> str:
        """In a word or two, for reports."""
        return f"{self.kind} norm{' (1 + w)' if self.plus_one else ''} eps {self.eps:g}"


def norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: str) -> Tensor:
    """Norm of x [..., K] with weight and bias [K], computed in fp32 (fp64 for fp64 inputs), in x's dtype."""
    parsed = NormSpec.from_text(spec)
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype)
    if parsed.kind == LAYER:
        z = z - z.mean(-1, keepdim=True)
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + parsed.eps)
    if weight is not None:
        y = y * (weight.to(dtype) + 1 if parsed.plus_one else weight.to(dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


define(
    "norm(Tensor x, Tensor? weight, Tensor? bias, str spec) -> Tensor",
    norm_reference,
    lambda x, weight, bias, spec: x.new_empty(x.shape),
)
