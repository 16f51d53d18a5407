"""Quantized linear layers of few tokens on a GPU: correctness first, then single layers and whole-model chains.

    python -m benchmarks.quant_linear --schemes fp8,int4 --tokens 1,16,64         # the committed configurations
    python -m benchmarks.quant_linear --tune --schemes int4 --tokens 16 --out DIR

As `benchmarks.linear`, whose chains these are with weights of codes; lm_head stays in bf16. Shares are of the read
bandwidth measured in the same run, by the bytes of codes, scales and zero points. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.ceilings import read_bandwidth
from benchmarks.linear import check_race, default_configs, split_counts
from benchmarks.linear import job as dense_job
from benchmarks.linear import prepare as dense_prepare
from benchmarks.linear_chain import EPS, MODELS, Chain, Kind, Model
from benchmarks.timing import time_replays
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.lowering import launch_linear, launch_norm_op
from fusecomp.lowerings.linear.skinny import split_steps
from fusecomp.lowerings.quant.heuristics import (
    DEQUANTIZE,
    QuantConfig,
    norm_limit,
    quant_config,
    serves_halves,
    serves_words,
)
from fusecomp.lowerings.quant.lowering import launch_dequantize, run_quant
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference
from fusecomp.ops.quant_linear import QuantShape

SCHEMES = {
    "fp8": (WeightSpec(FP8, 8, 1, 0, "bfloat16"), False),
    "int4": (WeightSpec(INT, 4, 1, 128, "bfloat16", 64), False),
    "int4-zero": (WeightSpec(INT, 4, 1, 128, "bfloat16", 64), True),
    "int4-32": (WeightSpec(INT, 4, 1, 32, "bfloat16", 32), False),
    "int8": (WeightSpec(INT, 8, 1, 0, "bfloat16"), False),
    "fp8-block": (WeightSpec(FP8, 8, 128, 128, "bfloat16"), False),
    "mxfp4": (WeightSpec(FP4, 4, 1, 32, "bfloat16"), False),
    "nf4": (WeightSpec(NF4, 4, 1, 64, "bfloat16"), False),
}
LAYERS = 4
# Rows, columns and warps of the one-token kernel that reads words: 256 columns a warp, or twice that.
WORD_TILES = (
    (4, 1024, 4), (8, 1024, 4), (16, 1024, 4), (2, 2048, 4), (4, 2048, 4), (8, 2048, 4), (2, 4096, 4), (4, 4096, 4),
    (4, 512, 2), (8, 512, 2), (4, 1024, 2), (8, 1024, 2), (8, 256, 1), (4, 512, 1), (4, 2048, 8), (8, 2048, 8),
)  # fmt: skip
SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
Weight = tuple[Tensor, Tensor, Tensor | None]


def program_of(kind: Kind) -> Program:
    """The epilogue and norm of a kind of layer as `linear`'s program."""
    norm = NormSpec("rms", EPS) if kind.norm else None
    if kind.epilogue is SWIGLU:
        return Program(2, (), SILU, "bfloat16", norm)
    if kind.epilogue is RESIDUAL:
        return Program(1, (FULL,), (("add", "a0", "i0"),), "bfloat16", norm)
    return Program(1, (), (), "bfloat16", norm)


def quant_shape_of(scheme: str, kind: Kind) -> QuantShape:
    spec, zero = SCHEMES[scheme]
    layout = (spec.kind, spec.bits, spec.rows, spec.cols)
    return QuantShape(kind.n, kind.k, kind.groups, "bfloat16", *layout, zero, fold=spec.fold)


def make_weight(rows: int, k: int, spec: WeightSpec, zero: bool) -> Weight:
    """Random codes, scales that make products near 1, and integer zero points."""
    if spec.bits == 4:
        q = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device="cuda")
    elif spec.kind == INT:
        q = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda")
    else:
        q = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) * 50).to(torch.float8_e4m3fn)
    size = spec.scales(rows, k)
    spread = {(INT, 4): 5.0, (INT, 8): 73.0, (FP8, 8): 50.0, (NF4, 4): 0.5, (FP4, 4): 3.0}[spec.kind, spec.bits]
    scale = ((torch.rand(size, device="cuda") + 0.5) / (spread * k**0.5)).bfloat16()
    if spec.kind == FP4:
        scale = torch.randint(118, 121, size, dtype=torch.uint8, device="cuda")
    return q, scale, torch.randint(4, 12, size, device="cuda").bfloat16() if zero else None


class QuantChain(Chain):
    """A chain whose layers hold codes."""

    def __init__(self, model: Model, layers: int, scheme: str) -> None:
        self.scheme = scheme
        self.spec, self.zero = SCHEMES[scheme]
        super().__init__(model, layers)

    def make_weight(self, name: str) -> Any:
        if name == "lm_head":
            return super().make_weight(name)
        kind = self.model.kinds[name]
        return make_weight(kind.groups * kind.n, kind.k, self.spec, self.zero)

    def weight_bytes(self, name: str) -> int:
        if name == "lm_head":
            return super().weight_bytes(name)
        return sum(part.nbytes for part in self.weights[name][0] if part is not None)

    def dense_weight(self, name: str, dtype: torch.dtype) -> Tensor:
        if name == "lm_head":
            return super().dense_weight(name, dtype)
        spec = replace(self.spec, dtype=str(dtype).removeprefix("torch."))
        return dequantize_reference(*self.weights[name][0], spec.to_text())

    def launch(self, name: str, i: int, x: Tensor, out: Tensor, added: Tensor | None, config: Any, pdl: bool) -> Tensor:
        if name == "lm_head":
            return super().launch(name, i, x, out, added, config, pdl)
        kind = self.model.kinds[name]
        norm = self.norms[2 * i + (name == "gate_up")] if kind.norm else None
        operands = [] if added is None else [added]
        program = program_of(kind)
        if kind.norm and len(x) > norm_limit(self.spec.fold):  # as `launch_quant_linear`
            x, norm, program = launch_norm_op(x, norm, None, program.norm), None, replace(program, norm=None)
        if config.kernel == DEQUANTIZE:
            return launch_linear(x, launch_dequantize(*self.weights[name][i], self.spec), None, None, operands, program)
        run_quant(config, x, *self.weights[name][i], norm, operands, program, self.spec, out, pdl)
        return out

    def configs(self, tokens: int) -> dict[str, Any]:
        """The committed configurations."""
        target = device_target(0)
        found: dict[str, Any] = {
            name: quant_config(target, quant_shape_of(self.scheme, kind), tokens)
            for name, kind in self.model.kinds.items()
            if name != "lm_head"
        }
        return found | {"lm_head": default_configs(self.model, tokens)["lm_head"]}


def candidates(shape: QuantShape, tokens: int) -> Iterator[QuantConfig]:
    """Launches worth a try; for the tile kernel, splits for one to four programs per multiprocessor."""
    block_t = min(128, max(8, triton.next_power_of_2(tokens)))
    if shape.fold:
        yield from folded_candidates(shape, tokens)
        return
    if tokens == 1:
        columns = 2048 if shape.bits == 4 else 1024
        for rows, block_k, warps in ((4, columns, 4), (8, columns, 4), (8, columns // 2, 2), (8, 2 * columns, 4)):
            yield QuantConfig("vector", 1, max(rows, shape.groups), block_k, warps)
        for rows, block_k, warps in WORD_TILES if serves_words(shape) else ():
            if shape.k % block_k == 0:
                yield QuantConfig("words", 1, rows, block_k, warps)
        if serves_words(shape):
            return
    for rows, block_k, warps, stages, *choices in BYTES[block_t]:
        if shape.cols and shape.cols % block_k:
            continue
        counts = split_counts(Kind(shape.n, shape.k, None, groups=shape.groups), rows, block_k)
        for splits, early, halves in itertools.product(counts, *choices):
            if not halves or serves_halves(shape):
                tokens_of_program = 16 if halves else block_t
                yield QuantConfig("tile", tokens_of_program, rows, block_k, warps, stages, splits, early, halves=halves)


YES, NO, BOTH = (True,), (False,), (True, False)
# By tokens of a program, of 8-bit codes: rows and columns of a tile, warps, stages, choices of `early` and `halves`.
BYTES = {
    8: [
        (64, 128, 4, 4, YES, NO), (64, 256, 4, 3, BOTH, NO), (64, 256, 4, 4, YES, NO), (128, 256, 8, 3, YES, NO),
        (128, 128, 8, 4, BOTH, NO), (32, 256, 2, 4, YES, NO), (64, 512, 4, 2, YES, NO), (64, 512, 8, 2, YES, NO),
    ],
    16: [
        (64, 128, 4, 4, YES, BOTH), (64, 256, 4, 3, NO, NO), (64, 256, 4, 3, BOTH, YES), (128, 128, 8, 4, BOTH, YES),
        (128, 256, 8, 3, BOTH, YES), (64, 512, 8, 2, YES, YES),
    ],
    32: [(64, 256, 4, 3, NO, YES), (128, 128, 8, 4, NO, BOTH), (128, 256, 8, 3, NO, YES)],
    64: [(64, 128, 4, 4, NO, NO), (128, 128, 8, 3, NO, NO), (128, 128, 4, 3, NO, NO)],
    128: [(64, 128, 4, 4, NO, NO), (128, 128, 8, 3, NO, NO), (128, 128, 4, 3, NO, NO)],
}  # fmt: skip
# Of folded codes, by tokens of a program: rows of a tile, warps, stages, programs to a multiprocessor, `early`, `sums`.
FOLDED = {
    8: [(64, 4, 4, (2, 3, 4), True, True), (64, 4, 4, (2, 3, 4), False, True)],
    16: [(64, 4, 4, (2, 3, 4), False, False), (64, 4, 3, (2, 4), False, False), (128, 8, 4, (2,), False, False)],
    32: [(64, 4, 4, (2, 3), False, False), (64, 4, 3, (2, 3), False, False), (128, 8, 4, (1, 2), False, False)],
    64: [(128, 8, 4, (1, 3), False, False), (64, 4, 3, (2, 3), False, False)],
    128: [],
}  # fmt: skip
# Of those whose warps have parts of K, up to 8 tokens: rows, warps, stages.
PARTS = [(16, 8, 3), (32, 8, 3), (32, 4, 3), (32, 4, 4), (64, 4, 3), (16, 4, 4)]


def folded_candidates(shape: QuantShape, tokens: int) -> Iterator[QuantConfig]:
    """As `candidates`, of folded codes."""
    block_t, fold = min(128, max(8, triton.next_power_of_2(tokens))), 4 * shape.fold
    steps, seen = shape.k // fold, {}
    for size in (64, 128) if block_t == 128 else (block_t,):
        for rows, warps, stages, loads, early, sums in FOLDED[size]:
            blocks = math.ceil(shape.n * shape.groups / rows) * math.ceil(tokens / size)
            for load in loads:
                splits = split_steps(steps, max(1, min(16, round(132 * load / blocks))))[1]
                seen[QuantConfig("folded", size, rows, fold, warps, stages, splits, early, sums)] = None
    for rows, parts, stages in PARTS if block_t == 8 else ():
        blocks = math.ceil(shape.n * shape.groups / rows)
        for splits, early in itertools.product((1, 2), (False, True)):
            # Programs of half of a multiprocessor's 64 warps at most, and none that splits what fills it.
            if (splits == 1 or blocks * parts < 132 * 16) and not (early and rows == 64):
                found = split_steps(math.ceil(steps / parts), splits)[1]
                config = QuantConfig("folded", block_t, rows, fold, parts, stages, found, early, True, parts=parts)
                seen[config] = None
    yield from seen


Job = tuple[str, str, int, QuantConfig]  # scheme, kind of layer, tokens, configuration


def job(scheme: str, name: str, tokens: int, config: QuantConfig) -> Job:
    """What decides a kernel's code."""
    return scheme, "o" if name == "down" else name, tokens, replace(config, source="")


def _prepare(job: Job) -> str:
    """Compile one configuration into Triton's disk cache, from a process of its own; returns why it cannot."""
    scheme, name, tokens, config = job
    kind, (spec, zero) = MODELS["llama-8b"].kinds[name], SCHEMES[scheme]
    n = 256
    try:
        x, out = (torch.zeros(s, dtype=torch.bfloat16, device="cuda") for s in ((tokens, kind.k), (tokens, n)))
        weight = make_weight(kind.groups * n, kind.k, spec, zero)
        operands, program = [out] if kind.epilogue is RESIDUAL else [], program_of(kind)
        norm = x[0] if kind.norm and tokens <= norm_limit(spec.fold) else None
        program = program if norm is not None else replace(program, norm=None)
        if config.kernel != DEQUANTIZE:
            run_quant(config, x, *weight, norm, operands, program, spec, out, True)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{config}: {type(error).__name__} {str(error)[-300:]}"
    return ""


def prepare(jobs: list[Job]) -> set[Job]:
    """Compile all; returns the jobs that failed."""
    start = time.time()
    jobs = list(dict.fromkeys(jobs))
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as pool:
        failures = pool.map(_prepare, jobs, chunksize=2)
    print(f"{len(jobs)} kernels built: {time.time() - start:.0f} s, {sum(map(bool, failures))} failed", flush=True)
    for text in list(dict.fromkeys(f[-200:].replace("\n", " ") for f in failures if f))[:4]:
        print(f"  not built: {text}", flush=True)
    return {job for job, text in zip(jobs, failures, strict=True) if text}


def seconds_of(run: Callable[[], Any], replays: int) -> float:
    try:
        run()
        return time_replays(run, replays)
    except triton.runtime.errors.OutOfResources:
        return math.inf


def brief(c: QuantConfig) -> str:
    tile = f"{c.kernel[0]} t{c.block_t} r{c.block_r} k{c.block_k} s{c.splits}"
    flags = "".join(f" {name}" for name in ("early", "sums", "halves") if getattr(c, name))
    return f"{tile} w{c.num_warps} st{c.num_stages}{' parts' if c.parts > 1 else ''}{flags}"


def tune_kind(chain: QuantChain, name: str, tokens: int, pool: list[QuantConfig], ceiling: float) -> tuple[Any, list]:
    """(best, all by time) of one kind of layer, launched over all its weights in a dependent chain."""
    x = chain.random(tokens, chain.model.hidden)
    size, results = chain.weight_bytes(name), []
    for config in pool:
        run, count = chain.single(name, x, config, True)
        results.append((seconds_of(run, 5) / count, config))
    results.sort(key=lambda r: r[0])
    finals = []
    for _, config in results[:3]:
        run, count = chain.single(name, x, config, True)
        finals.append((seconds_of(run, 21) / count, config))
    finals.sort(key=lambda r: r[0])
    results = [*finals, *results[3:]]
    share = size / results[0][0] / ceiling
    by_kernel = {}
    for s, c in results:
        by_kernel.setdefault((c.kernel, c.block_r, c.block_k, c.parts > 1, c.early, c.halves), (s, c))
    shown = list(dict.fromkeys([*results[:2], *by_kernel.values()]))[:7]
    top = "; ".join(f"{s * 1e6:.2f} {brief(c)}" for s, c in shown)
    print(f"{tokens:3} {name:8}{share:6.1%} {size / results[0][0] / 1e12:.2f} TB/s | {top}", flush=True)
    return results[0][1], results


def refine(chain: QuantChain, tokens: int, configs: dict[str, Any], found: dict[str, list]) -> float:
    """Sets configs to what makes the whole chain fastest, kind by kind, of the best alone and of each sort of launch.

    Returns its seconds. Alone, a small layer's weights stay in the L2, and a launch follows one of its own size.
    """
    x = chain.random(tokens, chain.model.hidden)

    def seconds(changes: dict[str, Any]) -> float:
        return seconds_of(chain.ours(x, configs | changes, True, head=False), 11)

    best = seconds({})
    for name, results in found.items():
        sorts: dict = {}
        for _, c in results:
            sorts.setdefault((c.parts > 1, c.early, c.halves), c)
        for config in dict.fromkeys([*(c for _, c in results[:4]), *sorts.values()]):
            if config != configs[name] and (took := seconds({name: config})) < best:
                best, configs[name] = took, config
    print(f"{tokens:3} chain of " + "; ".join(f"{name} {brief(configs[name])}" for name in found), flush=True)
    return seconds_of(chain.ours(x, configs, True, head=False), 21)


def tune(schemes: list[str], tokens: list[int], kinds: list[str], ceiling: float, out: Path | None) -> list[dict]:
    """Table entries for every scheme, number of tokens and kind of layer; checks, then chains with what was found."""
    model = MODELS["llama-8b"]
    pools = {
        (scheme, name, t): list(candidates(quant_shape_of(scheme, model.kinds[name]), t))
        for scheme in schemes for name in kinds for t in tokens
    }  # fmt: skip
    failed = prepare([job(s, n, t, c) for (s, n, t), pool in pools.items() for c in pool])
    entries = []
    for scheme in schemes:
        chain = QuantChain(model, LAYERS, scheme)
        for t in tokens:
            configs = chain.configs(t)
            found = {}
            for name in kinds:
                pool = [c for c in pools[scheme, name, t] if job(scheme, name, t, c) not in failed]
                configs[name], found[name] = tune_kind(chain, name, t, pool, ceiling)
            seconds = refine(chain, t, configs, found)
            for name in kinds:
                best, results, kind = configs[name], found[name], model.kinds[name]
                try:
                    ratio = chain.check(name, t, configs[name], True)
                except AssertionError as error:
                    print(f"CHECK FAILED {error}", flush=True)
                    ratio = math.nan
                entries.append(
                    {"scheme": scheme, "rows": kind.n * kind.groups, "k": kind.k, "groups": kind.groups, "tokens": t,
                     "config": {k: v for k, v in asdict(best).items() if k != "source"}, "error": round(ratio, 3),
                     "us": round(1e6 * min(s for s, c in results if c == best), 2),
                     "tried": [f"{s * 1e6:.2f} {brief(c)}" for s, c in results]}
                )  # fmt: skip
            size = chain.bytes(head=False)
            whole = seconds * model.layers / LAYERS + chain.weight_bytes("lm_head") / ceiling
            print(
                f"{scheme} {t}: chain {seconds * 1e3:.4f} ms {size / seconds / ceiling:.1%}; "
                f"32 layers and head {whole * 1e3:.3f}",
                flush=True,
            )
            try:
                check_race(chain, t, configs)
            except AssertionError as error:
                print(f"CHECK FAILED {error}", flush=True)
            if out:
                out.write_text(json.dumps(entries))
        del chain
        torch.cuda.empty_cache()
    return entries


def peers(tokens: list[int], ceiling: float, library: bool) -> list[dict]:
    """The same layers in bf16, ours and, if `library`, cuBLAS."""
    chain, rows = Chain(MODELS["llama-8b"], LAYERS), []
    chosen = [(t, name, c) for t in tokens for name, c in default_configs(chain.model, t).items() if name != "lm_head"]
    dense_prepare([dense_job(name, chain.model.kinds[name], t, config) for t, name, config in chosen])
    for t in tokens:
        x = chain.random(t, chain.model.hidden)
        runs = {"ours": chain.ours(x, default_configs(chain.model, t), True, head=False)}
        if library:
            runs["cuBLAS"] = chain.peer(x, False)
        cells = {label: seconds_of(run, 15) for label, run in runs.items()}
        rows.append({"tokens": t, **{k: round(v * 1e3, 4) for k, v in cells.items()}})
        share = chain.bytes(False) / cells["ours"] / ceiling
        text = ", ".join(f"{label} {seconds * 1e3:.4f} ms" for label, seconds in cells.items())
        print(f"bf16 {t} tokens: chain of {text}; ours {share:.1%}", flush=True)
    return rows


def measure(schemes: list[str], tokens: list[int], ceiling: float) -> list[dict]:
    """Whole models with the committed configurations."""
    model, rows = MODELS["llama-8b"], []
    prepare(
        [job(s, n, t, quant_config(device_target(0), quant_shape_of(s, kind), t))
         for s in schemes for t in tokens for n, kind in model.kinds.items() if n != "lm_head"]
    )  # fmt: skip
    for scheme in schemes:
        chain = QuantChain(model, LAYERS, scheme)
        for t in tokens:
            configs = chain.configs(t)
            for name in chain.weights:
                if name != "lm_head":
                    chain.check(name, t, configs[name], True)
            x = chain.random(t, model.hidden)
            check_race(chain, t, configs)
            seconds = seconds_of(chain.ours(x, configs, True, head=False), 15)
            cells = {}
            for name in chain.weights:
                run, count = chain.single(name, x, configs[name], True)
                cells[name] = chain.weight_bytes(name) / (seconds_of(run, 15) / count) / ceiling
            rows.append({"scheme": scheme, "tokens": t, "ms": seconds * 1e3, "share": cells})
            text = "  ".join(f"{name} {share:.1%}" for name, share in cells.items())
            print(f"{scheme:9} {t:4} tokens {LAYERS} layers {seconds * 1e3:.4f} ms "
                  f"{chain.bytes(False) / seconds / ceiling:.1%}  alone: {text}", flush=True)  # fmt: skip
        del chain
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="fp8,int4", help=f"some of {', '.join(SCHEMES)}, separated by commas")
    parser.add_argument("--tokens", default="1,8,16,64")
    parser.add_argument("--kinds", default="qkv,o,gate_up,down")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--peers", action="store_true", help="also time the same layers in bf16, ours and cuBLAS")
    parser.add_argument("--bf16", action="store_true", help="also time ours in bf16")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args()
    schemes, tokens = args.schemes.split(","), [int(t) for t in args.tokens.split(",")]
    ceiling = read_bandwidth(torch.device("cuda"))
    result: dict = {"gpu": torch.cuda.get_device_name(), "read_TB_s": round(ceiling / 1e12, 3)}
    print(result, flush=True)
    if args.peers or args.bf16:
        result["bf16"] = peers(tokens, ceiling, args.peers)
    if args.tune:
        result["tuned"] = tune(schemes, tokens, args.kinds.split(","), ceiling, args.out)
    else:
        result["rows"] = measure(schemes, tokens, ceiling)
    if args.peers:
        result["bf16"] = peers(tokens, ceiling)
    if args.out:
        args.out.write_text(json.dumps(result))
    print(json.dumps({k: v for k, v in result.items() if k != "tuned"}))


if __name__ == "__main__":
    main()
