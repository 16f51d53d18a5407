"""Launches of `folded_held_kernel`: its scratch and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, zeroed_counters
from fusecomp.lowerings.launch import ALIGNMENT, launch
from fusecomp.lowerings.paged_attention.heuristics import cdiv, next_power_of_2
from fusecomp.lowerings.quant.folded_held import folded_held_kernel
from fusecomp.lowerings.quant.heuristics import (
    HELD_ASKED,
    HELD_COLUMNS,
    HELD_ROWS,
    HELD_TOKENS,
    QuantConfig,
    held_registers,
)


def in_bf16(scale: Tensor, zero: Tensor | None) -> bool:
    """Whether scales and zero points are as the kernel reads them, two to a word."""
    given = [part for part in (scale, zero) if part is not None]
    return all(part.dtype == torch.bfloat16 and part.storage_offset() % 2 == 0 for part in given)


def run_held(
    config: QuantConfig,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    args: tuple[Tensor, ...],
    strides: tuple[int, ...],
    out: Tensor,
    eps: float,
    options: dict[str, Any],
) -> None:
    """out[T, N] of x[T, K], whose last dim is contiguous; scales and zero points are bf16, K whole tiles of warps.

    Args:
        args: of the epilogue, as `full_rows` gives them, and their row strides.
        options: the kernel's other constants, and the launch's options.

    Raises:
        ValueError: more tokens than registers have room for, or scales or zero points that are no words of two bf16.
    """
    if len(x) > HELD_TOKENS:
        raise ValueError(f"held inputs: {len(x)} tokens, of {HELD_TOKENS} at most")
    if not in_bf16(scale, zero):
        found = "; ".join(f"{p.dtype} from element {p.storage_offset()} on" for p in (scale, zero) if p is not None)
        raise ValueError(f"held inputs: scales are no words of two bf16: {found}")
    n, k, groups = out.shape[1], x.shape[1], options["G"]
    columns, rows = HELD_COLUMNS * config.parts, next_power_of_2(config.block_r)
    teams, splits = cdiv(groups * n, config.block_r), cdiv(k, columns)
    programs, tokens = teams * splits, len(x)
    partials, warp_scales = (
        torch.empty(programs * tokens * size * config.parts, dtype=torch.float32, device=x.device) for size in (rows, 2)
    )
    aligned = all(part is None or part.data_ptr() % ALIGNMENT == 0 for part in (scale, zero))
    asks = options["ASM"] and target_of(x).has_tma and k % HELD_ASKED == 0 and aligned
    launch(
        folded_held_kernel, (programs,),
        x, q, scale.view(torch.int32), None if zero is None else zero.view(torch.int32), out,
        norm_weight, partials, warp_scales,
        None if splits == 1 else zeroed_counters(x.device, teams), args, strides, x.stride(0), out.stride(0),
        cdiv(config.block_r, HELD_ROWS), n, k, eps, BLOCK_T=tokens, PARTS=config.parts, SPLITS=splits,
        AHEAD=config.ahead, ASK_SCALES=asks, EARLY=config.early, EVEN_K=k % columns == 0, **options | {"BLOCK_R": rows},
        **({"maxnreg": held_registers(tokens)} if options["ASM"] else {}),
    )  # fmt: skip
