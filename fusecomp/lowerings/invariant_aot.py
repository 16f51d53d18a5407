"""Specializations of the batch-invariant kernels for ahead-of-time compilation: see `fusecomp/lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.invariant import SPLIT_LIMIT, invariant_config, invariant_kernel, token_tile
from fusecomp.lowerings.linear.skinny_heuristics import DEFAULT_TABLE, SECTION, load_table
from fusecomp.lowerings.paged_attention import heuristics, pieces
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.paged_attention.invariant import invariant_attention_kernel
from fusecomp.lowerings.paged_attention.invariant_launch import invariant_attention
from fusecomp.lowerings.paged_attention.lowering import codes_kind

LAYERS = ((4096, 4096, 1, "bf16"), (14336, 4096, 2, "bf16"), (4096, 14330, 1, "fp16"), (64, 96, 1, "fp32"))
HEADS = (  # dtype, head dim, query heads per kv head, page size, every feature, FP8 cache
    ("bf16", 128, 4, 16, False, False),
    ("bf16", 128, 8, 16, False, True),
    ("bf16", 256, 2, 16, True, False),
    ("fp16", 80, 1, 1, True, True),
    ("fp32", 64, 4, 16, True, False),
)


def invariant_specializations(target: Target, *, full: bool) -> Iterator[Specialization]:
    """A few layers with few and many tokens; if `full`, every tuned shape."""
    layers = dict.fromkeys(LAYERS)
    for entry in load_table(DEFAULT_TABLE)[SECTION] if full else ():
        dtype = "fp32" if entry["itemsize"] == 4 else "bf16"
        layers[entry["rows"] // entry["groups"], entry["k"], entry["groups"], dtype] = None
    for n, k, groups, dtype in layers:
        for tokens in (1, 64, 4096):
            yield _linear(target, n, k, groups, dtype, tokens)
    for case in HEADS:
        for shared in (False, True):
            yield _attention(target, *case, shared)


def _linear(target: Target, n: int, k: int, groups: int, dtype: str, tokens: int) -> Specialization:
    itemsize = 4 if dtype == "fp32" else 2
    config = invariant_config(target, n=n, k=k, groups=groups, itemsize=itemsize)
    block_t, warps, stages = token_tile(target, config, tokens, itemsize)
    split = config.segments > 1 and tokens <= SPLIT_LIMIT
    pointers: dict[str, Any] = {"x": dtype, "weight": dtype, "out": dtype, "args": () if groups == 2 else (dtype,)}
    scalars: dict[str, Any] = dict.fromkeys(("num_tokens", "n", "k", "stride_x", "stride_out"), "i32")
    scalars["strides"] = () if groups == 2 else ("i32",)
    constants: dict[str, Any] = {
        "G": groups, "BLOCK_T": block_t, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k,
        "SEGMENTS": config.segments, "PER_SEGMENT": config.per_segment, "SPLIT": split,
        "EVEN_K": k % config.block_k == 0, "EPILOGUE": SWIGLU if groups == 2 else RESIDUAL, "USE_PDL": target.has_pdl,
    }  # fmt: skip
    scratch = {"partials": "fp32", "counters": "i32"}
    if split:
        pointers |= scratch
    else:
        constants |= dict.fromkeys(scratch)
    aligned = tuple(name for name, value in (("n", n), ("k", k)) if value % 16 == 0)
    name = f"invariant-{dtype}-n{n}-k{k}-g{groups}-t{tokens}"
    return Specialization(
        name, invariant_kernel, pointers, scalars, constants, warps, stages, aligned
    )  # fmt: skip


def _attention(
    target: Target, dtype: str, head_dim: int, group: int, page: int, every: bool, quantized: bool, shared: bool
) -> Specialization:
    config = invariant_attention(target, head_dim=head_dim, itemsize=4 if dtype == "fp32" else 2, group=group)
    score = pieces.softcap_score_fp32 if dtype == "fp32" else pieces.softcap_score
    pointers = {"q": dtype, "kv_cache": "u8" if quantized else dtype, "out": dtype}
    pointers |= dict.fromkeys(("cu_q_lens", "seq_lens", "block_tables"), "i32")
    scratch = {"part_acc": "fp32", "part_ml": "fp32", "arrivals": "i32"}
    constants: dict[str, Any] = {
        "H": 8 * group, "G": 8, "D": head_dim, "DP": heuristics.padded_dim(head_dim), "PAGE": page,
        "QUERIES": config.queries, "BLOCK_N": config.block_n, "SEGMENT": config.segment, "SHARED": shared,
        "WINDOWED": every, "SCORE": score if every else pieces.plain_score,
        "SINK": pieces.with_sink if every else pieces.no_sink, "CODES": codes_kind(target, quantized),
        "USE_PDL": target.has_pdl,
    }  # fmt: skip
    if every:
        pointers["sinks"] = dtype
    else:
        constants["sinks"] = None
    if shared:
        pointers |= scratch
    else:
        constants |= dict.fromkeys(scratch)
    scalars = {"pre": "fp32", "post": "fp32", **dict.fromkeys(("first_row", "window", "segments"), "i32")}
    strides = ("qt", "qh", "page", "v", "g", "slot", "table")
    return Specialization(
        f"invariant-attention-{dtype}-d{head_dim}-r{group}-b{page}{'-every' * every}{'-fp8' * quantized}-{shared}",
        invariant_attention_kernel, pointers, scalars | dict.fromkeys((f"stride_{s}" for s in strides), "i32"),
        constants, config.num_warps, config.num_stages,
    )  # fmt: skip
