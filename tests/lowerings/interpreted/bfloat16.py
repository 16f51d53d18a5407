"""Matrix products of bf16 under Triton's interpreter, which keeps bf16 as the bits of uint16."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _float32(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def multiply_bfloat16() -> None:
    """Let dot multiply the numbers, and not their bits as integers; once per process."""
    create_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, _float32(a), _float32(b), *rest)
