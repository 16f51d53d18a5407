"""A short second round: zero points with the bias in sums from 32 tokens on, and norms in launches of their own."""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks import int4_round
from benchmarks.ceilings import read_bandwidth
from benchmarks.int4_round import KINDS, MODEL, E, F, L, T, finish, search, short
from benchmarks.quant_linear import QuantChain
from benchmarks.quant_schemes import LAYERS, committed_configs
from benchmarks.quant_tune import job, prepare
from fusecomp.lowerings.quant.heuristics import QuantConfig

APART = {
    "gate_up": [
        (64, 4, 4, E, T, 1, 1, 0, 0, T), (64, 4, 4, L, T, 1, 1, 0, 0, T), (64, 2, 4, L, T, 1, 1, 0, 0, T),
        (128, 4, 3, L, T, 1, 1, 0, 0, T), (64, 4, 3, L, T, 1, 1, 4, 0, T),
    ],
    "down": [(32, 8, 3, L, T, 8, 1, 16), (16, 8, 3, L, T, 8, 1, 16), (16, 8, 4, L, T, 8, 1, 0)],
    "qkv": [
        (64, 4, 4, E, T, 1, 4, 0, 0, T), (64, 4, 4, L, T, 1, 4, 0, 0, T), (64, 4, 4, E, T, 1, 4, 0),
        (16, 8, 3, L, T, 8, 1, 0, 0, T), (16, 4, 4, E, T, 4, 1, 0, 0, T),
    ],
    "o": [(16, 4, 3, E, T, 4, 1, 0), (64, 4, 4, E, T, 1, 8, 0)],
}  # fmt: skip


def many(splits: dict[str, int], t: int) -> dict[str, list[tuple]]:
    """Of 32 tokens and more."""
    tiles = [(64, 4, 3, L, T), (128, 8, 3, L, T), (64, 4, 2, L, T)]
    tiles += [(32, 2, 3, L, T), (64, 4, 4, L, T)] if t == 32 else [(64, 4, 2, L, F)]
    return {kind: [(*tile, 1, splits[kind], 0) for tile in tiles] for kind in KINDS}


POOLS = {
    ("int4-zero", 32): many({"gate_up": 1, "down": 4, "qkv": 4, "o": 4}, 32),
    ("int4-zero", 64): many({"gate_up": 1, "down": 4, "qkv": 3, "o": 4}, 64),
    ("int4-zero", 128): many({"gate_up": 1, "down": 2, "qkv": 1, "o": 2}, 128),
    ("int4", 1): APART,
    ("int4", 8): APART,
    ("int4", 16): {
        "gate_up": [(64, 2, 4, L, F, 1, 1, 0), (64, 2, 3, L, F, 1, 1, 0)],
        "down": [(64, 2, 4, L, F, 1, 8, 0), (16, 4, 3, L, T, 4, 1, 16)],
        "qkv": [(64, 2, 4, L, F, 1, 4, 4)],
        "o": [(16, 4, 3, L, T, 4, 1, 0)],
    },
}


def made(t: int, rows: int, warps: int, stages: int, early: bool, sums: bool, parts: int, splits: int, ahead: int,
         registers: int = 0, apart: bool = False) -> QuantConfig:  # fmt: skip
    block_t = next(b for b in (8, 16, 32, 64) if t <= b or b == 64)
    return QuantConfig(
        "folded", block_t, rows, 256, warps, stages, splits, early, sums, parts=parts, ahead=ahead,
        registers=registers, apart=apart,
    )  # fmt: skip


def main() -> None:
    start, seconds = time.time(), float(sys.argv[1])
    jobs = [
        job(scheme, kind, t, c)
        for (scheme, t), kinds in POOLS.items() for kind in KINDS
        for c in (*(made(t, *f) for f in kinds[kind]), committed_configs(scheme, MODEL, t)[kind])
    ]  # fmt: skip
    failed = prepare(jobs)
    ceiling = read_bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()} {ceiling / 1e12:.2f} TB/s, {time.time() - start:.0f} s", flush=True)
    found: dict[tuple, dict] = {}
    for scheme in ("int4-zero", "int4"):
        chain = QuantChain(MODEL, LAYERS, scheme)
        for (of, t), kinds in POOLS.items():
            if of == scheme and time.time() - start < seconds - 2:
                int4_round.pool = lambda kind, t, kinds=kinds: [made(t, *f) for f in kinds[kind]]
                found[of, t] = search(chain, of, t, failed, ceiling, start + seconds - 2)
                finish(chain, of, t, found[of, t], ceiling)
        del chain
        torch.cuda.empty_cache()
    print(f"{time.time() - start:.0f} s")
    text = {f"{s} {t}": {k: short(c) for k, c in cs.items() if k in KINDS} for (s, t), cs in found.items()}
    print(json.dumps(text), flush=True)


if __name__ == "__main__":
    main()
