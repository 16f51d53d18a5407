"""Mixtures with their routers for tests: which experts a token gets is beyond doubt in any precision.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecomp.lowerings.experts import listed_launch, quant_routed
from fusecomp.lowerings.experts.heuristics import ExpertsConfig
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.routed_experts import routed_experts_reference
from fusecomp.ops.routed_quant_experts import routed_quant_experts_reference
from fusecomp.ops.router import LOGITS, OVER_CHOSEN, SIGMOID, SOFTMAX, SUM, TOP2, RouteSpec
from tests.lowerings.experts_cases import CONTRACT, FORMS, Layer, make_layer, relative_rms
from tests.lowerings.quant_experts_cases import LAYOUTS, make_codes

# Name: (router, whether a norm is in front, whether logits and choice are biased, form of the experts).
MIXTURES: dict[str, tuple[RouteSpec, bool, bool, dict[str, Any]]] = {
    "qwen3": (RouteSpec(SOFTMAX, 3, SUM), True, False, FORMS["residual"]),
    "deepseek": (RouteSpec(SIGMOID, 3, SUM, 1e-20, 0.0, 2, 1, TOP2, 2.5), True, True, FORMS["plain"]),
    "gpt-oss": (RouteSpec(LOGITS, 2, OVER_CHOSEN), False, True, {**FORMS["gpt-oss"], "transposed": False}),
    "not gated": (RouteSpec(SOFTMAX, 1), False, False, {**FORMS["not gated"], "bias": True}),
}


# What the three launches do not read.
CODE_LAYOUTS = [layout for layout in LAYOUTS if layout != "nf4"]
UP, DOWN = 8, 10  # weights among the arguments of `routed_experts` but x


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


def make_quant_mixture(name: str, T=1, E=8, C=64, width=48, *, layout="fp8", dtype=torch.float32, device="cpu"):
    """The arguments of `routed_quant_experts`, and those of `routed_experts` in fp64 by the same weights."""
    x, *args = make_mixture(name, T, E, C, width, dtype=dtype, device=device)
    spec, zero = LAYOUTS[layout]
    codes = [make_codes(tuple(args[at].shape), spec, zero, dtype, seed) for seed, at in enumerate((UP, DOWN))]
    up, down = ((*c.parts(x.device), args[at + 1]) for c, at in zip(codes, (UP, DOWN), strict=True))
    *form, residual = args[DOWN + 2 :]
    text = replace(spec, dtype=str(dtype).removeprefix("torch.")).to_text()
    wide = widened(args)
    wide[UP], wide[DOWN] = (c.numbers(torch.float64).to(device) for c in codes)
    return (x, *args[:UP], *up, *down, *form, text, text, residual), (x.double(), *wide)


def widened(args: list[Any]) -> list[Any]:
    """Arguments of `routed_experts` but x, in fp64."""
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    name = args[6]
    return [*wide[:6], "float64", args[7].replace(name, "float64"), *wide[8:]]


def serve_codes_by_lists(monkeypatch: pytest.MonkeyPatch, config: ExpertsConfig) -> None:
    """Whatever the tables say; the down projection waits by counts, as under dependent launch."""
    monkeypatch.setattr(quant_routed, "routed_codes_config", lambda *_: None)
    monkeypatch.setattr(quant_routed, "quant_experts_config", lambda *_: config)
    monkeypatch.setattr(listed_launch, "LEAST_ROWS", 0)
    monkeypatch.setattr(listed_launch, "signalled_blocks", lambda config, _, rows, __: -(-rows // config.up.block_n))


def check_mixture(args: tuple, exact: tuple, found: tuple[Tensor, Tensor]) -> None:
    """Error against fp64 at most `CONTRACT` times that of the reference in the dtype of x, for both results.

    Args:
        args: of `routed_quant_experts`.
        exact: those of `routed_experts` in fp64, by the same weights.
    """
    x = args[0]
    wanted, plain = routed_experts_reference(*exact), routed_quant_experts_reference(*args)
    # In fp32 the order of sums is all there is: one chain of the products of both matmuls (see `linear_cases`).
    columns = exact[1 + UP].shape[2] + exact[1 + DOWN].shape[2]
    chain = torch.finfo(x.dtype).eps * (columns / 24) ** 0.5 if x.dtype == torch.float32 else 0.0
    for actual, unfused, right in zip(found, plain, wanted, strict=True):
        assert (actual.dtype, actual.shape) == (x.dtype, right.shape)
        if right.numel():
            allowed = max(relative_rms(unfused, right), torch.finfo(x.dtype).eps / 4)
            assert relative_rms(actual, right) <= CONTRACT * allowed + chain


def check_replays(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Of a chain of layers, each of which reads what the one before wrote: bitwise equal under dependent launch."""

    def chain() -> Tensor:
        rows = x
        for _ in range(4):
            rows = layer(rows)
        return rows

    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(50):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)
