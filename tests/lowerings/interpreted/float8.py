"""fp8 (e4m3fn) and int8 products under Triton's interpreter, which keeps fp8 as the bits of uint8 and loses its NaN."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def _float32(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.float8e4nv:
        return handle
    return TensorHandle(_VALUES[handle.data], tl.float32)


@functools.cache
def multiply_float8() -> None:
    """Let dot multiply the numbers that fp8 codes stand for, and integers in int32; once in a process, whoever asks."""
    create_dot = InterpreterBuilder.create_dot

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        if a.dtype.scalar == tl.int8:
            acc = rest[0]
            sums = np.matmul(a.data.astype(np.int32), b.data.astype(np.int32)) + acc.data  # type: ignore[attr-defined]
            return TensorHandle(sums.astype(np.int32), tl.int32)
        return create_dot(self, _float32(a), _float32(b), *rest)

    InterpreterBuilder.create_dot = dot


@functools.cache
def fuse_multiply_add() -> None:
    """Let fma round once, as a GPU does; once in a process, whoever asks."""

    def fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma
