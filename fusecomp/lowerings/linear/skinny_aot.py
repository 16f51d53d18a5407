"""Specializations of the skinny matmul for ahead-of-time compilation: see `fusecomp/lowerings/aot.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.linear.skinny_heuristics import DEFAULT_TABLE, SECTION, load_table, skinny_config
from fusecomp.lowerings.linear.skinny_kernels import gemv_kernel, skinny_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target


@triton.jit
def residual(accs, args, strides, m, n, mask):
    return accs[0] + tl.load(args[0] + m * strides[0] + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def swiglu(accs, args, strides, m, n, mask):
    g = accs[0]
    return (g / (1 + tl.exp(-g))) * accs[1]


SUBSET = ((4096, 4096, 1, 1, "bf16"), (14336, 4096, 2, 8, "bf16"), (4096, 14330, 1, 64, "fp16"))  # n, k, groups, tokens


def skinny_specializations(target: Target, *, full: bool) -> Iterator[Specialization]:
    """Kernels of a few layers; if `full`, of every tuned one and of every token bucket in every dtype."""
    for n, k, groups, tokens, dtype in SUBSET:
        yield specialization(target, n, k, groups, tokens, dtype, norm=2 * (k == 4096))
    if full:
        for entry in load_table(DEFAULT_TABLE)[SECTION]:
            for dtype in ("bf16", "fp16") if entry["itemsize"] == 2 else ("fp32",):
                for norm in range(4):
                    n, k, groups, tokens = (
                        entry["rows"] // entry["groups"],
                        *(entry[x] for x in ("k", "groups", "tokens")),
                    )
                    yield specialization(target, n, k, groups, tokens, dtype, norm)
                    yield specialization(target, n, k - 6, groups, tokens, dtype, norm)


def specialization(target: Target, n: int, k: int, groups: int, tokens: int, dtype: str, norm: int) -> Specialization:
    """What a layer launches: gate and up with SwiGLU, all others with a residual, dependent where the GPU can."""
    itemsize = 4 if dtype == "fp32" else 2
    config = skinny_config(target, n=n, k=k, groups=groups, tokens=tokens, itemsize=itemsize)
    pdl = target.has_tma
    pointers: dict[str, Any] = {"x": dtype, "weight": dtype, "out": dtype, "args": () if groups == 2 else (dtype,)}
    scalars: dict[str, Any] = {"n": "i32", "k": "i32", "eps": "fp32", "strides": () if groups == 2 else ("i32",)}
    constants: dict[str, Any] = {
        "G": groups, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k, "EVEN_K": k % config.block_k == 0,
        "NORM": norm, "EPILOGUE": swiglu if groups == 2 else residual, "USE_PDL": pdl,
    }  # fmt: skip
    if norm >= 2:
        pointers["norm_weight"] = dtype
    else:
        constants["norm_weight"] = None
    if config.block_t > 1:
        scalars |= dict.fromkeys(("num_tokens", "per_split", "stride_x", "stride_out"), "i32")
        constants |= {
            "BLOCK_T": config.block_t, "SPLITS": config.splits, "PIPELINED": config.num_stages - 1,
            "AHEAD": config.ahead,
            "PREFETCH": config.prefetch, "LEAD": config.lead, "EXACT_NORM": norm > 0 and dtype == "fp16",
        }  # fmt: skip
        scratch = {"partials": "fp32", "part_squares": "fp32", "counters": "i32"}
        if config.splits > 1:
            pointers |= scratch
        else:
            constants |= dict.fromkeys(scratch)
    name = f"skinny-{dtype}-n{n}-k{k}-g{groups}-t{tokens}-norm{norm}"
    kernel = gemv_kernel if config.block_t == 1 else skinny_kernel
    aligned = tuple(name for name, value in (("n", n), ("k", k)) if value % 16 == 0)
    return Specialization(name, kernel, pointers, scalars, constants, config.num_warps, config.num_stages, pdl, aligned)
