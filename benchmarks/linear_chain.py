"""The linear layers of a whole model as one chain of launches, ours and its peer with cuBLAS; no attention.

Each layer: qkv(norm) -> o(+ residual) -> gate and up(norm, swiglu) -> down(+ residual), the latter two not in a model
of experts; last, lm_head(norm). Weights
are distinct, so they come from memory at every launch. The input of o is a slice of qkv's output.

Legend: T tokens, N features, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.skinny import run_skinny
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig
from fusecomp.lowerings.linear.skinny_pieces import plain

EPS = 1e-5


@dataclass(frozen=True)
class Kind:
    """One of a model's linear layers."""

    n: int
    k: int
    epilogue: Any
    norm: bool = False
    groups: int = 1

    @property
    def numel(self) -> int:
        return self.groups * self.n * self.k


@dataclass(frozen=True)
class Model:
    """What a chain is made of; `ffn` is None where experts take the place of a feed-forward network: it is left out."""

    layers: int
    hidden: int
    qkv: int
    attention: int
    ffn: int | None
    vocab: int = 128256

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        kinds = {
            "qkv": Kind(self.qkv, self.hidden, plain, norm=True),
            "o": Kind(self.hidden, self.attention, RESIDUAL),
        }
        if self.ffn:
            kinds["gate_up"] = Kind(self.ffn, self.hidden, SWIGLU, norm=True, groups=2)
            kinds["down"] = Kind(self.hidden, self.ffn, RESIDUAL)
        return kinds | {"lm_head": Kind(self.vocab, self.hidden, plain, norm=True)}


MODELS = {
    "llama-8b": Model(32, 4096, 6144, 4096, 14336),
    "llama-1b": Model(16, 2048, 3072, 2048, 8192),
    "qwen3-30b-a3b": Model(48, 2048, 5120, 4096, None, 151936),
}
Configs = dict[str, SkinnyConfig]


class Chain:
    """Weights and buffers of the first `layers` layers of a model, and lm_head if `head`."""

    def __init__(self, model: Model, layers: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self.dtype = model, dtype
        counts = {name: 1 if name == "lm_head" else layers for name in model.kinds}
        self.weights: dict[str, list[Any]] = {
            name: [self.make_weight(name) for _ in range(counts[name])] for name in model.kinds
        }
        self.norms = [1 + 0.2 * self.random(model.hidden) for _ in range(2 * layers + 1)]
        self.layers = layers

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device="cuda")

    def make_weight(self, name: str) -> Any:
        """A weight of a kind of layer, as `launch` takes it."""
        kind = self.model.kinds[name]
        return self.random(kind.groups * kind.n, kind.k) * kind.k**-0.5

    def weight_bytes(self, name: str) -> int:
        """What one weight of a kind takes in memory."""
        return self.weights[name][0].nbytes

    def bytes(self, head: bool = True) -> int:
        return sum(len(ws) * self.weight_bytes(name) for name, ws in self.weights.items() if head or name != "lm_head")

    def launch(self, name: str, i: int, x: Tensor, out: Tensor, added: Tensor | None, config: Any, pdl: bool) -> Tensor:
        kind = self.model.kinds[name]
        norm = {"qkv": 2 * i, "gate_up": 2 * i + 1, "lm_head": -1}.get(name, 0)
        args, strides = ((), ()) if added is None else ((added,), (added.stride(0),))
        run_skinny(
            config, x, self.weights[name][i], out, self.norms[norm] if kind.norm else None, EPS if kind.norm else None,
            False, kind.epilogue, args, strides, kind.groups, pdl,
        )  # fmt: skip
        return out

    def ours(self, x: Tensor, configs: dict[str, Any], pdl: bool, head: bool = True) -> Callable[[], Tensor]:
        """A function that launches the whole chain on x [T, hidden] and returns what it wrote last."""
        empty = {name: x.new_empty(len(x), kind.n) for name, kind in self.model.kinds.items()}
        h1, h2 = torch.empty_like(x), torch.empty_like(x)

        def other(h: Tensor) -> Tensor:
            return h2 if h is h1 else h1

        def run() -> Tensor:
            h = x
            for i in range(self.layers):
                qkv = self.launch("qkv", i, h, empty["qkv"], None, configs["qkv"], pdl)
                h = self.launch("o", i, qkv[:, : self.model.attention], other(h), h, configs["o"], pdl)
                if self.model.ffn:
                    act = self.launch("gate_up", i, h, empty["gate_up"], None, configs["gate_up"], pdl)
                    h = self.launch("down", i, act, other(h), h, configs["down"], pdl)
            return self.launch("lm_head", 0, h, empty["lm_head"], None, configs["lm_head"], pdl) if head else h

        return run

    def peer(self, x: Tensor, head: bool = True) -> Callable[[], Tensor]:
        """The same with cuBLAS, and norms and activation compiled by Inductor; residuals are added by cuBLAS."""
        norm, act = torch.compile(_norm), torch.compile(_swiglu)

        def run() -> Tensor:
            h = x
            for i in range(self.layers):
                qkv = torch.mm(norm(h, self.norms[2 * i]), self.weights["qkv"][i].T)
                h = torch.addmm(h, qkv[:, : self.model.attention], self.weights["o"][i].T)
                if self.model.ffn:
                    up = torch.mm(norm(h, self.norms[2 * i + 1]), self.weights["gate_up"][i].T)
                    h = torch.addmm(h, act(up), self.weights["down"][i].T)
            return torch.mm(norm(h, self.norms[-1]), self.weights["lm_head"][0].T) if head else h

        return run

    def single(self, name: str, x: Tensor, config: Any, pdl: bool) -> tuple[Callable[[], None], int]:
        """(launches of one kind over all its weights, their number); with cuBLAS alone where config is None."""
        kind = self.model.kinds[name]
        x = self.random(len(x), kind.k)
        out, added = self.random(len(x), kind.n), self.random(len(x), kind.n) if kind.epilogue is RESIDUAL else None
        wide = self.random(len(x), kind.n * kind.groups)
        count = len(self.weights[name])

        def run() -> None:
            for i, weight in enumerate(self.weights[name]):
                if config is not None:
                    self.launch(name, i, x, out, added, config, pdl)
                elif added is not None:
                    torch.addmm(added, x, weight.T, out=wide)
                else:
                    torch.mm(x, weight.T, out=wide)

        return run, count

    def check(self, name: str, tokens: int, config: Any, pdl: bool) -> float:
        """Error of one launch over that of the unfused layer in its dtype, both against fp32.

        Raises:
            AssertionError: it is above 1.5, or a second launch differs.
        """
        kind = self.model.kinds[name]
        x, added = self.random(tokens, kind.k) * 3, self.random(tokens, kind.n) if kind.epilogue is RESIDUAL else None
        out, again = (torch.full((tokens, kind.n), float("nan"), dtype=self.dtype, device="cuda") for _ in range(2))
        self.launch(name, 0, x, out, added, config, pdl)
        self.launch(name, 0, x, again, added, config, pdl)
        exact, plain_result = (self._reference(name, x.to(d), added, d) for d in (torch.float32, self.dtype))
        error, unfused = ((y.float() - exact).norm().item() for y in (out, plain_result))
        assert error <= 1.5 * unfused, f"{name} {tokens} {config}: error {error:.3g}, unfused {unfused:.3g}"
        assert torch.equal(out, again), f"{name} {tokens} {config}: a second launch differs"
        return error / unfused

    def dense_weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """The first weight of a kind, [G * N, K], rounded to `dtype` at most once."""
        return self.weights[name][0].to(dtype)

    def _reference(self, name: str, x: Tensor, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        kind = self.model.kinds[name]
        if kind.norm:
            x = _norm(x, self.norms[-1 if name == "lm_head" else {"qkv": 0, "gate_up": 1}[name]].to(dtype))
        y = x @ self.dense_weight(name, dtype).T
        if kind.groups == 2:
            y = _swiglu(y)
        return y if added is None else y + added.to(dtype)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + EPS)).to(x.dtype) * weight


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up
