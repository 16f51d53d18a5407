"""The router in front of a layer of experts, as the launches that run both have it.

Legend: C hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecomp.ops.norm import NormSpec
from fusecomp.ops.router import RouteSpec


@dataclass(frozen=True)
class Router:
    """The router of a layer; see `ops/router.py`.

    Attributes:
        weight: [E, C] contiguous.
        logits: dtype that logits are rounded to.
        norm: of x, whose result the experts read too, or None.
    """

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    route_bias: Tensor | None
    norm: NormSpec | None
    logits: torch.dtype
    spec: RouteSpec

    def bare(self) -> Router:
        """The same for rows that are normed already."""
        return replace(self, norm_weight=None, norm_bias=None, norm=None)

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
        route_bias: Tensor | None, norm: str, logits: str, spec: str,
    ) -> Router:  # fmt: skip
        """From the arguments of the canonical ops."""
        normed = NormSpec.from_text(norm) if norm else None
        wanted, routed = getattr(torch, logits), RouteSpec.from_text(spec)
        return Router(weight, bias, norm_weight, norm_bias, route_bias, normed, wanted, routed)
