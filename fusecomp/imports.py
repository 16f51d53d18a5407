"""Importing torch and transformers faster."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Where transformers imports a large package for one function, which only training and assisted decoding call.
DEFERRED = {"scipy.optimize": "linear_sum_assignment", "sklearn.metrics": "roc_curve"}


# What torch and transformers import that imports neither. Much of an import is waiting for files.
BESIDE = ("sympy", "httpx", "PIL.Image", "tokenizers")


@contextmanager
def fast_imports(*, own_process: bool = False) -> Iterator[None]:
    """For imports that bring torch and transformers. No garbage is collected inside, and `DEFERRED` packages wait.

    Imports make millions of objects, and searching them for cycles takes time.

    Args:
        own_process: for programs of our own, before they hold a model. `BESIDE` is imported in a thread, and later
            collections leave out all objects that there are at the end, which would keep a user's garbage alive.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _deferred(), import_beside(BESIDE if own_process else ()):
            yield
        if own_process:
            gc.freeze()
    finally:
        if enabled:
            gc.enable()


@contextmanager
def import_beside(names: Sequence[str]) -> Iterator[None]:
    """Import modules in a thread beside what runs inside; waits for it at the end.

    Modules that import each other must not be imported by both: Python then hands out unfinished ones.
    """

    def run() -> None:
        for name in names:
            with suppress(Exception):  # it fails again, and is seen, where the module is needed
                import_module(name)

    thread = threading.Thread(target=run, name="import-beside")
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextmanager
def _deferred() -> Iterator[None]:
    """Inside, importing a function of `DEFERRED` gives one that imports its package when it is called."""
    placed = {}
    for name, function in DEFERRED.items():
        package, *rest = name.split(".")
        if name not in sys.modules and (spec := find_spec(package)) is not None:
            folders = [os.path.join(folder, *rest) for folder in spec.submodule_search_locations or ()]
            placed[name] = _Deferred(name, function, folders)
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Deferred(ModuleType):
    """Stands for a module until something other than its one function is asked for."""

    def __init__(self, name: str, function: str, folders: list[str]) -> None:
        super().__init__(name)
        self.__path__ = folders  # for imports of its submodules
        self._function = function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `inspect` asks every module for its file
            raise AttributeError(name)
        waits = name == self._function and sys.modules.get(self.__name__) is self
        return self._wait() if waits else getattr(self._real(), name)

    def _wait(self) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._real(), self._function)(*args, **kwargs)

        call.__name__ = self._function
        return call

    def _real(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return import_module(self.__name__)
