"""Mixtures with their routers for tests: which experts a token gets is beyond doubt in any precision.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.router import LOGITS, OVER_CHOSEN, SIGMOID, SOFTMAX, SUM, TOP2, RouteSpec
from tests.lowerings.experts_cases import FORMS, Layer, make_layer

# Name: (router, whether a norm is in front, whether logits and choice are biased, form of the experts).
MIXTURES: dict[str, tuple[RouteSpec, bool, bool, dict[str, Any]]] = {
    "qwen3": (RouteSpec(SOFTMAX, 3, SUM), True, False, FORMS["residual"]),
    "deepseek": (RouteSpec(SIGMOID, 3, SUM, 1e-20, 0.0, 2, 1, TOP2, 2.5), True, True, FORMS["plain"]),
    "gpt-oss": (RouteSpec(LOGITS, 2, OVER_CHOSEN), False, True, {**FORMS["gpt-oss"], "transposed": False}),
    "not gated": (RouteSpec(SOFTMAX, 1), False, False, {**FORMS["not gated"], "bias": True}),
}


def make_mixture(name: str, T=1, E=8, C=64, width=48, *, dtype=torch.float32, device="cpu", transposed=False) -> tuple:
    """The arguments of `routed_experts`, in its order."""
    spec, normed, biased, form = MIXTURES[name]
    layer: Layer = make_layer(T, spec.k, E, C, width, dtype=dtype, device=device, **{**form, "transposed": transposed})
    g = torch.Generator().manual_seed(3)
    # Column e of a row speaks for expert e alone, in steps that no rounding closes.
    x = layer.x.clone()
    x[:, :E] = torch.stack([torch.randperm(E, generator=g) for _ in range(T)]).to(x) / 2 - 2
    router = torch.eye(E, C)
    spec = replace(spec, dtype=str(dtype).removeprefix("torch."))
    tensors: list[Tensor | None] = [
        router, torch.zeros(E) if biased else None, 1 + torch.rand(C, generator=g) if normed else None, None,
        torch.arange(E) / 64 if biased and spec.kind == SIGMOID else None,
    ]  # fmt: skip
    if normed:
        tensors[2][:E] = 1.0  # type: ignore[index]
    given = [t if t is None else t.to(device, dtype) for t in tensors]
    texts = [NormSpec(RMS, 1e-6).to_text() if normed else "", str(dtype).removeprefix("torch."), spec.to_text()]
    weights = [layer.up, layer.up_bias, layer.down, layer.down_bias, layer.act, layer.gated, layer.interleaved]
    return x, *given, *texts, *weights, layer.transposed, layer.residual
