"""Specializations of the skinny matmul for ahead-of-time compilation: see `fusecomp/lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.skinny_heuristics import DEFAULT_TABLE, SECTION, load_table, skinny_config
from fusecomp.lowerings.linear.skinny_tile import tile_kernel
from fusecomp.lowerings.linear.skinny_vector import vector_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target

SUBSET = ((4096, 4096, 1, 1, "bf16"), (14336, 4096, 2, 8, "bf16"), (4096, 14330, 1, 64, "fp16"))  # n, k, groups, tokens


def skinny_specializations(target: Target, *, full: bool) -> Iterator[Specialization]:
    """Kernels of a few layers; if `full`, of every tuned one, and of its neighbours in K, in dtype and in norm."""
    for n, k, groups, tokens, dtype in SUBSET:
        yield specialization(target, n, k, groups, tokens, dtype, norm=2 * (k == 4096))
    for entry in load_table(DEFAULT_TABLE)[SECTION] if full else ():
        n, k = entry["rows"] // entry["groups"], entry["k"]
        wide, half = ("fp32", "fp32") if entry["itemsize"] == 4 else ("bf16", "fp16")
        for columns, dtype, norm in ((k, wide, 0), (k, wide, 2), (k, half, 3), (k - 16, wide, 1), (k - 6, wide, 2)):
            yield specialization(target, n, columns, entry["groups"], entry["tokens"], dtype, norm)


def specialization(target: Target, n: int, k: int, groups: int, tokens: int, dtype: str, norm: int) -> Specialization:
    """What a layer launches: gate and up with SwiGLU, all others with a residual, dependent where the GPU can."""
    itemsize = 4 if dtype == "fp32" else 2
    config = skinny_config(target, n=n, k=k, groups=groups, tokens=tokens, itemsize=itemsize)
    pdl = target.has_pdl
    pointers: dict[str, Any] = {"x": dtype, "weight": dtype, "out": dtype, "args": () if groups == 2 else (dtype,)}
    scalars: dict[str, Any] = {"n": "i32", "k": "i32", "eps": "fp32", "strides": () if groups == 2 else ("i32",)}
    constants: dict[str, Any] = {
        "G": groups, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k, "EVEN_K": k % config.block_k == 0,
        "NORM": norm, "EPILOGUE": SWIGLU if groups == 2 else RESIDUAL, "USE_PDL": pdl,
    }  # fmt: skip
    if norm >= 2:
        pointers["norm_weight"] = dtype
    else:
        constants["norm_weight"] = None
    exact = norm > 0 and dtype == "fp16"
    if config.kernel == "tile":
        scalars |= dict.fromkeys(("num_tokens", "per_split", "stride_x", "stride_out"), "i32")
        constants |= {
            "BLOCK_T": config.block_t, "SPLITS": config.splits, "PIPELINED": config.num_stages - 1,
            "EARLY": config.early, "EXACT_NORM": exact,
        }  # fmt: skip
        scratch = {"partials": "fp32", "part_squares": "fp32", "counters": "i32"}
        if config.splits > 1:
            pointers |= scratch
        else:
            constants |= dict.fromkeys(scratch)
    name = f"skinny-{dtype}-n{n}-k{k}-g{groups}-t{tokens}-norm{norm}"
    kernel = {"vector": vector_kernel, "tile": tile_kernel}[config.kernel]
    aligned = tuple(name for name, value in (("n", n), ("k", k)) if value % 16 == 0)
    return Specialization(name, kernel, pointers, scalars, constants, config.num_warps, config.num_stages, aligned)
