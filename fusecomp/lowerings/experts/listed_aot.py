"""Specializations of the kernels that read lists of rows, for ahead-of-time compilation: see `lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.experts.experts_aot import (
    LAYOUTS,
    Shape,
    bias_of,
    config_of,
    described,
    gpt_oss_shape,
    layout_of,
)
from fusecomp.lowerings.experts.launch import signalled_blocks
from fusecomp.lowerings.experts.listed import down_listed_kernel, up_listed_kernel
from fusecomp.lowerings.experts.listed_launch import ASKED, LEAST_ROWS, tile_constants
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.ops.experts import Activation

QWEN3 = Shape(128, 8, 2048, 768, 64)
# CI keeps the last case of a kernel, and on sm_90 those at one and two thirds.
CASES: tuple[Shape, ...] = (
    replace(QWEN3, codes="int8"),
    *(replace(QWEN3, codes="fp8", tokens=tokens) for tokens in (8, 128, 256)),
    *(replace(QWEN3, tokens=tokens) for tokens in (8, 16, 128, 256)),
    replace(QWEN3, dtype="fp16", gating=0, act="relu2"),
    gpt_oss_shape(64),
    QWEN3,
    Shape(256, 8, 7168, 2048, 64, codes="fp8"),
    replace(QWEN3, codes="fp8"),
)


def listed_specializations(target: Target) -> Iterator[Specialization]:
    """The kernels of a few layers whose tables have launches that lists serve."""
    for shape in CASES:
        yield from specializations(target, shape)


def specializations(target: Target, shape: Shape) -> Iterator[Specialization]:
    """The two matmuls of one call; nothing where another kind of launch serves it."""
    config = config_of(target, shape)
    if config.method != "grouped" or not config.swap or config.up.per_sm or config.down.per_sm:
        return
    act, dtype = Activation.parse(shape.act, shape.gating > 0), shape.dtype
    pointers, layout = layout_of(target, shape)
    weight, rows = pointers["weight"], shape.tokens * shape.top_k
    signals = signalled_blocks(config, rows, shape.rows, target.has_pdl)
    many = rows >= LEAST_ROWS * shape.experts
    certain = target.has_pdl and many
    programs = shape.experts * -(-shape.rows // config.up.block_n)
    asking = min(2 * target.num_sms, programs) if certain and not shape.transposed else 0
    common: dict[str, Any] = {
        "E": shape.experts, "BLOCK_T": config.block_t, "TRANSPOSED": shape.transposed, "USE_PDL": target.has_pdl,
        **layout,
    }  # fmt: skip
    bits = LAYOUTS[shape.codes][0].bits if shape.codes else 8 * shape.itemsize
    up, down = (
        {
            k: v
            for k, v in tile_constants(t, config.block_t, bits, shape.itemsize, many and shape.codes != "nf4").items()
            if k.isupper()
        }
        for t in (config.up, config.down)
    )
    pointers, none = bias_of({"lists": "i32", "hidden": dtype, **pointers}, shape)
    tiles, more = described(config.up, shape, weight, 2 if shape.gating == 1 else 1, shape.hidden)
    yield Specialization(
        f"experts-up-listed-{shape}", up_listed_kernel, {**pointers, **tiles, "x": dtype},
        {"capacity": "i32", "stride_x": "i32"},
        {"K": shape.top_k, "N": shape.rows, "D": shape.hidden, "GATING": shape.gating, "ACT": act.name,
         "ALPHA": act.alpha, "LIMIT": act.limit, "ASKING": asking, "ASKED": ASKED,
         "SIGNAL": signals > 0, **common, **up, **none, **more},
        config.up.num_warps, config.up.num_stages,
    )  # fmt: skip
    tiles, more = described(config.down, shape, weight, 1, shape.width)
    yield Specialization(
        f"experts-down-listed-{shape}", down_listed_kernel, {**pointers, **tiles, "parts": dtype},
        {"capacity": "i32"},
        {"N": shape.hidden, "D": shape.width, "ASKS": certain,
         "UP_BLOCKS": signals, **common, **down, **none, **more},
        config.down.num_warps, config.down.num_stages,
    )  # fmt: skip
