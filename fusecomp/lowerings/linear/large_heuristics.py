"""How each large-M matmul of `linear` runs: a measured choice per shape, the nearest entry otherwise.

Everything here is a pure function of shapes and of a `Target`, so a choice made while a CUDA graph is captured holds
for every replay. An entry with a time ("us") was measured alone on the table's GPU; one with "step_us" by whole decode
steps of a model, beside what it replaced, on its own "gpu" (benchmarks/step_tune.py); the others' notes say where.
Legend: T tokens, N output features of one group, K input features, G groups.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2

TABLES = Path(__file__).parent / "tuned"
DEFAULT_TABLE = "nvidia_h200"
KINDS = ("identity", "residual", "bias", "other")
METHODS = ("persistent", "cublas", "cublas_addmm")
KEPT_TOKENS = 362  # whose results stay in the L2: up to where the tables' launches of 256 tokens are the nearest
MAX_BLOCK_K = 16384  # columns of a norm's row held at once


@dataclass(frozen=True)
class LargeConfig:
    """One way to run a large-M matmul: a library call, or the persistent kernel with these constants.

    Attributes:
        method: "persistent"; "cublas", with the epilogue as a kernel of its own; "cublas_addmm", with the residual or
            the bias as its third operand.
        block_t, block_n, block_k: the tile: tokens, features per group, columns of K.
        swap: features on the row side of the MMA; one group only.
        splits: parts of K, summed by the epilogue's kernel.
        pieces: parts in which a tile is finished.
        group_t: tiles of tokens that share a weight tile before the next one.
        per_sm: programs per multiprocessor.
    """

    method: str = "persistent"
    block_t: int = 128
    block_n: int = 128
    block_k: int = 64
    swap: bool = False
    splits: int = 1
    pieces: int = 2
    group_t: int = 8
    num_warps: int = 8
    num_stages: int = 3
    per_sm: int = 1
    use_tma: bool = True
    source: str = ""

    def constants(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as the tables keep them."""
        default = LargeConfig()
        kept = [f.name for f in fields(self) if f.name != "source"]
        return {name: getattr(self, name) for name in kept if getattr(self, name) != getattr(default, name)}


# Where nothing was measured: no TMA, products of one warp.
PLAIN = LargeConfig(block_t=128, block_n=128, block_k=32, num_stages=3, pieces=1, use_tma=False)


@cache
def load_table(name: str) -> dict[str, Any]:
    """The committed table of a GPU; the default GPU's where it has none."""
    path = TABLES / f"{name}_large.json"
    if not path.exists():
        path = TABLES / f"{DEFAULT_TABLE}_large.json"
    return json.loads(path.read_text())


@cache
def large_config(target: Target, *, n: int, k: int, groups: int, tokens: int, itemsize: int, kind: str) -> LargeConfig:
    """How `target` runs x [tokens, k] @ w [groups * n, k]^T with an epilogue of this kind.

    Args:
        kind: "identity", "residual" (a full [T, N] operand is added), "bias" ([N] is added) or "other".

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"epilogue kind {kind!r} is none of {', '.join(KINDS)}")
    if itemsize != 2 or not target.has_tma:
        return _without_table(target, n=n, k=k, groups=groups, itemsize=itemsize, kind=kind)
    wanted = {"n": n * groups, "k": k, "tokens": tokens}
    table = load_table(target.table)

    def distance(entry: dict[str, Any]) -> float:
        same = (entry["groups"] != groups) * 64 + (entry["kind"] != kind) * 32
        # The number of tokens decides the tile, n and k only how tiles fill the card.
        weight = {"tokens": 4.0, "n": 1.0, "k": 1.0}
        found = {"n": entry["n"] * entry["groups"], "k": entry["k"], "tokens": entry["tokens"]}
        return same + sum(w * abs(math.log2(found[key] / wanted[key])) for key, w in weight.items())

    entry = min(table["entries"], key=distance)
    how = "exact" if table["gpu"] == target.name and distance(entry) == 0 else "nearest"
    shape = " ".join(f"{key}={entry[key]}" for key in ("n", "k", "groups", "kind", "tokens"))
    measured = "us" in entry or "step_us" in entry
    source = f"{entry.get('gpu', table['gpu'])} large {shape} ({how}{'' if measured else ', not measured'})"
    config = LargeConfig(**entry["config"], source=source)
    if config.method == "cublas_addmm" and (groups > 1 or kind not in ("residual", "bias")):
        config = replace(config, method="cublas")
    if how == "nearest":
        config = replace(config, splits=_fitting_splits(config, n=n, k=k, tokens=tokens, num_sms=target.num_sms))
    return _fit(config, target, groups, itemsize)


def _fitting_splits(config: LargeConfig, *, n: int, k: int, tokens: int, num_sms: int) -> int:
    """Splits that another shape's configuration should use here: no more than fill the card once."""
    if config.splits == 1:
        return 1
    tiles = math.ceil(tokens / config.block_t) * math.ceil(n / config.block_n)
    return max(1, min(config.splits, num_sms // tiles, k // (4 * config.block_k)))


def _fit(config: LargeConfig, target: Target, groups: int, itemsize: int) -> LargeConfig:
    """More pieces, then fewer stages, until a tile in fp32 fits beside the stages: other epilogues need that much."""

    def need(c: LargeConfig) -> int:
        stages = c.num_stages * (c.block_t + groups * c.block_n) * c.block_k * itemsize
        return stages + 4 * c.block_t * c.block_n // c.pieces + 1024

    while need(config) > target.smem_bytes and config.pieces < 8:
        config = replace(config, pieces=2 * config.pieces)
    while need(config) > target.smem_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _without_table(target: Target, *, n: int, k: int, groups: int, itemsize: int, kind: str) -> LargeConfig:
    """The library where there is one for the dtype: unmeasured, the safer choice."""
    method = "cublas_addmm" if groups == 1 and kind in ("residual", "bias") else "cublas"
    return replace(PLAIN, method=method, source=f"no table for {target.name}, {itemsize} bytes")


def tma_reads(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can address this matrix: 16-byte aligned base and rows."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0 and tensor.stride(-1) == 1


def norm_block(num_tokens: int, k: int) -> tuple[int, int, int]:
    """(rows per program, columns held at once, warps) of a norm: short latency for few tokens, then loads in flight."""
    block_k = min(next_power_of_2(k), MAX_BLOCK_K)
    return 1, block_k, max(1, min(16, block_k // (256 if num_tokens < 1024 else 512)))


def sum_block(num_tokens: int, n: int) -> tuple[int, int]:
    """(columns of a row, warps) of a program that sums splits and norms: twice a norm's threads for few tokens.

    16 warps instead of 8 for 2,048 columns bring the step of 64 rows of a 1B model from 1.078 to 1.070 ms (H200).
    """
    block_n = next_power_of_2(n)
    return block_n, max(1, min(16, block_n // (128 if num_tokens < 1024 else 512)))


def pointwise_block(n: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program of the standalone epilogue."""
    block_n = min(1024, next_power_of_2(n))
    return max(1, 256 // block_n), block_n, 4
