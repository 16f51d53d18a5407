"""Launch configurations of quantized linears: pure functions of shapes and of a `Target`.

No shape was measured yet: what is here follows the tuned tables of 16-bit weights, with tiles of as many bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.ops.quant import INT
from fusecomp.ops.quant_linear import QuantShape

VECTOR, TILE, DEQUANTIZE = "vector", "tile", "dequantize"
SKINNY_LIMIT = 32  # tokens up to which the norm is computed inside
TILE_LIMIT = 512  # tokens from which a product outweighs writing the dequantized weight
MAX_SPLITS = 16
LEAST_COLUMNS = 16  # a scale must serve a multiple of these: the matrix units' depth


@dataclass(frozen=True)
class QuantConfig:
    """Configuration of one launch.

    Attributes:
        kernel: "vector" for one token, "tile" for more, "dequantize" for a 16-bit weight and `linear`'s own choice.
        block_t: tokens of a program.
        block_r: rows of a weight tile, over all groups.
        block_k: columns of a weight tile.
        splits: tile: programs that share the same features, each with its part of K.
    """

    kernel: str
    block_t: int = 1
    block_r: int = 4
    block_k: int = 1024
    num_warps: int = 4
    num_stages: int = 1
    splits: int = 1
    source: str = "no table"


@cache
def quant_config(target: Target, shape: QuantShape, tokens: int) -> QuantConfig:
    """Configuration for a shape that `reason` accepts."""
    if tokens == 1:
        # One 16-byte load of codes a thread; a table of values and fp32 inputs take registers, so half of one.
        block_k = 2048 if (shape.kind, shape.bits) == (INT, 4) else 1024
        block_k = block_k // 2 if shape.dtype == "float32" else block_k
        return QuantConfig(VECTOR, 1, 2 * shape.groups, max(min(block_k, next_power_of_2(shape.k)), 32), 4)
    if tokens > TILE_LIMIT:
        return QuantConfig(DEQUANTIZE)
    block_t = next_power_of_2(min(128, max(8, tokens)))
    wide = tokens > 64
    block_r, block_k = (128, 64) if tokens > SKINNY_LIMIT else (64, 128)
    if shape.dtype == "float32":  # its products are computed without matrix units, in registers
        block_t, block_r, block_k, wide = min(block_t, 16), 32, 32, False
    block_k = fitting_columns(block_k, shape.cols)
    blocks = math.ceil(shape.n * shape.groups / block_r) * math.ceil(tokens / block_t)
    splits = round(2 * target.num_sms / blocks)
    splits = max(1, min(splits, math.ceil(shape.k / block_k) // 4, MAX_SPLITS))
    stages = 2 if target.backend == "hip" else 3 if wide else 4
    return QuantConfig(TILE, block_t, block_r, block_k, 8 if wide else 4, stages, splits)


def fitting_columns(block_k: int, cols: int) -> int:
    """The widest tile up to block_k that divides, or is divided by, the columns of a scale."""
    while cols and cols % block_k and block_k % cols:
        block_k //= 2
    return block_k


def unit(shape: QuantShape) -> int:
    """Columns whose products are summed before they are scaled: those of a 16-byte load, if they share a scale."""
    wanted = 32 if shape.bits == 4 else 16
    return wanted if shape.cols % wanted == 0 else LEAST_COLUMNS


def reason(shape: QuantShape) -> str | None:
    """Why no kernel reads weights of this layout, or None."""
    if shape.cols % LEAST_COLUMNS:
        return f"a scale serves {shape.cols} columns, no multiple of {LEAST_COLUMNS}"
    return None
