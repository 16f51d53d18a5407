"""What `benchmarks.moe --tune` tries: configurations worth timing, and their compilation on many processes.

Legend: T tokens, K experts per token, E experts, F expert intermediate size.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch

from benchmarks.builds import refusal
from benchmarks.moe_schemes import SCHEMES, Frame, code_frames, make_layer
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.quant_lowering import run_quant_experts
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.ops.experts import Activation

# Shape and tokens as the tables name them, scheme of codes or "", configuration.
Job = tuple[tuple[tuple[str, int], ...], str, ExpertsConfig]

UP_VECTOR = (
    (2, 512, 1), (2, 1024, 1), (2, 2048, 1), (2, 2048, 2), (4, 512, 1), (4, 1024, 2), (4, 2048, 2), (4, 2048, 4),
    (8, 512, 4), (8, 1024, 4), (8, 2048, 4), (16, 512, 4),
)  # fmt: skip
DOWN_VECTOR = ((1, 256), (1, 512), (1, 1024), (2, 256), (2, 512), (2, 1024), (4, 256), (4, 512), (4, 1024), (8, 1024))
# Rows and columns of a weight tile, warps, stages, whether by TMA: with narrow tiles of tokens, then with wide ones.
MOST_VECTOR_ROWS = 32
NARROW = (
    (64, 128, 4, 3, False), (64, 128, 4, 4, False), (128, 64, 4, 4, False), (128, 64, 4, 6, False),
    (128, 128, 4, 3, False), (128, 64, 8, 4, False), (128, 128, 8, 3, False), (128, 64, 4, 4, True),
    (128, 64, 4, 6, True), (128, 128, 4, 3, True), (64, 128, 4, 6, False), (64, 128, 4, 6, True), (64, 64, 4, 8, False),
)  # fmt: skip
WIDE = (
    (256, 64, 8, 3, True, 1), (256, 64, 8, 4, True, 1), (256, 64, 8, 3, False, 1), (128, 64, 8, 4, True, 1),
    (128, 64, 4, 3, True, 2), (128, 64, 8, 3, True, 2), (128, 64, 8, 3, False, 2), (128, 128, 8, 3, True, 1),
)  # fmt: skip
HALF = (  # with tiles of 64 tokens
    (256, 64, 4, 2, True, 2), (256, 64, 8, 4, True, 1), (128, 64, 4, 4, True, 2), (128, 64, 4, 3, True, 3),
    (256, 64, 4, 4, True, 1), (128, 128, 4, 3, True, 1), (256, 64, 8, 3, True, 1),
)  # fmt: skip
FLAT = {  # tokens of a tile: rows of a weight tile, warps, stages, programs, pieces of both matmuls
    128: ((256, 8, 4, 1, 2, 4), (256, 8, 3, 1, 2, 4), (256, 8, 4, 1, 1, 2), (128, 4, 3, 2, 1, 2)),
    64: ((256, 8, 4, 1, 2, 4), (256, 4, 5, 1, 2, 4), (256, 4, 2, 2, 2, 4), (128, 4, 4, 2, 1, 1)),
}


def frames(top_k: int, experts: int, width: int, tokens: int, scheme: str = "") -> Iterator[Frame]:
    """Configurations with, for each, the tiles of both matmuls to try in it."""
    if scheme:
        yield from code_frames(SCHEMES[scheme], top_k, experts, width, tokens)
        return
    rows = tokens * top_k / experts
    some = Tiles(128, 64, 4, 4)
    if tokens * top_k <= MOST_VECTOR_ROWS:
        ups = [Tiles(*tile) for tile in UP_VECTOR]
        lanes = 1 << (top_k - 1).bit_length()
        downs = [
            Tiles(n, d, warps)
            for n, d in DOWN_VECTOR
            for warps in (1, 2, 4, 8)
            if 16 <= n * d * lanes // (32 * warps) <= 128 and d < 2 * width
        ]
        yield ExpertsConfig("vector", ups[0], downs[0]), ups, downs
    if tokens == 1:
        return
    if rows <= 48:
        heights = [t for t in (8, 16, 32, 64) if rows / 2 <= t <= 8 * rows + 8]
        pool = [Tiles(*tile[:4], per_sm, tile[4]) for tile in NARROW for per_sm in (0, 3)]
        for block_t in heights[:3]:
            yield ExpertsConfig("grouped", some, some, block_t, True, 1 if rows <= 4 else 2), pool, pool
    else:
        pool = [Tiles(n, d, w, s, per_sm, tma) for n, d, w, s, tma, per_sm in WIDE]
        pool += [replace(tiles, per_sm=0) for tiles in pool[:2]]
        half = [Tiles(n, d, w, s, per_sm, tma) for n, d, w, s, tma, per_sm in HALF]
        for block_t, group_t in ((64, 4), (128, 2)) if rows < 512 else ((64, 16), (128, 8), (128, 16)):
            tiles = half + pool[:4] if block_t == 64 else pool
            flat = [
                (Tiles(n, 64, w, s, per_sm, True, flat=True, pieces=up),
                 Tiles(n, 64, w, s, per_sm, True, tokens_tma=True, flat=True, pieces=down))
                for n, w, s, per_sm, up, down in FLAT[block_t]
            ]  # fmt: skip
            ups, downs = (tiles + list(each) for each in zip(*flat, strict=True))
            downs += [replace(tile, tokens_tma=True) for tile in tiles[:2]]
            yield ExpertsConfig("grouped", tiles[0], tiles[3], block_t, False, group_t), ups, downs


@cache
def _layer(experts: int, hidden: int, width: int, scheme: str) -> Experts:
    if scheme:
        return make_layer(SCHEMES[scheme], experts, hidden, width)
    up, down = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        for shape in ((experts, 2 * width, hidden), (experts, hidden, width))
    )
    return Experts(up, None, down, None, Activation("silu"), gated=True, interleaved=False, transposed=False)


def _build(job: Job) -> str:
    """Compile one configuration into Triton's disk cache, in a process of its own; returns why it cannot."""
    keys, scheme, config = dict(job[0]), job[1], job[2]
    tokens, top_k = keys["tokens"], keys["top_k"]
    x = torch.empty(tokens, keys["hidden"], dtype=torch.bfloat16, device="cuda")
    index = torch.zeros(tokens, top_k, dtype=torch.int64, device="cuda")
    layer = _layer(keys["experts"], keys["hidden"], keys["width"], scheme)

    def launch() -> None:
        with compile_ahead(x.device):  # what does not compile is logged, and met again when it is timed
            run_quant_experts(config, x, index, x[:, :top_k].contiguous(), layer, None, device_target(0).has_pdl)

    why = refusal(launch)
    return f"{config.to_entry()}: {why}" if why else ""


def build_all(shapes: list[tuple[dict[str, int], str]]) -> None:
    """Compile what tuning these shapes will launch, on several processes."""
    start, jobs = time.time(), []
    for shape, scheme in shapes:
        for frame, ups, downs in frames(shape["top_k"], shape["experts"], shape["width"], shape["tokens"], scheme):
            # The number of programs plays no part in the code.
            pools = [list(dict.fromkeys(replace(tiles, per_sm=0) for tiles in pool)) for pool in (ups, downs)]
            for up, down in itertools.zip_longest(*pools):
                jobs.append((tuple(shape.items()), scheme, replace(frame, up=up or ups[0], down=down or downs[0])))
    # Nor does the number of tokens, but in the routing's.
    seen = {}
    for keys, scheme, config in jobs:
        seen.setdefault((tuple(k for k in keys if k[0] != "tokens"), scheme, config), (keys, scheme, config))
    jobs = list(seen.values())
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as processes:
        failures = processes.map(_build, jobs, chunksize=2)
    print(f"{len(jobs)} configurations built: {time.time() - start:.0f} s", flush=True)
    for text in [f for f in failures if f][:5]:
        print(f"  not built: {text}", flush=True)
