"""Specializations of the kernels of codes by codes for ahead-of-time compilation: see `fusecomp/lowerings/aot.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.large_heuristics import sum_block
from fusecomp.lowerings.linear.skinny_pieces import plain
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.quant import rows, scaled_heuristics
from fusecomp.lowerings.quant.activations import rows_block
from fusecomp.lowerings.quant.norm_digits import norm_digits_kernel, sum_digits_kernel
from fusecomp.lowerings.quant.pieces import FP8 as BYTES
from fusecomp.lowerings.quant.pieces import INT8, NATIVE_FP8
from fusecomp.lowerings.quant.scaled import scaled_kernel
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, TILE, ScaledConfig, ScaledShape, own_config
from fusecomp.lowerings.quant.scaled_tile import scaled_tile_kernel
from fusecomp.lowerings.quant.sum_rows import sum_quantize_kernel
from fusecomp.ops.quant import FP8, INT

CODES = {FP8: "fp8e4nv", INT: "i8"}


def scaled_specializations(target: Target, *, full: bool) -> Iterator[Specialization]:
    """Kernels of a few layers; if `full`, of every tuned one."""
    seen = set()

    def add(shape: ScaledShape, tokens: int) -> None:
        # What is no part of a kernel's code is left out.
        seen.add((shape, replace(own_config(target, shape, tokens), source="", group_t=8, per_sm=1)))

    for kind, block in itertools.product((FP8, INT), (0, 128)):
        if scaled_heuristics.reason(target, kind, (1, block), block):
            continue
        sizes = ((1, 16), (2, 64), (1, 256), (2, 256), (1, 8192), (2, 8192)) if full else ((2, 64), (1, 8192))
        for groups, tokens in sizes if full or kind == FP8 else sizes[1:]:
            n, k = (14336, 4096) if groups == 2 else (4096, 14336)
            add(ScaledShape(n, k, groups, kind, block, "other" if groups == 2 else "residual"), tokens)
        if kind == FP8 and not block:
            for precise, k, tokens in ((True, 4096, 8192), (False, 28672, 64), (False, 28672, 8192)):
                add(ScaledShape(4096, k, 1, kind, 0, "residual", precise), tokens)
    for entry in scaled_heuristics.entries(target) if full else []:
        shape = ScaledShape(*(entry[key] for key in ("n", "k", "groups", "kind", "block", "epilogue")))
        add(shape, entry["tokens"])
    for shape, config in sorted(seen, key=str):
        assert config.method != LIBRARY
        yield specialization(target, shape, config)
    yield from _rows(target, full)
    yield from _sums(target)
    yield from _digits(target)


def specialization(target: Target, shape: ScaledShape, config: ScaledConfig) -> Specialization:
    """What a layer of 8B models launches: gate and up with SwiGLU, all others with a residual."""
    apart = config.method != TILE and config.splits > 1  # its epilogue is that of another kernel
    args, dtype, groups = () if apart else ("bf16",) * (2 - shape.groups), CODES[shape.kind], shape.groups
    pointers: dict[str, Any] = {"x_scale": "fp32", "w_scale": "fp32", "out": "bf16", "args": args, "x": dtype}
    scalars: dict[str, Any] = {"strides": ("i32",) * len(args), "num_tokens": "i32"}
    scalars |= dict.fromkeys(("stride_x", "stride_xs", "stride_ws"), "i32")
    constants: dict[str, Any] = {
        "G": groups, "BLOCK_T": config.block_t, "BLOCK_K": config.block_k, "CHUNK": config.chunk,
        "SPLITS": config.splits, "X_ROWS": True, "X_COLS": shape.block, "ROWS": shape.block or 1, "COLS": shape.block,
        "EPILOGUE": plain if apart else SWIGLU if groups == 2 else RESIDUAL, "USE_PDL": target.has_pdl,
    }  # fmt: skip
    stages = config.num_stages if target.backend == "cuda" else min(2, config.num_stages)
    name = f"scaled-{shape.kind}-b{shape.block}-g{groups}-{config.constants()}"
    if config.method == TILE:
        pointers["q"] = dtype
        scalars |= dict.fromkeys(("n", "k", "per_split", "stride_out"), "i32")
        constants |= {"BLOCK_R": config.block_n * groups, "AHEAD": config.ahead, "EVEN_K": True}
        if config.splits > 1:
            pointers |= {"partials": "fp32", "counters": "i32"}
        else:
            constants |= {"partials": None, "counters": None}
        return Specialization(
            name, scaled_tile_kernel, pointers, scalars, constants, config.num_warps, stages, ("n", "k")
        )
    pointers |= {"w": dtype, "out": "fp32" if config.splits > 1 else "bf16"}
    scalars["stride_o"] = "i32"
    if config.use_tma:
        weights = [config.block_n, config.block_k] if groups == 1 else [2, config.block_n, config.block_k]
        pointers["x_tiles"] = f"tensordesc<{dtype}[{config.block_t}, {config.block_k}]>"
        pointers["w_tiles"] = f"tensordesc<{dtype}{weights}>"
    else:
        constants |= {"x_tiles": None, "w_tiles": None}
    constants |= {
        "N": shape.n, "K": shape.k, "BLOCK_N": config.block_n, "GROUP_T": config.group_t, "PIECES": config.pieces,
        "SWAP": config.swap, "POLICY": KEEP.value if config.splits > 1 else "", "UNIT": 2.0**-16,
        "USE_TMA": config.use_tma,
    }  # fmt: skip
    return Specialization(name, scaled_kernel, pointers, scalars, constants, config.num_warps, stages)


def _rows(target: Target, full: bool) -> Iterator[Specialization]:
    native = target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89
    for kind in (INT8, NATIVE_FP8 if native else BYTES):
        for scale, fake, k in ((1, False, 4096), (1, True, 4096), (2, False, 14336), (3, False, 20000), (4, False, 64)):
            for norm in (0, 1, 2) if full else (1,):
                block_k, num_warps = rows_block(target, 64, k)
                codes = "bf16" if fake else {INT8: "i8", NATIVE_FP8: "fp8e4nv"}.get(kind, "u8")
                pointers = {
                    "x": "bf16",
                    "weight": "bf16",
                    "bias": "bf16",
                    "given": "fp32",
                    "out": codes,
                    "scales": "fp32",
                }
                absent = {"weight", "bias"} if not norm else set()
                absent |= {"scales"} if fake else {"out"} if scale == 4 else set()
                absent |= set() if scale == 3 else {"given"}
                yield Specialization(
                    f"codes-{kind}-scale{scale}-fake{fake}-k{k}-norm{norm}",
                    rows.quantize_kernel,
                    {name: text for name, text in pointers.items() if name not in absent},
                    {"eps": "fp32", "num_rows": "i32", "stride_x": "i32"},
                    {
                        "K": k, "BLOCK_K": max(block_k, 128), "BLOCK": 128 if scale == 2 else 1, "NORM": norm,
                        "PLUS_ONE": False, "KIND": kind, "SCALE": scale, "FAKE": fake, "USE_PDL": target.has_pdl,
                        **dict.fromkeys(absent),
                    },
                    num_warps,
                    num_stages=3,
                )  # fmt: skip


def _sums(target: Target) -> Iterator[Specialization]:
    native = target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 89
    for kind, scale, splits in ((NATIVE_FP8 if native else BYTES, 1, 2), (INT8, 2, 1), (INT8, 0, 3)):
        block_n, num_warps = rows_block(target, 64, 4096)
        yield Specialization(
            f"sum_codes-{kind}-scale{scale}-{splits}",
            sum_quantize_kernel,
            {
                "acc": "fp32" if splits > 1 else "bf16", "total": "bf16", "weight": "bf16", "scales": "fp32",
                "out": {INT8: "i8", NATIVE_FP8: "fp8e4nv"}.get(kind, "u8"), "args": ("bf16",),
                **({} if scale else {"given": "fp32"}),
            },
            {"eps": "fp32", "num_tokens": "i32", "strides": ("i32",)},
            {
                "N": 4096, "G": 1, "SPLITS": splits, "BLOCK_N": block_n, "BLOCK": 128 if scale == 2 else 1, "NORM": 1,
                "PLUS_ONE": False, "KIND": kind, "SCALE": scale, "EPILOGUE": RESIDUAL, "USE_PDL": target.has_pdl,
                "bias": None, **({"given": None} if scale else {}),
            },
            num_warps,
            num_stages=3,
        )  # fmt: skip


def _digits(target: Target) -> Iterator[Specialization]:
    """Norms that are read as digits, where `experts/digits.py` has kernels that read them."""
    if not target.has_tma:
        return
    block_n, num_warps = sum_block(64, 2048)
    digits = {"codes": "fp8e4nv", "units": "fp32", "weight": "bf16"}
    constants = {
        "N": 2048, "BLOCK_N": block_n, "CENTERED": False, "PLUS_ONE": False, "KIND": NATIVE_FP8, "bias": None,
        "USE_PDL": True,
    }  # fmt: skip
    scalars = {"eps": "fp32", "num_tokens": "i32"}
    yield Specialization(
        "norm_digits-2048", norm_digits_kernel, {"x": "bf16", "y": "bf16", **digits}, {**scalars, "stride_x": "i32"},
        constants, num_warps, num_stages=3,
    )  # fmt: skip
    for splits in (1, 4):
        acc = "fp32" if splits > 1 else "bf16"
        yield Specialization(
            f"sum_digits-2048-{splits}", sum_digits_kernel,
            {"acc": acc, "total": "bf16", "y": "bf16", "args": ("bf16",), **digits},
            {**scalars, "strides": ("i32",)}, {**constants, "G": 1, "SPLITS": splits, "EPILOGUE": RESIDUAL}, num_warps,
            num_stages=3,
        )  # fmt: skip
