"""Specializations of the kernels that read lists of rows, for ahead-of-time compilation: see `lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.experts.digits import halves_apart, rows_at_once
from fusecomp.lowerings.experts.experts_aot import (
    Shape,
    bias_of,
    config_of,
    described,
    gpt_oss_shape,
    layout_of,
)
from fusecomp.lowerings.experts.listed import down_listed_kernel, up_listed_kernel
from fusecomp.lowerings.experts.listed_launch import fits, listed_constants
from fusecomp.lowerings.paged_attention.heuristics import SM90, Target
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
        yield from specializations(target, shape, by_digits=True)


def specializations(target: Target, shape: Shape, *, by_digits: bool = False) -> Iterator[Specialization]:
    """The two matmuls of one call; nothing where another kind of launch serves it.

    Args:
        by_digits: in the tiles of the H200, whose table alone has any.
    """
    config = config_of(SM90 if by_digits else target, shape)
    served = fits(config, shape.tokens * shape.top_k)
    if not served or (by_digits and (config.digits is None or not target.has_tma)):
        return
    up_types: dict[str, Any] = {"x": shape.dtype}
    down_types: dict[str, Any] = {"hidden": shape.dtype, "parts": shape.dtype}
    apart = False
    up_none: dict[str, Any] = dict.fromkeys(("units", "hidden_digits", "hidden_units"))
    down_none: dict[str, Any] = {"units": None}
    if by_digits:
        assert config.digits is not None
        apart = halves_apart(shape.gating, config.digits.up.block_n)
        config = replace(config, up=config.digits.up, down=config.digits.down)
        up_types = {"x": "fp8e4nv", "units": "fp32", "hidden_digits": "fp8e4nv", "hidden_units": "fp32"}
        down_types |= {"hidden": "fp8e4nv", "units": "fp32"}
        up_none, down_none = {}, {}
    block_r, block_f = rows_at_once(shape.width)
    suffix = f"{shape}{'-digits' if by_digits else ''}"
    act = Activation.parse(shape.act, shape.gating > 0)
    pointers, layout = layout_of(target, shape)
    weight, bits = pointers["weight"], 8 * shape.itemsize
    weight_bits = 8 if shape.codes else bits
    ups, downs = listed_constants(
        config, (shape.experts, shape.rows, shape.top_k, shape.tokens),
        0 if shape.transposed else shape.hidden * weight_bits // 8, target.num_sms, target.has_pdl, bits, weight_bits,
        digits=by_digits,
    )  # fmt: skip
    common: dict[str, Any] = {
        "E": shape.experts, "BLOCK_T": config.block_t, "TRANSPOSED": shape.transposed, "USE_PDL": target.has_pdl,
        **layout,
    }  # fmt: skip
    pointers, none = bias_of({"lists": "i32", **pointers}, shape)
    groups = 2 if shape.gating == 1 else 1
    tiles, more = described(config.up, shape, weight, groups, shape.hidden, apart=apart)
    yield Specialization(
        f"experts-up-listed-{suffix}", up_listed_kernel, {**pointers, **tiles, "hidden": shape.dtype, **up_types},
        {"capacity": "i32", "stride_x": "i32"},
        {"K": shape.top_k, "N": shape.rows, "D": shape.hidden, "GATING": shape.gating, "ACT": act.name,
         "ALPHA": act.alpha, "LIMIT": act.limit, "BLOCK_R": block_r, "BLOCK_F": block_f, **ups, **common, **none,
         **more, **up_none},
        config.up.num_warps, config.up.num_stages,
    )  # fmt: skip
    tiles, more = described(config.down, shape, weight, 1, shape.width)
    yield Specialization(
        f"experts-down-listed-{suffix}", down_listed_kernel, {**pointers, **tiles, **down_types},
        {"capacity": "i32"},
        {"N": shape.hidden, "D": shape.width, **downs, **common, **none, **more, **down_none},
        config.down.num_warps, config.down.num_stages,
    )  # fmt: skip
