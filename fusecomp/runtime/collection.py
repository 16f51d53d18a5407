"""Keeps Python's collector of cycles from stopping a run to look through all that was there before it.

A model, its libraries and its compiled program are some hundreds of thousands of objects, which no request makes
garbage of. A full collection takes 0.2 to 0.5 s for them, in which no step is launched, and comes when a run has made
a quarter as many that stay.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Blocks:
    """Those that are entered now, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._froze = False

    def enter(self) -> None:
        with self._lock:
            if self._depth == 0 and gc.get_freeze_count() == 0:
                gc.freeze()
                self._froze = True
            self._depth += 1

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._froze:
                gc.unfreeze()
                self._froze = False


_blocks = _Blocks()


@contextmanager
def earlier_objects_spared() -> Iterator[None]:
    """Inside, only objects made since the outermost such block began are collected; after it, all are again.

    Where the program has frozen objects itself (`gc.freeze`), it stays as it is.
    """
    _blocks.enter()
    try:
        yield
    finally:
        _blocks.leave()
