"""`python -m benchmarks {decode,prefill,offline,prefix,patterns,startup} ...`: one model and engine, any benchmarks.

Progress goes to stderr, tables to stdout; the last line of stdout is one JSON object. Exit status 1, and no figures,
when the engine's numbers are wrong; 1, and the other benchmarks' figures, when one fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import hf, startup
from benchmarks.registry import BENCHMARKS
from benchmarks.session import Options, Result, Session, progress, versions
from benchmarks.shapes import SHAPES, ShapeError
from fusecomp.config import DTYPES, FUSE_MODES, KV_CACHE_DTYPES, QUANTIZE_SCHEMES
from fusecomp.errors import FusecompError, VerificationError
from fusecomp.runtime.graphs import GraphRunner

STARTUP = "startup"


def _numbers(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError("give positive integers")
    return values


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parse(argv: Sequence[str] | None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    names = [*BENCHMARKS, STARTUP]
    add("benchmarks", nargs="+", choices=names, metavar="benchmark", help=", ".join(names))
    add("--shape", choices=SHAPES, default="tiny")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--layers", type=int, help="another depth than the shape's, to try things quickly")
    add("--batches", type=_numbers, default=(1, 8, 64, 256), help="decode: batch sizes")
    add("--context", type=int, default=200, help="decode: prompt tokens per sequence")
    add("--steps", type=int, default=50, help="decode: timed engine steps")
    add("--replays", type=int, default=30, help="decode: timed graph replays")
    add("--repeat", type=int, default=1, help="times each measurement is taken")
    add("--prompts", type=int, default=8, help="prefill: prompts at once")
    add("--prompt-len", type=int, default=2048, help="prefill: tokens per prompt; prefix: tokens shared")
    add("--requests", type=int, default=256, help="offline: requests")
    add("--lengths", type=_numbers, default=(100, 1024), help="offline: range of input and output lengths")
    add("--max-num-seqs", type=int, help="engine: default is what the benchmarks need")
    add("--max-num-batched-tokens", type=int, default=8192, help="engine: most tokens in a step")
    add("--max-model-len", type=int, help="engine: default is what the benchmarks need")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="engine: fp8 halves the KV cache")
    add("--deterministic", action="store_true", help="engine: batch-invariant kernels")
    add("--enforce-eager", action="store_true", help="engine without Inductor and CUDA graphs")
    add("--strict", action="store_true", help="a kernel that falls back to its eager reference is an error")
    add("--fuse", choices=FUSE_MODES, default="auto", help="engine: run the fuse stage")
    add("--disabled-patterns", type=_names, default=(), help="engine: patterns to leave out, separated by commas")
    add("--quantize", choices=QUANTIZE_SCHEMES, help="quantize the weights before the engine is built")
    add("--compare-hf", action="store_true", help="also time Hugging Face with a static cache and torch.compile")
    add("--hf-batches", type=_numbers, default=(1,))
    add("--profile", action="store_true", help="decode, prefill: time by kernel; offline: idle time")
    add("--out", help="also write the JSON object to this file")
    add("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    if len(options["lengths"]) != 2 or options["lengths"][0] > options["lengths"][1]:
        parser.error("--lengths takes two numbers, the smaller first")
    for name in ("context", "steps", "replays", "repeat", "prompts", "prompt_len", "requests"):
        if options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if (
        options["max_num_seqs"]
        and max(options["batches"]) > options["max_num_seqs"]
        and "decode" in options["benchmarks"]
    ):
        parser.error("--batches must not exceed --max-num-seqs")
    options["benchmarks"] = tuple(dict.fromkeys(options["benchmarks"]))
    return Options(**options)


def run(options: Options) -> dict[str, Any]:
    """Run the chosen benchmarks, printing each table when it is there; returns the JSON object.

    A benchmark that fails after the gate leaves an "error" in its place, so that the others' figures are not lost.

    Raises:
        FusecompError: the engine cannot be built, or its numbers are wrong.
        ShapeError: the shape's checkpoint is missing.
    """
    session = Session(options)
    figures: dict[str, Any] = {}
    result: dict[str, Any] = {"shape": options.shape, "layers": options.layers, "dtype": str(options.torch_dtype)[6:]}
    result["quantize"] = options.quantize
    result |= versions(options.torch_device) | {"options": asdict(options), "benchmarks": figures}
    scheme = f" quantized to {options.quantize}" if options.quantize else ""
    print(f"{options.shape}, {result['dtype']}{scheme}, {result['device']}, torch {result['torch']}\n", flush=True)
    if STARTUP in options.benchmarks:  # before this process takes memory
        _try(STARTUP, figures, lambda: startup.measure(options))
    chosen = [name for name in options.benchmarks if name != STARTUP]
    if chosen:
        _ = session.engine  # the gate
        print(_headline(session), end="\n\n", flush=True)
    for name in chosen:
        progress(f"== {name}")
        session.clear()
        _try(name, figures, functools.partial(BENCHMARKS[name], session))
    if chosen:
        result |= _account(session)
        if fallbacks := session.engine.report.fallbacks:
            print(f"FALLBACKS to eager references: {fallbacks}\n")
    if options.compare_hf:
        _try("hf", figures, lambda: hf.compare(session))
        _compare(figures)
    return result


def _try(name: str, figures: dict[str, Any], measure: Callable[[], Result]) -> None:
    try:
        outcome = measure()
    except VerificationError:
        raise
    except Exception as error:
        traceback.print_exc()
        figures[name] = {"error": f"{type(error).__name__}: {error}"}
        return
    figures[name] = outcome.figures
    print(outcome.text, end="\n\n", flush=True)


def _graphs(graphs: GraphRunner) -> dict[str, Any]:
    """What was captured, what it took, and the device time of each shape."""
    return {
        "captures": graphs.num_captures,
        "seconds": round(graphs.captures_seconds, 3),
        "bytes": graphs.num_bytes,
        "launch_ms": round(graphs.launch_seconds * 1e3, 3),
        "ms": {str(tuple(k) if isinstance(k, tuple) else k): round(v * 1e3, 4) for k, v in graphs.seconds.items()},
    }


def _account(session: Session) -> dict[str, Any]:
    engine, report = session.engine, session.engine.report
    return {
        "ceilings": session.ceilings.to_dict(),
        "check": session.check.to_dict(),
        "workload": asdict(session.workload),
        "seconds": session.seconds,
        "engine": {
            "max_model_len": engine.config.max_model_len,
            "max_num_seqs": engine.config.max_num_seqs,
            "max_num_batched_tokens": engine.config.max_num_batched_tokens,
            "kv_blocks": engine.num_kv_blocks,
            "cuda_graphs": report.cuda_graphs,
            "graphs": None if engine.graphs is None else _graphs(engine.graphs),
            "matches": report.counts(),
            "fallbacks": report.fallbacks,
            "recompiles": report.recompiles,
            "seconds": {k: round(v, 3) for k, v in report.seconds.items()},
            "notes": report.notes,
        },
    }


def _headline(session: Session) -> str:
    limit, check = session.ceilings, session.check
    return (
        f"ceilings: read {limit.read_bytes_per_s / 1e12:.3g} TB/s, "
        f"{limit.matmul_dtype} matmul {limit.matmul_flops_per_s / 1e12:.3g} TFLOP/s\n"
        f"check: error against fp32 {check.prefill_error:.2e} (prefill), {check.decode_error:.2e} (decode), "
        f"stock {check.stock_error:.2e} and {check.stock_decode_error:.2e}; "
        f"served tokens below the best logit by {check.mean_token_gap:.2e} on average, "
        f"{check.allowed_mean_gap:.2e} allowed"
    )


def _compare(figures: dict[str, Any]) -> None:
    """Add `speedup_over_hf` to decode batches that both measured."""
    theirs = {r["batch"]: r["step_ms"] for r in figures["hf"].get("batches", ())}
    for row in figures.get("decode", {}).get("batches", ()):
        if row["batch"] in theirs:
            row["speedup_over_hf"] = theirs[row["batch"]] / row["step_ms"]
            print(f"batch {row['batch']}: {row['speedup_over_hf']:.2f} times as fast as Hugging Face\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason on stderr."""
    options = parse(argv)
    try:
        result = run(options)
    except (FusecompError, ShapeError, RuntimeError) as error:
        print(f"no figures: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    return int(any("error" in figures for figures in result["benchmarks"].values()))


if __name__ == "__main__":
    sys.exit(main())
