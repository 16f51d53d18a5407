"""RMSNorm and LayerNorm of whole rows as a kernel of their own.

Legend: T tokens, K features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.keep import store_rows
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.linear.large_heuristics import norm_block
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.ops.mode import batch_invariant

KINDS = ("rms", "layer")
# Widest row of a launch that moves in before the kernel before has ended. At 4,096 such launches cost the decode step
# of an 8B model on an H200 3% at 64 tokens and 1% at 256: waiting, they slow the product down. Behind an epilogue's
# kernel, which lets them in when the product has ended, 4,096 is neither better nor worse (8 layers on an H100, 64
# tokens: 2.03 ms either way). 2,048 brings the step of a 1B model from 1.483 to 1.433 ms.
MAX_DEPENDENT_K = 2048


@triton.jit
def _row(x, m, k, stride_x, mask):
    return tl.load(x + m * stride_x + k, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def parameters(weight, bias, k, within):
    """(weight, bias) in columns k as they are stored, each 0 where it is None: neither waits for the row."""
    w = 0.0 if weight is None else tl.load(weight + k, mask=within, other=0.0)
    b = 0.0 if bias is None else tl.load(bias + k, mask=within, other=0.0)
    return w, b


@triton.jit
def scaled(value, given, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PLUS_ONE: tl.constexpr):
    """value * weight + bias of `parameters`, where there are such."""
    if HAS_WEIGHT:
        scale = given[0].to(tl.float32)
        value *= scale + 1.0 if PLUS_ONE else scale
    if HAS_BIAS:
        value += given[1].to(tl.float32)
    return value


@triton.jit(do_not_specialize=["num_tokens"])
def norm_kernel(
    x,
    weight,
    bias,
    y,
    eps,
    num_tokens,
    stride_x,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CENTERED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """y[T, K] = norm(x) * weight + bias; program i does BLOCK_T rows.

    x [T, K] with a row stride, weight and bias [K] or None, y contiguous; statistics in fp32. CENTERED subtracts the
    mean (LayerNorm); PLUS_ONE scales by 1 + weight. Rows of up to BLOCK_K columns are read once; longer ones in pieces,
    once for each statistic and once for the output.
    Bytes: two tensors of T K.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    columns = tl.arange(0, BLOCK_K)[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    within = columns < K
    given = parameters(weight, bias, columns, within)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if K <= BLOCK_K:
        mask = (m < num_tokens) & within
        value = _row(x, m, columns, stride_x, mask)
        if CENTERED:
            value = tl.where(within, value - tl.sum(value, 1)[:, None] / K, 0.0)
        scale = tl.rsqrt(tl.sum(value * value, 1)[:, None] / K + eps)
        value = scaled(value * scale, given, weight is not None, bias is not None, PLUS_ONE)
        store_rows(y + m * K + columns, value.to(dtype), mask, num_tokens)
    else:
        mean = tl.zeros((BLOCK_T, 1), tl.float32)
        if CENTERED:
            for first in range(0, K, BLOCK_K):
                k = first + columns
                mask = (m < num_tokens) & (k < K)
                value = _row(x, m, k, stride_x, mask)
                mean += tl.sum(value, 1)[:, None] / K
        square = tl.zeros((BLOCK_T, 1), tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + columns
            mask = (m < num_tokens) & (k < K)
            value = _row(x, m, k, stride_x, mask)
            value = tl.where(k < K, value - mean, 0.0)
            square += tl.sum(value * value, 1)[:, None] / K
        scale = tl.rsqrt(square + eps)
        for first in range(0, K, BLOCK_K):
            k = first + columns
            mask = (m < num_tokens) & (k < K)
            value = _row(x, m, k, stride_x, mask)
            given = parameters(weight, bias, k, k < K)
            value = scaled((value - mean) * scale, given, weight is not None, bias is not None, PLUS_ONE)
            store_rows(y + m * K + k, value.to(dtype), mask, num_tokens)


def launch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str = "rms", plus_one: bool = False
) -> Tensor:
    """norm(x) [T, K], contiguous in x's dtype.

    Args:
        x: [T, K], last dim contiguous, any row stride.
        weight, bias: [K] contiguous, or None.
        kind: "rms" (x * rsqrt(mean(x^2) + eps)) or "layer" (the same of x - mean(x)).
        plus_one: scale by 1 + weight.

    Raises:
        ValueError: another kind, or an operand whose shape or last stride is not as above.
    """
    require_norm(kind, x.shape[1], weight, bias)
    if x.stride(-1) != 1:
        raise ValueError(f"norm: x has stride {x.stride(-1)} in its last dim, the kernel reads it as 1")
    num_tokens, k = x.shape
    y = torch.empty((num_tokens, k), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    # Warps decide the order of a row's sums.
    block_t, block_k, num_warps = norm_block(1 if batch_invariant() else num_tokens, k)
    use_pdl = uses_pdl(x) and k <= MAX_DEPENDENT_K
    options = {"launch_pdl": True} if use_pdl else {}
    options |= rounding_options()
    launch(
        norm_kernel, (cdiv(num_tokens, block_t),),
        x, weight, bias, y, eps, num_tokens, x.stride(0),
        K=k, BLOCK_T=block_t, BLOCK_K=block_k, CENTERED=kind == "layer", PLUS_ONE=plus_one, USE_PDL=use_pdl,
        num_warps=num_warps, **options,
    )  # fmt: skip
    return y


def require_norm(kind: str, k: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError: an unknown kind, or a weight or bias that is not [K] and contiguous."""
    if kind not in KINDS:
        raise ValueError(f"norm kind {kind!r} is none of {', '.join(KINDS)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.shape != (k,) or tensor.stride(-1) != 1):
            found = f"{list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"norm: {name} is {found}, wanted [{k}], contiguous")
