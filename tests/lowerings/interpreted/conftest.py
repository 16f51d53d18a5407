"""Interpreted kernels in half the time: calls of device functions do not patch the language again."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """A launch patches the language its kernel sees; a call inside it only what still is the compiler's own."""
    patch = interpreter._patch_lang

    def called(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        seen = (value for value in self.fn.__globals__.values() if value is tl or value is tl.core)
        if any(tl.core.is_builtin(language.load) for language in seen):
            patch(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = called


patch_once()
