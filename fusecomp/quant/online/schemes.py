"""The schemes by which a model can be quantized, and why each weight is as it is.

Legend: K columns of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fusecomp.config import QUANTIZE_SCHEMES
from fusecomp.errors import ConfigError
from fusecomp.ops.quant import FP8, INT, ActivationSpec

# Measured on an H100, layers of Llama-8B: from 16 tokens on, products of codes by codes are faster with all they need;
# below, steps are bound by reading weights, and rounding their activations would gain nothing.
LEAST_TOKENS = 16
# A group has as many columns as divide K: powers of two first, which other engines read too; kernels want multiples
# of 16, and scales of fewer than 32 columns weigh more than they gain.
GROUPS = (128, 64, 32, 112, 96, 80, 48)


@dataclass(frozen=True)
class Scheme:
    """How weights, and the inputs of linears, are quantized. Experts' inputs never are.

    Attributes:
        name: as users give it.
        kind, bits: of the codes, as in `WeightSpec`.
        grouped: weights have a scale for a group of columns; otherwise one for a row.
        activation: of linears' inputs; None if they stay.
        calibrated: whether calibration text changes anything.
        sizes: allowed groups, the best first.
    """

    name: str
    kind: str
    bits: int
    grouped: bool
    activation: ActivationSpec | None
    calibrated: bool
    sizes: tuple[int, ...] = GROUPS

    def from_tokens(self, least: int) -> Scheme:
        """The same scheme with activations rounded in steps of at least `least` tokens."""
        return (
            self if self.activation is None else replace(self, activation=replace(self.activation, least_tokens=least))
        )

    def group(self, *ks: int) -> int | None:
        """Columns that share a scale in weights of such K, 0 for all; None when no allowed size divides all of them."""
        if not self.grouped:
            return 0
        return next((size for size in self.sizes if all(k % size == 0 for k in ks)), None)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", FP8, 8, False, ActivationSpec(FP8, least_tokens=LEAST_TOKENS), False),
        Scheme("int8", INT, 8, False, ActivationSpec(INT, least_tokens=LEAST_TOKENS), True),
        Scheme("int4", INT, 4, True, None, True),
    )
}
assert tuple(SCHEMES) == QUANTIZE_SCHEMES


def scheme(given: str | Scheme) -> Scheme:
    """The scheme of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(given, Scheme):
        return given
    if given not in SCHEMES:
        raise ConfigError(
            f"quantize={given!r} is not supported", where="quantize", remedy=f"use one of {', '.join(SCHEMES)}"
        )
    return SCHEMES[given]


def scale_dtype(dtype: torch.dtype, grouped: bool) -> torch.dtype:
    """What scales are kept in: a weight's own dtype, so that checkpoints hold them exactly.

    One scale a row costs nothing in fp32, and fp16 has no room for a 448th of a small weight.
    """
    return torch.float32 if dtype == torch.float16 and not grouped else dtype
