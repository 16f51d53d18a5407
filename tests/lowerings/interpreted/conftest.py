"""Interpreted kernels on poisoned memory, and without the work that Triton's interpreter repeats.

Calls of device functions do not patch the language again, and what the interpreter derives from a type alone, anew for
every value, is derived once: the sizes of a block, the shape of a tensor, NumPy's dtype. Work whose result nobody reads
is left out. No value is kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def patch_once() -> None:
    """A launch patches the language its kernel sees; a call inside it only what still is the compiler's own."""
    patch = interpreter._patch_lang
    seen: dict[str, list[Any]] = {}  # a module's name -> what it calls the language

    def called(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if (languages := seen.get(self.fn.__module__)) is None:
            names = self.fn.__globals__.values()
            languages = seen[self.fn.__module__] = [value for value in names if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            patch(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = called


def derive_once() -> None:
    """Blocks of one element type and sizes, and tensors of one shape, share what follows from these alone."""
    make_block, make_tensor, scalar_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}  # by element type's name, sizes and their types
    shapes: dict[Any, dict[str, Any]] = {}  # sizes -> attributes of a tensor

    def block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = shape.values if type(shape) is tl.tuple else shape
        key = element_ty.name, *sizes, *map(type, sizes)  # 16.0 is no size, though it equals one
        if (known := blocks.get(key)) is None:
            make_block(self, element_ty, shape)
            known = blocks[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        self.__dict__.update(known)
        self.element_ty = element_ty

    def tensor(self: tl.tensor, handle: Any, kind: tl.dtype) -> None:
        key = tuple(kind.shape.values) if type(kind) is tl.block_type else ()
        if (known := shapes.get(key)) is None:
            make_tensor(self, handle, kind)
            shapes[key] = {name: vars(self)[name] for name in ("shape", "numel")}
            return
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.__dict__.update(known)

    of_scalar = functools.cache(scalar_dtype)

    def np_dtype(kind: tl.dtype) -> np.dtype:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else of_scalar(element)

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block, tensor, np_dtype


def compute_what_is_read() -> None:
    """Integers are not added again in 64 bits for assertions that are off; values of one shape have it already."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        a, b = lhs.type, rhs.type
        if a.is_block() is b.is_block() and (not a.is_block() or a.shape.values == b.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value


patch_once()
derive_once()
compute_what_is_read()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
