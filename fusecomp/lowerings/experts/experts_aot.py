"""Specializations of the experts' kernels for ahead-of-time compilation: see `fusecomp/lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.experts.codes import code_constants
from fusecomp.lowerings.experts.combine import MAX_DEPENDENT_TOKENS, combine_block, combine_kernel
from fusecomp.lowerings.experts.grouped import down_kernel, up_kernel
from fusecomp.lowerings.experts.heuristics import (
    DEFAULT_TABLE,
    ExpertsConfig,
    Tiles,
    experts_config,
    invariant_experts_config,
    load_table,
)
from fusecomp.lowerings.experts.launch import is_flat, reads_tokens, signalled_blocks
from fusecomp.lowerings.experts.quant_heuristics import DEQUANTIZE, quant_experts_config
from fusecomp.lowerings.experts.quant_pieces import PLAIN
from fusecomp.lowerings.experts.routing import (
    CHUNK,
    SINGLE_LAUNCH_ROWS,
    count_kernel,
    place_kernel,
    place_step,
    routing_bins,
    routing_block,
    routing_kernel,
)
from fusecomp.lowerings.experts.vector import down_vector_kernel, up_vector_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target, next_power_of_2
from fusecomp.lowerings.quant import pieces
from fusecomp.ops.experts import Activation, codes_shape
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec

NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CODE_TYPES = {pieces.INT8: "i8", pieces.NATIVE_FP8: "fp8e4nv"}
LAYOUTS = {  # layout of codes, and whether it has zero points
    "fp8": (WeightSpec(FP8, 8, 1, 0, "bfloat16"), False),
    "fp8-block": (WeightSpec(FP8, 8, 128, 128, "bfloat16"), False),
    "int8": (WeightSpec(INT, 8, 1, 0, "bfloat16"), False),
    "int8-zero": (WeightSpec(INT, 8, 1, 128, "bfloat16"), True),
    "int4": (WeightSpec(INT, 4, 1, 32, "bfloat16"), False),
    "int4-zero": (WeightSpec(INT, 4, 1, 128, "bfloat16"), True),
    "mxfp4": (WeightSpec(FP4, 4, 1, 32, "bfloat16"), False),
    "nf4": (WeightSpec(NF4, 4, 1, 64, "bfloat16"), False),
}


@dataclass(frozen=True)
class Shape:
    """A layer and what it is made of, as in `ops/experts.py`; `width` is F."""

    experts: int
    top_k: int
    hidden: int
    width: int
    tokens: int
    dtype: str = "bf16"
    act: str = "silu"
    gating: int = 1
    biased: bool = False
    transposed: bool = False
    codes: str = ""  # one of `LAYOUTS`, or numbers
    invariant: bool = False  # by the kernels of `deterministic=True`

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def rows(self) -> int:
        return 2 * self.width if self.gating else self.width

    def __str__(self) -> str:
        marks = (
            "-invariant" * self.invariant
            + "-biased" * self.biased
            + "-transposed" * self.transposed
            + f"-{self.codes}" * bool(self.codes)
        )
        size = f"e{self.experts}-k{self.top_k}-c{self.hidden}-f{self.width}-t{self.tokens}"
        return f"{self.dtype}-{size}-{self.act}-g{self.gating}{marks}"


def gpt_oss_shape(tokens: int) -> Shape:
    return Shape(32, 4, 2880, 2880, tokens, act="gpt_oss(1.702,7.0)", gating=2, biased=True, transposed=True)


SUBSET = (
    Shape(128, 8, 2048, 768, 1),
    Shape(128, 8, 2048, 768, 64),
    Shape(8, 2, 4096, 14336, 8192),
    gpt_oss_shape(1),
    gpt_oss_shape(64),
    gpt_oss_shape(4096),
    Shape(60, 4, 1001, 703, 9, dtype="fp32", act="gelu", gating=0, biased=True),
    *(Shape(128, 8, 2048, 768, tokens, codes=codes) for codes in ("fp8", "int4-zero") for tokens in (1, 64, 4096)),
    *(replace(gpt_oss_shape(tokens), transposed=False, codes="mxfp4") for tokens in (1, 64)),
    Shape(128, 8, 2048, 768, 64, codes="fp8-block"),
    *(Shape(128, 8, 2048, 768, tokens, invariant=True) for tokens in (1, 512, 8192)),
    replace(gpt_oss_shape(4096), invariant=True),
    Shape(8, 2, 4096, 14336, 8192, codes="fp8-block"),
    Shape(60, 4, 1024, 704, 1, dtype="fp16", act="gelu", gating=0, codes="nf4"),
    Shape(60, 4, 1024, 704, 9, dtype="fp32", act="gelu", gating=0, codes="int8-zero"),
)


def experts_specializations(target: Target, *, full: bool) -> Iterator[Specialization]:
    """Kernels of a few layers; if `full`, of every tuned one, in both halves, and of its neighbours."""
    shapes = list(SUBSET)
    for entry in load_table(DEFAULT_TABLE)["entries"] if full else ():
        plain = Shape(*(entry[key] for key in ("experts", "top_k", "hidden", "width", "tokens")))
        shapes += [plain, replace(plain, dtype="fp16"), replace(plain, dtype="fp32"), replace(plain, transposed=True)]
        shapes += [replace(plain, act="gelu_tanh", gating=2, biased=True), replace(plain, act="relu2", gating=0)]
    for codes in LAYOUTS if full else ():
        for tokens in (1, 2, 8, 64, 256, 1024, 8192):
            plain = Shape(128, 8, 2048, 768, tokens, codes=codes)
            shapes += [plain, replace(plain, dtype="fp16", gating=2), replace(plain, experts=8, top_k=2, hidden=4096)]
        shapes += [replace(plain, dtype="fp32", tokens=tokens) for tokens in (1, 64)]
    for shape in shapes:
        yield from specializations(target, shape)


def specializations(target: Target, shape: Shape) -> Iterator[Specialization]:
    """What one call launches."""
    config = config_of(target, shape)
    if config.method == DEQUANTIZE:
        yield from specializations(target, replace(shape, codes=""))
        return
    act = Activation.parse(shape.act, shape.gating > 0)
    activation = {"GATING": shape.gating, "ACT": act.name, "ALPHA": act.alpha, "LIMIT": act.limit}
    common: dict[str, Any] = {"USE_PDL": target.has_pdl, **layout_of(target, shape)[1]}
    if config.method == "grouped":
        common["TRANSPOSED"] = shape.transposed
    ups = {"K": shape.top_k, "N": shape.rows, "D": shape.hidden, **activation, **common}
    downs = {"N": shape.hidden, "D": shape.width, **common}
    if config.method == "vector":
        yield from _vector(target, shape, config, ups, downs)
    else:
        yield from _grouped(target, shape, config, ups, downs)


def config_of(target: Target, shape: Shape) -> ExpertsConfig:
    """What the heuristics choose."""
    if shape.codes:
        spec = LAYOUTS[shape.codes][0]
        sizes = (shape.experts, shape.top_k, shape.hidden, shape.width)
        return quant_experts_config(target, codes_shape(spec, spec, sizes, shape.itemsize), shape.tokens)
    choose = invariant_experts_config if shape.invariant else experts_config
    return choose(
        target, experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, width=shape.width, tokens=shape.tokens,
        itemsize=shape.itemsize, transposed=shape.transposed,
    )  # fmt: skip


def layout_of(target: Target, shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pointers and constants of the weight and, if it is codes, of its scales and zero points."""
    if not shape.codes:
        none = {"scale": None, "zero": None, "KIND": PLAIN, "OFFSET": 0.0, "ROWS": 0, "COLS": 0}
        return {"weight": shape.dtype}, none
    spec, has_zero = LAYOUTS[shape.codes]
    constants = code_constants(spec, has_zero, target)
    pointers = {"weight": CODE_TYPES.get(constants["KIND"], "u8"), "scale": "u8" if spec.kind == FP4 else "fp32"}
    return (pointers | {"zero": "bf16"}, constants) if has_zero else (pointers, constants | {"zero": None})


def _vector(target: Target, shape: Shape, config: ExpertsConfig, ups: dict, downs: dict) -> Iterator[Specialization]:
    dtype = shape.dtype
    pointers, none = bias_of({"index": "i64", "hidden": dtype, **layout_of(target, shape)[0]}, shape)
    for name, kernel, tiles, own, scalars, constants in (
        ("up", up_vector_kernel, config.up, {"x": dtype}, {"stride_x": "i32"}, ups),
        ("down", down_vector_kernel, config.down, {"routing_weights": dtype, "residual": dtype, "out": dtype},
         {"stride_r": "i32"}, {"K": shape.top_k, "KP": next_power_of_2(shape.top_k), **downs}),
    ):  # fmt: skip
        blocks = {"E": shape.experts, "BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d}
        yield Specialization(
            f"experts-{name}-vector-{shape}", kernel, {**pointers, **own}, scalars, {**constants, **blocks, **none},
            tiles.num_warps, num_stages=3,
        )  # fmt: skip


def _grouped(target: Target, shape: Shape, config: ExpertsConfig, ups: dict, downs: dict) -> Iterator[Specialization]:
    yield from _routing(target, shape, config.block_t)
    dtype = shape.dtype
    tile = {"BLOCK_T": config.block_t, "GROUP_T": config.group_t, "SWAP": config.swap}
    weight = layout_of(target, shape)[0]
    pointers, none = bias_of({"plan": "i32", "hidden": dtype, **weight}, shape)
    signals = signalled_blocks(config, shape.tokens * shape.top_k, shape.rows, target.has_pdl)
    ups = {**ups, "SIGNAL": signals > 0, "PIECES": config.up.pieces}
    downs = {**downs, "UP_BLOCKS": signals, "PIECES": config.down.pieces}
    tiles, more = described(config.up, shape, weight["weight"], 2 if shape.gating == 1 else 1, shape.hidden)
    more["FLAT"] = is_flat(config.up, more["USE_TMA"], bool(shape.codes), signals)
    yield Specialization(
        f"experts-up-{shape}", up_kernel, {**pointers, **tiles, "x": dtype},
        {"capacity": "i32", "stride_x": "i32"}, {**ups, **tile, **_blocks(config.up), **none, **more},
        config.up.num_warps, config.up.num_stages,
    )  # fmt: skip
    tiles, more = described(config.down, shape, weight["weight"], 1, shape.width)
    more["FLAT"] = is_flat(config.down, more["USE_TMA"], bool(shape.codes), signals)
    if reads_tokens(config.down, shape.width * shape.itemsize, bool(shape.codes), signals):
        tiles["h_tiles"] = f"tensordesc<{dtype}[{config.block_t}, {config.down.block_d}]>"
    else:
        more["h_tiles"] = None
    yield Specialization(
        f"experts-down-{shape}", down_kernel, {**pointers, **tiles, "parts": dtype}, {"capacity": "i32"},
        {**downs, **tile, **_blocks(config.down), **none, **more}, config.down.num_warps, config.down.num_stages,
    )  # fmt: skip
    block_n, num_warps = combine_block(shape.tokens, shape.hidden, target.num_sms)
    yield Specialization(
        f"experts-combine-{shape}", combine_kernel,
        {"parts": dtype, "index": "i64", "routing_weights": dtype, "residual": dtype, "out": dtype},
        {"stride_r": "i32"},
        {"E": shape.experts, "K": shape.top_k, "N": shape.hidden, "BLOCK_N": block_n,
         "USE_PDL": target.has_pdl and shape.tokens <= MAX_DEPENDENT_TOKENS},
        num_warps, num_stages=3,
    )  # fmt: skip


def _routing(target: Target, shape: Shape, block_t: int) -> Iterator[Specialization]:
    rows, sizes = shape.tokens * shape.top_k, {"num_rows": "i32", "capacity": "i32"}
    common = {"E": shape.experts, "BINS": routing_bins(shape.experts)}
    if rows <= SINGLE_LAUNCH_ROWS:
        _, block, warps = routing_block(rows, shape.experts)
        yield Specialization(
            f"experts-routing-{shape}", routing_kernel, {"index": "i64", "plan": "i32"}, sizes,
            {**common, "BLOCK_T": block_t, "BLOCK": block, "USE_PDL": target.has_pdl}, warps, num_stages=3,
        )  # fmt: skip
        return
    common["CHUNK"] = CHUNK
    yield Specialization(
        f"experts-count-{shape}", count_kernel, {"index": "i64", "counts": "i32"}, {"num_rows": "i32"}, common,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    yield Specialization(
        f"experts-place-{shape}", place_kernel, {"index": "i64", "counts": "i32", "plan": "i32"}, sizes,
        {**common, "BLOCK_T": block_t, "STEP": place_step(common["BINS"])}, num_warps=8, num_stages=3,
    )  # fmt: skip


def bias_of(pointers: dict[str, Any], shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """(pointers, constants) with the bias among the former or, absent, the latter."""
    return ({**pointers, "bias": shape.dtype}, {}) if shape.biased else (pointers, {"bias": None})


def described(
    tiles: Tiles, shape: Shape, kind: str, groups: int, columns: int, *, apart: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(pointers, constants) of the descriptor of a weight of elements `kind`, as `launch.weight_tiles` decides."""
    bits = LAYOUTS[shape.codes][0].bits if shape.codes else 8 * shape.itemsize
    if not tiles.use_tma or shape.transposed or columns * bits // 8 % 16:
        return {}, {"w_tiles": None, "USE_TMA": False}
    block = [1 if apart else groups, tiles.block_n // groups, tiles.block_d * bits // 8 if bits < 8 else tiles.block_d]
    return {"w_tiles": f"tensordesc<{kind}{block}>"}, {"USE_TMA": True}


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d}
