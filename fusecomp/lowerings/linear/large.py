"""`linear` for many tokens: the norm's kernel if there is one, the measured choice of matmul, then the epilogue.

Safe under CUDA-graph capture: scratch comes from `torch.empty`, and choices depend on shapes only.
Legend: T tokens, N output features, K input features, G accumulator groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.keep import store_policy
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear import large_heuristics
from fusecomp.lowerings.linear.large_heuristics import LargeConfig, tma_reads
from fusecomp.lowerings.linear.norm import launch_norm
from fusecomp.lowerings.linear.persistent import persistent_kernel
from fusecomp.lowerings.linear.pointwise import launch_pointwise
from fusecomp.lowerings.linear.skinny_pieces import plain
from fusecomp.lowerings.paged_attention.heuristics import cdiv


def launch_large(
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_plus_one: bool,
    epilogue: Any,
    args: tuple[Tensor, ...],
    strides: tuple[int, ...],
    groups: int,
    kind_hint: str,
) -> Tensor:
    """EPILOGUE(norm(x) @ weight^T): [T, N] contiguous in `out_dtype`.

    Args:
        x: [T, K], last dim contiguous, any row stride.
        weight: [G * N, K] contiguous, x's dtype.
        norm_kind: "", "rms" or "layer"; the `norm_*` after it are `launch_norm`'s.
        epilogue: a Triton function (accs, args, strides, m, n, mask) -> fp32 tile.
        args, strides: the epilogue's operands and their row strides in elements.
        kind_hint: what the epilogue does: "identity", "residual" (adds args[0] [T, N]), "bias" (adds args[0] [N]) or
            "other".

    Raises:
        ValueError: a shape, stride, dtype or hint other than these.
    """
    _check(x, weight, args, strides, groups, kind_hint)
    if norm_kind:
        x = launch_norm(x, norm_weight, norm_bias, norm_eps, norm_kind, norm_plus_one)
    config = large_heuristics.large_config(
        target_of(x), n=weight.shape[0] // groups, k=x.shape[1], groups=groups, tokens=max(1, x.shape[0]),
        itemsize=x.element_size(), kind=kind_hint,
    )  # fmt: skip
    return run_matmul(config, x, weight, out_dtype, epilogue, args, strides, groups, kind_hint)


def run_matmul(
    config: LargeConfig,
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    epilogue: Any,
    args: tuple[Tensor, ...],
    strides: tuple[int, ...],
    groups: int,
    kind_hint: str,
) -> Tensor:
    """EPILOGUE(x @ weight^T) as `config` says, by the library where TMA cannot read x; arguments of `launch_large`."""
    num_tokens, n = x.shape[0], weight.shape[0] // groups
    acc = None
    if num_tokens and leaves_sums(config, x, weight, out_dtype, args):
        acc = run_product(config, x, weight, out_dtype, groups)
        if kind_hint == "identity" and acc.dtype == out_dtype and acc.dim() == 2:
            return acc
    elif num_tokens and not _runs_persistent(config, x, weight):
        return torch.addmm(args[0], x, weight.t())
    out = torch.empty((num_tokens, n), dtype=out_dtype, device=x.device)
    if acc is not None:
        return launch_pointwise(acc, out, epilogue, args, strides, groups)
    return _launch_persistent(config, x, weight, out, epilogue, args, strides, groups) if num_tokens else out


def leaves_sums(
    config: LargeConfig, x: Tensor, weight: Tensor, out_dtype: torch.dtype, args: tuple[Tensor, ...]
) -> bool:
    """Whether the product leaves the epilogue, and the sum over splits of K, to another kernel."""
    if _runs_persistent(config, x, weight):
        return config.splits > 1
    return config.method != "cublas_addmm" or not args[0].dtype == x.dtype == out_dtype


def run_product(config: LargeConfig, x: Tensor, weight: Tensor, out_dtype: torch.dtype, groups: int) -> Tensor:
    """x @ weight^T [T, G * N], or fp32 parts of it [S, T, G * N], where `leaves_sums`; there are tokens."""
    if _runs_persistent(config, x, weight):
        parts = (config.splits, x.shape[0], weight.shape[0])
        buffer = torch.empty(parts, dtype=torch.float32, device=x.device)
        return _launch_persistent(config, x, weight, buffer, plain, (), (), groups)
    # The library rounds to the inputs' dtype unless told otherwise; it can be told on a GPU alone.
    widened = x.is_cuda and out_dtype == torch.float32 != x.dtype
    return torch.mm(x, weight.t(), out_dtype=out_dtype) if widened else torch.mm(x, weight.t())


def _runs_persistent(config: LargeConfig, x: Tensor, weight: Tensor) -> bool:
    return config.method == "persistent" and (not config.use_tma or (tma_reads(x) and tma_reads(weight)))


def _launch_persistent(
    config: LargeConfig,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    epilogue: Any,
    args: tuple[Tensor, ...],
    strides: tuple[int, ...],
    groups: int,
) -> Tensor:
    """out [T, N] = EPILOGUE(x @ weight^T), or with splits its parts out [S, T, G * N]."""
    num_tokens, k = x.shape
    n = weight.shape[0] // groups
    x_tiles = w_tiles = None
    if config.use_tma:
        x_tiles = TensorDescriptor(x, [num_tokens, k], [x.stride(0), 1], [config.block_t, config.block_k])
        w_tiles = _weight_tiles(weight, n, k, groups, config)
    use_pdl = uses_pdl(x)
    options: dict[str, Any] = {"launch_pdl": True} if use_pdl else {}
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    constants = {
        "N": n, "K": k, "G": groups, "BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PIECES": config.pieces, "SWAP": config.swap, "USE_TMA": config.use_tma, "USE_PDL": use_pdl,
        "POLICY": store_policy(out, large_heuristics.KEPT_TOKENS), "EPILOGUE": epilogue,
    }  # fmt: skip
    tiles_t, tiles_n = cdiv(num_tokens, config.block_t), cdiv(n, config.block_n)
    programs = min(tiles_t * tiles_n * config.splits, target_of(x).num_sms * config.per_sm)
    launch(
        persistent_kernel, (programs,),
        x, weight, x_tiles, w_tiles, out, args, strides, num_tokens, x.stride(0), out.stride(-2),
        GROUP_T=config.group_t, SPLITS=config.splits, **constants, **options,
    )  # fmt: skip
    return out


def _weight_tiles(weight: Tensor, n: int, k: int, groups: int, config: LargeConfig) -> TensorDescriptor:
    """Blocks of block_n rows, or of as many from each of the two groups."""
    if groups == 1:
        return TensorDescriptor(weight, [n, k], [k, 1], [config.block_n, config.block_k])
    return TensorDescriptor(weight, [2, n, k], [n * k, k, 1], [2, config.block_n, config.block_k])


def _check(
    x: Tensor, weight: Tensor, args: tuple[Tensor, ...], strides: tuple[int, ...], groups: int, kind_hint: str
) -> None:
    if groups not in (1, 2) or weight.shape[0] % groups:
        raise ValueError(
            f"linear: {weight.shape[0]} rows of weight in {groups} groups; 1 or 2 equal ones are supported"
        )
    if x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(f"linear: x {list(x.shape)} {x.dtype} does not fit weight {list(weight.shape)} {weight.dtype}")
    if x.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError("linear: x must be contiguous in its last dim, and weight altogether")
    if kind_hint not in large_heuristics.KINDS or (kind_hint in ("residual", "bias") and not args):
        raise ValueError(f"linear: hint {kind_hint!r} with {len(args)} operands")
    if len(args) != len(strides):
        raise ValueError(f"linear: {len(args)} operands with {len(strides)} row strides")
