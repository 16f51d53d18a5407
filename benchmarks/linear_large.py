"""Large-M linear layers on a GPU: correctness first, then single matmuls and whole chains against the matmul rate.

    python -m benchmarks.linear_large                     # the committed choices, chains and peers
    python -m benchmarks.linear_large --tune --out DIR    # sweep, write DIR/<gpu>_large.json

A chain is every linear layer of a model with its norms, residuals and SwiGLU, without attention, over distinct weights in
one CUDA graph. Times are medians of graph replays over random data. The last line of the output is JSON; a failed check
ends the run before any timing.

Legend: T tokens, N output features of one group, K input features, G groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.ceilings import measure_ceilings
from fusecomp.lowerings.linear import large, large_heuristics
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from tests.lowerings.linear_epilogues import EPILOGUES, make_args, reference, row_strides

DTYPE = torch.bfloat16
ROTATION_BYTES = 1 << 30  # distinct weights that the repeats of one matmul cycle through


@dataclass(frozen=True)
class Layer:
    """One linear layer: its epilogue says how many groups and operands it has."""

    n: int
    k: int
    epilogue: str = "identity"

    @property
    def groups(self) -> int:
        return EPILOGUES[self.epilogue][1]

    @property
    def kind(self) -> str:
        return EPILOGUES[self.epilogue][3]

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.groups * self.n * self.k

    def __str__(self) -> str:
        return f"{self.groups} x {self.n} x {self.k} {self.epilogue}"


@dataclass(frozen=True)
class Model:
    hidden: int
    qkv: int
    attention: int  # width of the attention's output
    feed_forward: int
    vocabulary: int
    layers: int

    def parts(self) -> tuple[Layer, Layer, Layer, Layer]:
        return (
            Layer(self.qkv, self.hidden),
            Layer(self.hidden, self.attention, "residual"),
            Layer(self.feed_forward, self.hidden, "swiglu"),
            Layer(self.hidden, self.feed_forward, "residual"),
        )

    def head(self) -> Layer:
        return Layer(self.vocabulary, self.hidden)


MODELS = {
    "llama-8b": Model(4096, 6144, 4096, 14336, 128256, 32),
    "llama-1b": Model(2048, 3072, 2048, 8192, 128256, 16),
}


def bench(run: Callable[[int], object], launches: int, replays: int = 5) -> float:
    """Median seconds of one of `launches` calls run(0), run(1), ..., captured in one CUDA graph."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / launches)
    return statistics.median(times)


class Case:
    """Inputs of one matmul; weights are slices of one large random buffer."""

    def __init__(self, layer: Layer, tokens: int, pool: Tensor) -> None:
        self.layer, self.tokens = layer, tokens
        size = layer.groups * layer.n * layer.k
        self.weights = [w.view(-1, layer.k) for w in pool[: len(pool) // size * size].split(size)]
        self.x = torch.randn(tokens, layer.k, dtype=DTYPE, device="cuda")
        self.args = make_args(layer.epilogue, tokens, layer.n, DTYPE, "cuda")

    def run(self, config: LargeConfig, i: int = 0) -> Tensor:
        return large.run_matmul(
            config, self.x, self.weights[i % len(self.weights)], DTYPE, EPILOGUES[self.layer.epilogue][0], self.args,
            row_strides(self.args), self.layer.groups, self.layer.kind,
        )  # fmt: skip

    def seconds(self, config: LargeConfig) -> float:
        launches = max(4, min(60, int(8e-3 * 6e14 / self.layer.flops(self.tokens))))
        return bench(lambda i: self.run(config, i), launches)

    def errors(self, config: LargeConfig) -> tuple[float, float]:
        """Relative errors against fp32 of this configuration and of the unfused computation, on up to 512 tokens."""
        rows = slice(max(0, self.tokens - 512), self.tokens)
        weight, name = self.weights[0], self.layer.epilogue
        args = tuple(a[rows] if a.dim() == 2 else a for a in self.args)
        exact = reference(name, self.x[rows].float() @ weight.float().t(), tuple(a.float() for a in args))
        unfused = reference(name, self.x[rows] @ weight.t(), args)
        found = self.run(config)[rows]
        return tuple(((y.float() - exact).norm() / exact.norm()).item() for y in (found, unfused))  # type: ignore[return-value]


def random_pool(size: int, fan_in: int = 4096) -> Tensor:
    return torch.empty(size, dtype=DTYPE, device="cuda").normal_(std=fan_in**-0.5)


def library_choices(layer: Layer) -> list[LargeConfig]:
    methods = ["cublas"] + ["cublas_addmm"] * (layer.kind in ("residual", "bias"))
    return [LargeConfig(method=m) for m in methods]


def candidates(layer: Layer, tokens: int) -> Iterator[LargeConfig]:
    """Persistent configurations worth timing."""
    g = layer.groups
    tiles = [
        # block_t, features of all groups, swap, warps, stages, subtiles, per_sm
        (128, 256, False, 8, 4, 4, 1),
        (256, 128, False, 8, 4, 4, 1),
        (256, 128, True, 8, 4, 4, 1),
        (128, 256, True, 8, 4, 4, 1),
        (128, 128, False, 4, 3, 2, 2),
        (128, 128, True, 4, 3, 2, 2),
    ]
    if tokens <= 256:
        tiles += [(256, 64, True, 4, 2, 2, 2), (128, 128, True, 8, 6, 2, 1), (256, 128, True, 8, 3, 2, 1)]
    for block_t, width, swap, warps, stages, subtiles, per_sm in tiles:
        if block_t > max(128, tokens):
            continue
        config = LargeConfig(
            block_t=block_t, block_n=width // g, swap=swap, num_warps=warps, num_stages=stages, subtiles=subtiles,
            per_sm=per_sm,
        )  # fmt: skip
        count = math.ceil(tokens / block_t) * math.ceil(layer.n / config.block_n)
        for splits in (1, 2, 3, 4, 5, 6, 8):
            rounds = math.ceil(count * splits / (132 * per_sm))
            if splits == 1 or (tokens <= 512 and layer.k >= splits * 512 and (rounds <= 1 or splits == 4)):
                yield replace(config, splits=splits)


def warp_specialized(layer: Layer, tokens: int) -> Iterator[LargeConfig]:
    if layer.groups == 1:
        base = LargeConfig(num_warps=4, subtiles=1, flatten=False, warp_specialize=True)
        yield replace(base, block_t=128, block_n=256, num_stages=3)
        yield replace(base, block_t=128, block_n=128, num_stages=4)
        if 128 < tokens <= 256:
            yield replace(base, block_t=256, block_n=128, swap=True, num_stages=3)


def build(job: tuple[Layer, LargeConfig]) -> str:
    """Compile one configuration into Triton's disk cache, from a process of its own."""
    layer, config = job
    try:
        Case(layer, 256, torch.empty(layer.groups * layer.n * layer.k, dtype=DTYPE, device="cuda")).run(config)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{layer} {config.constants()}: {type(error).__name__} {str(error)[:200]}"
    return ""


def build_all(jobs: list[tuple[Layer, LargeConfig]]) -> None:
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as pool:
        for text in pool.imap_unordered(build, jobs, chunksize=1):
            if text:
                print("not built:", text, flush=True)
    print(f"{len(jobs)} kernels: {time.time() - start:.0f} s", flush=True)
