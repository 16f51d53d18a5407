"""Tuner of the attention kernels: builds candidates in parallel, times them, writes entries of the tuned table.

A decode class is one layer, batch and kind of cache; it gets one configuration for all contexts. Tiles are chosen
first, then, for the best of them, how finely a row is split: both are timed with what precedes attention in a step.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from benchmarks.attention_cases import (
    CHECKS,
    DTYPE,
    DecodeCase,
    DecodeShape,
    FusedCase,
    Layer,
    PrefillCase,
    PrefillShape,
    check_correctness,
)
from benchmarks.builds import refusal
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, PrefillConfig

Case = DecodeCase | PrefillCase
Shape = DecodeShape | PrefillShape
Config = DecodeConfig | PrefillConfig
TILES = ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4), (128, 8))  # keys, warps
# Most splits of a row, by the batch up to which they serve; the least keys of a split decide how many there are.
MOST_SPLITS = {4: 32, 16: 8, 128: 4, 512: 2}
LEAST_KEYS = (32, 64, 128, 256, 512, 1024)
SAME = 5e-3  # relative difference of two configurations' results that bf16 explains


def decode_candidates(shape: DecodeShape) -> Iterator[DecodeConfig]:
    """Tiles, stages and whether the first tile is read ahead, split as the batch wants it."""
    splits = next(most for batch, most in MOST_SPLITS.items() if shape.batch <= batch)
    for (n, w), stages, ahead in itertools.product(TILES, (2, 3, 4), (False, True)):
        if stages * n <= 256 and n * shape.layer.head_dim // w <= 4096 and not (ahead and stages == 4):
            yield DecodeConfig(n, w, stages, splits, max(n, 256), ahead)


def split_candidates(config: DecodeConfig) -> Iterator[DecodeConfig]:
    """The same kernel with rows split more finely or less."""
    for least in LEAST_KEYS:
        if least >= config.block_n:
            yield replace(config, min_split=least)


def prefill_candidates(layer: Layer) -> Iterator[PrefillConfig]:
    shapes = [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 3),
    ]  # fmt: skip
    for (m, n, w, s), tma in itertools.product(shapes, (True, False)):
        if (2 * s * n + m) * layer.head_dim * 2 <= 227 * 1024 and (tma or s == 3):
            yield PrefillConfig(m, n, w, s, tma)


def build_or_check(job: tuple) -> str:
    """Run one check, or compile one configuration into Triton's disk cache, from a process of its own."""
    shape, config = job
    if shape is None:
        try:
            check_correctness(config)
        except Exception:  # however it fails: `prepare` tells all checks that did together, and nothing is timed
            return f"check {CHECKS[config]}: {traceback.format_exc()}"
        return ""
    case = FusedCase(shape) if isinstance(shape, DecodeShape) else PrefillCase(replace(shape, cached=64))

    def launch() -> None:
        case.launch(config or case.default())
        torch.cuda.synchronize()

    if why := refusal(launch):  # a candidate that does not fit is met again when it is timed
        print(f"build {config}: {why}", flush=True)
    return ""


def prepare(shapes: Iterable[Shape], committed: Iterable[Shape] = ()) -> None:
    """All checks, and builds on several processes: what tuning `shapes` launches, what `committed` ones launch.

    Raises:
        SystemExit: a check failed.
    """
    start, jobs = time.time(), [(None, case) for case in range(len(CHECKS))]
    for shape in shapes:
        if isinstance(shape, DecodeShape):
            jobs += [(replace(shape, context=64), c) for c in decode_candidates(shape)]
        else:
            jobs += [(PrefillShape(shape.layer, 2, 256), c) for c in prefill_candidates(shape.layer)]
    jobs += [(replace(shape, context=64), None) for shape in committed if isinstance(shape, DecodeShape)]
    jobs = list(dict.fromkeys(jobs))
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as pool:
        failures = [text for text in pool.map(build_or_check, jobs, chunksize=1) if text]
    if failures:
        raise SystemExit("\n".join([*failures, json.dumps({"failed_checks": len(failures)})]))
    built = len(jobs) - len(CHECKS)
    print(f"{len(CHECKS)} checks passed, {built} kernels built: {time.time() - start:.0f} s", flush=True)


def timed(case: Case, config: Config) -> float:
    """Seconds of one launch; infinite if the configuration does not compile for the card or does not fit it."""
    try:
        return case.seconds(config)  # type: ignore[arg-type]
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:  # what does not fit, or does not compile
        print(f"{config}: {type(error).__name__} {str(error)[:80]}", flush=True)
        return math.inf


def tune(cases: Sequence[Case]) -> list[tuple[list[float], Config]]:
    """(seconds per case, config) of every candidate that was timed for all cases, best geometric mean first.

    Raises:
        AssertionError: the best configuration's results are not the committed one's.
    """

    def rank(configs: Iterable[Config], timed_on: Sequence[Case]) -> list[tuple[list[float], Config]]:
        found = [([timed(case, config) for case in timed_on], config) for config in configs]
        return sorted(found, key=lambda pair: math.prod(pair[0]))

    shape = cases[0].shape
    if isinstance(shape, PrefillShape):
        return rank(prefill_candidates(shape.layer), cases)
    first = rank(decode_candidates(shape), cases[: max(1, len(cases) - 1)])  # the longest context takes long
    best = [config for _, config in first[:3]]
    found = rank([c for config in best for c in split_candidates(config)], cases)
    _check_same(cases[0], found[0][1])
    return found


def _check_same(case: DecodeCase, config: Config) -> None:
    results = []
    for chosen in (case.default(), config):
        case.launch(chosen)
        results.append(case.out.double().clone())
    error = float((results[1] - results[0]).norm() / results[0].norm())
    assert error < SAME, f"{config} differs from the committed configuration by {error:.1e}"


def table_entry(shape: Shape, config: Config, rows: Sequence[dict]) -> dict:
    """What the tuned table keeps of a class of shapes: its keys, the best configuration, the times it reached."""
    layer = shape.layer
    entry = {"head_dim": heuristics.padded_dim(layer.head_dim), "itemsize": DTYPE.itemsize}
    if isinstance(shape, DecodeShape):
        entry |= {"kv_itemsize": 1} if shape.quantized else {}
        entry |= {"page": layer.page_size, "pairs": shape.batch * layer.kv_heads}
    else:
        entry |= {"keys": shape.new}
    chosen = {key: value for key, value in asdict(config).items() if key != "source"}
    return {**entry, "config": chosen, "measured": {row["label"]: [row["us"], row["share"]] for row in rows}}


def write_entries(path: Path, environment: dict, entries: Sequence[dict]) -> None:
    """Tuned entries, one a line, to be merged into the card's table."""
    body = ",\n".join("    " + json.dumps(entry) for entry in entries)
    path.write_text(f'{{\n  "measured": {json.dumps(environment)},\n  "entries": [\n{body}\n  ]\n}}\n')
