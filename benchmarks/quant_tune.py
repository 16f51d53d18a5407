"""What `benchmarks.quant_linear --tune` does: tries launches of each kind of layer, then in the whole chain.

Configurations are compiled on many processes first. Every choice is checked; a failed check is printed with its entry.
"""

from __future__ import annotations

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

from benchmarks.builds import refusal
from benchmarks.linear import check_race, split_counts
from benchmarks.linear_chain import MODELS, Chain, Kind
from benchmarks.quant_schemes import LAYERS, SCHEMES, committed_configs, make_weight, program_of, quant_shape_of
from benchmarks.timing import time_replays
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL
from fusecomp.lowerings.linear.skinny import split_steps
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant.heuristics import (
    DEQUANTIZE,
    DIGIT_ROWS,
    DIGIT_TOKENS,
    DIGITS,
    FOLDED_DIGITS,
    FOLDED_HELD,
    FOLDED_WIDE,
    HELD_TOKENS,
    QuantConfig,
    held_config,
    norms_inside,
    serves_digits,
    serves_folded_digits,
    serves_halves,
    serves_held,
    serves_words,
)
from fusecomp.lowerings.quant.launches import run_quant
from fusecomp.ops.quant_linear import QuantShape

Job = tuple[str, str, int, QuantConfig]  # scheme, kind of layer, tokens, configuration

# Rows, columns and warps of the one-token kernel that reads words: 256 columns a warp, or twice that.
WORD_TILES = (
    (4, 1024, 4), (8, 1024, 4), (16, 1024, 4), (2, 2048, 4), (4, 2048, 4), (8, 2048, 4), (2, 4096, 4), (4, 4096, 4),
    (4, 512, 2), (8, 512, 2), (4, 1024, 2), (8, 1024, 2), (8, 256, 1), (4, 512, 1), (4, 2048, 8), (8, 2048, 8),
    (2, 4096, 2), (8, 4096, 8), (4, 256, 1), (2, 512, 1), (8, 512, 1), (4, 1024, 1), (2, 1024, 2), (16, 512, 2),
)  # fmt: skip
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
# Of fp8 whose inputs are cut to digits: rows and columns of a tile, warps, stages.
DIGIT_TILES = (
    (64, 256, 4, 3), (64, 256, 4, 4), (64, 512, 4, 2), (64, 128, 4, 6), (128, 256, 8, 3), (128, 256, 4, 3),
    (128, 128, 8, 6), (128, 512, 8, 2), (256, 128, 8, 3),
)  # fmt: skip
# Of folded codes, by tokens of a program: rows of a tile, warps, stages, programs to a multiprocessor, `early`, `sums`.
FOLDED = {
    8: [(64, 4, 4, (2, 3, 4), True, True), (64, 4, 4, (2, 3, 4), False, True)],
    16: [
        (64, 2, 4, (2, 4), False, True), (64, 4, 4, (2, 3, 4), False, False), (64, 4, 3, (2, 4), False, False),
        (128, 8, 4, (2,), False, False),
    ],
    32: [
        (64, 4, 4, (2, 3), False, True), (64, 4, 4, (2, 3), False, False), (64, 4, 3, (2, 3), False, False),
        (128, 8, 4, (1, 2), False, False),
    ],
    64: [
        (64, 4, 3, (2, 3), False, True), (128, 8, 3, (2, 3), False, True), (128, 8, 4, (1, 3), False, False),
        (64, 4, 3, (2, 3), False, False),
    ],
    128: [],
}  # fmt: skip
# Of the kernel of many tokens: rows and columns of a step, warps, stages, programs to a multiprocessor. Each is tried
# with and without TMA.
WIDE = {
    16: [(64, 256, 4, 4, (2, 3)), (64, 128, 4, 4, (2, 4)), (128, 256, 8, 3, (1, 2))],
    32: [(64, 256, 4, 3, (2, 3)), (64, 128, 4, 4, (2, 4)), (128, 128, 8, 4, (1, 2)), (128, 256, 8, 3, (1, 2))],
    64: [
        (64, 128, 4, 3, (2,)), (64, 128, 4, 4, (2,)), (64, 256, 4, 2, (2,)), (128, 128, 8, 3, (2,)),
        (128, 256, 8, 2, (1, 2)),
    ],
    128: [
        (64, 128, 4, 2, (3,)), (64, 128, 4, 3, (2,)), (128, 128, 8, 2, (1, 2)), (128, 128, 8, 4, (1,)),
        (128, 256, 8, 2, (1,)),
    ],
}  # fmt: skip
# Of the kernel that multiplies digits: rows of a group, warps, stages, programs to a multiprocessor.
FOLDED_DIGIT_TILES = {
    8: [(64, 4, 4, (2, 3, 4)), (64, 4, 6, (2, 3)), (128, 8, 4, (1,))],
    16: [(64, 4, 4, (2, 3, 4)), (64, 4, 3, (2, 3)), (64, 4, 6, (2,)), (128, 8, 4, (1,))],
    32: [(64, 4, 3, (2, 3)), (64, 4, 4, (2,)), (128, 8, 3, (1, 2))],
}
# Of those whose warps have parts of K, up to 8 tokens: rows, warps, stages.
PARTS = [(16, 8, 3), (32, 8, 3), (32, 4, 3), (32, 4, 4), (64, 4, 3), (16, 4, 4)]


def candidates(shape: QuantShape, tokens: int) -> Iterator[QuantConfig]:
    """Launches worth a try; for the tile kernel, splits for one to four programs per multiprocessor."""
    block_t = min(128, max(8, triton.next_power_of_2(tokens)))
    if shape.fold:
        yield from folded_candidates(shape, tokens)
        return
    if 1 < tokens <= 32 and serves_digits(device_target(0) if torch.cuda.is_available() else SM90, shape):
        for rows, block_k, warps, stages in DIGIT_TILES:
            if rows < DIGIT_ROWS * shape.groups:
                continue
            for splits in split_counts(Kind(shape.n, shape.k, None, groups=shape.groups), rows, block_k):
                yield QuantConfig(DIGITS, block_t, rows, block_k, warps, stages, splits)
    if tokens == 1:
        columns = 2048 if shape.bits == 4 else 1024
        for rows, block_k, warps in ((4, columns, 4), (8, columns, 4), (8, columns // 2, 2), (8, 2 * columns, 4)):
            yield QuantConfig("vector", 1, max(rows, shape.groups), block_k, warps)
        for rows, block_k, warps in WORD_TILES if serves_words(shape) else ():
            if shape.k % block_k == 0:
                for ahead in sorted({0, min(1, shape.k // block_k - 1)}):
                    yield QuantConfig("words", 1, rows, block_k, warps, ahead=ahead)
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
    for size in (64, 128) if block_t == 128 else (block_t,):
        for rows, block_k, warps, stages, loads in WIDE.get(size, ()):
            blocks = math.ceil(shape.n * shape.groups / rows) * math.ceil(tokens / size)
            for load, use_tma in itertools.product(loads if block_k <= fold else (), BOTH):
                splits = split_steps(shape.k // block_k, max(1, min(16, round(132 * load / blocks))))[1]
                config = QuantConfig(FOLDED_WIDE, size, rows, block_k, warps, stages, splits, False, use_tma=use_tma)
                seen[config] = None
    for rows, parts, stages in PARTS if block_t == 8 else ():
        blocks = math.ceil(shape.n * shape.groups / rows)
        for splits, early in itertools.product((1, 2), (False, True)):
            # Programs of half of a multiprocessor's 64 warps at most, and none that splits what fills it.
            if (splits == 1 or blocks * parts < 132 * 16) and not (early and rows == 64):
                found = split_steps(math.ceil(steps / parts), splits)[1]
                config = QuantConfig("folded", block_t, rows, fold, parts, stages, found, early, True, parts=parts)
                seen[config] = None
                if not early:
                    seen[replace(config, ahead=16)] = None
    yield from seen
    yield from folded_digit_candidates(shape, tokens)
    if tokens <= HELD_TOKENS and serves_held(shape):
        for parts, (ahead, early) in itertools.product((2, 4, 8, 16), ((0, False), (1, False), (0, True))):
            config = QuantConfig(FOLDED_HELD, 1, num_stages=3, parts=parts, ahead=ahead, early=early)
            yield held_config(config, device_target(0) if torch.cuda.is_available() else SM90, shape, tokens)


def folded_digit_candidates(shape: QuantShape, tokens: int) -> Iterator[QuantConfig]:
    """As `candidates`, of the kernel that multiplies digits."""
    if not serves_folded_digits(device_target(0) if torch.cuda.is_available() else SM90, shape):
        return
    wanted, steps = max(8, triton.next_power_of_2(tokens)), shape.k // (4 * shape.fold)
    sizes = {8: (8,), 16: (16,), 32: (16, 32)}.get(wanted, ())
    for block_t in (size for size in sizes if size * shape.groups <= DIGIT_TOKENS):
        for rows, warps, stages, loads in FOLDED_DIGIT_TILES[block_t]:
            blocks = math.ceil(shape.n / rows) * math.ceil(tokens / block_t)
            counts = {split_steps(steps, max(1, min(16, round(132 * load / blocks))))[1] for load in loads}
            for splits in sorted(counts):
                config = QuantConfig(FOLDED_DIGITS, block_t, rows * shape.groups, 4 * shape.fold, warps, stages, splits)
                yield replace(config, early=False)


def job(scheme: str, name: str, tokens: int, config: QuantConfig) -> Job:
    """What decides a kernel's code."""
    return scheme, "o" if name == "down" else name, tokens, replace(config, source="")


def _prepare(job: Job) -> str:
    """Compile one configuration into Triton's disk cache, from a process of its own; returns why it cannot."""
    scheme, name, tokens, config = job
    kind, (spec, zero) = MODELS["llama-8b"].kinds[name], SCHEMES[scheme]
    n = 256
    x, out = (torch.zeros(s, dtype=torch.bfloat16, device="cuda") for s in ((tokens, kind.k), (tokens, n)))
    weight = make_weight(kind.groups * n, kind.k, spec, zero)
    operands, program = [out] if kind.epilogue is RESIDUAL else [], program_of(kind)
    norm = x[0] if kind.norm and norms_inside(config, spec.fold, tokens) else None
    program = program if norm is not None else replace(program, norm=None)

    def launch() -> None:
        if config.kernel != DEQUANTIZE:
            run_quant(config, x, *weight, norm, operands, program, spec, out, True)
        torch.cuda.synchronize()

    why = refusal(launch)
    return f"{config}: {why}" if why else ""


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
    letter = {FOLDED_WIDE: "w", FOLDED_HELD: "h", FOLDED_DIGITS: "d"}.get(c.kernel, c.kernel[0])
    tile = f"{letter} t{c.block_t} r{c.block_r} k{c.block_k} s{c.splits}"
    flags = "".join(f" {name}" for name in ("early", "sums", "halves") if getattr(c, name))
    flags += f" ahead {c.ahead}" if c.ahead else ""
    flags += " tma" * c.use_tma
    return f"{tile} w{c.num_warps} st{c.num_stages}{' parts' if c.parts > 1 else ''}{flags}"


def tune_kind(chain: Chain, name: str, tokens: int, pool: list[QuantConfig], ceiling: float) -> tuple[Any, list]:
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
        by_kernel.setdefault((c.kernel, c.block_r, c.block_k, c.parts > 1, c.early, c.halves, c.use_tma), (s, c))
    shown = list(dict.fromkeys([*results[:2], *by_kernel.values()]))[:7]
    top = "; ".join(f"{s * 1e6:.2f} {brief(c)}" for s, c in shown)
    print(f"{tokens:3} {name:8}{share:6.1%} {size / results[0][0] / 1e12:.2f} TB/s | {top}", flush=True)
    return results[0][1], results


def refine(chain: Chain, tokens: int, configs: dict[str, Any], found: dict[str, list]) -> float:
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
            sorts.setdefault((c.kernel, c.parts > 1, c.early, c.halves, c.use_tma), c)
        for config in dict.fromkeys([*(c for _, c in results[:4]), *sorts.values()]):
            if config != configs[name] and (took := seconds({name: config})) < best:
                best, configs[name] = took, config
    print(f"{tokens:3} chain of " + "; ".join(f"{name} {brief(configs[name])}" for name in found), flush=True)
    return seconds_of(chain.ours(x, configs, True, head=False), 21)


def tune(
    schemes: list[str],
    tokens: list[int],
    kinds: list[str],
    ceiling: float,
    out: Path | None,
    chain_of: Callable[[str], Chain],
) -> list[dict]:
    """Table entries for every scheme, number of tokens and kind of layer; checks, then chains with what was found.

    Args:
        chain_of: `LAYERS` layers of Llama-8B by a scheme.
    """
    model = MODELS["llama-8b"]
    pools = {
        (scheme, name, t): list(candidates(quant_shape_of(scheme, model.kinds[name]), t))
        for scheme in schemes for name in kinds for t in tokens
    }  # fmt: skip
    failed = prepare([job(s, n, t, c) for (s, n, t), pool in pools.items() for c in pool])
    entries = []
    for scheme in schemes:
        chain = chain_of(scheme)
        for t in tokens:
            configs = committed_configs(scheme, model, t)
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
