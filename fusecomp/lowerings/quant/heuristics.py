"""Launch configurations of quantized linears: a tuned table per GPU, the nearest entry otherwise.

Pure functions of shapes and of a `Target`. Tables hold 16-bit activations on NVIDIA GPUs, with fp8 by rows (int8 takes
the same) and folded 4-bit integers whose scales serve 128 columns; other layouts have tiles of as many bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fusecomp.lowerings.linear.large_heuristics import MAX_BLOCK_K
from fusecomp.lowerings.linear.skinny_heuristics import scaled_splits
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.quant.tables import entries_of
from fusecomp.ops.quant import FP8, INT
from fusecomp.ops.quant_linear import QuantShape

KEY = ("kind", "bits", "zero", "rows", "k", "groups", "tokens")  # of a table's entries
VECTOR, WORD_VECTOR, TILE, DIGITS, DEQUANTIZE = "vector", "words", "tile", "digits", "dequantize"
FOLDED, FOLDED_WIDE, FOLDED_HELD, FOLDED_DIGITS = "folded", "folded wide", "folded held", "folded digits"
SKINNY_LIMIT = 32  # tokens up to which the norm is computed inside,
FOLDED_NORM_LIMIT = 8  # and those of folded codes: at 16, a launch of its own costs less
TILE_LIMIT = {4: 64, 8: 128}  # by bits: tokens beyond which the weight is dequantized before the product
FOLDED_LIMIT = 128  # the same of folded codes whose launches are tuned
HELD_ROWS, HELD_COLUMNS, HELD_TOKENS = 16, 256, 2  # "folded held": rows of a product, columns of a warp; most tokens
HELD_ASKED = 1024  # columns whose scales are 16 bytes, the least that the L2 is asked for
# Warps that a multiprocessor's registers have room for, of one token and of two; rows of a program.
HELD_WARPS, HELD_MOST_ROWS = (16, 12), 1024
DIGITS_ARCH = 90  # compute capability, times ten; compiled for 10.0, the kernel spills
# "digits": a scale serves a multiple of these columns; K is one, for TMA; rows of a group of a tile, at least.
DIGIT_COLUMNS, DIGIT_ALIGNED, DIGIT_ROWS = 128, 16, 64
DIGIT_TOKENS = 32  # "folded digits": of a program, over all groups
MAX_SPLITS = 16
OTHER_ZERO = 0.5  # how far an entry is for having zero points, or none, in doublings of a size
LEAST_COLUMNS = 16  # a scale must serve a multiple of these: the matrix units' depth


@dataclass(frozen=True)
class QuantConfig:
    """Configuration of one launch.

    Attributes:
        kernel: "vector" for one token, or "words" where it serves them; "tile" for more, or "digits" where it
            serves them; "folded" for folded codes, "folded held" for those of one or two tokens where it serves them,
            "folded wide" for those of many, or "folded digits" where it serves them; "dequantize"
            for a 16-bit weight and `linear`'s own choice.
        block_t: tokens of a program.
        block_r: rows of a weight tile, over all groups; folded held: rows of a program.
        block_k: columns of a weight tile.
        splits: tile, digits, folded: programs that share the same features, each with its part of K.
        sums: folded: codes are multiplied plus a bias, which sums of inputs take off.
        early: tile, folded, folded held: only codes go through the pipeline, which then begins before the wait for the
            last kernel.
        halves: tile: tokens are multiplied by a tile in two halves.
        parts: folded, folded held: warps of a program share its features, each with one of so many parts of K; 1: they
            share K.
        ahead: words, folded: tiles of which the L2 is asked for the codes before the wait, folded: a power of two;
            folded held: products, at most two for each warp.
        use_tma: folded wide: inputs are read by the tensor memory accelerator, where it can.
    """

    kernel: str
    block_t: int = 1
    block_r: int = 4
    block_k: int = 1024
    num_warps: int = 4
    num_stages: int = 1
    splits: int = 1
    early: bool = True
    sums: bool = False
    halves: bool = False
    parts: int = 1
    ahead: int = 0
    use_tma: bool = False
    source: str = "no table"


def entries(name: str) -> list[dict[str, Any]]:
    """The committed entries for a GPU."""
    return entries_of(name, "", "quant", KEY)


def held_entries(name: str) -> list[dict[str, Any]]:
    """Those of weights that launches which hold their inputs serve, of either kind; only some GPUs have any."""
    return entries_of(name, "", "held", KEY)


def digit_entries(name: str) -> list[dict[str, Any]]:
    """Those of as few tokens as digits serve, from two on, of whichever kernel was faster; only some GPUs have any."""
    return entries_of(name, "", "digits", KEY)


@cache
def quant_config(target: Target, shape: QuantShape, tokens: int, held: bool = True) -> QuantConfig:
    """Configuration for a shape that `reason` accepts; not one that holds its inputs unless `held`."""
    tuned = (shape.fold or shape.bits == 8) and shape.dtype != "float32" and target.backend == "cuda"
    if tokens > (FOLDED_LIMIT if tuned and shape.fold else TILE_LIMIT[shape.bits]):
        return QuantConfig(DEQUANTIZE)
    if tuned and held and serves_held(shape) and any(e["tokens"] >= tokens for e in held_entries(target.table)):
        found = _tuned(target, shape, tokens, held_entries(target.table))
        return held_config(found, target, shape, tokens) if found.kernel == FOLDED_HELD else _fit(found, target, shape)
    if serves_digits(target, shape) or serves_folded_digits(target, shape):
        table = digit_entries(target.table)
        most = max((e["tokens"] for e in table if e["bits"] == shape.bits), default=0)
        if 1 < tokens <= most:
            return _fit(_tuned(target, shape, tokens, table), target, shape)
    if tuned:
        return _fit(_tuned(target, shape, tokens, entries(target.table)), target, shape)
    if shape.fold:
        return _untuned_folded(target, shape, tokens)
    if tokens == 1:
        # One 16-byte load of codes a thread; a table of values and fp32 inputs take registers, so half of one.
        block_k = 1024 if shape.dtype != "float32" else 512
        return QuantConfig(VECTOR, 1, 2 * shape.groups, max(min(block_k, next_power_of_2(shape.k)), 32), 4)
    block_t = next_power_of_2(min(128, max(8, tokens)))
    block_r, block_k, wide = (128, 64, True) if tokens > SKINNY_LIMIT else (64, 128, False)
    if shape.dtype == "float32":  # its products are computed without matrix units, in registers
        block_t, block_r, block_k, wide = min(block_t, 16), 32, 32, False
    block_k = fitting_columns(block_k, shape.cols)
    blocks = math.ceil(shape.n * shape.groups / block_r) * math.ceil(tokens / block_t)
    splits = round(2 * target.num_sms / blocks)
    splits = max(1, min(splits, math.ceil(shape.k / block_k) // 4, MAX_SPLITS))
    stages = 2 if target.backend == "hip" else 3 if wide else 4
    return QuantConfig(TILE, block_t, block_r, block_k, 8 if wide else 4, stages, splits)


def _untuned_folded(target: Target, shape: QuantShape, tokens: int) -> QuantConfig:
    """For inputs of fp32, whose products are computed without matrix units, and other vendors' GPUs."""
    exact, block_t = shape.dtype == "float32", min(16, max(8, next_power_of_2(tokens)))
    rows, stages = (32, 1) if exact else (64, 2)
    blocks = math.ceil(shape.n * shape.groups / rows) * math.ceil(tokens / block_t)
    splits = max(1, min(round(2 * target.num_sms / blocks), shape.k // (4 * shape.fold) // 4, MAX_SPLITS))
    return QuantConfig(FOLDED, block_t, rows, 4 * shape.fold, 4, stages, splits, early=tokens <= SKINNY_LIMIT)


def _tuned(target: Target, shape: QuantShape, tokens: int, table: list[dict[str, Any]]) -> QuantConfig:
    """The nearest entry of a table: of the kind, of the least tokens that hold them all, then of the shape.

    Of entries as near those measured with zero points, or without, as the weight is.
    """
    kind = INT if shape.bits == 4 else FP8
    alike = [e for e in table if (e["kind"], e["bits"]) == (kind, shape.bits)]
    bucket = min(e["tokens"] for e in alike if e["tokens"] >= tokens)
    wanted = {"rows": shape.n * shape.groups, "k": shape.k}

    def distance(entry: dict) -> float:
        return sum(abs(math.log2(entry[key] / wanted[key])) for key in wanted) + (entry["groups"] != shape.groups)

    entry = min(
        (e for e in alike if e["tokens"] == bucket),
        key=lambda e: distance(e) + OTHER_ZERO * (e.get("zero", False) != shape.zero),
    )
    layout = (shape.kind, shape.rows, shape.cols, shape.zero)
    like = layout == ((INT, 1, 128) if shape.fold else (FP8, 1, 0)) + (entry.get("zero", False),)
    exact = like and entry["gpu"] == target.name and distance(entry) == 0 and ("us" in entry or "step_us" in entry)
    text = " ".join(f"{key}={entry[key]}" for key in ("rows", "k", "tokens"))
    source = f"{entry['gpu']} {kind}{'' if kind == FP8 else shape.bits} {text} ({'exact' if exact else 'nearest'})"
    config = QuantConfig(**entry["config"], source=source)
    if distance(entry) and config.kernel not in (VECTOR, WORD_VECTOR, FOLDED_HELD):
        step = replace(config, block_k=config.block_k * config.parts)
        config = replace(config, splits=scaled_splits(step, entry["rows"], target, wanted["rows"], shape.k))
    return config


def _fit(config: QuantConfig, target: Target, shape: QuantShape) -> QuantConfig:
    """Tiles that keep to the columns of a scale, and fewer stages until those of codes and inputs fit."""
    if config.kernel == WORD_VECTOR and not serves_words(shape):
        config = replace(config, kernel=VECTOR, block_r=8, block_k=1024, num_warps=4)
    if config.kernel in (VECTOR, WORD_VECTOR):
        ahead = config.ahead if target.has_tma else 0
        return replace(config, block_k=max(min(config.block_k, next_power_of_2(shape.k)), 32), ahead=ahead)
    folded = config.kernel == FOLDED
    if config.kernel == FOLDED_WIDE:
        return _fit_wide(config, target, shape)
    if config.kernel == FOLDED_DIGITS:
        return _fit_folded_digits(config, target, shape)
    if config.kernel == DIGITS:
        config = replace(config, block_r=max(config.block_r, DIGIT_ROWS * shape.groups))
    if config.halves and not serves_halves(shape):
        config = replace(config, halves=False)
    if (shape.kind, shape.bits, shape.dtype) == (INT, 8, "float16") and config.block_r > 64:  # ptxas spills some
        config = replace(config, block_k=min(config.block_k, 128))
    if config.parts > 1 and shape.fold == 32:  # scales of a warp's columns take registers
        blocks = math.ceil(shape.n * shape.groups / 64)
        splits = max(1, min(round(3 * target.num_sms / blocks), shape.k // (4 * shape.fold) // 2, MAX_SPLITS))
        config = QuantConfig(FOLDED, config.block_t, 64, splits=splits, num_stages=4, source=config.source)
    config = replace(config, block_k=4 * shape.fold if folded else fitting_columns(config.block_k, shape.cols))
    if not folded and shape.cols and shape.cols < config.block_k:  # scales of a tile's columns take registers
        config = replace(config, block_k=min(config.block_k, 128))

    if shape.cols and config.block_r * config.block_t > 32 * 32 * config.num_warps:  # sums of a tile and of all
        config = replace(config, num_warps=8)
    if shape.fold == 32 and config.sums:  # ptxas spills some
        config = replace(config, sums=False)
    if folded and shape.zero and not config.sums:  # of fewer rows than threads, zeros are loaded in place
        config = replace(config, num_warps=max(config.num_warps, config.block_r // 16))

    def need(c: QuantConfig) -> int:
        if c.kernel == DIGITS:  # codes, and digits once
            return (c.num_stages * c.block_r + 2 * c.block_t) * c.block_k
        # Bytes of a column and token: with the norm inside, the tile kernel stages its weight beside the inputs.
        if folded:  # a tile of codes less, and inputs once if threads load them or norm them
            inputs = 2 * c.block_t * (1 if c.early else c.num_stages - (c.parts > 1 and c.block_t > 8))
            return ((c.num_stages - 1) * c.block_r // 2 + inputs) * c.block_k * c.parts
        inputs = 4 if c.block_t <= SKINNY_LIMIT and not c.early else 2
        return c.num_stages * (c.block_r * shape.bits // 8 + c.block_t * inputs) * c.block_k

    while need(config) > target.smem_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _fit_wide(config: QuantConfig, target: Target, shape: QuantShape) -> QuantConfig:
    """Steps no longer than a folded tile, fewer stages until those of codes and inputs fit, no TMA where is none."""
    use_tma = config.use_tma and target.has_tma
    config = replace(config, block_k=min(config.block_k, 4 * shape.fold), use_tma=use_tma)
    stage = config.block_k * (config.block_r // 2 + 2 * config.block_t)
    most = max(1, (target.smem_bytes - 4096) // stage)
    return replace(config, num_stages=min(config.num_stages, most))


def _fit_folded_digits(config: QuantConfig, target: Target, shape: QuantShape) -> QuantConfig:
    """Products of 64 rows at least, of two groups no more tokens than registers hold, and as many stages as fit."""
    block_t, block_r = min(config.block_t, DIGIT_TOKENS // shape.groups), max(config.block_r, DIGIT_ROWS * shape.groups)
    config = replace(config, block_t=block_t, block_r=block_r, block_k=4 * shape.fold)
    stage = config.block_k * (config.block_r // 2 + 2 * config.block_t)
    most = max(2, (target.smem_bytes - 4096) // stage)
    return replace(config, num_stages=min(config.num_stages, most))


def held_registers(tokens: int) -> int:
    """Registers of a thread that leave `HELD_WARPS` room."""
    return 65536 // (32 * HELD_WARPS[tokens - 1]) // 8 * 8


def held_config(config: QuantConfig, target: Target, shape: QuantShape, tokens: int) -> QuantConfig:
    """No more warps than K has columns for, and as many rows a program as keep all programs on the GPU at once."""
    room = HELD_WARPS[tokens - 1]
    warps = min(config.parts, next_power_of_2(shape.k // HELD_COLUMNS), next_power_of_2(room + 1) // 2)
    splits = math.ceil(shape.k / (warps * HELD_COLUMNS))
    teams = max(1, target.num_sms * (room // warps) // splits)
    products = math.ceil(shape.n * shape.groups / HELD_ROWS / teams)
    return replace(
        config, block_r=min(products * HELD_ROWS, HELD_MOST_ROWS), block_k=HELD_COLUMNS, num_warps=warps, parts=warps,
        splits=splits, ahead=config.ahead if target.has_tma else 0,
    )  # fmt: skip


def fitting_columns(block_k: int, cols: int) -> int:
    """The widest tile up to block_k that divides, or is divided by, the columns of a scale."""
    while cols and cols % block_k and block_k % cols:
        block_k //= 2
    return block_k


def norm_limit(fold: int) -> int:
    """Tokens up to which the norm is computed inside the product's launch."""
    return FOLDED_NORM_LIMIT if fold else SKINNY_LIMIT


def norms_inside(config: QuantConfig, fold: int, tokens: int) -> bool:
    """Whether `run_quant` makes an RMSNorm: in the product's launch, or with the digits that it multiplies."""
    return config.kernel == FOLDED_DIGITS or tokens <= norm_limit(fold)


def unit(shape: QuantShape) -> int:
    """Columns whose products the vector kernel sums before they are scaled: those of a 16-byte load, if possible."""
    wanted = 32 if shape.bits == 4 else 16
    return wanted if shape.cols % wanted == 0 else LEAST_COLUMNS


def packs_scales(shape: QuantShape) -> bool:
    """Whether a word of two 16-bit scales of a row is that of a folded tile."""
    return shape.dtype != "float32" and shape.cols == 2 * shape.fold > 0


def serves_held(shape: QuantShape) -> bool:
    """Whether the kernel that holds its inputs takes a shape; scales and zero points must be bf16, too.

    fp16 failed on a GPU, which is not explained.
    """
    rows = shape.n * shape.groups
    whole = rows % HELD_ROWS == 0 and shape.k % HELD_COLUMNS == 0 and rows * shape.k // 2 < 1 << 31
    return shape.dtype == "bfloat16" and packs_scales(shape) and shape.rows == 1 and shape.cols == 128 and whole


def serves_words(shape: QuantShape) -> bool:
    """Whether the kernel of one token that reads words of four codes takes a shape."""
    return shape.bits == 8 and not shape.cols and not shape.zero and shape.dtype != "float32" and shape.k % 4 == 0


def serves_digits(target: Target, shape: QuantShape) -> bool:
    """Whether the kernel that cuts inputs to fp8 digits takes a shape."""
    alike = shape.kind == FP8 and shape.dtype == "bfloat16" and not shape.zero
    whole = shape.cols % DIGIT_COLUMNS == 0 and shape.k % DIGIT_ALIGNED == 0
    return target.arch == DIGITS_ARCH and alike and whole


def serves_folded_digits(target: Target, shape: QuantShape) -> bool:
    """Whether the kernel that multiplies digits by folded codes takes a shape."""
    whole = shape.fold > 0 and shape.cols % (2 * shape.fold) == 0
    return target.arch == DIGITS_ARCH and shape.dtype == "bfloat16" and whole and shape.k <= MAX_BLOCK_K


def serves_halves(shape: QuantShape) -> bool:
    """Whether the tile kernel multiplies 16 tokens of a shape in halves."""
    return shape.bits == 8 and not shape.cols and not shape.zero and shape.dtype != "float32"


def reads_words(config: QuantConfig, shape: QuantShape) -> bool:
    """Whether codes are read as words, so that a thread's codes become its part of the product's operand.

    That is fp8 whose products share scales along a tile, where the operand comes from registers.
    """
    shared = shape.cols == 0 or shape.cols % config.block_k == 0
    wide = config.block_t >= 16 and not config.halves
    return shared and shape.kind == FP8 and shape.k % 4 == 0 and config.block_k % 64 == 0 and wide


def reason(shape: QuantShape) -> str | None:
    """Why no kernel reads weights of this layout, or None."""
    if shape.cols % LEAST_COLUMNS:
        return f"a scale serves {shape.cols} columns, no multiple of {LEAST_COLUMNS}"
    return None
