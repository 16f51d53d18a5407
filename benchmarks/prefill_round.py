"""Prefill of a mixture, part by part: attention, linears, grouped matmuls; checks, then variants in turns."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import torch

from benchmarks import attention_cases, linear_large, moe, moe_tune
from benchmarks.attention_cases import Layer, PrefillCase, PrefillShape, check_correctness
from benchmarks.ceilings import measure_ceilings
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import PrefillConfig

P = PrefillConfig
D128 = [
    P(64, 64, 4, 3, True), P(128, 128, 8, 3, True), P(64, 64, 4, 3, True, True), P(64, 64, 4, 2, True, True),
    P(128, 128, 8, 3, True, True), P(128, 128, 8, 2, True, True), P(128, 64, 8, 2, True, True, 128),
    P(128, 64, 8, 2, True, False, 128), P(128, 64, 8, 3, True, True), P(64, 128, 4, 2, True, True),
]
FEW = [D128[0], D128[2], D128[4], D128[6]]
D64 = [
    P(64, 64, 4, 3, True), P(64, 64, 4, 3, True, True), P(128, 64, 8, 3, True, True, 128), P(128, 64, 4, 3, True, True),
    P(64, 128, 4, 2, True, True), P(128, 128, 8, 2, True, True), P(128, 128, 8, 2, True, True, 128),
]
ATTENTION = [
    (Layer(kv_heads=4), D128, [(4, 2048), (8, 2048), (4, 4096), (1, 16384), (16, 256)]),
    (Layer(kv_heads=8), FEW, [(8, 2048), (1, 16384)]),
    (Layer(kv_heads=8, head_dim=64), D64, [(8, 2048), (4, 4096)]),
]
CHECKED = [(case, config) for case in (2, 9, 4) for config in (D128[2], D128[6], D128[5])] + [(4, D64[2]), (4, D64[5])]

QKV, OUT = linear_large.Layer(5120, 2048), linear_large.Layer(2048, 4096, "residual")
ROUTER = linear_large.Layer(128, 2048)
UP, DOWN = linear_large.Layer(1536, 2048), linear_large.Layer(2048, 768)
WIDE = LargeConfig(block_n=256, num_stages=4, pieces=4)
DEEP = replace(WIDE, block_k=128, num_stages=2)
SMALL = LargeConfig(num_warps=4, num_stages=3, pieces=2, per_sm=2)
LIBRARY = LargeConfig(method="cublas")
ADDMM = LargeConfig(method="cublas_addmm")
LINEARS = [
    (QKV, 8192, [SMALL, WIDE, replace(WIDE, group_t=16), DEEP, replace(WIDE, swap=True, block_t=256, block_n=128), LIBRARY]),
    (OUT, 8192, [WIDE, replace(WIDE, group_t=16), DEEP, SMALL, replace(WIDE, swap=True, block_t=256, block_n=128), LIBRARY, ADDMM]),
    (ROUTER, 8192, [
        SMALL, LIBRARY, LargeConfig(num_stages=6), LargeConfig(num_stages=6, splits=2), LargeConfig(num_stages=6, splits=4),
        LargeConfig(block_t=64, num_stages=6), LargeConfig(block_t=64, num_stages=4, num_warps=4, per_sm=2),
        LargeConfig(block_t=64, num_stages=4, num_warps=4, per_sm=2, splits=2),
    ]),
    (UP, 65536, [WIDE, LIBRARY]),
    (DOWN, 65536, [WIDE, LIBRARY]),
]  # fmt: skip
MOE = moe.SHAPES["qwen3-30b-a3b"]
T = 8192


def experts() -> dict[str, Any]:
    base = MOE.config(device_target(0), T, "")
    deep_up, deep_down = (replace(t, block_d=128, num_stages=2) for t in (base.up, base.down))
    plain = replace(base.down, num_stages=3, use_tma=False)
    return {
        "table": base, "g8": replace(base, group_t=8), "g4": replace(base, group_t=4), "g6": replace(base, group_t=6),
        "up deep": replace(base, up=deep_up), "down deep": replace(base, down=deep_down),
        "down s3 no TMA": replace(base, down=plain), "both deep g8": replace(base, up=deep_up, down=deep_down, group_t=8),
        "down 128 w8 s4": replace(base, down=replace(base.down, block_n=128)),
    }


def name(c: PrefillConfig) -> str:
    return f"{c.block_m}x{c.block_n}w{c.num_warps}s{c.num_stages}" + "p" * c.peel + f"r{c.max_registers}" * bool(c.max_registers)


def job(what: tuple) -> str:
    kind, *rest = what
    try:
        if kind == "check":
            case, config = rest
            heuristics.prefill_config = lambda *_, **__: config
            check_correctness(case)
        elif kind == "attention":
            layer, config = rest
            PrefillCase(PrefillShape(layer, 2, 256, cached=64)).launch(config)
            torch.cuda.synchronize()
        elif kind == "linear":
            return linear_large.build(tuple(rest))
        else:
            return moe_tune._build((tuple(MOE.keys(T).items()), "", rest[0]))
    except Exception:
        return f"{what}: {traceback.format_exc()[-700:]}"
    return ""


def race(runs: dict[str, Any], launches: int, rounds: int = 9) -> dict[str, float]:
    """Median us of a launch of each, replayed in turns."""
    graphs, times = {}, {key: [] for key in runs}
    for key, run in runs.items():
        try:
            run(0)
            torch.cuda.synchronize()
            graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[key]):
                for i in range(launches):
                    run(i)
        except Exception as error:
            graphs.pop(key, None)
            print(f"  {key}: {type(error).__name__} {str(error)[:90]}")
    for _ in range(rounds):
        for key, graph in graphs.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            times[key].append(a.elapsed_time(b) * 1e3 / launches)
    return {key: statistics.median(found[1:]) for key, found in times.items() if found}


def show(title: str, found: dict[str, float], flops: float) -> None:
    line = "  ".join(f"{k}={v:.1f}" for k, v in found.items())
    best = min(found.values())
    print(f"{title}: best {best:.1f} us {flops / best / 1e6:.0f} TFLOP/s | {line}", flush=True)


def main() -> None:
    start = time.time()
    jobs = [("check", *c) for c in CHECKED]
    jobs += [("attention", layer, c) for layer, configs, _ in ATTENTION for c in configs]
    jobs += [("linear", layer, c) for layer, _, configs in LINEARS for c in configs if c.method == "persistent"]
    jobs += [("moe", replace(c, up=replace(c.up, per_sm=0), down=replace(c.down, per_sm=0))) for c in experts().values()]
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1)) as pool:
        failures = [text for text in pool.imap_unordered(job, jobs, chunksize=1) if text]
    for text in failures[:4]:
        print("FAILED", text.replace("\n", " ")[-400:])
    print(f"{len(CHECKED)} checks, {len(jobs)} jobs, {len(failures)} failed: {time.time() - start:.0f} s", flush=True)
    limits = measure_ceilings(torch.device("cuda"))
    print(torch.cuda.get_device_name(), limits.to_dict(), flush=True)
    out: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "limits": limits.to_dict()}

    def keep(title: str, found: dict[str, float], flops: float) -> None:
        out[title] = found
        show(title, found, flops)

    for layer, configs, shapes in ATTENTION:
        for rows, new in shapes:
            case = PrefillCase(PrefillShape(layer, rows, new))
            runs = {name(c): (lambda i, c=c, case=case: case.launch(c)) for c in configs}
            keep(f"attention D{layer.head_dim} 32/{layer.kv_heads} {rows}x{new}", race(runs, 4), case.shape.flops)
    pool = linear_large.random_pool(1 << 28)
    for layer, tokens, configs in LINEARS:
        case = linear_large.Case(layer, tokens, pool)
        for c in configs:
            if tokens == 8192 and c.method == "persistent":
                linear_large.check(case, c)
        runs = {}
        for c in configs:
            text = " ".join(f"{k[:7]}={v}" for k, v in c.constants().items()).replace("method=cublas", "cublas")
            runs[f"[{text}]"] = lambda i, c=c, case=case: case.run(c, i)
        keep(f"linear {layer} x {tokens}", race(runs, 6 if tokens == 8192 else 3), layer.flops(tokens))
    del pool
    layers = moe.make_layers(MOE)
    case = moe.Case(MOE, layers, T)
    for key, c in experts().items():
        if "deep" in key or "128" in key:
            case.check(c)
    runs = {key: (lambda i, c=c: case.run(c, i)) for key, c in experts().items()}
    keep(f"experts {T}", race(runs, case.launches, 13), MOE.flops(T))
    if folder := os.environ.get("OUT"):
        with open(f"{folder}/moe-prefill-round.json", "w") as file:
            json.dump(out, file)
    print(f"all: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
