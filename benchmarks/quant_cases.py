"""Single products of codes by codes on a GPU: random cases, their compilation and checks, for `quant_large`.

Legend: T tokens, N output features of one group, K input features, G groups.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.builds import refusal
from benchmarks.linear_layers import Layer
from benchmarks.timing import time_chain
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.quant.activations import launch_quantize, library_serves
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, PERSISTENT, TILE, ScaledConfig
from fusecomp.lowerings.quant.scaled_launch import run_scaled
from fusecomp.ops.linear import FULL, Program, linear_reference
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import (
    BLOCK,
    FP8,
    INT,
    TENSOR,
    TOKEN,
    ActivationSpec,
    WeightSpec,
    dequantize_reference,
    quantize_reference,
)

DTYPE, NAME = torch.bfloat16, "bfloat16"
POOL = 1 << 30  # bytes of distinct weights that the repeats of one product cycle through
SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
PROGRAMS = {
    "identity": Program(1, (), (), NAME),
    "residual": Program(1, (FULL,), (("add", "i0", "a0"),), NAME),
    "swiglu": Program(2, (), SILU, NAME),
}
SCHEMES = {
    "fp8": (ActivationSpec(FP8, 8, TOKEN), WeightSpec(FP8, 8, 1, 0, NAME)),
    "fp8-tensor": (ActivationSpec(FP8, 8, TENSOR), WeightSpec(FP8, 8, 0, 0, NAME)),
    "fp8-block": (ActivationSpec(FP8, 8, BLOCK, 128), WeightSpec(FP8, 8, 128, 128, NAME)),
    "int8": (ActivationSpec(INT, 8, TOKEN), WeightSpec(INT, 8, 1, 0, NAME)),
}
NORM = NormSpec("rms", 1e-5)
RATE = 1.2e15  # a guess, to choose how often a product is repeated


def random_codes(size: int, kind: str) -> Tensor:
    """Codes with the spread of quantized normal numbers."""
    values = torch.empty(size, dtype=torch.float16, device="cuda").normal_(std=100.0 if kind == FP8 else 32.0)
    if kind == FP8:
        return values.clamp_(-448, 448).to(torch.float8_e4m3fn)
    return values.round_().clamp_(-127, 127).to(torch.int8)


class Case:
    """Inputs of one product; weights are slices of one large random buffer."""

    def __init__(self, layer: Layer, tokens: int, scheme: str, pool: Tensor) -> None:
        self.layer, self.tokens, self.scheme = layer, tokens, scheme
        self.activation, self.spec = SCHEMES[scheme]
        self.program = PROGRAMS[layer.epilogue]
        rows, k = layer.groups * layer.n, layer.k
        self.weights = [w.view(rows, k) for w in pool[: len(pool) // (rows * k) * (rows * k)].split(rows * k)]
        size = self.spec.scales(rows, k)
        self.scale = (torch.rand(size, device="cuda") + 0.5) * (0.01 * k**-0.5)
        self.source = torch.randn(tokens, k, dtype=DTYPE, device="cuda")
        self.x, self.x_scale = launch_quantize(self.source, None, self.activation)
        self.operands = [torch.randn(tokens, layer.n, dtype=DTYPE, device="cuda")] * len(self.program.operands)

    def run(self, config: ScaledConfig, i: int = 0) -> Tensor:
        return run_scaled(
            config, self.x, self.x_scale, self.weights[i % len(self.weights)], self.scale, self.operands, self.program,
            self.spec, self.activation,
        )  # fmt: skip

    def seconds(self, run: Callable[[int], Any]) -> float:
        launches = max(4, min(40, int(5e-3 * RATE / self.layer.flops(self.tokens))))
        return time_chain(run, launches, replays=5)

    def reference(self) -> tuple[Tensor, float]:
        """fp32 result of the dequantized operands for the last 256 tokens, and the unfused computation's error."""
        rows = slice(max(0, self.tokens - 256), self.tokens)
        scale = self.x_scale if self.activation.granularity == TENSOR else self.x_scale[rows]
        x = dequantize_reference(self.x[rows], scale, None, self.activation.dequantized("float32").to_text())
        w = dequantize_reference(self.weights[0], self.scale, None, replace(self.spec, dtype="float32").to_text())
        operands = [o[rows] for o in self.operands]
        exact = linear_reference(x, w, None, None, operands, replace(self.program, dtype="float32").to_text())
        y = x.to(DTYPE) @ w.to(DTYPE).t()
        if self.program.groups == 2:
            gate, up = y.chunk(2, 1)
            y = torch.nn.functional.silu(gate) * up
        unfused = y + operands[0] if operands else y
        return exact, relative(unfused, exact)

    def error(self, config: ScaledConfig, exact: Tensor) -> float:
        return relative(self.run(config)[-exact.shape[0] :], exact)

    def bf16(self, pool: Tensor) -> float:
        """Seconds of the library's product of bf16 operands."""
        size = self.layer.groups * self.layer.n * self.layer.k
        weights = [w.view(-1, self.layer.k) for w in pool[: len(pool) // size * size].split(size)]
        return self.seconds(lambda i: torch.nn.functional.linear(self.source, weights[i % len(weights)]))

    def served(self, config: ScaledConfig) -> bool:
        return config.method != LIBRARY or library_serves(self.x_scale, self.scale, self.weights[0], DTYPE, self.spec)


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def build(job: tuple[Layer, int, str, ScaledConfig]) -> str:
    """Compile one configuration into Triton's disk cache, in a process of its own; returns why it cannot."""
    layer, tokens, scheme, config = job
    activation, spec = SCHEMES[scheme]
    program, device = PROGRAMS[layer.epilogue], torch.device("cuda", 0)
    q = torch.empty(layer.groups * layer.n, layer.k, dtype=spec.codes_dtype, device=device)
    codes = torch.empty(tokens, layer.k, dtype=spec.codes_dtype, device=device)
    blocks = layer.k // activation.block if activation.block else 1
    x_scale = torch.empty((1,) if activation.granularity == TENSOR else (tokens, blocks), device=device)
    operands = [torch.empty(tokens, layer.n, dtype=DTYPE, device=device)] * len(program.operands)
    scale = torch.empty(spec.scales(*q.shape), device=device)

    def launch() -> None:
        with compile_ahead(device):
            run_scaled(config, codes, x_scale, q, scale, operands, program, spec, activation)

    why = refusal(launch)
    return f"{layer} {config.constants()}: {why}" if why else ""


def build_all(jobs: list[tuple[Layer, int, str, ScaledConfig]]) -> None:
    """Compile all jobs on several processes, those that share a kernel once; failures show when they are timed."""
    distinct: dict[tuple, tuple] = {}
    for layer, tokens, scheme, config in jobs:
        if config.method != LIBRARY:
            shape = (layer.groups, layer.epilogue) if config.method == TILE else layer
            distinct.setdefault((shape, scheme, replace(config, ahead=0)), (layer, min(tokens, 512), scheme, config))
    start = time.time()
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1)) as pool:
        for text in pool.imap_unordered(build, distinct.values(), chunksize=1):
            if text:
                print("not built:", text, flush=True)
    print(f"{len(distinct)} kernels built: {time.time() - start:.0f} s", flush=True)


def check(case: Case, config: ScaledConfig, known: tuple[Tensor, float] | None = None) -> tuple[float, str]:
    """Error relative to the unfused computation's, and what is wrong: over 1.5 times that, or another second result."""
    exact, unfused = known or case.reference()
    found = case.error(config, exact)
    what = f"{case.scheme} {case.layer} {case.tokens} tokens {config.method} {config.constants()}"
    if not found <= 1.5 * unfused:
        return found / unfused, f"CHECK FAILED {what}: error {found}, unfused {unfused}"
    if config.method != LIBRARY and not torch.equal(case.run(config), case.run(config)):
        return found / unfused, f"CHECK FAILED {what}: a second launch differs"
    return found / unfused, ""


def accuracy(pools: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Errors of sums over K, rounded to bf16, of each way of adding, beside the unfused computation's."""
    rows = []
    for k in (4096, 14336, 28672):
        case = Case(Layer(4096, k), 512, "fp8", pools[FP8])
        exact, unfused = case.reference()
        wide = ScaledConfig(PERSISTENT, 128, 256, num_stages=4, pieces=4)
        ways = {
            "whole": wide, "chunk 56": replace(wide, chunk=56),
            "tile each": ScaledConfig(TILE, 64, num_warps=4, chunk=1), "library": ScaledConfig(LIBRARY, exact=True),
            "library fast": ScaledConfig(LIBRARY),
        }  # fmt: skip
        with compile_ahead(torch.device("cuda", 0)):
            for config in ways.values():
                if config.method != LIBRARY:
                    case.run(config)
        rows.append({"k": k, "unfused": unfused} | {name: case.error(config, exact) for name, config in ways.items()})
        print(
            "error of sums, x1e-4:", {a: round(b * 1e4, 2) if a != "k" else b for a, b in rows[-1].items()}, flush=True
        )
    return rows


def check_rows() -> list[str]:
    """What is wrong with the row kernel's codes and scales, of every kind and granularity, with norms and long rows."""
    from fusecomp.ops.norm import norm_reference

    wrong = []
    for kind in (FP8, INT):
        for gran, block, dynamic in ((TOKEN, 0, True), (TENSOR, 0, True), (TENSOR, 0, False), (BLOCK, 128, True)):
            for k, norm in ((4096, None), (4096, NORM), (1000, NORM), (20000, NORM)):
                spec = ActivationSpec(kind, 8, gran, block, dynamic)
                x = torch.randn(37, k, dtype=DTYPE, device="cuda")
                x[3] = 0
                weight = None if norm is None else 1 + 0.1 * torch.randn(k, dtype=DTYPE, device="cuda")
                given = None if dynamic else torch.tensor([0.01], device="cuda")
                codes, scale = launch_quantize(x, given, spec, norm, weight)
                y = x.float() if norm is None else norm_reference(x.float(), weight.float(), None, norm.to_text())
                # On the CPU: PyTorch's division by a number is a multiplication by its reciprocal on a GPU.
                static = None if given is None else given.cpu()
                exact, exact_scale = (part.cuda() for part in quantize_reference(y.cpu(), static, spec.to_text()))
                differ = (codes.float() != exact.float()).float().mean().item()
                apart = ((scale - exact_scale).abs() / exact_scale).max().item()
                # A sum in another order moves a value over a rounding boundary now and then.
                if apart > 1e-5 or differ > (2e-3 if norm else 1e-4):
                    wrong.append(f"CHECK FAILED rows {spec} K={k} {norm}: {differ} of codes differ, scales by {apart}")
    return wrong
