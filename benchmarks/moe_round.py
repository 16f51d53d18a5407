"""Experts of many tokens, variants in turns (a round's script, not kept)."""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.moe import CONTRACT, DTYPE, SHAPES, Case, expert_loop, make_layers
from benchmarks.moe_tail import Tail
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts import routed
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.registration import register

SHAPE = SHAPES["qwen3-30b-a3b"]
REPLAYS = 11
BIG = Tiles(256, 64, 8, 4, 1, True)
MID = Tiles(128, 64, 4, 3, 2, True)


def variants(tokens: int) -> dict[str, ExpertsConfig]:
    base = SHAPE.config(device_target(0), tokens, "")
    found = {"base": replace(base, extra=0)}
    big = ExpertsConfig("grouped", BIG, BIG, 128, False, 16)
    if tokens >= 4096:
        for extra in (16, 32, 64):
            found[f"x{extra}"] = replace(big, extra=extra)
        for group in (4, 8):
            found[f"x32 g{group}"] = replace(big, extra=32, group_t=group)
        found["s64"] = replace(big, extra=-64)
        found["s64 g8"] = replace(big, extra=-64, group_t=8)
    elif tokens == 2048:
        found["x0 big"] = replace(big, group_t=2)
        for extra in (16, 32, 64):
            found[f"x{extra} g2"] = replace(big, extra=extra, group_t=2)
        found["x32 g2 dmid"] = replace(big, extra=32, group_t=2, down=MID)
        found["x16 g2 dmid"] = replace(big, extra=16, group_t=2, down=MID)
        found["s64 g2"] = replace(big, extra=-64, group_t=2)
        found["s64 g2 dmid"] = replace(big, extra=-64, group_t=2, down=MID)
        found["x32 g4"] = replace(big, extra=32, group_t=4)
    else:
        two = Tiles(128, 64, 4, 4, 2, True)
        found["s64 g1"] = replace(big, extra=-64, group_t=1)
        found["s64 base"] = replace(found["base"], extra=-64)
        found["t64 128w4 x32"] = ExpertsConfig("grouped", two, two, 64, False, 1, 32)
    return found


def skewed(case: Case) -> None:
    """Experts of unlike popularity: lognormal."""
    popular = torch.randn(case.launches, 1, SHAPE.experts, device="cuda") * 0.7
    noise = -torch.log(-torch.log(torch.rand(case.launches, case.tokens, SHAPE.experts, device="cuda")))
    case.index = (popular + noise).topk(SHAPE.top_k, dim=-1)[1]


def check(case: Case, config: ExpertsConfig, expected: torch.Tensor, exact: list, plain: list) -> str:
    """Replays against an ordered launch, all rows against the base, first and last rows against fp32."""
    ordered = case.run(config, 0, False)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = case.run(config)
    for _ in range(5):
        found.fill_(float("nan"))
        graph.replay()
        if not torch.equal(found, ordered):
            return "REPLAYS DIFFER"
    for some, a, b in zip(parts(case), exact, plain, strict=True):
        error, allowed = ((y.float() - a).norm().item() for y in (found[some], b))
        if not error <= CONTRACT * allowed:
            return f"ERROR {error:.3g} {allowed:.3g}"
    far = ((found - expected).float().norm() / expected.float().norm()).item()
    if not far < 0.01:
        return f"FAR {far:.3g}"
    return f"{(found == expected).float().mean().item():.4f} equal"


def parts(case: Case) -> list[slice]:
    n = min(256, case.tokens // 2)
    return [slice(0, n), slice(case.tokens - n, case.tokens)]


def measure(case: Case, name: str, result: dict) -> None:
    configs = variants(case.tokens)
    with compile_ahead(torch.device("cuda")):
        for config in configs.values():
            case.run(config)
    exact, plain = [], []
    for some in parts(case):
        args = case.x[0, some], case.index[0, some], case.weights[0, some], case.layers[0]
        exact.append(expert_loop(*args, torch.float32))
        plain.append(expert_loop(*args, DTYPE))
    expected = case.run(configs["base"]).clone()
    checks, graphs = {}, {}
    for label, config in configs.items():
        try:
            checks[label] = check(case, config, expected, exact, plain)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(case.launches):
                    case.run(config, i)
            graph.replay()
            graphs[label] = graph
        except Exception as error:  # the others are still worth their time
            checks[label] = f"{type(error).__name__} {str(error)[:80]}"
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {label: [] for label in graphs}
    for _ in range(REPLAYS):
        for label, graph in graphs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[label].append(start.elapsed_time(stop) * 1e3 / case.launches)
    base = times["base"]
    print(f"--- {name} {case.tokens} tokens, base {statistics.median(base):.1f} us", flush=True)
    text = []
    for label, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        note = "" if checks[label].endswith("equal") else " " + checks[label]
        text.append(f"{label}={statistics.median(values):.1f} ({ratio:.3f}){note}")
        result[f"{name} {case.tokens} {label}"] = [round(statistics.median(values), 2), round(ratio, 4), checks[label]]
    for i in range(0, len(text), 6):
        print("  ".join(text[i : i + 6])[:200], flush=True)


def kernels(case: Case, config: ExpertsConfig, label: str, result: dict) -> None:
    """Time of each kernel, launched in order without dependence."""
    from torch.profiler import ProfilerActivity, profile

    for i in range(case.launches):
        case.run(config, i, False)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for i in range(case.launches):
            case.run(config, i, False)
        torch.cuda.synchronize()
    text = {e.key.split("(")[0][:20]: round(e.device_time_total / e.count, 1) for e in found.key_averages()}
    text = {k: v for k, v in text.items() if "kernel" in k}
    result[f"kernels {case.tokens} {label}"] = text
    print(f"kernels {case.tokens} {label}: {text}", flush=True)


def costs(layers: list, result: dict) -> None:
    """Kernels where each expert has as many rows: 512, then 528."""
    for tokens in (8192, 8448):
        case = Case(SHAPE, layers, tokens)
        case.launches = 4
        even = torch.arange(tokens * SHAPE.top_k, device="cuda") % SHAPE.experts
        case.index = even.view(1, tokens, SHAPE.top_k).repeat(case.launches, 1, 1)
        for label, config in variants(8192).items():
            if label in (("base", "x32") if tokens == 8192 else ("base", "x16", "x32", "x64", "s64")):
                kernels(case, config, f"even {label}", result)


def decode(result: dict) -> None:
    """A chain of layers at few tokens: choice and plan in one launch or two, in turns."""
    register()
    tail = Tail("qwen3-30b-a3b")
    for tokens in (8, 16):
        graphs, inputs = {}, tail.inputs(tokens)
        for label, most in (("two", 0), ("one", 16)):
            routed.MAX_PLANNED = most
            with compile_ahead(torch.device("cuda")):
                tail.run(*inputs)
            try:
                error = tail.check(tokens)
            except SystemExit as failure:
                print(f"decode {tokens} {label}: {failure}", flush=True)
                continue
            out = tail.run(*inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = tail.run(*inputs)
            graphs[label] = (graph, [], out, kept, error)
        for _ in range(31):
            for graph, times, *_ in graphs.values():
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) * 1e3 / len(tail.layers))
        same = len(graphs) == 2 and all(map(torch.equal, graphs["two"][2], graphs["one"][2]))
        found = {k: (round(statistics.median(t), 2), round(e, 2)) for k, (_, t, _, _, e) in graphs.items()}
        result[f"decode {tokens}"] = found
        print(f"decode {tokens} us a layer, error: {found}, equal {same}", flush=True)
    routed.MAX_PLANNED = 16


def main() -> None:
    start, result = time.time(), {}
    print(torch.cuda.get_device_name(), measure_ceilings(torch.device("cuda")).to_dict(), flush=True)
    try:
        decode(result)
    except Exception as error:  # prefill is the main matter
        print(f"decode: {type(error).__name__} {str(error)[:300]}", flush=True)
    print(f"{time.time() - start:.0f} s", flush=True)
    layers = make_layers(SHAPE)
    for tokens in (8192, 4096, 2048, 1024):
        case = Case(SHAPE, layers, tokens)
        case.launches = {8192: 4, 4096: 6, 2048: 6, 1024: 9}[tokens]
        measure(case, "spread", result)
        if time.time() - start < 105:
            skewed(case)
            measure(case, "skew", result)
        if tokens in (8192, 2048):
            with_extra = {
                k: c for k, c in variants(tokens).items() if k in ("base", "x16", "x32", "x32 g2", "x32 g2 dmid")
            }
            case = Case(SHAPE, layers, tokens)
            for label, config in with_extra.items():
                kernels(case, config, label, result)
        print(f"{time.time() - start:.0f} s", flush=True)
    costs(layers, result)
    (Path(os.environ["OUT"]) / "tail-round.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
