"""What a product leaves to another kernel, and the codes that the next product begins with, in one launch.

The sum over splits of K, the epilogue (in most models the residual), the norm of the result, and its codes.

Legend: T tokens, N features, G accumulator groups, S splits of K, B columns of a block that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.linear.norm import parameters, require_norm
from fusecomp.lowerings.linear.pointwise import require_sums
from fusecomp.lowerings.linear.sum_norm import Sums, row_of_sums
from fusecomp.lowerings.quant import pieces, rows
from fusecomp.lowerings.quant.activations import code_kind, rows_block
from fusecomp.lowerings.quant.rows import quantize_row, store_scale
from fusecomp.ops.norm import LAYER, NormSpec
from fusecomp.ops.quant import TENSOR, ActivationSpec


@triton.jit(do_not_specialize=["num_tokens"])
def sum_quantize_kernel(
    acc,  # [S, T, G * N], contiguous
    total,  # [T, N], contiguous
    weight,  # [N] of the norm, or None
    bias,  # [N] of the norm, or None
    given,  # SCALE 0: [1], a float type; else None
    out,  # [T, N] codes
    scales,  # fp32 [1], [T] or [T, ceil(N / B)]
    args,  # tuple of the epilogue's operands
    strides,  # tuple of their row strides
    eps,
    num_tokens,
    N: tl.constexpr,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """total = EPILOGUE(sums over S of acc's groups), and codes and scales of norm(total); program i does row i.

    BLOCK_N holds a row. The norm is that of total as stored, its result is not rounded before it is quantized. KIND,
    SCALE (0, 1 or 2), NORM and the codes are those of `rows.py`.
    Bytes: S G T N of acc, T N of total, T N of codes, the scales and the operands.
    """
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    m = tl.program_id(0).to(tl.int64)
    scale = tl.full([1, 1], 1.0, tl.float32)
    norm = parameters(weight, bias, n, n < N)
    if USE_PDL:
        # What follows moves in when the matmul has ended, not while it runs: waiting there, it would slow it down.
        gdc_wait()
        gdc_launch_dependents()
    if SCALE == 0:
        scale = tl.load(given + tl.zeros([1, 1], tl.int32)).to(tl.float32)
    at = m + tl.zeros([1, 1], tl.int64)
    value = row_of_sums(acc, total, args, strides, num_tokens, at, n, N, G, SPLITS, EPILOGUE)
    scale = quantize_row(
        value, scale, norm, out, scales, eps, m, n, N, BLOCK_N, BLOCK, NORM, weight is not None, bias is not None,
        PLUS_ONE, KIND, SCALE, False,
    )  # fmt: skip
    store_scale(scales, scale, m, SCALE)


def one_launch(spec: ActivationSpec) -> bool:
    """Whether codes of a row need no other row: one scale for all values of a step follows from all of them."""
    return not (spec.dynamic and spec.granularity == TENSOR)


def launch_sum_quantize(
    sums: Sums,
    norm: NormSpec,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Tensor | None,
    spec: ActivationSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, codes, scales): total [T, N] is the sums' epilogue, the others are `launch_quantize` of norm(total).

    Args:
        sums: of one token or more; `fits_a_row(N)`.
        weight, bias: the norm's, [N] contiguous, or None.
        given: the static scale [1], or None.
        spec: of the codes; `one_launch`.

    Raises:
        ValueError: the sums, weight or bias are not as above.
    """
    acc, (num_tokens, n) = sums.acc, sums.shape
    splits = require_sums(acc, num_tokens, n, sums.groups)
    require_norm(norm.kind, n, weight, bias)
    blocks = -(-n // spec.block) if spec.block else 1
    total = torch.empty((num_tokens, n), dtype=sums.dtype, device=acc.device)
    codes = torch.empty((num_tokens, n), dtype=spec.codes_dtype, device=acc.device)
    size = (1,) if spec.granularity == TENSOR else (num_tokens, blocks)
    scales = torch.empty(size, dtype=torch.float32, device=acc.device)
    kind = code_kind(spec, target_of(acc), acc.is_cuda)
    block_n, num_warps = rows_block(target_of(acc), num_tokens, n)
    use_pdl = uses_pdl(acc)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        sum_quantize_kernel, (num_tokens,),
        acc, total, weight, bias, given, codes.view(torch.uint8) if kind == pieces.FP8 else codes, scales, sums.args,
        sums.strides, norm.eps, num_tokens, N=n, G=sums.groups, SPLITS=splits, BLOCK_N=max(block_n, spec.block),
        BLOCK=spec.block or 1, NORM=2 if norm.kind == LAYER else 1, PLUS_ONE=norm.plus_one, KIND=kind,
        SCALE=rows.GIVEN if not spec.dynamic else rows.OF_BLOCK if spec.block else rows.OF_TOKEN,
        EPILOGUE=sums.epilogue, USE_PDL=use_pdl, num_warps=num_warps, **options,
    )  # fmt: skip
    return total, codes, scales
