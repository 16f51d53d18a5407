"""Launches of products of codes by codes, as a configuration says.

Legend: T tokens, N output features, K input features, G accumulator groups, S splits of K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusecomp.lowerings.device import target_of, uses_pdl, zeroed_counters
from fusecomp.lowerings.keep import store_policy
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides, unit_stride
from fusecomp.lowerings.linear.large_heuristics import tma_reads
from fusecomp.lowerings.linear.pointwise import launch_pointwise
from fusecomp.lowerings.linear.skinny_pieces import plain
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.lowerings.quant.scaled import scaled_kernel
from fusecomp.lowerings.quant.scaled_heuristics import KEPT_TOKENS, LIBRARY, TILE, ScaledConfig
from fusecomp.lowerings.quant.scaled_tile import scaled_tile_kernel
from fusecomp.ops.linear import Program
from fusecomp.ops.quant import FP8, LARGEST, TENSOR, ActivationSpec, WeightSpec


def run_scaled(
    config: ScaledConfig,
    x: Tensor,
    x_scale: Tensor,
    q: Tensor,
    w_scale: Tensor,
    operands: Sequence[Tensor],
    program: Program,
    spec: WeightSpec,
    activation: ActivationSpec,
) -> Tensor:
    """epilogue((x * x_scale)[T, K] @ (q * w_scale)[G * N, K]^T) as `config` says: [T, N] contiguous.

    Launches on one device must be ordered, as those of one stream or graph are: they share counters.
    """
    tokens, n, groups = x.shape[0], q.shape[0] // program.groups, program.groups
    args = full_rows(operands, program)
    strides, hook = operand_strides(program, args), epilogue_hook(program)
    acc = None
    if tokens and leaves_sums(config):
        acc = run_product(config, x, x_scale, q, w_scale, groups, spec, activation)
        if not program.steps and acc.dtype == program.torch_dtype and acc.dim() == 2:
            return acc
    out = torch.empty((tokens, n), dtype=program.torch_dtype, device=x.device)
    if acc is not None:
        return launch_pointwise(acc, out, hook, args, strides, groups)
    if not tokens:
        return out
    return _launch_product(config, x, x_scale, q, w_scale, out, hook, args, strides, groups, spec, activation)


def leaves_sums(config: ScaledConfig) -> bool:
    """Whether the product leaves the epilogue, and the sum over splits of K, to another kernel."""
    return config.method == LIBRARY or (config.method != TILE and config.splits > 1)


def run_product(
    config: ScaledConfig,
    x: Tensor,
    x_scale: Tensor,
    q: Tensor,
    w_scale: Tensor,
    groups: int,
    spec: WeightSpec,
    activation: ActivationSpec,
) -> Tensor:
    """The scaled product [T, G * N], or fp32 parts of it [S, T, G * N], where `leaves_sums`; there are tokens."""
    if config.method == LIBRARY:
        return _library(config, unit_stride(x), x_scale, q, w_scale)
    acc = torch.empty((config.splits, x.shape[0], q.shape[0]), dtype=torch.float32, device=x.device)
    return _launch_product(config, x, x_scale, q, w_scale, acc, plain, (), (), groups, spec, activation)


def _launch_product(
    config: ScaledConfig,
    x: Tensor,
    x_scale: Tensor,
    q: Tensor,
    w_scale: Tensor,
    out: Tensor,
    hook: Any,
    args: tuple[Tensor, ...],
    strides: tuple[int, ...],
    groups: int,
    spec: WeightSpec,
    activation: ActivationSpec,
) -> Tensor:
    """out [T, N] = the epilogue of the product, or of a persistent kernel with splits its parts out [S, T, G * N]."""
    x, by_token = unit_stride(x), activation.granularity != TENSOR
    use_pdl = uses_pdl(x)
    common: dict[str, Any] = {
        "G": groups, "BLOCK_T": config.block_t, "BLOCK_K": config.block_k, "CHUNK": config.chunk,
        "X_ROWS": by_token, "X_COLS": activation.block, "ROWS": spec.rows, "COLS": spec.cols, "EPILOGUE": hook,
        "USE_PDL": use_pdl, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if use_pdl:
        common["launch_pdl"] = True
    scale_stride = x_scale.stride(0) if by_token else 0
    run = _tile if config.method == TILE else _persistent
    columns = spec.scales(*q.shape)[1]
    return run(config, x, x_scale, q, w_scale, out, args, strides, groups, scale_stride, columns, common)


def _library(config: ScaledConfig, x: Tensor, x_scale: Tensor, q: Tensor, w_scale: Tensor) -> Tensor:
    """The scaled product [T, G * N], bf16."""
    scale = w_scale.to(torch.float32)
    if x.dtype == torch.int8:
        sums = torch._int_mm(x, q.t())
        return (sums * x_scale * scale.reshape(1, -1)).to(torch.bfloat16)
    scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(1, -1)
    x_scale = x_scale.reshape(()) if x_scale.numel() == 1 and scale.dim() == 0 else x_scale.reshape(-1, 1)
    return torch._scaled_mm(
        x, q.t(), scale_a=x_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=not config.exact
    )


def _tile(
    config: ScaledConfig, x: Tensor, x_scale: Tensor, q: Tensor, w_scale: Tensor, out: Tensor,
    args: tuple[Tensor, ...], strides: tuple[int, ...], groups: int, stride_xs: int, columns: int,
    common: dict[str, Any],
) -> Tensor:  # fmt: skip
    (tokens, k), n = x.shape, out.shape[1]
    steps = cdiv(k, config.block_k)
    per_split = cdiv(steps, config.splits)
    splits = cdiv(steps, per_split)  # none is empty
    teams = cdiv(n, config.block_n) * cdiv(tokens, config.block_t)
    partials = counters = None
    if splits > 1:
        size = teams * splits * config.block_t * config.block_n * groups
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = zeroed_counters(x.device, teams)
    launch(
        scaled_tile_kernel, (teams * splits,),
        x, q, x_scale, w_scale, out, partials, counters, args, strides, tokens, n, k, per_split, x.stride(0),
        out.stride(0), stride_xs, columns, BLOCK_R=config.block_n * groups, SPLITS=splits, AHEAD=config.ahead,
        EVEN_K=k % config.block_k == 0, **common,
    )  # fmt: skip
    return out


def _persistent(
    config: ScaledConfig, x: Tensor, x_scale: Tensor, q: Tensor, w_scale: Tensor, out: Tensor,
    args: tuple[Tensor, ...], strides: tuple[int, ...], groups: int, stride_xs: int, columns: int,
    common: dict[str, Any],
) -> Tensor:  # fmt: skip
    (tokens, k), n = x.shape, q.shape[0] // groups
    use_tma = config.use_tma and tma_reads(x) and tma_reads(q)
    x_tiles = w_tiles = None
    if use_tma:
        x_tiles = TensorDescriptor(x, [tokens, k], [x.stride(0), 1], [config.block_t, config.block_k])
        if groups == 1:
            w_tiles = TensorDescriptor(q, [n, k], [k, 1], [config.block_n, config.block_k])
        else:
            w_tiles = TensorDescriptor(q, [2, n, k], [n * k, k, 1], [2, config.block_n, config.block_k])
    tiles = cdiv(tokens, config.block_t) * cdiv(n, config.block_n) * config.splits
    launch(
        scaled_kernel, (min(tiles, target_of(x).num_sms * config.per_sm),),
        x, q, x_tiles, w_tiles, x_scale, w_scale, out, args, strides, tokens, x.stride(0), out.stride(-2), stride_xs,
        columns, N=n, K=k, BLOCK_N=config.block_n, GROUP_T=config.group_t, SPLITS=config.splits, PIECES=config.pieces,
        SWAP=config.swap, UNIT=_unit(k), POLICY=store_policy(out, KEPT_TOKENS), USE_TMA=use_tma, **common,
    )  # fmt: skip
    return out


def _unit(k: int) -> float:
    """A power of 2 that brings every sum of k products of fp8 codes into fp16's range."""
    return 2.0 ** -max(0, math.ceil(math.log2(max(1, k) * LARGEST[FP8] ** 2 / torch.finfo(torch.float16).max)))
