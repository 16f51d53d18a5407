"""How experts whose weights are codes run: a table per GPU; what was not measured follows from 16-bit weights.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from fusecomp.lowerings.experts.heuristics import (
    TABLES,
    DigitTiles,
    ExpertsConfig,
    Tiles,
    distance,
    experts_config,
    fit_registers,
    fit_tiles,
)
from fusecomp.lowerings.linear.large_heuristics import MAX_BLOCK_K
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.quant.heuristics import LEAST_COLUMNS, fitting_columns
from fusecomp.ops.experts import CodesShape
from fusecomp.ops.quant import FP8, NF4, WeightSpec

Choice = TypeVar("Choice")
DEQUANTIZE = "dequantize"  # method: the weights are dequantized, then 16-bit experts run
DEFAULT_CODES_TABLE = "nvidia_h100_80gb_hbm3"
KEYS = ("codes", "experts", "top_k", "hidden", "width", "tokens")
WIDE = Tiles(128, 64, 8, 4)  # with many tokens
STAGES = 8
CONVERTED = 64  # weights of a step in one thread
MAX_DIGITS = 4096  # numbers of hidden activations of which a program of the up projection makes digits at once
FAR = 8.0  # as `distance` has it: beyond, what was measured of 16-bit weights is the better guess


def refusal(up: WeightSpec, down: WeightSpec, transposed: bool) -> str | None:
    """Why no kernel reads experts of these layouts, or None."""
    if transposed:
        return "two codes of a byte, or codes that share a scale, are neighbours along the outputs"
    for name, spec in (("up", up), ("down", down)):
        if spec.cols % LEAST_COLUMNS:
            return f"of the {name} weights, {columns_reason(spec.cols)}"
    return None


def columns_reason(cols: int) -> str:
    """Why no kernel reads codes of which this many columns share a scale."""
    return f"a scale serves {cols} columns, no multiple of {LEAST_COLUMNS}"


@cache
def load_codes_table(name: str) -> dict[str, Any]:
    """The committed table of a GPU; the default GPU's where it has none."""
    path = TABLES / f"{name}_codes.json"
    if not path.exists():
        path = TABLES / f"{DEFAULT_CODES_TABLE}_codes.json"
    return json.loads(path.read_text())


@cache
def quant_experts_config(target: Target, shape: CodesShape, tokens: int) -> ExpertsConfig:
    """Configuration of one call; any shape that `refusal` accepts has one. Its method may be `DEQUANTIZE`."""
    wanted = {
        "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden, "width": shape.width, "tokens": tokens,
    }  # fmt: skip
    table = load_codes_table(target.table)
    if entry := _nearest(table["entries"], shape, wanted):
        config = _measured(entry, table, target, shape, wanted)
    else:
        config = _derived(experts_config(target, itemsize=shape.itemsize, **wanted), shape)
    if config.method == DEQUANTIZE:
        return config
    return _fit(config, target, shape)


@cache
def routed_codes_config(target: Target, shape: CodesShape, tokens: int) -> ExpertsConfig | None:
    """Configuration of `routed.run_chosen` for experts of codes; None where router and experts are launched apart.

    Only where the GPU's own table has an entry of the same layout and a shape not far from this one; every program
    chooses for itself, so it serves no more tokens than it was measured with.
    """
    table = load_codes_table(target.table)
    if table["gpu"] != target.name or shape.kind == NF4:  # whose comparisons leave the choice too few registers
        return None
    wanted = {
        "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden, "width": shape.width, "tokens": tokens,
    }  # fmt: skip
    same = [entry for entry in table.get("routed", ()) if entry["codes"] == shape.codes]
    entry = _nearest(same, shape, wanted)
    if entry is None or entry["config"]["method"] != "vector":
        return None
    return _fit(_measured(entry, table, target, shape, wanted), target, shape)


def _nearest(entries: list[dict[str, Any]], shape: CodesShape, wanted: dict[str, int]) -> dict[str, Any] | None:
    """The nearest measured entry of codes as wide, those of the same layout before others; None if all are far."""

    def far(entry: dict[str, Any]) -> float:
        return distance(entry, wanted) + (entry["codes"] != shape.codes)

    # As with numbers, a vector launch serves no more tokens than it was measured with.
    near = [
        entry
        for entry in entries
        if shape.itemsize == 2
        and ("4" in entry["codes"]) == (shape.bits == 4)
        and (entry["config"]["method"] != "vector" or entry["tokens"] >= wanted["tokens"])
        and far(entry) <= FAR
    ]
    return min(near, key=far, default=None)


def _measured(
    entry: dict[str, Any], table: dict[str, Any], target: Target, shape: CodesShape, wanted: dict[str, int]
) -> ExpertsConfig:
    """The configuration of an entry, and where it comes from."""
    gpu = entry.get("gpu", table["gpu"])
    exact = gpu == target.name and all(entry[key] == value for key, value in wanted.items())
    exact = exact and entry["codes"] == shape.codes
    found = " ".join(f"{key}={entry[key]}" for key in KEYS[1:])
    source = f"{gpu} experts of {entry['codes']} {found} ({'exact' if exact else 'nearest'})"
    return replace(ExpertsConfig.from_entry(entry["config"]), source=source)


def _derived(config: ExpertsConfig, shape: CodesShape) -> ExpertsConfig:
    """From that of numbers: as many bytes in flight, and weights as the operand that comes from registers."""
    source = f"as 16-bit experts, not measured: {config.source}"
    if shape.itemsize == 4:  # products without matrix units, whose operands are in registers: small tiles as they are
        if config.method == "vector":
            return replace(config, source=source)
        up, down = (replace(t, block_d=LEAST_COLUMNS) for t in (config.up, config.down))
        return replace(config, up=up, down=down, source=source)
    if config.method == "vector":
        up, down = (replace(t, block_d=min(t.block_d * 16 // shape.bits, 4096)) for t in (config.up, config.down))
        return replace(config, up=up, down=down, source=source)
    if not config.swap:
        return replace(config, up=WIDE, down=WIDE, swap=True, source=source)
    up, down = (_narrow(t, shape) for t in (config.up, config.down))
    return replace(config, up=up, down=down, source=source)


def _narrow(t: Tiles, shape: CodesShape) -> Tiles:
    """A thread's weights are converted in its registers, so they are not many."""
    rows = min(t.block_n, 64) if shape.kind == NF4 else t.block_n  # many comparisons
    warps = max(t.num_warps, min(8, rows * t.block_d // (CONVERTED * 32)))
    return replace(
        t, block_n=rows, num_warps=warps, num_stages=min(t.num_stages * 16 // shape.bits, STAGES), use_tma=False
    )


def _fit(config: ExpertsConfig, target: Target, shape: CodesShape) -> ExpertsConfig:
    """The same within a target's registers and shared memory; columns of a tile keep to those of a scale."""
    config = replace(config, digits=fitted_digits(config, target, shape))
    tiles = []
    for tile, cols, columns in ((config.up, shape.up_cols, shape.hidden), (config.down, shape.down_cols, shape.width)):
        if config.method == "vector":
            tiles.append(replace(tile, block_d=max(32, min(tile.block_d, next_power_of_2(columns)))))
        else:
            fitting = replace(tile, block_d=fitting_columns(tile.block_d, cols))
            tiles.append(fit_tiles(fitting, config.block_t, target, shape.itemsize, weight_bits=shape.bits))
    if config.method == "vector":
        lanes = 2 if shape.kind == NF4 else 1  # its values are chosen by many comparisons
        tiles = [fit_registers(tiles[0], lanes), fit_registers(tiles[1], lanes * next_power_of_2(shape.top_k))]
    return replace(config, up=tiles[0], down=tiles[1])


def fitted_digits(config: ExpertsConfig, target: Target, shape: CodesShape) -> DigitTiles | None:
    """Tiles of digits, whose kernels are for GPUs that multiply fp8 and read by TMA, and have no other scales.

    A program makes digits of a whole row: of hidden states while it norms them, of hidden activations by the way.
    """
    found, whole = config.digits, not (shape.up_cols or shape.down_cols)
    if found is None or not (target.has_tma and shape.kind == FP8 and whole):
        return None
    if shape.hidden > MAX_BLOCK_K or shape.width > MAX_DIGITS or not (found.up.use_tma and found.down.use_tma):
        return None
    up, down = (fit_tiles(t, config.block_t, target, shape.itemsize, weight_bits=8) for t in (found.up, found.down))
    if shape.hidden % up.block_d or shape.width % down.block_d:
        return None
    return DigitTiles(up, down)


def explain_choices(target: Target, shape: CodesShape, token_counts: Sequence[int]) -> list[str]:
    """One line for each run of token counts that one choice serves."""
    for cols in (shape.up_cols, shape.down_cols):
        if cols % LEAST_COLUMNS:
            return [f"any tokens: dequantized, then experts: {columns_reason(cols)}"]
    counts = sorted(set(token_counts) - {0})
    lines = []
    for choice, span in _spans([(tokens, quant_experts_config(target, shape, tokens)) for tokens in counts]):
        name = "dequantize, then experts" if choice.method == DEQUANTIZE else f"{choice.method} experts of codes"
        lines.append(f"{span} tokens: {name}, from {choice.source}")
    routed = [(t, config) for t in counts if (config := routed_codes_config(target, shape, t)) is not None]
    for choice, span in _spans(routed):
        name = "three launches that choose inside, where the router is part of them"
        lines.append(f"{span} tokens: {name}, from {choice.source}")
    lists = [t for t in counts if _lists(target, shape, t)]
    for listed, span in _spans([(t, t in lists) for t in counts]):
        if listed:
            lines.append(f"{span} tokens: by lists of the router, where it is part of them")
    digits = [(t, t in lists and quant_experts_config(target, shape, t).digits is not None) for t in counts]
    for by_digits, span in _spans(digits):
        if by_digits:
            lines.append(f"{span} tokens: then inputs of bf16 are fp8 digits, and codes are multiplied as they are")
    return lines


def _lists(target: Target, shape: CodesShape, tokens: int) -> bool:
    """Whether a router in front of them lists each expert's rows."""
    from fusecomp.lowerings.experts.listed_launch import fits, reads
    from fusecomp.lowerings.route.router import MAX_TOKENS

    whole = reads(shape.bits, shape.up_cols) and reads(shape.bits, shape.down_cols)
    served = whole and 1 < tokens <= MAX_TOKENS
    return served and fits(quant_experts_config(target, shape, tokens), tokens * shape.top_k)


def _spans(named: Sequence[tuple[int, Choice]]) -> Iterator[tuple[Choice, str]]:
    """Each choice and the run of token counts that it serves: "8 to 16"."""
    for choice, run in itertools.groupby(named, key=lambda pair: pair[1]):
        counts = [tokens for tokens, _ in run]
        yield choice, str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
