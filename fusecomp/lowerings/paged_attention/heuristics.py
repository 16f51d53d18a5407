"""Launch configurations of the attention kernels: a tuned table per GPU, the nearest entry otherwise.

Everything here is a pure function of shapes and of a `Target`; nothing reads device data, so a configuration chosen
while a CUDA graph is captured is right for every replay.

Legend: H query heads, G kv heads, D head dim (DP: padded to a power of two), B page size, SM multiprocessors.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tuned"
DEFAULT_TABLE = "nvidia_h200"
MAX_SPLITS = 128
# Registers of a thread that may hold the accumulators in decode, per item size. fp32 products, without matrix units,
# hold their operands in registers too.
ACCUMULATOR_REGISTERS = {2: 64, 4: 16}
MAX_WARPS = 16
APART_DIMS, APART_GROUP = (64, 128), 16  # head dims, and query heads of a kv head, that warps apart can do
MAX_CODES = 2048  # of K, and as many of V, that a warp converts in one tile
# Numbers of decodes that launches are chosen for: each up to the first, then these, then multiples of 64.
FEW_ROWS, ROWS = 16, (24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
CHOICES = 1024  # that are remembered: every layer of a step asks for the same one


@dataclass(frozen=True)
class Target:
    """What a launch depends on in a GPU."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # 80, 90, 100 or "gfx942"
    smem_bytes: int  # shared memory that one program may use
    num_sms: int

    @property
    def table(self) -> str:
        return self.name.lower().replace(" ", "_")

    @property
    def has_tma(self) -> bool:
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    @property
    def has_fp8(self) -> bool:
        """The GPU converts e4m3 codes itself."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 89

    @property
    def has_pdl(self) -> bool:
        """Programmatic dependent launch: a kernel may start before the one it follows has ended."""
        return self.has_tma


SM80 = Target("NVIDIA A100", "cuda", 80, 163 * 1024, 108)
SM90 = Target("NVIDIA H200", "cuda", 90, 227 * 1024, 132)
SM100 = Target("NVIDIA B200", "cuda", 100, 227 * 1024, 148)
GFX942 = Target("AMD Instinct MI300X", "hip", "gfx942", 64 * 1024, 304)
TARGETS = (SM80, SM90, SM100, GFX942)


@dataclass(frozen=True)
class DecodeConfig:
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int
    min_split: int  # keys below which a row is not split further
    read_ahead: bool = False  # where the rows' last keys are new, read the first tile before waiting for the step
    apart: int = 0  # keys of a warp of `decode_apart_kernel`, block_n / num_warps; 0: `decode_kernel`
    source: str = ""

    @property
    def ahead(self) -> bool:
        """Of `decode_apart_kernel`: a tile is loaded while the one before is multiplied."""
        return self.num_stages > 1

    def min_tiles(self) -> int:
        return max(1, self.min_split // self.block_n)


@dataclass(frozen=True)
class PrefillConfig:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool
    source: str = ""


def padded_dim(head_dim: int) -> int:
    """D as the kernels see it: a power of two, at least 16."""
    return max(16, next_power_of_2(head_dim))


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Launches use no `triton.cdiv`: called by Python it takes 2.5 us, a tenth of what they take."""
    return -(-a // b)


@cache
def load_table(name: str) -> dict[str, Any]:
    """The committed table of a GPU; the default GPU's where it has none."""
    path = TABLES / f"{name}.json"
    if not path.exists():
        path = TABLES / f"{DEFAULT_TABLE}.json"
    return json.loads(path.read_text())


def apart_refusal(target: Target, *, head_dim: int, itemsize: int, group: int, quantized: bool) -> str | None:
    """Why `decode_apart_kernel` cannot serve rows whose last keys are new, or None if it can."""
    if target.backend != "cuda" or int(target.arch) < 80:
        return "its loads are operands of NVIDIA's matrix units, of compute capability 8.0 and above"
    if head_dim not in APART_DIMS:
        return f"head dim {head_dim} is none of {APART_DIMS}"
    if itemsize != 2 or quantized:
        return "a cache that is not of 16 bits"
    if group > APART_GROUP:
        return f"{group} query heads per kv head, more than {APART_GROUP}"
    return None


def _nearest(
    target: Target, kind: str, wanted: dict[str, int], weight: dict[str, float], *, apart: bool = False
) -> tuple[dict, str]:
    """The entry with the smallest weighted distance in log2 of each key, and a sentence on how it was found.

    The weights put the dtype before the head dim before the rest: tiles must first of all fit. Entries of an FP8 cache
    say so by `kv_itemsize`, and serve no other; those whose warps are apart serve where `apart`, and, if they load a
    tile ahead, no more pairs than their own: programs fill the card, and others wait. One with a `group` serves the
    shape it was measured on alone, on Hopper cards, and may name another `gpu` than its table does.
    """

    def value(entry: dict, key: str) -> int:
        return entry["itemsize"] if key == "kv_itemsize" and key not in entry else entry[key]

    def distance(entry: dict) -> float:
        return sum(w * abs(math.log2(value(entry, key) / wanted[key])) for key, w in weight.items())

    def serves(entry: dict) -> bool:
        if "kv_itemsize" in entry and "kv_itemsize" not in weight:
            return False
        if entry["config"].get("apart"):
            ahead = DecodeConfig(**entry["config"]).ahead
            if not apart or (ahead and wanted["pairs"] > entry["pairs"]):
                return False
        alone = target.arch == SM90.arch and entry.get("group") == wanted.get("group") and distance(entry) == 0
        return "group" not in entry or alone

    table = load_table(target.table)
    entry = min(filter(serves, table[kind]), key=distance)
    gpu = entry.get("gpu", table["gpu"])
    shape = " ".join(f"{key}={value(entry, key)}" for key in weight)
    how = "exact" if gpu == target.name and distance(entry) == 0 else "nearest"
    return entry, f"{gpu} {kind} {shape} ({how})"


def query_block(group: int) -> int:
    """Rows of the query tile of a decode program: the query heads of a kv head, padded to what matrix units take."""
    return max(16, next_power_of_2(group))


def rows_of_choice(num_rows: int) -> int:
    """The rows that a launch of `num_rows` is chosen for: the next of few numbers, those of which graphs are made.

    So any number of rows wants a kernel that one of those wants, and what is met at the start of an engine serves all.
    """
    if num_rows > ROWS[-1]:
        return -(-num_rows // 64) * 64
    return num_rows if num_rows <= FEW_ROWS else ROWS[bisect_left(ROWS, num_rows)]


@lru_cache(CHOICES)
def decode_config(
    target: Target,
    *,
    head_dim: int,
    itemsize: int,
    num_kv_heads: int,
    page_size: int,
    num_rows: int,
    capacity: int,
    group: int = 1,
    quantized: bool = False,
    new_key: bool = False,
) -> DecodeConfig:
    """Configuration of one decode launch.

    Args:
        num_rows: rows of the launch, padding included; chosen for as many as `rows_of_choice` says.
        capacity: the most keys a row can have, in tokens: pages of the block table times B.
        group: query heads per kv head.
        quantized: the cache is FP8; `itemsize` is that of the queries.
        new_key: the launch norms, rotates and writes the rows' last keys too, in a cache of words of 32 bits.
    """
    pairs = rows_of_choice(num_rows) * num_kv_heads
    wanted = {"head_dim": padded_dim(head_dim), "itemsize": itemsize, "page": page_size, "pairs": pairs, "group": group}
    weight = {"itemsize": 8.0, "head_dim": 4.0, "page": 0.5, "pairs": 0.1}
    if quantized:
        wanted["kv_itemsize"], weight["kv_itemsize"] = 1, 2.0
    refusal = apart_refusal(target, head_dim=head_dim, itemsize=itemsize, group=group, quantized=quantized)
    entry, source = _nearest(target, "decode", wanted, weight, apart=new_key and refusal is None)
    config = DecodeConfig(**entry["config"], source=source)
    if quantized and "kv_itemsize" not in entry:
        config = _for_codes(config, padded_dim(head_dim), itemsize)
    # As many programs as the tuned launch had, scaled to this GPU, each with at least min_split keys.
    programs = config.num_splits * entry["pairs"] * target.num_sms / SM90.num_sms
    splits = min(programs / pairs, capacity / config.min_split, MAX_SPLITS)
    config = replace(config, num_splits=math.ceil(max(splits, 1)))
    if config.apart:
        return config
    # The table was tuned for up to 16 query heads per kv head; taller accumulators go to more warps.
    warps = query_block(group) * padded_dim(head_dim) // (32 * ACCUMULATOR_REGISTERS[itemsize])
    if query_block(group) > 16 and padded_dim(head_dim) > 128:  # the queries themselves fill as many registers again
        warps = max(warps, 8)
    config = replace(config, num_warps=max(config.num_warps, min(warps, MAX_WARPS)))
    if query_block(group) > 16:  # no registers are left to hold a tile
        config = replace(config, read_ahead=False)
    if itemsize == 4 and query_block(group) > 16:
        config = replace(config, block_n=min(config.block_n, 16))
    return _fit_decode(config, target, padded_dim(head_dim), itemsize, quantized=quantized)


@lru_cache(CHOICES)
def prefill_config(target: Target, *, head_dim: int, itemsize: int, max_keys: int) -> PrefillConfig:
    """Configuration of one prefill launch.

    Args:
        max_keys: the most keys a query sees: the longest sequence of the step, or the window if that is shorter.
    """
    wanted = {"head_dim": padded_dim(head_dim), "itemsize": itemsize, "keys": max_keys}
    entry, source = _nearest(target, "prefill", wanted, {"itemsize": 8.0, "head_dim": 4.0, "keys": 0.1})
    config = PrefillConfig(**entry["config"], source=source)
    config = replace(config, use_tma=config.use_tma and target.has_tma)
    return _fit_prefill(config, target, padded_dim(head_dim), itemsize)


def _for_codes(config: DecodeConfig, dp: int, itemsize: int) -> DecodeConfig:
    """A 16-bit cache's configuration for codes: twice the keys are as many bytes in flight, if registers hold them."""
    if itemsize != 2 or config.read_ahead or 2 * config.block_n * dp // config.num_warps > MAX_CODES:
        return config
    return replace(config, block_n=2 * config.block_n, min_split=max(config.min_split, 2 * config.block_n))


def _fit_decode(config: DecodeConfig, target: Target, dp: int, itemsize: int, *, quantized: bool) -> DecodeConfig:
    """Fewer stages, then smaller tiles, until K and V of every stage fit in shared memory."""

    def need(c: DecodeConfig) -> int:
        if quantized:  # codes of every stage, and one tile of K and V converted
            return 2 * c.block_n * dp * (c.num_stages + itemsize)
        return 2 * c.num_stages * c.block_n * dp * itemsize

    budget = target.smem_bytes - 8 * 1024  # queries and reductions
    while need(config) > budget and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while need(config) > budget and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    return config


def _fit_prefill(config: PrefillConfig, target: Target, dp: int, itemsize: int) -> PrefillConfig:
    """As `_fit_decode`, with the query tile, and with the smaller accumulators that other matrix units want."""

    def need(c: PrefillConfig) -> int:
        return (2 * c.num_stages * c.block_n + c.block_m) * dp * itemsize

    if not target.has_tma:  # no warpgroup products: accumulators and operands share the registers
        config = replace(config, block_n=min(config.block_n, 32))
    if target.backend == "hip":
        config = replace(config, num_stages=1)
    while need(config) > target.smem_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while need(config) > target.smem_bytes and config.block_n > 32:
        config = replace(config, block_n=config.block_n // 2)
    while need(config) > target.smem_bytes and config.block_m > 32:
        config = replace(config, block_m=config.block_m // 2)
    return config


def launches_early(num_rows: int, num_kv_heads: int) -> bool:
    """Whether a decode launch lets the next kernel start at its own start.

    A small one leaves most of the GPU to it. A large one would share its multiprocessors unevenly: the next kernel's
    programs take whatever places are free at that moment.
    """
    return rows_of_choice(num_rows) * num_kv_heads <= 64


def cache_write_block(num_tokens: int) -> int:
    """Tokens per program of the cache write: enough programs for a decode step, wide tiles for a prefill."""
    return max(1, min(32, next_power_of_2(num_tokens) // 64))


def rope_cache_block(num_tokens: int, head_dim: int) -> tuple[int, int]:
    """(tokens, heads) per program of the rope and cache write: wide tiles for a prefill, many programs below that.

    Measured on an H200, D = 128: (8, 4) and (8, 8) are best at 8192 tokens, (8, 2) at 512.
    """
    tokens = max(1, min(8, next_power_of_2(num_tokens) // 64, 1024 // padded_dim(head_dim)))
    return tokens, 8 if num_tokens > 4096 else 2
