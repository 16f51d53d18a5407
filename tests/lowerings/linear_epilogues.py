"""Epilogues that the tests and benchmarks of the large-M linear give the kernels, each beside its eager reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def identity(accs, args, strides, m, n, mask):
    return accs[0]


@triton.jit
def residual(accs, args, strides, m, n, mask):
    return accs[0] + tl.load(args[0] + m * strides[0] + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def bias(accs, args, strides, m, n, mask):
    return accs[0] + tl.load(args[0] + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def swiglu(accs, args, strides, m, n, mask):
    return accs[0] / (1 + tl.exp(-accs[0])) * accs[1]


@triton.jit
def swiglu_biased(accs, args, strides, m, n, mask):
    # A bias [N], a gate and an addition [T, N]: three operands of different shapes.
    gate = accs[0] + tl.load(args[0] + n, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * accs[1]
    value *= tl.load(args[1] + m * strides[1] + n, mask=mask, other=0.0).to(tl.float32)
    return value + tl.load(args[2] + m * strides[2] + n, mask=mask, other=0.0).to(tl.float32)


# name: (kernel, groups, what each operand is, hint)
EPILOGUES = {
    "identity": (identity, 1, "", "identity"),
    "residual": (residual, 1, "t", "residual"),
    "bias": (bias, 1, "n", "bias"),
    "swiglu": (swiglu, 2, "", "other"),
    "swiglu_biased": (swiglu_biased, 2, "ntt", "other"),
}


def reference(name: str, acc: Tensor, args: tuple[Tensor, ...]) -> Tensor:
    """The epilogue of acc [T, G * N], in the dtype of acc, as an unfused model computes it."""
    args = tuple(arg.to(acc.dtype) for arg in args)
    if name == "identity":
        return acc
    if name in ("residual", "bias"):
        return acc + args[0]
    gate, up = acc.chunk(2, 1)
    if name == "swiglu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.silu(gate + args[0]) * up * args[1] + args[2]


def make_args(name: str, num_tokens: int, n: int, dtype: torch.dtype, device: str, pad: int = 0) -> tuple[Tensor, ...]:
    """Operands of an epilogue; those with rows have `pad` more columns in storage."""
    shapes = {"t": lambda: torch.randn(num_tokens, n + pad, dtype=dtype, device=device)[:, :n]}
    shapes["n"] = lambda: torch.randn(n, dtype=dtype, device=device)
    return tuple(shapes[letter]() for letter in EPILOGUES[name][2])


def row_strides(args: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(arg.stride(0) if arg.dim() == 2 else 0 for arg in args)


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str, plus_one: bool
) -> Tensor:
    """The norm as models write it: statistics in fp32 or better, rounded to x's dtype before the weight is applied."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "layer":
        value = value - value.mean(1, keepdim=True)
    value = (value * torch.rsqrt((value * value).mean(1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        value = value * (weight.to(x.dtype) + plus_one)
    return value if bias is None else value + bias.to(x.dtype)
