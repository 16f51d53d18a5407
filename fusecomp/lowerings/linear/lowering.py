"""CUDA implementations of `linear` and `norm`: which kernel runs, decided per call from shapes alone.

Few tokens: one skinny kernel, with the norm and the epilogue inside. Many: the norm's kernel, then the measured choice
of matmul.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides, unit_stride
from fusecomp.lowerings.linear.invariant import launch_invariant_linear
from fusecomp.lowerings.linear.large import launch_large, leaves_sums, run_product
from fusecomp.lowerings.linear.large_heuristics import LargeConfig, large_config
from fusecomp.lowerings.linear.norm import launch_norm
from fusecomp.lowerings.linear.skinny import run_skinny
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig, skinny_config
from fusecomp.lowerings.linear.sum_norm import Sums, fits_a_row, launch_sum_norm
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.ops.linear import LinearShape, Program
from fusecomp.ops.mode import batch_invariant
from fusecomp.ops.norm import LAYER, RMS, NormSpec

# Tokens up to which the skinny kernels run: at 64 their chains took longer than the library's on an H200.
SKINNY_LIMIT = 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(x: Tensor, weight: Tensor, operands: Sequence[Tensor], program: Program) -> str | None:
    """Why the kernels cannot run this linear, or None if they can."""
    for tensor in (x, weight, *operands):
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} is none of fp32, fp16, bf16"
    if x.dtype != weight.dtype:
        return f"activations are {x.dtype}, the weight {weight.dtype}"
    if program.torch_dtype not in DTYPES:
        return f"output dtype {program.dtype} is none of fp32, fp16, bf16"
    return None


@cache
def choose(target: Target, shape: LinearShape, tokens: int) -> SkinnyConfig | LargeConfig:
    """The kernel that runs a linear on this many tokens, with its launch configuration."""
    sizes = {"n": shape.n, "k": shape.k, "groups": shape.groups, "tokens": max(1, tokens), "itemsize": shape.itemsize}
    if 0 < tokens <= SKINNY_LIMIT:
        return skinny_config(target, **sizes)
    return large_config(target, **sizes, kind=shape.kind)


def explain_choices(target: Target, shape: LinearShape, token_counts: Sequence[int]) -> list[str]:
    """One line for each run of token counts that one choice serves: "8 to 16 tokens: tile, from ..."."""
    lines: list[str] = []
    named = [(tokens, choose(target, shape, tokens)) for tokens in sorted(set(token_counts))]
    for choice, run in itertools.groupby(named, key=lambda pair: pair[1]):
        counts = [tokens for tokens, _ in run]
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        name = f"skinny {choice.kernel}" if isinstance(choice, SkinnyConfig) else choice.method
        lines.append(f"{span} tokens: {name}, from {choice.source}")
    return lines


def launch_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
) -> Tensor:
    """epilogue(norm(x)[T, K] @ weight[G * N, K]^T): [T, N] contiguous. `supports` must hold.

    Safe under CUDA-graph capture: what runs depends on shapes only.
    """
    if batch_invariant():
        return launch_invariant_linear(x, weight, norm_weight, norm_bias, operands, program)
    x = unit_stride(x)
    args = full_rows(operands, program)
    strides, hook, norm = operand_strides(program, args), epilogue_hook(program), program.norm
    tokens, n = x.shape[0], weight.shape[0] // program.groups
    config = _choice(x, weight, program)
    if isinstance(config, LargeConfig):
        spec = norm or NormSpec("", 0.0)
        return launch_large(
            x, weight, program.torch_dtype, spec.kind, norm_weight, norm_bias, spec.eps, spec.plus_one,
            hook, args, strides, program.groups, program.kind,
        )  # fmt: skip
    if norm is not None and (norm.kind == LAYER or norm_bias is not None):
        x = launch_norm_op(x, norm_weight, norm_bias, norm)
        norm = None
    out = torch.empty((tokens, n), dtype=program.torch_dtype, device=x.device)
    run_skinny(
        config, x, weight, out, None if norm is None else norm_weight,
        None if norm is None else norm.eps, norm is not None and norm.plus_one, hook, args, strides,
        program.groups, uses_pdl(x),
    )  # fmt: skip
    return out


def sums_of(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
) -> Sums | None:
    """The product of `launch_linear` before its epilogue.

    None, and nothing is launched, where the epilogue is part of the product, or a row too long for who goes on.
    """
    if batch_invariant() or not x.shape[0] or not fits_a_row(weight.shape[0] // program.groups):
        return None
    args, config, dtype = full_rows(operands, program), _choice(x, weight, program), program.torch_dtype
    if not isinstance(config, LargeConfig) or not leaves_sums(config, x, weight, dtype, args):
        return None
    if program.norm is not None:
        x = launch_norm_op(x, norm_weight, norm_bias, program.norm)
    acc = run_product(config, x, weight, dtype, program.groups)
    return Sums(acc, dtype, epilogue_hook(program), args, operand_strides(program, args), program.groups)


def launch_linear_pair(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    next_weight: Tensor,
    next_norm_weight: Tensor | None,
    next_norm_bias: Tensor | None,
    next_operands: Sequence[Tensor],
    next_program: Program,
) -> tuple[Tensor, Tensor]:
    """(h, z): h = `launch_linear` of the first, z = that of the next with h as its activations.

    The next linear's norm is made where h is, if it is no part of its product, and h is summed after the first's.
    `supports` must hold for both.
    """
    x, norm = unit_stride(x), next_program.norm
    found = None
    if norm is not None and isinstance(_choice(x, next_weight, next_program), LargeConfig):
        found = sums_of(x, weight, norm_weight, norm_bias, operands, program)
    if norm is not None and found is not None:
        h, x = launch_sum_norm(found, norm, next_norm_weight, next_norm_bias)
        return h, launch_linear(x, next_weight, None, None, next_operands, replace(next_program, norm=None))
    h = launch_linear(x, weight, norm_weight, norm_bias, operands, program)
    return h, launch_linear(h, next_weight, next_norm_weight, next_norm_bias, next_operands, next_program)


def sums_with_norm(target: Target, first: LinearShape, then: LinearShape, tokens: int) -> bool:
    """Whether `launch_linear_pair` makes the next norm where the first is summed, operands being as TMA reads them."""
    return isinstance(choose(target, then, tokens), LargeConfig) and shape_leaves_sums(target, first, tokens)


def shape_leaves_sums(target: Target, shape: LinearShape, tokens: int) -> bool:
    """Whether `sums_of` gives the product of such a linear, operands being as TMA reads them."""
    config = choose(target, shape, tokens)
    if not isinstance(config, LargeConfig) or not fits_a_row(shape.n):
        return False
    return config.splits > 1 if config.method == "persistent" else config.method == "cublas"


def _choice(x: Tensor, weight: Tensor, program: Program) -> SkinnyConfig | LargeConfig:
    """The kernel for as many tokens as x has."""
    n, dtype = weight.shape[0] // program.groups, str(weight.dtype).removeprefix("torch.")
    return choose(target_of(x), LinearShape(n, weight.shape[1], program.groups, program.kind, dtype), x.shape[0])


def launch_norm_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """norm(x) for x [..., K], in x's shape and dtype."""
    assert spec.kind in (RMS, LAYER)
    rows = x.reshape(-1, x.shape[-1])
    return launch_norm(rows, weight, bias, spec.eps, spec.kind, spec.plus_one).view(x.shape)
