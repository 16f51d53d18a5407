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
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.ceilings import measure_ceilings
from benchmarks.linear_layers import MODELS, Layer, Model
from benchmarks.quant_cases import (
    DTYPE,
    NAME,
    NORM,
    POOL,
    PROGRAMS,
    SCHEMES,
    Case,
    accuracy,
    build_all,
    check,
    check_rows,
    random_codes,
)
from benchmarks.timing import time_chain, time_replays
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.quant import activations, scaled_heuristics
from fusecomp.lowerings.quant.activations import launch_quantize, scaled_shape
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, PERSISTENT, TILE, ScaledConfig, scaled_config
from fusecomp.lowerings.quant.scaled_launch import run_scaled
from fusecomp.ops.linear import Program
from fusecomp.ops.quant import (
    FP8,
    INT,
    ActivationSpec,
)

TOKENS = [64, 256, 8192, 16, 32, 128, 512, 2048, 16384]


def split_counts(blocks: int, tiles: int, per: tuple[int, ...]) -> list[int]:
    """Splits that give every multiprocessor so many programs, each with at least four tiles of K."""
    counts = {max(1, int(132 * p / blocks)) for p in per}
    return sorted({c for c in counts if c == 1 or (c <= 16 and tiles // c >= 4)}) or [1]


def candidates(layer: Layer, tokens: int, scheme: str) -> Iterator[ScaledConfig]:
    """Configurations worth timing."""
    g, block = layer.groups, scheme.endswith("block")
    if tokens <= 256:
        t = min(max(16, triton.next_power_of_2(tokens)), 64 if block else 128)
        tiles = {
            16: [(64, 256, 4, 4), (128, 256, 8, 4), (128, 128, 4, 5)],
            32: [(64, 256, 4, 4), (128, 256, 8, 4), (128, 128, 4, 5)],
            64: [(128, 128, 4, 5), (128, 256, 8, 3)],
            128: [(128, 128, 8, 5), (256, 128, 8, 4)],
        }[t]
        if block:
            tiles = [(64, 128, 4, 5), (128, 128, 8, 5)]
        for r, k, w, s in tiles:
            blocks = math.ceil(g * layer.n / r) * math.ceil(tokens / t)
            for splits in split_counts(blocks, layer.k // k, (1, 2)):
                for ahead in (2, 4) if tokens in (16, 64) else (2,):
                    yield ScaledConfig(TILE, t, r // g, k, splits=splits, num_warps=w, num_stages=s, ahead=ahead)
    if tokens < 64:
        return
    square = ScaledConfig(PERSISTENT, 128, 128 // g, 128, num_stages=6, pieces=2)
    wide = replace(square, block_n=256 // g, num_stages=4, pieces=4)
    if block:
        yield from (replace(square, num_stages=4), replace(square, num_stages=5), replace(square, block_t=64))
        return
    if tokens <= 64:
        whole = [replace(square, block_t=64, num_warps=4)]
    elif tokens <= 128:
        whole = [square, replace(square, swap=True)] if g == 1 else [square, wide]
    elif tokens <= 512:
        whole = [replace(square, swap=True), replace(square, swap=True, block_t=256, num_stages=4, pieces=4)]
        whole = whole if g == 1 else [wide, replace(wide, block_t=256, block_n=64)]
        if tokens <= 192:  # no more than the last 64 of the second tile are empty
            whole.append(replace(square, block_t=64, num_warps=4, num_stages=3, per_sm=2))
    else:
        tall = replace(wide, block_t=256, block_n=128 // g)
        whole = [wide, tall, replace(wide, group_t=16)]
    for config in whole:
        yield config
        items = math.ceil(tokens / config.block_t) * math.ceil(layer.n / config.block_n)
        for splits in (2, 3):
            if g == 1 and tokens <= 256 and 60 <= items * splits <= 132 * config.per_sm:
                yield replace(config, splits=splits)
    if tokens > 64:
        yield ScaledConfig(LIBRARY)


def write_table(path: Path, environment: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """A table with one line per entry; shapes that were not tuned keep the GPU's own entries."""
    gpu, shape = environment["gpu"], scaled_heuristics.KEY
    kept = [entry for entry in scaled_heuristics.entries(device_target(0)) if entry["gpu"] == gpu]
    kept_keys = (*shape, "config", "own", "us", "layer_us")
    clean = [{k: v for k, v in entry.items() if k in kept_keys} for entry in (*kept, *entries)]
    merged = {tuple(entry[key] for key in shape): entry for entry in clean}
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

    def seconds(self, tokens: int, picked: list[ScaledConfig] | None = None) -> float:
        """Of one layer; `picked` has a configuration for each of its linears."""
        h = torch.randn(tokens, self.model.hidden, dtype=DTYPE, device="cuda")

        def configs(q: Tensor, x_scale: Tensor, w_scale: Tensor, program: Program) -> ScaledConfig:
            if picked:
                return picked[next(i for i, w in enumerate(self.layers[0]) if w.shape == q.shape)]
            return activations.choose(q, x_scale, w_scale, program, self.spec, self.activation, tokens)

        self.run(h, configs)
        return time_replays(lambda: self.run(h, configs), 9 if tokens < 1024 else 5) / len(self.layers)


def tune(chain: Chain, scheme: str, tokens: int, pool: Tensor) -> list[dict[str, Any]]:
    """A table's entries for one number of tokens: each linear in turn by its candidates, in whole layers, two passes.

    Alone, a product is timed between its like, cool, and without what follows it.
    """
    parts, choices = chain.model.parts(), []
    for layer in parts:
        case = Case(layer, tokens, scheme, pool)
        known, right = case.reference(), []
        for config in dict.fromkeys(candidates(layer, tokens, scheme)):
            if not case.served(config):
                continue
            try:
                problem = check(case, config, known)[1]
            except triton.runtime.errors.OutOfResources as error:
                problem = f"{layer} {config.constants()}: {str(error)[:80]}"
            if problem:
                print(problem, flush=True)
            else:
                right.append(config)
        choices.append(right)
    picked = [right[0] for right in choices]
    timed: list[dict[str, float]] = [{} for _ in parts]
    best = chain.seconds(tokens, picked)
    for _ in range(2):
        for at in (2, 3, 0, 1):
            for config in choices[at]:
                seconds = chain.seconds(tokens, [*picked[:at], config, *picked[at + 1 :]])
                timed[at][f"{config.method} {config.constants()}"] = round(seconds * 1e6, 2)
                if seconds < best:
                    best, picked[at] = seconds, config
        best = chain.seconds(tokens, picked)  # again: what was best by luck may lose
    entries = []
    for at, layer in enumerate(parts):
        own = [config for config in choices[at] if config.method != LIBRARY]
        ours = min(own, key=lambda config: timed[at][f"{config.method} {config.constants()}"])
        entry: dict[str, Any] = {
            "kind": chain.spec.kind, "block": chain.activation.block, "n": layer.n, "k": layer.k,
            "groups": layer.groups, "epilogue": layer.kind, "tokens": tokens,
            "config": picked[at].constants() | {"method": picked[at].method}, "layer_us": round(best * 1e6, 2),
        }  # fmt: skip
        if picked[at].method == LIBRARY:
            entry["own"] = ours.constants() | {"method": ours.method}
        entries.append(entry | {"timed": timed[at]})
    return entries


def time_rows(tokens: list[int]) -> list[dict[str, Any]]:
    """The making of codes alone: us, and bytes per second."""
    rows = []
    for count in tokens:
        row: dict[str, Any] = {"tokens": count}
        for k, norm in ((4096, True), (4096, False), (14336, False)):
            inputs = [torch.randn(count, k, dtype=DTYPE, device="cuda") for _ in range(max(1, min(8, 8192 // count)))]
            gain = torch.ones(k, dtype=DTYPE, device="cuda")
            spec = SCHEMES["fp8"][0]

            def run(
                i: int, xs: list[Tensor] = inputs, g: Tensor = gain, n: bool = norm, spec: ActivationSpec = spec
            ) -> Any:
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
        shape = scaled_shape(layer.n, layer.k, layer.groups, NAME, spec, activation.block, layer.kind)
        return scaled_config(target, shape, tokens)

    jobs = [(*case, committed(*case)) for case in cases]
    if args.tune:
        jobs += [(*case, config) for case in cases for config in candidates(*case)]
    build_all(jobs)
    result["failed"] = check_rows()
    print("\n".join(result["failed"]) or "codes and scales of rows are those of the reference", flush=True)
    result["accuracy"] = accuracy(pools)
    finish()
    pool16 = torch.empty(POOL // 2, dtype=DTYPE, device="cuda").normal_(std=1 / 64)
    entries: list[dict[str, Any]] = []
    result["products"], result["layers"] = entries, []
    for scheme in args.schemes:
        pool, chain = pools[SCHEMES[scheme][1].kind], Chain(MODELS[args.model], scheme, args.layers)
        for tokens in args.tokens:
            if time.time() - begin > args.seconds:
                print(f"out of time before {scheme}, {tokens} tokens", flush=True)
                break
            if args.tune:
                found = tune(chain, scheme, tokens, pool)
                picked = [ScaledConfig(**entry["config"]) for entry in found]
            else:
                found, picked = [{} for _ in layers], [committed(layer, tokens, scheme) for layer in layers]
            for layer, config, entry in zip(layers, picked, found, strict=True):
                case = Case(layer, tokens, scheme, pool)
                entry["error"], problem = check(case, config)
                entry["us"] = round(case.seconds(lambda i, c=config, case=case: case.run(c, i)) * 1e6, 2)
                if scheme == FP8:
                    entry["bf16_us"] = round(case.bf16(pool16) * 1e6, 2)
                rate = layer.flops(tokens) / entry["us"] / 1e6
                moved = layer.groups * layer.n * layer.k / entry["us"] / 1e6
                short = {k: v for k, v in config.constants().items() if k != "method"}
                line = (
                    f"{scheme} {tokens:5d} {layer!s:27} {entry['us']:8.1f} us {rate:5.0f} TF {rate / limit:4.0%} "
                    f"{moved:4.2f} TB/s bf16 {entry.get('bf16_us', 0):.1f} err {entry['error']:.2f} {config.method} "
                )
                print(problem or line + str(short), flush=True)
                entries.append(entry | {"scheme": scheme, "layer": str(layer)})
            row: dict[str, Any] = {"scheme": scheme, "tokens": tokens}
            variants = {"us": picked}
            if args.tune:
                variants["committed_us"] = [committed(layer, tokens, scheme) for layer in layers]
            if tokens >= 128 and not scheme.endswith("block"):
                variants["library_us"] = [ScaledConfig(LIBRARY)] * len(layers)
            for name, configs in variants.items():
                row[name] = round(chain.seconds(tokens, configs) * 1e6, 2)
            activations.MAX_DEPENDENT_K, kept = 0, activations.MAX_DEPENDENT_K
            row["rows_not_dependent_us"] = round(chain.seconds(tokens, picked) * 1e6, 2)
            activations.MAX_DEPENDENT_K = kept
            moved, flops = sum(w.numel() for w in chain.layers[0]), sum(part.flops(tokens) for part in layers)
            row |= {"TFLOP/s": round(flops / row["us"] / 1e6, 1), "TB/s": round(moved / row["us"] / 1e6, 2)}
            result["layers"].append(row)
            print("layer:", row, flush=True)
            finish()
            if args.tune:
                write_table(args.out / f"{target.table}_scaled.json", environment, entries)
        del chain
    result["codes"] = time_rows([64, 256, 8192])
    finish()
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
