"""How each product of codes by codes runs: a measured choice per shape and number of tokens, the nearest otherwise.

Everything here is a pure function of shapes and of a `Target`, so a choice made while a CUDA graph is captured holds
for every replay. Legend: T tokens, N output features of one group, K input features, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.quant.tables import entries_of
from fusecomp.ops.quant import FP8, INT

KEY = ("kind", "block", "groups", "n", "k", "epilogue", "tokens")  # of a table's entries
TILE, PERSISTENT, LIBRARY = "tile", "persistent", "library"
KEPT_TOKENS = 256  # whose results stay in the L2; the tables have launches of so many, and more take others
# Columns that the matrix units of compute capability 9.0 may sum alone: their error over 14,336, with the rounding of
# the result to bf16, is 1.2 times that of the product of dequantized bf16 operands.
LONGEST_SUM = 14336
TILE_TOKENS = 256  # up to which, where nothing was measured, weights are on the wide side
MAX_SPLITS = 16


@dataclass(frozen=True)
class ScaledShape:
    """What the choice depends on, besides the number of tokens.

    Attributes:
        n: output features of one group.
        k: input features.
        groups: accumulators.
        kind: of both codes, "fp8" or "int".
        block: columns that share a scale of either side, 0 if all do.
        epilogue: `Program.kind`.
        precise: sums of fp8 codes must be good enough for fp16.
    """

    n: int
    k: int
    groups: int
    kind: str
    block: int
    epilogue: str
    precise: bool = False


@dataclass(frozen=True)
class ScaledConfig:
    """One way to run a product: a library call with the epilogue as a kernel of its own, or one of our kernels.

    Attributes:
        method: "tile" (weights on the wide side, K split inside), "persistent" or "library".
        block_t, block_n, block_k: the tile: tokens, features per group, columns of K.
        swap: persistent: features on the row side of the MMA; one group only.
        splits: parts of K; of "persistent" summed by the epilogue's kernel.
        pieces, group_t, per_sm, use_tma: persistent: as `LargeConfig` has them.
        chunk: steps after which fp8 sums leave the matrix units; of "tile" 1; 0 for never.
        ahead: tile: weight tiles that the L2 is asked for before the wait.
        exact: library: its slower sums of fp8 codes, added up in fp32.
    """

    method: str = PERSISTENT
    block_t: int = 128
    block_n: int = 128
    block_k: int = 128
    swap: bool = False
    splits: int = 1
    pieces: int = 2
    group_t: int = 8
    num_warps: int = 8
    num_stages: int = 3
    per_sm: int = 1
    use_tma: bool = True
    chunk: int = 0
    ahead: int = 2
    exact: bool = False
    source: str = ""

    def constants(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as the tables keep them."""
        default = ScaledConfig()
        kept = [f.name for f in fields(self) if f.name != "source"]
        return {name: getattr(self, name) for name in kept if getattr(self, name) != getattr(default, name)}


def reason(target: Target, kind: str, weight: tuple[int, int], block: int) -> str | None:
    """Why no kernel on `target` multiplies these codes, or None.

    Args:
        weight: rows and columns that share a scale of the weight, 0 for all.
        block: columns that share a scale of a token, 0 for all.
    """
    if kind == FP8 and not (target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89):
        return f"{target.name} has no products of fp8 (e4m3fn)"
    for cols in (weight[1], block):
        if cols and (cols < 32 or cols & (cols - 1)):
            return f"a scale serves {cols} columns, no power of 2 from 32 on"
    return None


def entries(target: Target) -> list[dict[str, Any]]:
    """The committed entries for a GPU, none for one that the kernels were not tuned for."""
    return entries_of(target.table, "_scaled", "entries", KEY) if target.has_tma else []


@cache
def own_config(target: Target, shape: ScaledShape, tokens: int) -> ScaledConfig:
    """As `scaled_config`, without the library."""
    return _config(target, shape, tokens, library=False)


@cache
def scaled_config(target: Target, shape: ScaledShape, tokens: int) -> ScaledConfig:
    """How `target` runs a product that `reason` accepts."""
    return _config(target, shape, tokens, library=True)


def _config(target: Target, shape: ScaledShape, tokens: int, *, library: bool) -> ScaledConfig:
    alike = [e for e in entries(target) if bool(e["block"]) == bool(shape.block)]
    measured = [e for e in alike if e["kind"] == shape.kind]
    if not measured and shape.kind == INT:  # as many bytes and as fast, but for the library
        measured, library = alike, False
    if not measured or shape.precise:
        return _fit(_unmeasured(target, shape, tokens), target, shape)

    def distance(entry: dict[str, Any]) -> float:
        same = (entry["groups"] != shape.groups) * 64 + (entry["epilogue"] != shape.epilogue) * 32
        # The number of tokens decides the tile, n and k only how tiles fill the card. A tile for fewer tokens would
        # read the weight once more for the last of them.
        same += 4.0 * (entry["tokens"] < tokens)
        sizes = ((entry["tokens"], tokens, 4.0), (entry["n"] * entry["groups"], shape.n * shape.groups, 1.0))
        return same + sum(w * abs(math.log2(a / b)) for a, b, w in (*sizes, (entry["k"], shape.k, 1.0)))

    entry = min(measured, key=distance)
    same = entry["gpu"] == target.name and entry["kind"] == shape.kind
    how = "exact" if same and distance(entry) == 0 else "nearest"
    name = " ".join(f"{key}={entry[key]}" for key in ("n", "k", "groups", "epilogue", "tokens"))
    found = entry["config"] if library or "own" not in entry else entry["own"]
    config = ScaledConfig(**found, source=f"{entry['gpu']} {entry['kind']} {name} ({how})")
    if config.swap and shape.groups > 1:
        config = replace(config, swap=False)
    if how == "nearest":
        config = replace(config, splits=_splits(config, target, shape, tokens))
    return _fit(config, target, shape)


def _splits(config: ScaledConfig, target: Target, shape: ScaledShape, tokens: int) -> int:
    """Splits that another shape's configuration should use here."""
    if config.splits == 1:
        return 1
    tiles = math.ceil(tokens / config.block_t) * math.ceil(shape.n / config.block_n)
    room = target.num_sms * (2 if config.method == TILE else 1) // tiles
    return max(1, min(config.splits, room, shape.k // (2 * config.block_k), MAX_SPLITS))


def _unmeasured(target: Target, shape: ScaledShape, tokens: int) -> ScaledConfig:
    stages = 2 if target.backend == "hip" else 3
    if tokens <= TILE_TOKENS or shape.precise:  # whose persistent kernel would leave the matrix units too often
        block_t = next_power_of_2(min(64 if tokens <= TILE_TOKENS else 128, max(16, tokens)))
        blocks = math.ceil(shape.n * shape.groups / 128) * math.ceil(tokens / block_t)
        splits = max(1, min(round(2 * target.num_sms / blocks), shape.k // 512, MAX_SPLITS))
        return ScaledConfig(
            TILE, block_t, 128 // shape.groups, 128, splits=splits, num_warps=8 if block_t > 64 or shape.block else 4,
            num_stages=stages + 1, source="no table",
        )  # fmt: skip
    tma = target.has_tma
    return ScaledConfig(
        PERSISTENT, 128, 128 // shape.groups, 128 if tma else 64, num_stages=stages, use_tma=tma, source="no table"
    )


def _fit(config: ScaledConfig, target: Target, shape: ScaledShape) -> ScaledConfig:
    """Sums as long as they may be, tiles as narrow as a block, then more pieces and fewer stages until all fits."""
    whole = shape.kind == INT or shape.block or (shape.k <= LONGEST_SUM and not shape.precise)
    if config.method == LIBRARY:
        return config if whole else replace(config, exact=True)
    if shape.block:
        config = replace(config, block_k=min(config.block_k, shape.block))
    chunk = 1 if config.method == TILE else LONGEST_SUM // 2 // config.block_k
    config = replace(config, chunk=0 if whole else chunk)

    def need(c: ScaledConfig) -> int:
        stages = c.num_stages * (c.block_t + shape.groups * c.block_n) * c.block_k
        return stages + (0 if c.method == TILE else 4 * c.block_t * c.block_n // c.pieces) + 1024

    while config.method == PERSISTENT and need(config) > target.smem_bytes and config.pieces < 8:
        config = replace(config, pieces=2 * config.pieces)
    while need(config) > target.smem_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    return config
