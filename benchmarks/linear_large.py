"""Large-M linear layers on a GPU: correctness first, then single matmuls and whole chains against the matmul rate.

    python -m benchmarks.linear_large                     # the committed choices, chains and peers
    python -m benchmarks.linear_large --tune --out DIR    # sweep, write DIR/<gpu>_large.json

A chain is every linear layer of a model with its norms, residuals and SwiGLU, without attention, over distinct
weights in one CUDA graph. Times are medians of graph replays over random data. The last line of the output is JSON; a
failed check ends the run.

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
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.builds import refusal
from benchmarks.ceilings import measure_ceilings
from benchmarks.linear_large_chain import measure_chains
from benchmarks.linear_layers import DTYPE, LAYERS, MODELS, Layer, random_pool
from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear import large, large_heuristics
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.linear.persistent import persistent_kernel
from tests.lowerings.linear_epilogues import EPILOGUES, make_args, reference, row_strides

ROTATION_BYTES = 1 << 30  # distinct weights that the repeats of one matmul cycle through
TOKENS = [128, 256, 64, 192, 512, 2048, 8192, 1024, 48, 96]


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
        return time_chain(lambda i: self.run(config, i), launches, replays=5)

    def errors(self, config: LargeConfig) -> tuple[float, float]:
        """Relative errors against fp32 of this configuration and of the unfused computation, on up to 512 tokens."""
        rows = slice(max(0, self.tokens - 512), self.tokens)
        weight, name = self.weights[0], self.layer.epilogue
        args = tuple(a[rows] if a.dim() == 2 else a for a in self.args)
        exact = reference(name, self.x[rows].float() @ weight.float().t(), tuple(a.float() for a in args))
        unfused = reference(name, self.x[rows] @ weight.t(), args)
        found = self.run(config)[rows]
        return tuple(((y.float() - exact).norm() / exact.norm()).item() for y in (found, unfused))  # type: ignore[return-value]


def library_choices(layer: Layer) -> list[LargeConfig]:
    methods = ["cublas"] + ["cublas_addmm"] * (layer.kind in ("residual", "bias"))
    return [LargeConfig(method=m) for m in methods]


def candidates(layer: Layer, tokens: int) -> Iterator[LargeConfig]:
    """Persistent configurations worth timing."""
    g = layer.groups
    wide = LargeConfig(block_t=128, block_n=256 // g, num_stages=4, pieces=4)
    square = LargeConfig(block_t=128, block_n=128 // g, num_stages=6, pieces=2)
    small = LargeConfig(block_t=128, block_n=128 // g, num_warps=4, num_stages=3, pieces=2, per_sm=2)
    whole = [wide, small]
    if g == 2:
        whole.append(replace(wide, pieces=2))
    if tokens <= 512:
        whole.append(square)
    if g == 1:
        whole.append(replace(square, swap=True))
        if tokens > 128:
            whole.append(replace(wide, swap=True, block_t=256, block_n=128))
    if tokens <= 64:
        whole = [replace(config, block_t=64, num_stages=config.num_stages + 1) for config in whole]
    for config in whole:
        yield config
        tiles = math.ceil(tokens / config.block_t) * math.ceil(layer.n / config.block_n)
        for splits in (2, 3, 4):
            if g == 1 and tokens <= 512 and 66 <= tiles * splits <= 132 * config.per_sm:
                yield replace(config, splits=splits)


class _CompileOnly:
    """Stands in for a kernel: a launch compiles it into Triton's disk cache and runs nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)


def build(job: tuple[Layer, LargeConfig]) -> str:
    """Compile one configuration, in a process of its own."""
    layer, config = job
    x = torch.empty(256, layer.k, dtype=DTYPE, device="cuda")
    weight = torch.empty(layer.groups * layer.n, layer.k, dtype=DTYPE, device="cuda")
    args = make_args(layer.epilogue, 256, layer.n, DTYPE, "cuda")
    stand_ins = {"persistent_kernel": _CompileOnly(persistent_kernel), "launch_pointwise": lambda *_: None}
    hook, strides = EPILOGUES[layer.epilogue][0], row_strides(args)
    with mock.patch.multiple(large, **stand_ins):
        why = refusal(lambda: large.run_matmul(config, x, weight, DTYPE, hook, args, strides, layer.groups, layer.kind))
    return f"{layer} {config.constants()}: {why}" if why else ""


def build_all(jobs: list[tuple[Layer, LargeConfig]]) -> None:
    """Compile all jobs on several processes; those that fail are reported again when they are timed."""
    start = time.time()
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as pool:
        for text in pool.imap_unordered(build, jobs, chunksize=1):
            if text:
                print("not built:", text, flush=True)
    print(f"{len(jobs)} kernels built: {time.time() - start:.0f} s", flush=True)


def check(case: Case, config: LargeConfig) -> float:
    """Error relative to the unfused computation's; SystemExit above 1.5, or if a second launch differs."""
    found, unfused = case.errors(config)
    if not found <= 1.5 * unfused:
        raise SystemExit(f"{case.layer} {case.tokens} tokens {config.constants()}: error {found}, unfused {unfused}")
    first = case.run(config)
    if config.method == "persistent" and not torch.equal(first, case.run(config)):
        raise SystemExit(f"{case.layer} {case.tokens} tokens {config.constants()}: a second launch differs")
    return found / unfused


def tune(case: Case) -> dict[str, Any]:
    """The table's entry for one layer and number of tokens: each candidate once, then the best again, in turns."""
    library = library_choices(case.layer)
    first = []
    for config in candidates(case.layer, case.tokens):
        try:
            first.append((case.seconds(config), config))
        except triton.runtime.errors.OutOfResources as error:
            print(f"{case.layer} {config.constants()}: {error}", flush=True)
    first.sort(key=lambda pair: pair[0])
    finalists = library + [config for _, config in first[:2]]
    times: dict[LargeConfig, list[float]] = {config: [] for config in finalists}
    for _ in range(3):
        for config in finalists:
            times[config].append(case.seconds(config))
    medians = {config: statistics.median(found) for config, found in times.items()}
    best = min(medians, key=lambda config: medians[config])
    ours = min((config for config in medians if config.method == "persistent"), key=lambda config: medians[config])
    check(case, ours)
    layer = case.layer
    return {
        "n": layer.n, "k": layer.k, "groups": layer.groups, "kind": layer.kind, "tokens": case.tokens,
        "config": best.constants() | {"method": best.method}, "us": round(medians[best] * 1e6, 2),
        "library_us": round(min(medians[c] for c in library) * 1e6, 2), "persistent_us": round(medians[ours] * 1e6, 2),
        "persistent": ours.constants(),
    }  # fmt: skip


def write_table(path: Path, environment: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """A table with one line per entry; shapes that were not tuned keep their entries."""
    shape = ("groups", "n", "k", "kind", "tokens")
    kept = large_heuristics.load_table(large_heuristics.DEFAULT_TABLE)["entries"]
    merged = {tuple(entry[key] for key in shape): entry for entry in (*kept, *entries)}
    body = ",\n".join("    " + json.dumps(merged[key]) for key in sorted(merged))
    head = f'  "gpu": {json.dumps(environment["gpu"])},\n  "measured": {json.dumps(environment)},\n'
    path.write_text("{\n" + head + '  "entries": [\n' + body + "\n  ]\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--models", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--chains", nargs="*", type=int, default=[128, 256, 8192], help="tokens of the chains")
    parser.add_argument("--inductor", nargs="*", type=int, default=[256], help="tokens of the torch.compile'd chains")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=120.0, help="tune no further shape after this long")
    args = parser.parse_args()
    begin = time.time()
    layers = list(dict.fromkeys(layer for name in args.models for layer in LAYERS[name]))
    cases = [(layer, tokens) for tokens in args.tokens for layer in layers if not (layer.n > 65536 and tokens > 512)]
    device = torch.device("cuda")
    target = device_target(0)

    def committed(layer: Layer, tokens: int) -> LargeConfig:
        return large_heuristics.large_config(
            target, n=layer.n, k=layer.k, groups=layer.groups, tokens=tokens, itemsize=2, kind=layer.kind
        )

    choices = candidates if args.tune else lambda *shape: [committed(*shape)]
    jobs = [(layer, config) for layer, tokens in cases for config in choices(layer, tokens)]
    build_all(list(dict.fromkeys(job for job in jobs if job[1].method == "persistent")))
    ceilings = measure_ceilings(device)
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        **ceilings.to_dict(),
    }  # fmt: skip
    print(environment, flush=True)
    pool = random_pool(ROTATION_BYTES // 2)
    entries, rows = [], []
    for layer, tokens in cases:
        case = Case(layer, tokens, pool)
        if args.tune:
            if time.time() - begin > args.seconds:
                print(f"out of time before {layer}, {tokens} tokens")
                break
            entries.append(tune(case))
            seconds = entries[-1]["us"] * 1e-6
            extra = "library {library_us} persistent {persistent_us} {persistent}".format(**entries[-1])
            write_table(args.out / f"{target.table}_large.json", environment, entries)
        else:
            config = committed(layer, tokens)
            extra = f"error {check(case, config):.2f} {config.method} {config.constants()}"
            seconds = case.seconds(config)
        share = layer.flops(tokens) / seconds / ceilings.matmul_flops_per_s
        rows.append({"layer": str(layer), "tokens": tokens, "us": round(seconds * 1e6, 2), "share": round(share, 3)})
        print(f"{tokens:5d} {layer!s:32} {seconds * 1e6:9.2f} us {share:6.1%}  {extra}", flush=True)
    chains = []
    if not args.tune:
        names = [name for name in args.models if name in MODELS]
        for name in names:
            chains += measure_chains(name, args.chains, ("ours", "library"))
        for name in names:
            chains += measure_chains(name, args.inductor, ("ours", "merged", "stock"))
    result = {**environment, "matmuls": rows, "chains": chains}
    (args.out / "linear_large.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
