"""Whether ops must give a token the same bits whatever else is in its step: set by the engine around a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)


def batch_invariant() -> bool:
    """Whether kernels are launched now whose sums for a row depend on that row alone."""
    return _invariant.get()


@contextmanager
def batch_invariance(on: bool = True) -> Iterator[None]:
    """Inside, `batch_invariant()` is `on`."""
    token = _invariant.set(on)
    try:
        yield
    finally:
        _invariant.reset(token)
