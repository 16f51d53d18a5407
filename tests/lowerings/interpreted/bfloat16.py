"""bf16 under Triton's interpreter, which keeps it as the bits of uint16: matrix products, and rounding."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _float32(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@functools.cache
def multiply_bfloat16() -> None:
    """Let dot multiply the numbers, and not their bits as integers; once in a process, whoever asks."""
    create_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, _float32(a), _float32(b), *rest)


def _fp_trunc(self: InterpreterBuilder, x: TensorHandle, to: tl.dtype) -> TensorHandle:
    if to.scalar != tl.bfloat16:
        return self.cast_impl(x, to)
    rounded = torch.from_numpy(np.ascontiguousarray(x.data, dtype=np.float32)).bfloat16().view(torch.int16)
    return TensorHandle(rounded.numpy().view(np.uint16), to.scalar)


def round_to_nearest() -> None:
    """Let fp32 become bf16 as a GPU rounds: the interpreter cuts its low bits off, which rounds down."""
    InterpreterBuilder.create_fp_trunc = _fp_trunc
