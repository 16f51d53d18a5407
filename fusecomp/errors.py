"""One class per failure a user can meet.

Every error says what happened, where, why, and what to do about it. Classes also derive from the
builtin a caller would expect (`ValueError` for bad input, `MemoryError` for a budget), so code that
does not know fusecomp still catches them.
"""

from __future__ import annotations


class FusecompError(Exception):
    """Base of all errors raised on purpose by fusecomp.

    Args:
        what: what failed, as one clause.
        where: the file, option, tensor, layer or request concerned.
        why: the cause, when it is known.
        remedy: what the user can do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        text = f"{where}: {what}" if where else what
        if why:
            text += f" ({why})"
        if remedy:
            text += f". Remedy: {remedy}"
        super().__init__(text)


class ConfigError(FusecompError, ValueError):
    """An option is unknown or its value is invalid."""


class RequestError(FusecompError, ValueError):
    """One request cannot be served; others are unaffected."""


class CheckpointError(FusecompError, OSError):
    """A checkpoint on disk is missing, truncated or malformed."""


class UnsupportedModelError(FusecompError, NotImplementedError):
    """The model does something that fusecomp cannot prove it preserves."""


class CapacityError(FusecompError, MemoryError):
    """A memory budget is too small for what was asked."""


class RecompileError(FusecompError, RuntimeError):
    """A graph would be compiled again after warm-up."""


class VerificationError(FusecompError, RuntimeError):
    """A rewritten graph or a replayed CUDA graph disagrees with its reference."""


class FallbackError(FusecompError, RuntimeError):
    """A fallback would have been taken under `strict=True`."""


class FallbackWarning(UserWarning):
    """A call was served by the unfused model; the message names the cause. Under `strict=True`: `FallbackError`."""
