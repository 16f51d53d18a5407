"""Specializations of the kernels that choose experts inside, for ahead-of-time compilation: see `lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton.language as tl

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.experts.chosen import down_chosen_kernel, logits_kernel, up_chosen_kernel
from fusecomp.lowerings.experts.experts_aot import LAYOUTS, Shape, bias_of, config_of, gpt_oss_shape, layout_of
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, routed_config
from fusecomp.lowerings.experts.quant_heuristics import routed_codes_config
from fusecomp.lowerings.experts.routed import layout_constants, logits_warps
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.route.pieces import constants as route_constants
from fusecomp.ops.experts import Activation, codes_shape
from fusecomp.ops.router import SIGMOID, SOFTMAX, SUM, TOP2, RouteSpec

Case = tuple[Shape, RouteSpec, bool]  # a layer, its router, whether a norm is in front

QWEN3, QWEN3_ROUTER = Shape(128, 8, 2048, 768, 1), RouteSpec(SOFTMAX, 8, SUM, dtype="bfloat16")
GPT_OSS = replace(gpt_oss_shape(1), transposed=False), RouteSpec("logits", 4, "softmax", dtype="bfloat16"), False
DEEPSEEK = (
    Shape(256, 8, 7168, 2048, 1), RouteSpec(SIGMOID, 8, SUM, 1e-20, 0.0, 8, 4, TOP2, 2.5), True,
)  # fmt: skip
# Of codes; Qwen3-30B-A3B; DeepSeek V3's router in front of wide rows; 512 experts; gpt-oss's router without a norm.
# CI keeps the last case of a kernel, and on sm_90 those at one and two thirds: numbers among them.
CASES: tuple[Case, ...] = (
    (replace(DEEPSEEK[0], codes="fp8-block"), *DEEPSEEK[1:]),
    (replace(GPT_OSS[0], codes="mxfp4"), *GPT_OSS[1:]),
    *((replace(QWEN3, codes=codes), QWEN3_ROUTER, True) for codes in LAYOUTS if codes not in ("nf4", "fp8")),
    (QWEN3, QWEN3_ROUTER, True),
    DEEPSEEK,
    (Shape(512, 10, 2048, 512, 1, dtype="fp16"), RouteSpec(SOFTMAX, 10, SUM, dtype="float16"), True),
    GPT_OSS,
    (replace(QWEN3, codes="fp8"), QWEN3_ROUTER, True),
)


def routed_specializations(target: Target) -> Iterator[Specialization]:
    """The kernels of a few layers."""
    for case in CASES:
        yield from specializations(target, *case)


def specializations(target: Target, shape: Shape, spec: RouteSpec, normed: bool) -> Iterator[Specialization]:
    """What one call launches with its router inside."""
    config = _config(target, shape)
    dtype, columns, pdl = shape.dtype, next_power_of_2(shape.hidden), {"USE_PDL": target.has_pdl}
    given = {"norm_weight": dtype, "y": dtype} if normed else {}
    absent: dict[str, Any] = {"bias": None, **({} if normed else {"norm_weight": None, "y": None})}
    threads = 32 * logits_warps(columns)
    asks = target.has_pdl and not shape.codes
    absent |= {"LATER": threads * 256 if asks else 0, "THREADS": threads, **({} if asks else {"later": None})}
    given |= {"later": dtype} if asks else {}
    yield Specialization(
        f"experts-logits-{shape}", logits_kernel, {"x": dtype, "weight": dtype, "logits": "fp32", **given},
        {"eps": "fp32", "stride_x": "i32"},
        {"E": shape.experts, "D": shape.hidden, "BLOCK_D": columns, "NORM": normed, "PLUS_ONE": False, **absent, **pdl},
        logits_warps(columns), num_stages=3,
    )  # fmt: skip
    number = {"bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    act = Activation.parse(shape.act, shape.gating > 0)
    weight, layout = layout_of(target, shape)
    choice: dict[str, Any] = {
        **route_constants(spec, shape.experts), "DTYPE": number, **layout_constants(layout), **pdl,
    }  # fmt: skip
    pointers, none = bias_of({"logits": "fp32", "route_bias": "fp32", "hidden": dtype, **weight}, shape)
    yield Specialization(
        f"experts-up-chosen-{shape}", up_chosen_kernel, {**pointers, "x": dtype}, {"stride_x": "i32"},
        {**choice, "N": shape.rows, "D": shape.hidden, "GATING": shape.gating, "ACT": act.name, "ALPHA": act.alpha,
         "LIMIT": act.limit, "BLOCK_N": config.up.block_n, "BLOCK_D": config.up.block_d if shape.codes else columns,
         **none},
        config.up.num_warps, num_stages=3,
    )  # fmt: skip
    yield Specialization(
        f"experts-down-chosen-{shape}", down_chosen_kernel, {**pointers, "residual": dtype, "out": dtype},
        {"stride_r": "i32"},
        {**choice, "WEIGHT_DTYPE": number, "KP": next_power_of_2(spec.k), "N": shape.hidden, "D": shape.width,
         "BLOCK_N": config.down.block_n, "BLOCK_D": config.down.block_d, **none},
        config.down.num_warps, num_stages=3,
    )  # fmt: skip


def _config(target: Target, shape: Shape) -> ExpertsConfig:
    """That of the table; for codes without an entry, the tiles that the experts have when they are launched apart."""
    sizes = (shape.experts, shape.top_k, shape.hidden, shape.width)
    if shape.codes:
        spec = LAYOUTS[shape.codes][0]
        config = routed_codes_config(target, codes_shape(spec, spec, sizes, shape.itemsize), shape.tokens)
        return config or config_of(target, shape)
    config = routed_config(
        target, experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, width=shape.width, tokens=shape.tokens,
        itemsize=2,
    )  # fmt: skip
    assert config is not None
    return config
