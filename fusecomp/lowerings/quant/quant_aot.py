"""Specializations of the quantized linears for ahead-of-time compilation: see `fusecomp/lowerings/aot.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton.language as tl

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.large_heuristics import sum_block
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.quant import heuristics, pieces
from fusecomp.lowerings.quant.digits import digits_kernel
from fusecomp.lowerings.quant.folded import folded_kernel, unfold_kernel
from fusecomp.lowerings.quant.folded_digit_rows import folded_digit_rows_kernel
from fusecomp.lowerings.quant.folded_digits import folded_digits_kernel
from fusecomp.lowerings.quant.folded_held import folded_held_kernel
from fusecomp.lowerings.quant.folded_parts import folded_parts_kernel
from fusecomp.lowerings.quant.folded_wide import folded_wide_kernel
from fusecomp.lowerings.quant.heuristics import (
    DIGITS,
    FOLDED,
    FOLDED_DIGITS,
    FOLDED_HELD,
    FOLDED_WIDE,
    TILE,
    VECTOR,
    WORD_VECTOR,
    QuantConfig,
    quant_config,
)
from fusecomp.lowerings.quant.kinds import code_kind
from fusecomp.lowerings.quant.tile import dequantize_kernel, quant_tile_kernel
from fusecomp.lowerings.quant.vector import quant_vector_kernel
from fusecomp.lowerings.quant.word_vector import word_vector_kernel
from fusecomp.ops.quant import FP4, FP8, INT, NF4
from fusecomp.ops.quant_linear import QuantShape

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CODES = {pieces.INT8: "i8", pieces.NATIVE_FP8: "fp8e4nv"}
LAYOUTS = (  # kind, bits, rows and columns of a scale, zero points, fold
    (INT, 4, 1, 128, True, 64),
    (INT, 4, 1, 32, False, 32),
    (INT, 8, 1, 0, False, 0),
    (FP8, 8, 128, 128, False, 0),
    (FP8, 8, 0, 0, False, 0),
    (FP4, 4, 1, 32, False, 0),
    (NF4, 4, 1, 64, False, 0),
    (INT, 4, 1, 128, False, 64),
    (INT, 4, 1, 0, True, 64),
    (INT, 4, 1, 16, True, 0),
)
SUBSET = (  # layout, groups, tokens, dtype, norm
    (0, 1, 1, "bfloat16", 2),
    (1, 2, 1, "float16", 0),
    (3, 1, 1, "bfloat16", 2),
    (0, 2, 8, "bfloat16", 2),
    (1, 1, 32, "float16", 2),
    (2, 1, 32, "bfloat16", 0),
    (3, 2, 32, "bfloat16", 2),
    (0, 2, 16, "bfloat16", 0),
    (0, 1, 64, "bfloat16", 0),
    (3, 2, 128, "bfloat16", 0),
    (4, 2, 16, "float16", 2),
    (5, 1, 8, "bfloat16", 2),
    (7, 1, 1, "bfloat16", 2),
    (7, 2, 64, "bfloat16", 0),
    (7, 1, 128, "bfloat16", 0),
    (8, 1, 16, "float16", 2),
    (9, 1, 1, "bfloat16", 2),
    (9, 1, 32, "bfloat16", 2),
)

# Layout, groups, norm, warps, whether the pipeline begins before the wait.
HELD = ((0, 2, 2, 4, False), (7, 1, 0, 8, True), (0, 1, 3, 16, True))
DIGIT = (  # layout, groups, norm, launch; only for GPUs that it serves
    ((FP8, 8, 1, 0, False, 0), 2, 2, QuantConfig(DIGITS, 8, 128, 256, 8, 3)),
    ((FP8, 8, 1, 0, False, 0), 1, 0, QuantConfig(DIGITS, 16, 64, 256, 4, 3, 4)),
    ((FP8, 8, 128, 128, False, 0), 2, 3, QuantConfig(DIGITS, 16, 128, 128, 8, 4, 2)),
)
FOLDED_DIGIT = (  # layout, groups, norm, launch; likewise
    (0, 2, 2, QuantConfig(FOLDED_DIGITS, 16, 128, 256, 4, 4)),
    (7, 1, 0, QuantConfig(FOLDED_DIGITS, 16, 128, 256, 8, 4, 4)),
    (8, 1, 3, QuantConfig(FOLDED_DIGITS, 8, 64, 256, 4, 4, 2)),
)
WIDE = (  # layout, groups, launch: tuned for one GPU, compiled for all that have what it takes
    (0, 2, QuantConfig(FOLDED_WIDE, 128, 128, 128, 8, 2)),
    (1, 1, QuantConfig(FOLDED_WIDE, 64, 128, 128, 8, 2, 4)),
    (0, 1, QuantConfig(FOLDED_WIDE, 128, 64, 128, 4, 3, 4, use_tma=True)),
)


def quant_specializations(target: Target, *, full: bool) -> Iterator[Specialization]:
    """Kernels of a few layers; if `full`, of every layout at every size of tile, in each dtype."""
    for at, groups, tokens, dtype, norm in SUBSET:
        if tokens <= _token_limit(target, LAYOUTS[at]):
            yield specialization(target, LAYOUTS[at], groups, tokens, dtype, norm)
    for at, groups, config in WIDE:
        if target.has_tma or not config.use_tma:
            yield specialization(target, LAYOUTS[at], groups, config.block_t, "bfloat16", 0, config)
    for layout, groups, norm, config in DIGIT if target.arch == heuristics.DIGITS_ARCH else ():
        yield specialization(target, layout, groups, config.block_t, "bfloat16", norm, config)
    for at, groups, norm, config in FOLDED_DIGIT if target.arch == heuristics.DIGITS_ARCH else ():
        yield specialization(target, LAYOUTS[at], groups, config.block_t, "bfloat16", norm, config)
        yield _digit_rows(target, LAYOUTS[at][5], 14336 if groups == 1 else 4096, norm)
    for at, groups, norm, warps, early in HELD if target.backend == "cuda" else ():  # made of NVIDIA's operands
        config = QuantConfig(FOLDED_HELD, 1, parts=warps, num_stages=3, ahead=1, early=early)
        yield specialization(target, LAYOUTS[at], groups, 1, "bfloat16", norm, config)
    yield _dequantize(target, LAYOUTS[0])
    if full:
        for layout in LAYOUTS:
            yield _dequantize(target, layout)
            counts = [t for t in (1, 2, 8, 16, 32, 64, 128) if t <= _token_limit(target, layout)]
            for groups, tokens, dtype in itertools.product((1, 2), counts, ("bfloat16", "float16")):
                for norm in (0, 2, 3) if tokens <= heuristics.norm_limit(layout[5]) else (0,):
                    yield specialization(target, layout, groups, tokens, dtype, norm)
            for tokens in (1, 32):
                yield specialization(target, layout, 1, tokens, "float32", 2)


def _token_limit(target: Target, layout: tuple) -> int:
    """Tokens beyond which the weight is dequantized first."""
    tuned = layout[5] and target.backend == "cuda"
    return heuristics.FOLDED_LIMIT if tuned else heuristics.TILE_LIMIT[layout[1]]


def _layout(target: Target, layout: tuple) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pointers and constants of codes, scales and zero points."""
    kind, bits, rows, cols, zero, fold = layout
    code = code_kind(kind, bits, target)
    by_row = bits == 8 and (rows, cols) == (1, 0)  # in fp32, as `prepared` leaves them
    pointers = {"q": CODES.get(code, "u8"), "scale": "u8" if kind == FP4 else "fp32" if by_row else "bf16"}
    constants: dict[str, Any] = {"ROWS": rows, "COLS": cols}
    if fold:
        pointers["q"] = "i16"
        constants["FOLD"] = fold
    else:
        constants |= {"KIND": code, "OFFSET": 8.0 if code == pieces.INT4 and not zero else 0.0}
    if zero:
        pointers["zero"] = "bf16"
    else:
        constants["zero"] = None
    return pointers, constants


def specialization(
    target: Target, layout: tuple, groups: int, tokens: int, dtype: str, norm: int, config: QuantConfig | None = None
) -> Specialization:
    """What a layer of 8B models launches: gate and up with SwiGLU, all others with a residual."""
    n, k = (14336, 4096) if groups == 2 else (4096, 14336)
    kind, bits, rows, cols, zero, fold = layout
    shape = QuantShape(n, k, groups, dtype, kind, bits, rows, cols, zero, fold=fold)
    config, short, pdl = config or quant_config(target, shape, tokens), NAMES[dtype], target.has_pdl
    if config.kernel == FOLDED_HELD:
        return _held(target, shape, tokens, norm, config)
    if config.kernel == FOLDED_DIGITS:
        return _folded_digits(target, shape, config)
    norm = norm if tokens <= heuristics.norm_limit(fold) else 0
    pointers, constants = _layout(target, layout)
    pointers |= {"x": short, "out": short, "args": () if groups == 2 else (short,)}
    scalars: dict[str, Any] = {"n": "i32", "k": "i32", "eps": "fp32", "stride_scale": "i32"}
    scalars["strides"] = () if groups == 2 else ("i32",)
    constants |= {
        "G": groups, "BLOCK_R": config.block_r, "NORM": norm, "EPILOGUE": SWIGLU if groups == 2 else RESIDUAL,
        "USE_PDL": pdl,
    }  # fmt: skip
    if not fold:
        constants |= {"BLOCK_K": config.block_k, "EVEN_K": k % config.block_k == 0}
    if norm >= 2:
        pointers["norm_weight"] = short
    else:
        constants["norm_weight"] = None
    if config.kernel == WORD_VECTOR:
        pointers |= {"x": "i64", "q": "i32"} | ({"norm_weight": "i64"} if norm >= 2 else {})
        constants |= {"DTYPE": getattr(tl, dtype), "WARPS": config.num_warps, "AHEAD": config.ahead}
        for name in ("zero", "OFFSET", "COLS"):
            del constants[name]
    elif config.kernel == VECTOR:
        constants["UNIT"] = heuristics.unit(shape)
    else:
        constants |= {
            "ASM": target.backend == "cuda" and dtype != "float32", "EXACT_NORM": norm > 0 and dtype == "float16",
            "BLOCK_T": config.block_t, "SPLITS": config.splits, "EARLY": config.early,
        }  # fmt: skip
        if config.kernel == FOLDED_WIDE:
            packed = heuristics.packs_scales(shape)
            constants |= {"WORDS": config.block_k // 4, "AHEAD": config.ahead, "PACKED": packed}
            pointers |= {"scale": "i32", **({"zero": "i32"} if zero else {})} if packed else {}
            constants["USE_TMA"] = config.use_tma
            if config.use_tma:
                pointers["x_tiles"] = f"tensordesc<{short}[{config.block_t}, {config.block_k // 4}]>"
            else:
                constants["x_tiles"] = None
        elif fold:
            constants |= {"SUMS": config.sums, "AHEAD": config.ahead}
            if config.parts > 1:
                even = k % (4 * fold * config.parts) == 0
                constants |= {"PARTS": config.parts, "EVEN_K": even, "ONE": tokens == 1}
        elif config.kernel == DIGITS:
            for name in ("ASM", "EXACT_NORM", "EARLY", "OFFSET", "zero"):
                del constants[name]
            pointers["q_tiles"] = f"tensordesc<{pointers.pop('q')}[{config.block_r // groups}, {config.block_k}]>"
        else:
            constants["HALVES"] = config.halves
            words = constants["WORDS"] = heuristics.reads_words(config, shape)
            pointers["q"] = "i32" if words else pointers["q"]
        scalars |= dict.fromkeys(("num_tokens", "per_split", "stride_x", "stride_out"), "i32")
        scratch = {"partials": "fp32", "part_squares": "fp32", "counters": "i32"}
        if config.splits > 1:
            pointers |= scratch
        else:
            constants |= dict.fromkeys(scratch)
    if config.kernel == FOLDED_WIDE:
        for name in ("NORM", "EXACT_NORM", "EARLY", "norm_weight", "part_squares"):
            constants.pop(name, None)
        pointers.pop("part_squares", None)
        del scalars["eps"]
    label = "digits" if config.kernel == DIGITS else "quant"
    name = f"{label}-{kind}{bits}-{rows}x{cols}-fold{fold}-{short}-g{groups}-t{tokens}-norm{norm}"
    kernels = {
        VECTOR: quant_vector_kernel, WORD_VECTOR: word_vector_kernel, TILE: quant_tile_kernel, FOLDED: folded_kernel,
        FOLDED_WIDE: folded_wide_kernel, DIGITS: digits_kernel,
    }  # fmt: skip
    kernel = folded_parts_kernel if config.parts > 1 else kernels[config.kernel]
    return Specialization(name, kernel, pointers, scalars, constants, config.num_warps, config.num_stages, ("n", "k"))


def _folded_digits(target: Target, shape: QuantShape, config: QuantConfig) -> Specialization:
    rows, cols, fold, zero, groups = shape.rows, shape.cols, shape.fold, shape.zero, shape.groups
    packed = heuristics.packs_scales(shape)
    scale = "i32" if packed else "bf16"
    pointers: dict[str, Any] = {
        "digit_tiles": f"tensordesc<i8[{2 * config.block_t}, {2 * fold}]>", "sums": "i32",
        "q_tiles": f"tensordesc<u8[{config.block_r // groups}, {2 * fold}]>", "scale": scale, "out": "bf16",
        "args": () if groups == 2 else ("bf16",),
    }  # fmt: skip
    pointers |= {"zero": scale} if zero else {}
    pointers |= {"partials": "fp32", "counters": "i32"} if config.splits > 1 else {}
    constants: dict[str, Any] = {
        "G": groups, "BLOCK_T": config.block_t, "BLOCK_R": config.block_r, "FOLD": fold, "SPLITS": config.splits,
        "PACKED": packed, "ASM": True, "ROWS": rows, "COLS": cols, "USE_PDL": target.has_pdl,
        "EPILOGUE": SWIGLU if groups == 2 else RESIDUAL,
    }  # fmt: skip
    constants |= {name: None for name in ("zero", "partials", "counters") if name not in pointers}
    scalars: dict[str, Any] = dict.fromkeys(("num_tokens", "n", "k", "per_split", "stride_out", "stride_scale"), "i32")
    scalars["strides"] = () if groups == 2 else ("i32",)
    name = f"folded-digits-{rows}x{cols}-fold{fold}-g{groups}-t{config.block_t}-zero{zero}"
    kernel, warps, stages = folded_digits_kernel, config.num_warps, config.num_stages
    return Specialization(name, kernel, pointers, scalars, constants, warps, stages, ("n", "k"))


def _digit_rows(target: Target, fold: int, k: int, norm: int) -> Specialization:
    block_k, warps = sum_block(64, k)
    pointers = {"x": "bf16", "digits": "i8", "sums": "i32"}
    pointers |= {"weight": "bf16"} if norm >= 2 else {}
    constants = {
        "K": k, "BLOCK_K": block_k, "FOLD": fold, "NORM": norm, "USE_PDL": target.has_pdl,
        **({} if norm >= 2 else {"weight": None}),
    }  # fmt: skip
    scalars = {"eps": "fp32", "num_tokens": "i32", "stride_x": "i32"}
    name = f"folded-digit-rows-{k}-norm{norm}"
    return Specialization(name, folded_digit_rows_kernel, pointers, scalars, constants, warps, 1)


def _held(target: Target, shape: QuantShape, tokens: int, norm: int, config: QuantConfig) -> Specialization:
    config = heuristics.held_config(config, target, shape, tokens)
    groups, zero, warps = shape.groups, shape.zero, config.parts
    short = NAMES[shape.dtype]
    pointers: dict[str, Any] = {
        "x": short, "q": "u8", "scale": "i32", "out": short, "partials": "fp32",
        "warp_scales": "fp32", "args": () if groups == 2 else (short,),
    }  # fmt: skip
    pointers |= {"zero": "i32"} if zero else {}
    pointers |= {"norm_weight": short} if norm >= 2 else {}
    pointers |= {"counters": "i32"} if config.splits > 1 else {}
    constants: dict[str, Any] = {
        "G": groups, "BLOCK_T": tokens, "BLOCK_R": next_power_of_2(config.block_r), "PARTS": warps,
        "SPLITS": config.splits,
        "AHEAD": config.ahead, "ASK_SCALES": target.has_tma, "EARLY": config.early,
        "EVEN_K": shape.k % (heuristics.HELD_COLUMNS * warps) == 0,
        "ASM": True, "NORM": norm, "EPILOGUE": SWIGLU if groups == 2 else RESIDUAL, "USE_PDL": target.has_pdl,
    }  # fmt: skip
    constants |= {name: None for name in ("zero", "norm_weight", "counters") if name not in pointers}
    scalars: dict[str, Any] = dict.fromkeys(("stride_x", "stride_out", "count", "n", "k"), "i32")
    scalars |= {"eps": "fp32", "strides": () if groups == 2 else ("i32",)}
    name = f"quant-held-{short}-g{groups}-t{tokens}-w{warps}-zero{zero}-norm{norm}"
    return Specialization(
        name, folded_held_kernel, pointers, scalars, constants, config.num_warps, config.num_stages, ("n", "k"),
        heuristics.held_registers(tokens),
    )  # fmt: skip


def _dequantize(target: Target, layout: tuple) -> Specialization:
    pointers, constants = _layout(target, layout)
    block_k = heuristics.fitting_columns(256, layout[3])
    kernel: Any = unfold_kernel if layout[5] else dequantize_kernel
    constants |= {"BLOCK_R": 16} if layout[5] else {"BLOCK_R": 16, "BLOCK_K": block_k, "EVEN_K": True}
    scalars = dict.fromkeys(("n", "k", "scale_rows", "stride_scale"), "i32")
    name = f"dequantize-{layout[0]}{layout[1]}-{layout[2]}x{layout[3]}-fold{layout[5]}"
    return Specialization(name, kernel, {**pointers, "out": "bf16"}, scalars, constants, 4, 1, ("n", "k"))
