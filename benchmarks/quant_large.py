"""Products of codes by codes on a GPU: correctness first, then single linears, the making of codes, and whole layers.

    python -m benchmarks.quant_large                      # the committed choices, chains and peers
    python -m benchmarks.quant_large --tune --out DIR     # sweep, write DIR/<gpu>_scaled.json

A chain is every linear layer of a model with its norms, residuals and SwiGLU, and with the making of codes before each,
without attention, over distinct weights in one CUDA graph under dependent launch. Times are medians of graph replays
over random data. The last line of the output is JSON; a failed check ends the run.

Legend: T tokens, N output features of one group, K input features, G groups.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.ceilings import measure_ceilings
from benchmarks.linear_large import MODELS, Layer, Model
from benchmarks.timing import time_chain, time_replays
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.quant import activations, scaled_heuristics
from fusecomp.lowerings.quant.activations import launch_quantize, library_serves, run_scaled, scaled_shape
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, PERSISTENT, TILE, ScaledConfig, scaled_config
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
TOKENS = [64, 256, 8192, 16, 32, 128, 512, 2048, 16384]
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


def split_counts(blocks: int, tiles: int, per: tuple[int, ...]) -> list[int]:
    """Splits that give every multiprocessor so many programs, each with at least four tiles of K."""
    counts = {max(1, int(132 * p / blocks)) for p in per}
    return sorted({c for c in counts if c == 1 or (c <= 16 and tiles // c >= 4)}) or [1]


def candidates(layer: Layer, tokens: int, scheme: str) -> Iterator[ScaledConfig]:
    """Configurations worth timing."""
    g, fp8, block = layer.groups, scheme.startswith(FP8), scheme.endswith("block")
    chunked = int(fp8 and not block)
    if tokens <= 256:
        t = min(max(16, triton.next_power_of_2(tokens)), 64 if block else 128)
        tiles = {
            16: [(64, 256, 4, 4), (128, 128, 4, 5), (128, 256, 8, 4), (64, 128, 4, 6)],
            32: [(64, 256, 4, 4), (128, 128, 4, 5), (128, 256, 8, 4)],
            64: [(128, 128, 4, 5), (128, 256, 8, 3), (256, 128, 8, 4)],
            128: [(128, 128, 8, 5)],
        }[t]
        for r, k, w, s in tiles:
            if block and k > 128:
                continue
            blocks = math.ceil(g * layer.n / r) * math.ceil(tokens / t)
            for splits in split_counts(blocks, layer.k // k, (1, 2)):
                yield ScaledConfig(TILE, t, r // g, k, splits=splits, num_warps=w, num_stages=s, chunk=chunked)
    if tokens < 64:
        return
    square = ScaledConfig(PERSISTENT, 128, 128 // g, 128, num_stages=6, pieces=2, chunk=16 * chunked)
    wide = replace(square, block_n=256 // g, num_stages=4, pieces=4)
    if block:
        yield replace(square, num_stages=4)
        yield replace(square, num_stages=4, block_t=64, num_warps=4)
        return
    whole = [wide]
    if tokens <= 128:
        whole = [square, wide]
    if tokens <= 64:
        whole = [replace(square, block_t=64, num_warps=4), replace(wide, block_t=64, num_stages=5)]
    if tokens > 512:
        whole += [replace(wide, chunk=32 * chunked), replace(wide, chunk=0), replace(wide, num_stages=3)]
        whole += [replace(square, num_stages=5), replace(wide, group_t=16)]
        if chunked:
            whole.append(replace(square, num_stages=5, chunk=0, promote=128))
    elif g == 1 and tokens >= 128:
        whole += [replace(square, swap=True), replace(square, swap=True, block_t=256, num_stages=3, pieces=4)]
    for config in dict.fromkeys(whole):
        yield config
        items = math.ceil(tokens / config.block_t) * math.ceil(layer.n / config.block_n)
        for splits in (2, 3):
            if g == 1 and tokens <= 512 and 60 <= items * splits <= 132 * config.per_sm:
                yield replace(config, splits=splits)
    if tokens >= 128:
        yield ScaledConfig(LIBRARY)
        if fp8:
            yield ScaledConfig(LIBRARY, exact=False)


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
    try:
        with compile_ahead(device):
            run_scaled(config, codes, x_scale, q, scale, operands, program, spec, activation)
    except Exception as error:
        return f"{layer} {config.constants()}: {type(error).__name__} {str(error)[:200]}"
    return ""


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
    """Error relative to the unfused computation's, and what is wrong: more than 1.5 times it, or another second time."""
    exact, unfused = known or case.reference()
    found = case.error(config, exact)
    what = f"{case.scheme} {case.layer} {case.tokens} tokens {config.method} {config.constants()}"
    if not found <= 1.5 * unfused:
        return found / unfused, f"CHECK FAILED {what}: error {found}, unfused {unfused}"
    if config.method != LIBRARY and not torch.equal(case.run(config), case.run(config)):
        return found / unfused, f"CHECK FAILED {what}: a second launch differs"
    return found / unfused, ""


def accuracy(pools: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Errors of sums over K as each way of adding has them: of bf16 results beside the unfused one's, and of fp32."""
    rows = []
    for k in (4096, 14336):
        case = Case(Layer(4096, k), 512, "fp8", pools[FP8])
        exact, unfused = case.reference()
        wide = ScaledConfig(PERSISTENT, 128, 256, 128, num_stages=4, pieces=4)
        square = replace(wide, block_n=128, pieces=2)
        tile = ScaledConfig(TILE, 64, 128, 128, num_warps=4, num_stages=4)
        ways = {
            "whole": wide, "chunk 32": replace(wide, chunk=32), "chunk 16": replace(wide, chunk=16),
            "chunk 8": replace(wide, chunk=8), "promote 128": replace(square, promote=128),
            "tile whole": tile, "tile each": replace(tile, chunk=1), "library": ScaledConfig(LIBRARY),
            "library fast": ScaledConfig(LIBRARY, exact=False),
        }  # fmt: skip
        row: dict[str, Any] = {"k": k, "unfused": unfused}
        for name, config in ways.items():
            row[name] = case.error(config, exact)
        case.program = replace(case.program, dtype="float32")
        row |= {f"{name} fp32": case.error(c, exact) for name, c in ways.items() if c.method != LIBRARY}
        rows.append(row)
        print(f"error of sums, K={k}, x1e-4:", {a: round(b * 1e4, 2) for a, b in row.items() if a != "k"}, flush=True)
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
                exact, exact_scale = quantize_reference(y, given, spec.to_text())
                differ = (codes.float() != exact.float()).float().mean().item()
                apart = ((scale - exact_scale).abs() / exact_scale).max().item()
                # A sum in another order moves a value over a rounding boundary now and then.
                if apart > 1e-5 or differ > (2e-3 if norm else 1e-4):
                    wrong.append(f"CHECK FAILED rows {spec} K={k} {norm}: {differ} of codes differ, scales by {apart}")
    return wrong


def tune(case: Case) -> dict[str, Any]:
    """The table's entry for one layer and number of tokens: each candidate once, then the best again, in turns."""
    known, first, failed = case.reference(), [], []
    every = {}
    for config in dict.fromkeys(candidates(case.layer, case.tokens, case.scheme)):
        if not case.served(config):
            continue
        try:
            error = case.error(config, known[0])
            seconds = case.seconds(lambda i, c=config: case.run(c, i))
        except Exception as error:
            failed.append(f"{config.method} {config.constants()}: {type(error).__name__} {str(error)[:80]}")
            continue
        every[f"{config.method} {config.constants()}"] = [round(seconds * 1e6, 2), round(error / known[1], 3)]
        if error <= 1.5 * known[1]:
            first.append((seconds, config))
    first.sort(key=lambda pair: pair[0])
    own = [config for _, config in first if config.method != LIBRARY][:2]
    library = [config for _, config in first if config.method == LIBRARY][:1]
    times: dict[ScaledConfig, list[float]] = {config: [] for config in (*own, *library)}
    for _ in range(3):
        for config in times:
            times[config].append(case.seconds(lambda i, c=config: case.run(c, i)))
    medians = {config: statistics.median(found) for config, found in times.items()}
    if not own:
        print(f"nothing of ours is right for {case.layer}, {case.tokens} tokens: {every} {failed}", flush=True)
        return {}
    best, ours = min(medians, key=medians.__getitem__), min(own, key=medians.__getitem__)
    if problem := check(case, ours, known)[1]:
        print(problem, flush=True)
    layer = case.layer
    entry: dict[str, Any] = {
        "kind": case.spec.kind, "block": case.activation.block, "n": layer.n, "k": layer.k, "groups": layer.groups,
        "epilogue": layer.kind, "tokens": case.tokens, "config": best.constants() | {"method": best.method},
        "us": round(medians[best] * 1e6, 2),
    }  # fmt: skip
    if best is not ours:
        entry["own"] = ours.constants() | {"method": ours.method}
    entry |= {"own_us": round(medians[ours] * 1e6, 2), "every": every, "failed": failed}
    if library:
        entry["library_us"] = round(medians[library[0]] * 1e6, 2)
    return entry


def write_table(path: Path, environment: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """A table with one line per entry; shapes that were not tuned keep their entries."""
    shape = ("kind", "block", "groups", "n", "k", "epilogue", "tokens")
    kept = scaled_heuristics.load_table(scaled_heuristics.DEFAULT_TABLE)["entries"]
    kept_keys = (*shape, "config", "own", "us", "own_us", "library_us", "bf16_us")
    clean = [{k: v for k, v in entry.items() if k in kept_keys} for entry in entries]
    merged = {tuple(entry[key] for key in shape): entry for entry in (*kept, *clean)}
    body = ",\n".join("    " + json.dumps(merged[key]) for key in sorted(merged))
    head = f'  "gpu": {json.dumps(environment["gpu"])},\n  "measured": {json.dumps(environment)},\n'
    path.write_text("{\n" + head + '  "entries": [\n' + body + "\n  ]\n}\n")


class Chain:
    """Layers of a model over distinct codes."""

    def __init__(self, model: Model, scheme: str, layers: int) -> None:
        self.model = model
        self.activation, self.spec = SCHEMES[scheme]
        shapes = [(part.groups * part.n, part.k) for part in model.parts()]
        self.programs = [PROGRAMS[part.epilogue] for part in model.parts()]
        self.layers = [tuple(random_codes(n * k, self.spec.kind).view(n, k) for n, k in shapes) for _ in range(layers)]
        self.scales = [torch.full(self.spec.scales(n, k), 0.01 * k**-0.5, device="cuda") for n, k in shapes]
        self.gain = torch.ones(model.hidden, dtype=DTYPE, device="cuda")

    def linear(self, x: Tensor, q: Tensor, at: int, norm: bool, operands: list[Tensor], configs: Any) -> Tensor:
        codes, scale = launch_quantize(x, None, self.activation, NORM if norm else None, self.gain if norm else None)
        program = self.programs[at]
        config = configs(q, scale, self.scales[at], program)
        return run_scaled(config, codes, scale, q, self.scales[at], operands, program, self.spec, self.activation)

    def run(self, h: Tensor, configs: Any) -> Tensor:
        width = self.model.attention
        for qkv, o, gate_up, down in self.layers:
            attention = self.linear(h, qkv, 0, True, [], configs)[:, :width]
            h = self.linear(attention, o, 1, False, [h], configs)
            h = self.linear(self.linear(h, gate_up, 2, True, [], configs), down, 3, False, [h], configs)
        return h

    def seconds(self, tokens: int, pick: Any = None) -> float:
        """Of one layer."""
        h = torch.randn(tokens, self.model.hidden, dtype=DTYPE, device="cuda")

        def configs(q: Tensor, x_scale: Tensor, w_scale: Tensor, program: Program) -> ScaledConfig:
            if pick:
                return pick(q, program, tokens)
            return activations.choose(q, x_scale, w_scale, program, self.spec, self.activation, tokens)

        self.run(h, configs)
        return time_replays(lambda: self.run(h, configs), 9 if tokens < 1024 else 5) / len(self.layers)


def time_rows(tokens: list[int]) -> list[dict[str, Any]]:
    """The making of codes alone: us, and bytes per second."""
    rows = []
    for count in tokens:
        row: dict[str, Any] = {"tokens": count}
        for k, norm in ((4096, True), (4096, False), (14336, False)):
            inputs = [torch.randn(count, k, dtype=DTYPE, device="cuda") for _ in range(max(1, min(8, 8192 // count)))]
            gain = torch.ones(k, dtype=DTYPE, device="cuda")
            spec = SCHEMES["fp8"][0]

            def run(i: int, xs: list[Tensor] = inputs, g: Tensor = gain, n: bool = norm) -> Any:
                return launch_quantize(xs[i % len(xs)], None, spec, NORM if n else None, g if n else None)

            seconds = time_chain(run, 20, replays=5)
            row[f"{k}{' norm' if norm else ''}"] = f"{seconds * 1e6:.2f} us {3 * count * k / seconds / 1e12:.2f} TB/s"
        rows.append(row)
        print("codes:", row, flush=True)
    return rows


def fp8_rate(pool: Tensor) -> dict[str, float]:
    """FLOP/s of the library's square product of fp8, with fast and with exact sums."""
    n = 8192
    a, b = pool[: n * n].view(n, n), pool[n * n : 2 * n * n].view(n, n)
    one = torch.ones((), device="cuda")
    found = {}
    for name, fast in (("fast", True), ("exact", False)):

        def run(_: int, fast: bool = fast) -> Tensor:
            return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=DTYPE, use_fast_accum=fast)

        found[f"fp8_{name}_TFLOP_per_s"] = round(2 * n**3 / time_chain(run, 8, replays=7) / 1e12, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=["fp8"])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--chains", nargs="*", type=int, default=[16, 32, 64, 128, 256, 512, 2048, 8192])
    parser.add_argument("--layers", type=int, default=6, help="of a chain")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--name", default="quant_large.json")
    parser.add_argument("--seconds", type=float, default=120.0, help="tune no further shape after this long")
    args = parser.parse_args()
    begin, device, target = time.time(), torch.device("cuda", 0), device_target(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    ceilings = measure_ceilings(device)
    pools = {FP8: random_codes(POOL, FP8)}
    if "int8" in args.schemes:
        pools[INT] = random_codes(POOL, INT)
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        **ceilings.to_dict(), **fp8_rate(pools[FP8]),
    }  # fmt: skip
    print(environment, flush=True)
    limit = environment["fp8_fast_TFLOP_per_s"]
    result: dict[str, Any] = {**environment}

    def finish() -> None:
        result["seconds"] = round(time.time() - begin, 1)
        (args.out / args.name).write_text(json.dumps(result))

    layers = MODELS[args.model].parts()
    cases = [(layer, tokens, scheme) for scheme in args.schemes for tokens in args.tokens for layer in layers]

    def committed(layer: Layer, tokens: int, scheme: str) -> ScaledConfig:
        activation, spec = SCHEMES[scheme]
        q = torch.empty(layer.groups * layer.n, layer.k, dtype=spec.codes_dtype, device="meta")
        return scaled_config(target, scaled_shape(q, PROGRAMS[layer.epilogue], spec, activation), tokens)

    if args.tune:
        jobs = [(*case, config) for case in cases for config in candidates(*case)]
    else:
        jobs = [(*case, committed(*case)) for case in cases]
    build_all(jobs)
    result["failed"] = check_rows()
    print("\n".join(result["failed"]) or "codes and scales of rows are those of the reference", flush=True)
    result["accuracy"] = accuracy(pools)
    finish()
    pool16 = torch.empty(POOL // 2, dtype=DTYPE, device="cuda").normal_(std=1 / 64)
    entries: list[dict[str, Any]] = []
    result["products"], by_shape = entries, {}
    for layer, tokens, scheme in cases:
        if time.time() - begin > args.seconds:
            print(f"out of time before {scheme} {layer}, {tokens} tokens", flush=True)
            break
        case = Case(layer, tokens, scheme, pools[SCHEMES[scheme][1].kind])
        if args.tune:
            entry = tune(case)
            if not entry:
                continue
            by_shape[scheme, str(layer), tokens] = ScaledConfig(**entry["config"])
        else:
            config = committed(layer, tokens, scheme)
            error, problem = check(case, config)
            if problem:
                print(problem, flush=True)
                continue
            entry = {"tokens": tokens, "config": config.constants() | {"method": config.method}, "error": error}
            entry["us"] = round(case.seconds(lambda i, c=config, case=case: case.run(c, i)) * 1e6, 2)
        if scheme == FP8:
            entry["bf16_us"] = round(case.bf16(pool16) * 1e6, 2)
        entries.append(entry | {"scheme": scheme, "layer": str(layer)})
        if args.tune:
            write_table(args.out / f"{target.table}_scaled.json", environment, entries)
        rate = layer.flops(tokens) / entry["us"] / 1e6
        moved = layer.groups * layer.n * layer.k / entry["us"] / 1e6
        config = entry["config"]
        short = {k: v for k, v in config.items() if k != "method"}
        print(
            f"{scheme} {tokens:5d} {layer!s:27} {entry['us']:8.1f} us {rate:6.0f} TF {rate / limit:4.0%} "
            f"{moved:4.2f} TB/s bf16 {entry.get('bf16_us', 0):7.1f} lib {entry.get('library_us', 0):7.1f} "
            f"own {entry.get('own_us', 0):7.1f} "
            f"{config['method'][:4]} {str(short)[:60] if args.tune else round(entry['error'], 2)}"
            + (f" {len(entry['failed'])} failed" if entry.get("failed") else ""),
            flush=True,
        )
        finish()
    result["codes"] = time_rows([64, 256, 8192])
    result["chains"] = []
    for scheme in args.schemes:
        chain = Chain(MODELS[args.model], scheme, args.layers)
        moved = sum(w.numel() for w in chain.layers[0])

        def tuned(q: Tensor, program: Program, tokens: int, scheme: str = scheme, chain: Chain = chain) -> ScaledConfig:
            layer = next(p for p in layers if (p.groups * p.n, p.k) == tuple(q.shape))
            found = by_shape.get((scheme, str(layer), tokens))
            shape = scaled_shape(q, program, chain.spec, chain.activation)
            return found or scaled_config(target, shape, tokens)

        for tokens in args.chains:
            row: dict[str, Any] = {"scheme": scheme, "tokens": tokens}
            for name, width in (("us", 1 << 20), ("us_rows_not_dependent", 0)):
                activations.MAX_DEPENDENT_K = width
                row[name] = round(chain.seconds(tokens, tuned if args.tune else None) * 1e6, 2)
            best = min(row["us"], row["us_rows_not_dependent"])
            flops = sum(part.flops(tokens) for part in layers)
            row |= {"TFLOP/s": round(flops / best / 1e6, 1), "TB/s": round(moved / best / 1e6, 2)}
            result["chains"].append(row)
            print("layer:", row, flush=True)
            finish()
        del chain
    finish()
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
