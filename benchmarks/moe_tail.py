"""What lies between two attentions of a mixture, on a GPU: output projection, router, experts, next projection.

    python -m benchmarks.moe_tail --tokens 1 8 64 256 --out DIR

A chain of layers in one CUDA graph, each fed by the one before; weights are distinct and larger than the L2. Where the
router may ask for the next projection's weight (`lowerings/experts/later.py`) the chain is timed with several numbers
of bytes asked for, none among them. Each is checked first: the first layer's projection against fp32, and replays under
dependent launch against the first one. Times are of one layer, medians of graph replays; shares
are of the read bandwidth of the same run. The last line is JSON.

Legend: T tokens, C hidden size, E experts, K chosen per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import read_bandwidth
from benchmarks.linear_chain import MODELS
from benchmarks.moe import SHAPES
from benchmarks.timing import time_replays
from fusecomp.lowerings import register
from fusecomp.lowerings.experts import later
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.ops import OPS
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec

DTYPE = torch.bfloat16
TOKENS = (1, 2, 8, 64, 256)
ASKED = (0, 2 << 20, 5 << 20, 10 << 20, 15 << 20)
LAYERS = 6
REPLAYS = 15
RACE_REPLAYS = 30
CONTRACT = 1.5
NORM = NormSpec(RMS, 1e-6)
RESIDUAL = Program(1, (FULL,), (("add", "a0", "i0"),), "bfloat16").to_text()
PROJECTION = Program(1, (), (), "bfloat16", NORM).to_text()


class Tail:
    """Weights of a few layers of a shape."""

    def __init__(self, name: str) -> None:
        self.shape, self.model = SHAPES[name], MODELS[name]
        C, E, F = self.shape.hidden, self.shape.experts, self.shape.width

        def weight(*size: int) -> Tensor:
            return torch.empty(size, dtype=DTYPE, device="cuda").normal_(std=size[-1] ** -0.5)

        def norm() -> Tensor:
            return 1 + 0.2 * torch.randn(C, dtype=DTYPE, device="cuda")

        self.layers = [
            {
                "o": weight(C, self.model.attention), "router": weight(E, C), "up": weight(E, 2 * F, C),
                "down": weight(E, C, F), "qkv": weight(self.model.qkv, C), "norm": norm(), "next": norm(),
            }
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.route = RouteSpec(SOFTMAX, self.shape.top_k, SUM, dtype="bfloat16").to_text()

    def bytes(self, tokens: int) -> float:
        """Of a layer: dense weights, and the experts that `tokens` touch if each draws evenly."""
        E, K = self.shape.experts, self.shape.top_k
        touched = E * (1 - (1 - K / E) ** tokens)
        dense = sum(self.layers[0][name].nbytes for name in ("o", "router", "qkv"))
        return dense + touched * self.shape.expert_bytes()

    def layer(self, w: dict[str, Tensor], attended: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden state, next qkv) from what attention gave [T, attention] and the hidden state [T, C]."""
        h = OPS.linear(attended, w["o"], None, None, [h], RESIDUAL)
        router = (w["router"], None, w["norm"], None, None, NORM.to_text(), "bfloat16", self.route)
        form = (w["up"], None, w["down"], None, "silu", True, False, False, h)
        return OPS.experts_linear(h, *router, *form, w["qkv"], w["next"], None, [], PROJECTION)[1:]

    def run(self, attended: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The chain."""
        for w in self.layers:
            h, qkv = self.layer(w, attended, h)
            attended = qkv[:, : self.model.attention]
        return h, qkv

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator(device="cuda").manual_seed(tokens)
        sizes = (self.model.attention, self.shape.hidden)
        attended, h = (torch.randn(tokens, n, generator=g, dtype=DTYPE, device="cuda") for n in sizes)
        return attended, h

    def check(self, tokens: int) -> float:
        """Error of the first layer's qkv over that of unfused operations on its hidden state, both against fp32.

        Raises:
            SystemExit: it is above the contract, or a replay of the chain differs from the first.
        """
        w, inputs = self.layers[0], self.inputs(tokens)
        out, qkv = self.layer(w, *inputs)
        wide = out.float()
        wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + NORM.eps)
        exact, plain = (
            (wide.to(d) * w["next"].to(d) @ w["qkv"].to(d).T).float() for d in (torch.float32, DTYPE)
        )  # fmt: skip
        error, allowed = ((y.float() - exact).norm().item() for y in (qkv, plain))
        if not error <= CONTRACT * allowed:
            raise SystemExit(f"{tokens} tokens: error {error:.3g}, unfused {allowed:.3g}")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.run(*inputs)
        graph.replay()
        expected = [t.clone() for t in results]
        for _ in range(RACE_REPLAYS):
            for t in results:
                t.fill_(float("nan"))
            graph.replay()
            if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
                raise SystemExit(f"{tokens} tokens: replays differ")
        return error / allowed

    def seconds(self, tokens: int) -> float:
        inputs = self.inputs(tokens)
        self.run(*inputs)
        return time_replays(lambda: self.run(*inputs), REPLAYS) / LAYERS


def measure(tail: Tail, tokens: int, ceiling: float) -> dict[str, Any]:
    """Times by bytes asked for ahead, where the committed choice asks for any."""
    floor, committed = tail.bytes(tokens) / ceiling, later.BYTES
    row: dict[str, Any] = {"tokens": tokens, "floor_us": round(floor * 1e6, 2), "us": {}}
    try:
        for asked in ASKED if tokens <= later.MAX_TOKENS else (committed,):
            later.BYTES = asked
            with compile_ahead(torch.device("cuda")):
                tail.run(*tail.inputs(tokens))
            error, seconds = tail.check(tokens), tail.seconds(tokens)
            row["us"][asked] = round(seconds * 1e6, 2)
            ahead = f"  {asked / 2**20:4.0f} MB asked for" if tokens <= later.MAX_TOKENS else ""
            print(f"{tokens:4} tokens {seconds * 1e6:8.2f} us a layer, {floor / seconds:.1%} of the limit, "
                  f"error {error:.2f}{ahead}", flush=True)  # fmt: skip
    finally:
        later.BYTES = committed
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name in MODELS], default="qwen3-30b-a3b")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    register()
    ceiling = read_bandwidth(torch.device("cuda"))
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "read_TB_s": round(ceiling / 1e12, 3), "rows": []}
    print(result, flush=True)
    tail = Tail(args.shape)
    result["rows"] = [measure(tail, tokens, ceiling) for tokens in args.tokens]
    (args.out / "moe-tail.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
