"""Every linear layer of a model with its norms, residuals and SwiGLU, one behind the other, without attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.linear_layers import DTYPE, MODELS, Model, random_pool
from benchmarks.timing import time_chain
from fusecomp.lowerings.linear import large, large_heuristics
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from tests.lowerings.linear_epilogues import EPILOGUES, row_strides


@dataclass
class Weights:
    """A model's linear layers over distinct random weights."""

    model: Model
    layers: list[tuple[Tensor, ...]]
    head: Tensor
    scale: Tensor  # of every norm

    @classmethod
    def random(cls, model: Model) -> Weights:
        shapes = [(part.groups * part.n, part.k) for part in model.parts()]
        layers = [tuple(random_pool(n * k, k).view(n, k) for n, k in shapes) for _ in range(model.layers)]
        head = random_pool(model.vocabulary * model.hidden, model.hidden).view(model.vocabulary, model.hidden)
        return cls(model, layers, head, 1 + 0.1 * torch.randn(model.hidden, dtype=DTYPE, device="cuda"))


def linear(
    x: Tensor, weight: Tensor, epilogue: str, args: tuple[Tensor, ...] = (), scale: Tensor | None = None
) -> Tensor:
    kernel, groups, _, hint = EPILOGUES[epilogue]
    norm = "" if scale is None else "rms"
    return large.launch_large(
        x, weight, DTYPE, norm, scale, None, 1e-5, False, kernel, args, row_strides(args), groups, hint
    )


def our_layer(h: Tensor, weights: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """One decoder layer without attention: its queries are taken for the attention's output."""
    qkv, o, gate_up, down = weights
    h = linear(linear(h, qkv, "identity", scale=scale)[:, : o.shape[1]], o, "residual", (h,))
    return linear(linear(h, gate_up, "swiglu", scale=scale), down, "residual", (h,))


def merged_layer(h: Tensor, weights: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """The same in PyTorch, for Inductor."""
    functional = torch.nn.functional
    qkv, o, gate_up, down = weights
    h = h + functional.linear(functional.linear(_rms(h, scale), qkv)[:, : o.shape[1]], o)
    gate, up = functional.linear(_rms(h, scale), gate_up).chunk(2, 1)
    return h + functional.linear(functional.silu(gate) * up, down)


def stock_layer(h: Tensor, weights: tuple[Tensor, ...], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as models write it: q, k, v, gate and up apart."""
    functional = torch.nn.functional
    q, k, v, o, gate, up, down = weights
    x = _rms(h, scale)
    q, k, v = functional.linear(x, q), functional.linear(x, k), functional.linear(x, v)
    h = h + functional.linear(q, o)
    x = _rms(h, scale)
    h = h + functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
    return h, k, v  # returned, or Inductor would drop their products


def _rms(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def chain_seconds(layer: Callable, weights: Weights, split: bool, tokens: int, head: bool) -> float:
    """One pass over all layers, and the head if asked; `split` gives q, k, v, gate and up apart."""
    model = weights.model
    x = torch.randn(tokens, model.hidden, dtype=DTYPE, device="cuda")
    kv = (model.qkv - model.attention) // 2
    layers = weights.layers
    if split:
        layers = [
            (*qkv.split([model.attention, kv, kv]), o, *gate_up.chunk(2), down) for qkv, o, gate_up, down in layers
        ]

    def run(_: int) -> Tensor:
        h = x
        for one in layers:
            h = layer(h, one, weights.scale)
            h = h[0] if split else h
        if not head:
            return h
        if layer is our_layer:
            return linear(h, weights.head, "identity", scale=weights.scale)
        return torch.nn.functional.linear(_rms(h, weights.scale), weights.head)

    return time_chain(run, 1, replays=9 if tokens < 1024 else 5)


def measure_chains(name: str, tokens: list[int], variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """Chain times in ms: "ours", "library" (with our other kernels), "merged" and "stock" (both by Inductor)."""
    weights = Weights.random(MODELS[name])
    model = weights.model
    rows = []

    def library(*_: Any, groups: int, kind: str, **__: Any) -> LargeConfig:
        return LargeConfig(method="cublas_addmm" if groups == 1 and kind == "residual" else "cublas")

    for count in tokens:
        head = count <= 1024
        flops = sum(part.flops(count) for part in model.parts()) * model.layers + head * model.head().flops(count)
        row: dict[str, Any] = {"model": name, "tokens": count, "head": head}
        for variant in (*variants, variants[0]):
            if variant == "library":
                with mock.patch.object(large_heuristics, "large_config", library):
                    found = chain_seconds(our_layer, weights, False, count, head)
            else:
                layer = our_layer if variant == "ours" else merged_layer if variant == "merged" else stock_layer
                with torch.no_grad():
                    layer = layer if layer is our_layer else torch.compile(layer, dynamic=False)
                    found = chain_seconds(layer, weights, variant == "stock", count, head)
            row[f"{variant} again" if variant in row else variant] = round(found * 1e3, 4)
        row["TFLOP/s"] = round(flops / row["ours"] / 1e9, 1)
        rows.append(row)
        print(row, flush=True)
    return rows
