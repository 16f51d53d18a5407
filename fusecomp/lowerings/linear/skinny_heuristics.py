"""Launch configurations of the skinny matmul: a tuned table per GPU, the nearest entry otherwise.

Pure functions of shapes and of a `Target`, so a configuration chosen while a CUDA graph is captured is right for every
replay.

Legend: T tokens, N features, K inputs, G groups, BR, BK rows and columns of a weight tile.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fusecomp.lowerings.paged_attention.heuristics import SM90, Target

TABLES = Path(__file__).parent / "tuned"
DEFAULT_TABLE = "nvidia_h200"
SECTION = "skinny"
MAX_SPLITS = 16
MAX_BLOCK_T = 128


@dataclass(frozen=True)
class SkinnyConfig:
    """Configuration of one launch.

    Attributes:
        kernel: "vector" for one token, "tile" for more.
        block_t: tokens of a program.
        block_r: rows of a weight tile, over all groups.
        block_k: columns of a weight tile.
        splits: tile: programs that share the same features, each with its part of K.
        num_stages: tile: depth of the pipeline of copies to shared memory; 1 keeps tiles in registers.
        early: tile: only weights go through the pipeline, which then begins before the wait for the kernel before.
    """

    kernel: str
    block_t: int
    block_r: int
    block_k: int
    num_warps: int
    splits: int = 1
    num_stages: int = 1
    early: bool = True
    source: str = ""


@cache
def load_table(name: str) -> dict[str, Any]:
    """The committed table of a GPU; the default GPU's where it has none."""
    path = TABLES / f"{name}.json"
    if not path.exists():
        path = TABLES / f"{DEFAULT_TABLE}.json"
    return json.loads(path.read_text())


def skinny_config(target: Target, *, n: int, k: int, groups: int, tokens: int, itemsize: int) -> SkinnyConfig:
    """Configuration of one launch; any shape has one.

    Args:
        n: features of the output.
        groups: 2 when the weight holds gate and up rows, else 1.
    """
    table = load_table(target.table)
    # The bucket of tokens first: the tuned one that holds them all, or the largest.
    entries = [e for e in table[SECTION] if e["itemsize"] == itemsize]
    buckets = sorted({e["tokens"] for e in entries})
    bucket = next((b for b in buckets if b >= tokens), buckets[-1])
    wanted = {"rows": n * groups, "k": k}

    def distance(entry: dict) -> float:
        return sum(abs(math.log2(entry[key] / wanted[key])) for key in wanted) + (entry["groups"] != groups)

    entry = min((e for e in entries if e["tokens"] == bucket), key=distance)
    how = "exact" if table["gpu"] == target.name and distance(entry) == 0 else "nearest"
    shape = " ".join(f"{key}={entry[key]}" for key in ("rows", "k", "tokens"))
    config = SkinnyConfig(**entry["config"], source=f"{table['gpu']} {SECTION} {shape} ({how})")
    if how == "nearest" and config.kernel == "tile":
        config = replace(config, splits=scaled_splits(config, entry["rows"], target, n * groups, k))
    if k * itemsize % 16:  # narrow loads, which asynchronous copies cannot do: small tiles in registers
        config = replace(config, block_k=min(config.block_k, 32 if config.block_t > 1 else 512), num_stages=1)
    return _fit(config, target, itemsize)


def scaled_splits(config: Any, tuned_rows: int, target: Target, rows: int, k: int) -> int:
    """As many programs as the tuned launch had, scaled to this GPU, each with at least two tiles of K."""
    tuned = math.ceil(tuned_rows / config.block_r) * config.splits * target.num_sms / SM90.num_sms
    splits = round(tuned / math.ceil(rows / config.block_r))
    return max(1, min(splits, math.ceil(k / config.block_k) // 2, MAX_SPLITS))


def _fit(config: SkinnyConfig, target: Target, itemsize: int) -> SkinnyConfig:
    """Fewer stages, then narrower tiles, until the weights of every stage and the inputs fit in shared memory."""
    if target.backend == "hip":
        config = replace(config, num_stages=min(config.num_stages, 2))

    def need(c: SkinnyConfig) -> int:  # inputs and the norm's weight are staged too, or else inputs once
        inputs = c.block_t if c.early or c.num_stages == 1 else 2 * c.block_t * c.num_stages
        return (c.num_stages * c.block_r + inputs) * c.block_k * itemsize

    while need(config) > target.smem_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while need(config) > target.smem_bytes and config.block_k > 32:
        config = replace(config, block_k=config.block_k // 2)
    return config
