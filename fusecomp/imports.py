"""Importing torch and transformers faster."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection(*, lasting: bool = False) -> Iterator[None]:
    """No cyclic garbage collection inside: imports make millions of objects, and searching them takes time.

    Args:
        lasting: later collections leave out all objects that there are at the end. For programs of our own, before
            they hold a model; in a user's process it would keep garbage alive.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if lasting:
            gc.freeze()
    finally:
        if enabled:
            gc.enable()
