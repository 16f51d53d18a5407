"""How the experts run: a table per GPU, the nearest entry otherwise.

Pure functions of shapes and of a `Target`, so a choice made while a CUDA graph is captured holds for every replay. An
entry with a time ("us") was measured; the others take the tiles of measured linears of like shapes.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2

TABLES = Path(__file__).parent / "tuned"
DEFAULT_TABLE = "nvidia_h200"
METHODS = ("vector", "grouped")
VECTOR_ELEMENTS = 64  # of weights, in one thread's registers


@dataclass(frozen=True)
class Tiles:
    """One of the two matmuls.

    Attributes:
        block_n: rows of a weight tile, gate and up counted apart.
        block_d: columns of a weight tile.
        num_stages: depth of the pipeline of copies to shared memory; the vector kernels have none.
        per_sm: programs per multiprocessor that take tiles in turn; 0 gives every tile a program.
        use_tma: weights are read by the tensor memory accelerator, where it can.
        tokens_tma: down: so are hidden rows, where launches are ordered.
        flat: with use_tma: the first loads of a program's next tile begin before this one is stored.
        pieces: of the features of a finished tile, stored one after the other: fewer take more shared memory.
    """

    block_n: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 1
    per_sm: int = 0
    use_tma: bool = False
    tokens_tma: bool = False
    flat: bool = False
    pieces: int = 1


@dataclass(frozen=True)
class DigitTiles:
    """Of the two matmuls by digits of their inputs: see `digits.py`."""

    up: Tiles
    down: Tiles


@dataclass(frozen=True)
class ExpertsConfig:
    """Configuration of the launches of one call.

    Attributes:
        method: "vector" (two launches, no routing) or "grouped" (routing and two matmuls).
        block_t: grouped: tokens of a tile.
        swap: grouped: weights on the wide side of the matrix units, for narrow tiles of tokens.
        group_t: grouped: tiles of tokens that share a weight tile before the next one.
        digits: of fp8 codes, where the kernels of `listed.py` run by digits; or None.
    """

    method: str
    up: Tiles
    down: Tiles
    block_t: int = 1
    swap: bool = False
    group_t: int = 1
    digits: DigitTiles | None = None
    source: str = field(default="", compare=False)

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> ExpertsConfig:
        up, down, digits = Tiles(**entry["up"]), Tiles(**entry["down"]), entry.get("digits")
        tiles = None if digits is None else DigitTiles(Tiles(**digits["up"]), Tiles(**digits["down"]))
        return cls(**{**entry, "up": up, "down": down, "digits": tiles})

    def to_entry(self) -> dict[str, Any]:
        """As the tables keep it."""
        return {key: value for key, value in asdict(self).items() if key != "source" and value is not None}


@cache
def load_table(name: str) -> dict[str, Any]:
    """The committed table of a GPU; the default GPU's where it has none."""
    path = TABLES / f"{name}.json"
    if not path.exists():
        path = TABLES / f"{DEFAULT_TABLE}.json"
    return json.loads(path.read_text())


@cache
def experts_config(
    target: Target,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    width: int,
    tokens: int,
    itemsize: int,
    transposed: bool = False,
) -> ExpertsConfig:
    """Configuration of one call; any shape has one.

    Args:
        hidden, width: C and F.
        transposed: weights are [E, in, out]; their rows are not contiguous, so "vector" does not read them.
    """
    if itemsize != 2:
        return _fit(_exact_products(experts, tokens * top_k, itemsize, transposed), target, itemsize, top_k)
    table = load_table(target.table)
    wanted = {"tokens": tokens, "experts": experts, "top_k": top_k, "hidden": hidden, "width": width}
    # A vector launch reads an expert once per row, so it serves no more tokens than it was measured with.
    vector = [e for e in table["entries"] if e["config"]["method"] == "vector" and e["tokens"] >= tokens]
    entries = [e for e in table["entries"] if e["config"]["method"] == "grouped"] + vector * (not transposed)

    config = _nearest(table, entries, wanted, target)
    if transposed:
        config = _transposed(config)
    return _fit(config, target, itemsize, top_k)


@cache
def invariant_experts_config(
    target: Target,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    width: int,
    tokens: int,
    itemsize: int,
    transposed: bool = False,
) -> ExpertsConfig:
    """Configuration of one call whose sums for a row are the same for any number of tokens.

    As in `linear/invariant.py`: weights on the wide side of the matrix units, one tile of them, no part of K apart;
    only the width of the tile of tokens follows their number.
    """
    source = "the same sums for any number of tokens"
    if itemsize != 2:
        tiles = Tiles(32, 32, 4, 2)
        return ExpertsConfig("grouped", tiles, tiles, 16, True, source=source)
    rows = tokens * top_k / experts
    block_t = 16 if rows <= 16 else 32 if rows <= 64 else 128
    tiles = Tiles(64, 128 if target.smem_bytes >= 128 * 1024 else 64, 4, 4)
    config = ExpertsConfig("grouped", tiles, tiles, block_t, True, 1 if block_t < 128 else 8, source=source)
    fitted = _fit(config, target, itemsize, top_k)
    assert fitted.up.block_d == fitted.down.block_d == tiles.block_d, "stages alone must make room"
    return fitted


def routed_config(
    target: Target, *, experts: int, top_k: int, hidden: int, width: int, tokens: int, itemsize: int
) -> ExpertsConfig | None:
    """Configuration of `routed.run_chosen`; None where router and experts are launched apart.

    Every program chooses for itself, so it serves no more tokens than it was measured with.
    """
    sizes = {"experts": experts, "top_k": top_k, "hidden": hidden, "width": width, "tokens": tokens}
    table = load_table(target.table)
    entries = [e for e in table["routed"] if e["tokens"] >= tokens]
    if itemsize != 2 or not entries or experts_config(target, itemsize=itemsize, **sizes).method != "vector":
        return None
    config = _nearest(table, entries, sizes, target)
    up, down = _fit_rows(config.up, next_power_of_2(hidden)), fit_registers(config.down, next_power_of_2(top_k))
    return replace(config, up=up, down=down)


def _nearest(
    table: dict[str, Any], entries: list[dict[str, Any]], wanted: dict[str, int], target: Target
) -> ExpertsConfig:
    """The configuration of the entry that is most like the shape wanted."""
    entry = min(entries, key=lambda entry: distance(entry, wanted))
    exact = table["gpu"] == target.name and all(entry[key] == wanted[key] for key in wanted)
    shape = " ".join(f"{key}={entry[key]}" for key in ("tokens", "experts", "top_k", "hidden", "width"))
    how = ("exact" if exact else "nearest") + ("" if "us" in entry else ", not measured")
    source = f"{table['gpu']} experts {shape} ({how})"
    return replace(ExpertsConfig.from_entry(entry["config"]), source=source)


def distance(entry: dict[str, Any], wanted: dict[str, int]) -> float:
    """How far an entry's shape is from another."""
    # Rows per expert decide the tile; whether experts fill the card comes second.
    rows = abs(math.log2(_rows_per_expert(entry) / _rows_per_expert(wanted)))
    sizes = sum(abs(math.log2(entry[key] / wanted[key])) for key in ("experts", "hidden", "width"))
    return 4.0 * rows + sizes + 16.0 * ((entry["tokens"] == 1) != (wanted["tokens"] == 1))


def _transposed(config: ExpertsConfig) -> ExpertsConfig:
    """The same for weights that TMA does not read, and whose copies end in matrix instructions of 16 tokens or more."""
    up, down = (
        replace(t, num_stages=min(t.num_stages, 3 if t.use_tma else 6), use_tma=False, tokens_tma=False, flat=False)
        for t in (config.up, config.down)
    )
    return replace(config, block_t=max(16, config.block_t), up=up, down=down)


def _rows_per_expert(shape: dict[str, Any]) -> float:
    return shape["tokens"] * shape["top_k"] / shape["experts"]


def _exact_products(experts: int, rows: int, itemsize: int, transposed: bool) -> ExpertsConfig:
    """fp32: products without matrix units, whose operands are in registers, so tiles are small."""
    source = f"no table for {itemsize} bytes"
    if rows <= 8 and not transposed:
        return ExpertsConfig("vector", Tiles(8, 512), Tiles(2, 256), source=source)
    block_t = 16 if rows <= 16 * experts else 32
    tiles = Tiles(32, 32, 4, 2)
    return ExpertsConfig("grouped", tiles, tiles, block_t, source=source)


def _fit(config: ExpertsConfig, target: Target, itemsize: int, top_k: int) -> ExpertsConfig:
    """The same within a target's registers and shared memory, and without TMA where there is none."""
    if config.method == "vector":
        return replace(config, down=fit_registers(config.down, next_power_of_2(top_k)))
    return replace(
        config,
        up=fit_tiles(config.up, config.block_t, target, itemsize),
        down=fit_tiles(config.down, config.block_t, target, itemsize),
    )


def fit_registers(tiles: Tiles, lanes: int) -> Tiles:
    """Narrower and lower tiles until a thread holds at most `VECTOR_ELEMENTS` of `lanes` experts' tiles."""

    def crowded(t: Tiles) -> bool:
        return lanes * t.block_n * t.block_d > VECTOR_ELEMENTS * 32 * t.num_warps

    while crowded(tiles) and tiles.block_d > 128:
        tiles = replace(tiles, block_d=tiles.block_d // 2)
    while crowded(tiles) and tiles.block_n > 1:
        tiles = replace(tiles, block_n=tiles.block_n // 2)
    return tiles


def _fit_rows(tiles: Tiles, columns: int) -> Tiles:
    """More warps, then fewer rows, until a thread holds at most `VECTOR_ELEMENTS` * 2 of whole rows of a weight."""
    while tiles.block_n * columns > 2 * VECTOR_ELEMENTS * 32 * tiles.num_warps:
        if tiles.num_warps < 8:
            tiles = replace(tiles, num_warps=2 * tiles.num_warps)
        else:
            tiles = replace(tiles, block_n=tiles.block_n // 2)
    return tiles


def fit_tiles(tiles: Tiles, block_t: int, target: Target, itemsize: int, *, weight_bits: int = 0) -> Tiles:
    """Fewer stages, then narrower tiles, until stages, or else a finished tile, fit.

    Args:
        weight_bits: of a weight, where it is not as wide as an activation.
    """
    if target.backend == "hip":
        tiles = replace(tiles, num_stages=min(tiles.num_stages, 2))
    if not target.has_tma:
        tiles = replace(tiles, use_tma=False, tokens_tma=False, flat=False)

    def need(t: Tiles) -> int:
        weight = t.block_n * (weight_bits or 8 * itemsize)
        finished = t.block_n * block_t * itemsize // t.pieces if t.flat else 0  # beside stages of the next tile
        return t.num_stages * (weight + block_t * 8 * itemsize) * t.block_d // 8 + finished + 1024

    while need(tiles) > target.smem_bytes and tiles.num_stages > 2:
        tiles = replace(tiles, num_stages=tiles.num_stages - 1)
    while need(tiles) > target.smem_bytes and tiles.block_d > 32:
        tiles = replace(tiles, block_d=tiles.block_d // 2)
    return tiles
