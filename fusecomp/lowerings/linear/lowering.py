"""CUDA implementations of `linear` and `norm`: which kernel runs, decided per call from shapes alone.

Few tokens: one skinny kernel, with the norm and the epilogue inside. Many: the norm's kernel, then the measured choice
of matmul.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.linear.epilogue import epilogue_hook, operand_strides
from fusecomp.lowerings.linear.invariant import launch_invariant_linear
from fusecomp.lowerings.linear.large import launch_large
from fusecomp.lowerings.linear.large_heuristics import LargeConfig, large_config
from fusecomp.lowerings.linear.norm import launch_norm
from fusecomp.lowerings.linear.skinny import run_skinny
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig, skinny_config
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.ops.linear import FULL, LinearShape, Program
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
    x = x if x.stride(-1) == 1 else x.contiguous()
    args = tuple(
        o if layout != FULL or o.stride(-1) == 1 else o.contiguous()
        for o, layout in zip(operands, program.operands, strict=True)
    )
    strides, hook, norm = operand_strides(program, args), epilogue_hook(program), program.norm
    tokens, k = x.shape
    n = weight.shape[0] // program.groups
    target = target_of(x)
    shape = LinearShape(n, k, program.groups, program.kind, str(x.dtype).removeprefix("torch."))
    config = choose(target, shape, tokens)
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


def launch_norm_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """norm(x) for x [..., K], in x's shape and dtype."""
    assert spec.kind in (RMS, LAYER)
    rows = x.reshape(-1, x.shape[-1])
    y, _ = launch_norm(rows, None, weight, bias, spec.eps, spec.kind, spec.plus_one)
    return y.view(x.shape)
