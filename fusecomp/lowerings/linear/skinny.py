"""Launch of the skinny matmul: a linear layer of few tokens in one kernel, norm and epilogue included.

Legend: T tokens, N features of the output, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.device import zeroed_counters
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig
from fusecomp.lowerings.linear.skinny_tile import tile_kernel
from fusecomp.lowerings.linear.skinny_vector import vector_kernel
from fusecomp.lowerings.paged_attention.heuristics import cdiv

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run_skinny(
    config: SkinnyConfig,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm_weight: Tensor | None,
    eps: float | None,
    plus_one: bool,
    epilogue: Any,
    args: Sequence[Tensor],
    strides: Sequence[int],
    groups: int,
    use_pdl: bool,
) -> None:
    """out[T, N] = epilogue(norm(x)[T, K] @ weight[G * N, K]^T), in one launch.

    Safe under CUDA-graph capture, if a launch came before (see `zeroed_counters`). Launches on one device must be
    ordered, as those of one stream or graph are: they share counters.

    Args:
        x: last dim contiguous; row stride free. Same dtype as `weight` (one of `DTYPES`).
        weight: contiguous; with G = 2, rows [0, N) are gate and [N, 2N) up.
        out: last dim contiguous; any float dtype.
        norm_weight: [K], or None for a norm without weight.
        eps: RMSNorm's; None for no norm.
        plus_one: the norm's factor is 1 + norm_weight.
        epilogue: Triton function (accs, args, strides, m, n, mask) -> fp32 tile; `skinny_pieces.plain` does nothing.
        args: operands of the epilogue, with their row strides in `strides`.
        use_pdl: programmatic dependent launch; needs an NVIDIA GPU of compute capability 9.0 or more.

    Raises:
        ValueError: layouts or shapes that the kernels cannot read.
    """
    tokens, k = x.shape
    n = out.shape[1]
    _require(weight.shape == (groups * n, k) and weight.is_contiguous(), "weight must be [groups * N, K], contiguous")
    _require(x.stride(1) == 1 and out.stride(1) == 1, "the last dimensions of x and out must be contiguous")
    _require(out.shape[0] == tokens, "x and out must have the same tokens")
    _require(groups in (1, 2), "groups must be 1 or 2")
    _require(config.kernel != "vector" or tokens == 1, "the vector kernel serves one token")
    norm = 0 if eps is None else 1 if norm_weight is None else 3 if plus_one else 2
    common = {
        "G": groups, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k, "EVEN_K": k % config.block_k == 0,
        "NORM": norm, "EPILOGUE": epilogue, "USE_PDL": use_pdl, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    if use_pdl:
        common["launch_pdl"] = True
    norm_weight = norm_weight if norm >= 2 else None
    blocks = cdiv(n, config.block_r // groups)
    if config.kernel == "vector":
        launch(
            vector_kernel, (blocks,),
            x, weight, out, norm_weight, tuple(args), tuple(strides), n, k, eps or 0.0, **common,
        )  # fmt: skip
        return
    teams = blocks * cdiv(tokens, config.block_t)
    per_split, splits = split_steps(cdiv(k, config.block_k), config.splits)
    scratch = split_scratch(x, teams, splits, config.block_r, config.block_t)
    launch(
        tile_kernel, (teams * splits,),
        x, weight, out, norm_weight, *scratch, tuple(args), tuple(strides), tokens, n, k,
        per_split, eps or 0.0, x.stride(0), out.stride(0),
        BLOCK_T=config.block_t, SPLITS=splits, PIPELINED=config.num_stages - 1, EARLY=config.early,
        EXACT_NORM=norm > 0 and x.dtype == torch.float16, **common,
    )  # fmt: skip


def split_steps(steps: int, splits: int) -> tuple[int, int]:
    """(steps of one split, splits) such that no split is empty."""
    per_split = cdiv(steps, splits)
    return per_split, cdiv(steps, per_split)


def split_scratch(
    x: Tensor, teams: int, splits: int, block_r: int, block_t: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Partial sums, partial squares and arrival counters of teams of `splits` programs; nothing for teams of one."""
    if splits == 1:
        return None, None, None
    size = teams * splits * block_t
    partials = torch.empty(size * block_r, dtype=torch.float32, device=x.device)
    part_squares = torch.empty(size, dtype=torch.float32, device=x.device)
    return partials, part_squares, zeroed_counters(x.device, teams)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"skinny matmul: {message}")
