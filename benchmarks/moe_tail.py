"""What lies between two attentions of a mixture, on a GPU: output projection, router, experts, norm, next projection.

    python -m benchmarks.moe_tail --tokens 1 8 64 256 --out DIR

A chain of layers in one CUDA graph, each fed by the one before; weights are distinct and larger than the L2. Choices
are made one after the other, each with those before it: the kernels of both linears, whether the experts write the next
norm, and what the router has fetched ahead. Every choice is checked against the chain's first layer in fp32, and under
dependent launch against its own first result, before it is timed. Times are of one layer, medians of graph replays;
shares are of the read bandwidth of the same run. The last line is JSON.

Legend: T tokens, C hidden size, E experts, K chosen per token.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.ceilings import read_bandwidth
from benchmarks.linear_chain import MODELS
from benchmarks.moe import SHAPES
from benchmarks.timing import time_replays
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.lowering import launch_experts_norm
from fusecomp.lowerings.experts.routed import launch_routed_experts
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.linear import lowering as linear_lowering
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig
from fusecomp.lowerings.route.ahead import Ahead, Later
from fusecomp.lowerings.route.router import launch_router
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec

DTYPE = torch.bfloat16
TOKENS = (1, 2, 8, 64, 256)
LAYERS = 6
REPLAYS = 15
RACE_REPLAYS = 30
CONTRACT = 1.5
NORM = NormSpec(RMS, 1e-6)
FORM = (None, "silu", True, False, False)  # of the experts, behind both weights


@dataclass(frozen=True)
class Choice:
    """How a layer's tail is launched.

    Attributes:
        o, qkv: kernel of the linear, or None for the committed one.
        normed: the experts' sum writes the next norm.
        ahead: what the router fetches of the experts.
        later: bytes that it fetches of the next projection's weight.
    """

    o: SkinnyConfig | None = None
    qkv: SkinnyConfig | None = None
    normed: bool = False
    ahead: Ahead | None = None
    later: int = 0

    def __str__(self) -> str:
        def linear(name: str, c: SkinnyConfig | None) -> str:
            if c is None:
                return ""
            return f"{name} {c.block_r}x{c.block_k} w{c.num_warps} s{c.num_stages} x{c.splits}{' early' * c.early}"

        a = self.ahead
        ahead = "" if a is None else f"ahead {a.size} B x {a.programs}{' early' * a.early}"
        later = f"later {self.later >> 20} MB" if self.later else ""
        linears = linear("o", self.o), linear("qkv", self.qkv)
        return "; ".join(filter(None, (*linears, "normed" * self.normed, ahead, later)))


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
        self.route = RouteSpec(SOFTMAX, self.shape.top_k, SUM, dtype="bfloat16")

    def bytes(self, tokens: int) -> float:
        """Of a layer: dense weights, and experts that `tokens` touch if each draws evenly."""
        E, K = self.shape.experts, self.shape.top_k
        touched = E * (1 - (1 - K / E) ** tokens)
        dense = sum(self.layers[0][name].nbytes for name in ("o", "router", "qkv"))
        return dense + touched * self.shape.expert_bytes()

    def layer(self, w: dict[str, Tensor], choice: Choice, attended: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden state, next qkv) of one layer from what attention gave [T, attention] and the hidden state [T, C]."""
        residual = Program(1, (FULL,), (("add", "a0", "i0"),), "bfloat16")
        h = _linear(attended, w["o"], None, [h], residual, choice.o)
        args = (w["router"], None, w["norm"], None, None, NORM.to_text(), "bfloat16", self.route.to_text())
        form = (w["up"], None, w["down"], *FORM, h)
        later = Later(w["qkv"], choice.later) if choice.later else None
        found = launch_routed_experts(h, *args, *form, later=later)
        normed = None
        if found is not None:
            h = found[1]
        elif len(h) > 1:
            y, ids, weights = launch_router(
                h, w["router"], None, w["norm"], None, NORM, DTYPE, self.route, device_target(0).has_pdl, w["up"],
                choice.ahead, later,
            )  # fmt: skip
            h, normed = launch_experts_norm((NORM, w["next"]) if choice.normed else None, y, ids, weights, *form)
        norm = NORM if normed is None else None
        program = Program(1, (), (), "bfloat16", norm)
        x, scale = (h, w["next"]) if normed is None else (normed, None)
        return h, _linear(x, w["qkv"], scale, [], program, choice.qkv)

    def run(self, choice: Choice, attended: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The chain."""
        for w in self.layers:
            h, qkv = self.layer(w, choice, attended, h)
            attended = qkv[:, : self.model.attention]
        return h, qkv

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator(device="cuda").manual_seed(tokens)
        sizes = (self.model.attention, self.shape.hidden)
        attended, h = (torch.randn(tokens, n, generator=g, dtype=DTYPE, device="cuda") for n in sizes)
        return attended, h

    def check(self, choice: Choice, tokens: int) -> float:
        """Error of one layer's qkv over that of the unfused linears on the same hidden state, both against fp32.

        Raises:
            SystemExit: it is above the contract, or a replay of the chain differs from its ordered run.
        """
        w, (attended, h) = self.layers[0], self.inputs(tokens)
        program = Program(1, (FULL,), (("add", "a0", "i0"),), "bfloat16")
        first = _linear(attended, w["o"], None, [h], program, choice.o)
        exact, plain = (attended.to(d) @ w["o"].to(d).T + h.to(d) for d in (torch.float32, DTYPE))
        _require(first, plain, exact, f"{tokens} tokens {choice}: o")
        out, qkv = self.layer(w, choice, attended, h)
        results = []
        for dtype in (torch.float32, DTYPE):
            x = out.float()
            x = (x * torch.rsqrt(x.square().mean(1, keepdim=True) + NORM.eps)).to(dtype) * w["next"].to(dtype)
            results.append(x @ w["qkv"].to(dtype).T)
        error = _require(qkv, results[1], results[0], f"{tokens} tokens {choice}: qkv")
        graph, run, _inputs = self.captured(choice, tokens)
        expected = [t.clone() for t in run]
        for _ in range(RACE_REPLAYS):
            for t in run:
                t.fill_(float("nan"))
            graph.replay()
            if not all(torch.equal(a, b) for a, b in zip(run, expected, strict=True)):
                raise SystemExit(f"{tokens} tokens {choice}: replays differ")
        return error

    def captured(self, choice: Choice, tokens: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple]:
        """A graph of the chain, replayed once, its results, and its inputs, which must live as long."""
        inputs = self.inputs(tokens)
        self.run(choice, *inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.run(choice, *inputs)
        graph.replay()
        torch.cuda.synchronize()
        return graph, results, inputs

    def seconds(self, choice: Choice, tokens: int, replays: int = REPLAYS) -> float:
        inputs = self.inputs(tokens)
        self.run(choice, *inputs)
        return time_replays(lambda: self.run(choice, *inputs), replays) / LAYERS


def _linear(
    x: Tensor, weight: Tensor, norm: Tensor | None, operands: list[Tensor], program: Program, config: Any
) -> Tensor:
    """`launch_linear`, by another kernel than the committed one if a configuration is given."""
    if config is None:
        return linear_lowering.launch_linear(x, weight, norm, None, operands, program)
    chosen = linear_lowering.choose
    linear_lowering.choose = lambda *_: config  # type: ignore[assignment]
    try:
        return linear_lowering.launch_linear(x, weight, norm, None, operands, program)
    finally:
        linear_lowering.choose = chosen


def _require(found: Tensor, plain: Tensor, exact: Tensor, what: str) -> float:
    error, allowed = ((y.float() - exact).norm().item() for y in (found, plain))
    if not error <= CONTRACT * allowed:
        raise SystemExit(f"{what}: error {error:.3g}, unfused {allowed:.3g}")
    return error / allowed


def linears(tail: Tail, name: str, tokens: int) -> Iterator[SkinnyConfig]:
    """Kernels of a linear worth a try where the committed choice is the library."""
    if 32 < tokens <= 128:
        kind, block_t = tail.model.kinds[name], max(64, triton.next_power_of_2(tokens))
        for r, k, warps, stages in ((128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 4), (64, 64, 4, 6)):
            blocks, steps = -(-kind.n // r), -(-kind.k // k)
            for splits, early in itertools.product((1, 2, 4, 8), (True, False)):
                if 120 <= blocks * splits <= 300 and steps >= 4 * splits:
                    yield SkinnyConfig("tile", block_t, r, k, warps, splits, stages, early=early)


def aheads(tail: Tail, tokens: int) -> Iterator[Ahead]:
    """What may be fetched ahead: of the experts chosen, or, where nearly all will be, of the layer's first."""
    E, K, size = tail.shape.experts, tail.shape.top_k, int(tail.shape.expert_bytes() * 2 / 3)
    touched = E * (1 - (1 - K / E) ** tokens)
    if touched > 0.8 * E:
        for megabytes, programs in itertools.product((4, 8, 16, 24), (1, 4)):
            each = int(megabytes * 2**20 / tokens / programs) // 512 * 512
            if 512 <= each <= 512 * 1024:
                yield Ahead(size, 2, each, programs, early=True)
    elif tokens > 1:
        for kilobytes, programs in itertools.product((2, 4, 8, 16), (4, 16)):
            if 16 <= kilobytes * programs <= 128 and programs * tokens <= 512:
                yield Ahead(size, 2, 1024 * kilobytes, programs)


def tune(tail: Tail, tokens: int, ceiling: float) -> dict[str, Any]:
    """Times of the committed choice and of each better one, choice by choice."""
    best, row = Choice(), {"tokens": tokens, "tried": {}}
    floor = tail.bytes(tokens) / ceiling
    steps: dict[str, list[Choice]] = {
        "qkv": [Choice(qkv=c, normed=True) for c in linears(tail, "qkv", tokens)],
        "o": [Choice(o=c) for c in linears(tail, "o", tokens)],
        "normed": [Choice(normed=True)] * (tokens > 2),
        "ahead": [Choice(ahead=a) for a in aheads(tail, tokens)],
        "later": [Choice(later=size << 20) for size in (2, 5, 10, 15)],
    }
    with compile_ahead(torch.device("cuda")):
        for choice in (best, *itertools.chain(*steps.values())):
            tail.run(choice, *tail.inputs(tokens))
    tail.check(best, tokens)
    base = seconds = tail.seconds(best, tokens)
    print(f"{tokens:4} tokens: {base * 1e6:8.2f} us a layer, floor {floor * 1e6:.1f} ({floor / base:.1%})", flush=True)
    for name, tried in steps.items():
        timed = []
        for choice in tried:
            fields = {f: v for f, v in vars(choice).items() if v}
            merged = replace(best, **fields)
            try:
                timed.append((tail.seconds(merged, tokens, 7), str(merged), merged))
            except (triton.errors.TritonError, RuntimeError) as error:
                print(f"not run: {merged}: {str(error)[:100]}", flush=True)
        timed.sort(key=lambda entry: entry[:2])
        row["tried"][name] = [(round(s * 1e6, 2), text) for s, text, _ in timed[:6]]
        for _, text, choice in timed[:2]:
            again = tail.seconds(choice, tokens)
            print(f"     {name:7} {again * 1e6:8.2f} us  {text}"[:158], flush=True)
            if again < seconds * 0.999:
                tail.check(choice, tokens)
                best, seconds = choice, again
    base = tail.seconds(Choice(), tokens)
    seconds = tail.seconds(best, tokens)
    print(f"     best    {seconds * 1e6:8.2f} us ({floor / seconds:.1%}), committed again {base * 1e6:.2f}", flush=True)
    chosen = {
        name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in vars(best).items()
    }
    return {**row, "us": round(seconds * 1e6, 2), "committed_us": round(base * 1e6, 2), "best": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name in MODELS], default="qwen3-30b-a3b")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    ceiling = read_bandwidth(torch.device("cuda"))
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "read_TB_s": round(ceiling / 1e12, 3), "rows": []}
    print(result, flush=True)
    tail = Tail(args.shape)
    for tokens in args.tokens:
        result["rows"].append(tune(tail, tokens, ceiling))
        (args.out / "moe-tail-chain.json").write_text(json.dumps(result))
    print(json.dumps({"gpu": result["gpu"], "us": {row["tokens"]: row["us"] for row in result["rows"]}}))


if __name__ == "__main__":
    main()
