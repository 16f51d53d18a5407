"""The one way that kernels here are launched, and a mode in which launches only compile them, many at once.

Triton compiles a kernel when it is first launched, so a start that runs every kernel once compiles one after the other.
Inside `compile_ahead` a launch computes nothing: it hands its kernel to threads, once for each specialization. Triton's
passes, LLVM, ptxas and the C compiler of launchers run without Python's lock. A real launch later finds the kernel in
Triton's own cache; one that does not compile ahead is compiled again by its real launch, which raises as ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.mode import batch_invariant

logger = logging.getLogger("fusecomp")

ALIGNMENT = 16  # bytes of an address, or of an integer, that Triton specializes on
INT32_END = 1 << 31


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton function on the current stream, or under `compile_ahead` only have it compiled.

    Args:
        grid: programs along each axis.
        options: the kernel's constants by name, and Triton's launch options.
    """
    ahead = _ahead.get()
    if ahead is None:
        kernel[grid](*args, **options)
    else:
        ahead.compile(kernel, grid, args, options)


def computed(result: Tensor) -> Tensor:
    """What launches wrote to; zeros under `compile_ahead`, where nothing was written."""
    return result.zero_() if compiling_ahead() else result


def rounding_options() -> dict[str, bool]:
    """Launch options that keep products and sums apart where a token's bits must not depend on a kernel's variant."""
    return {"enable_fp_fusion": False} if batch_invariant() else {}


def compiling_ahead() -> bool:
    """Whether launches now only compile."""
    return _ahead.get() is not None


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[None]:
    """Inside, launches on a CUDA device only compile, in as many threads as there are CPUs; waits for them at the end.

    Elsewhere, where no Triton kernel runs, it does nothing.
    """
    if device.type != "cuda":
        yield
        return
    threads = len(os.sched_getaffinity(0))
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    pool = ThreadPoolExecutor(threads, "compile-ahead", initializer=torch.cuda.set_device, initargs=(device,))
    ahead = _Ahead(pool)
    token = _ahead.set(ahead)
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        _ahead.reset(token)
    pool.shutdown()
    ahead.report_failures()


class _Ahead:
    """The kernels that one `compile_ahead` has met."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._compiling: dict[tuple, tuple[str, Future]] = {}

    def compile(self, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        places = tuple(_place(arg, p.do_not_specialize) for arg, p in zip(args, kernel.params, strict=False))
        key = (kernel, places, tuple(options.items()))
        if key not in self._compiling:
            self._compiling[key] = kernel.__name__, self._pool.submit(_compile, kernel, grid, args, options)

    def report_failures(self) -> None:
        for name, future in self._compiling.values():
            if error := future.exception():
                logger.warning("%s did not compile ahead, its first launch will: %s", name, error)


_ahead: ContextVar[_Ahead | None] = ContextVar("compile_ahead", default=None)


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    compiled = kernel.warmup(*args, grid=grid, **options)
    compiled[grid]  # builds the launcher and loads the binary, which the first launch would do


def _place(value: Any, plain: bool) -> Any:
    """What a kernel's specialization may depend on in an argument; `plain` ones only by type."""
    if isinstance(value, Tensor):
        return value.dtype, plain or value.data_ptr() % ALIGNMENT == 0
    if isinstance(value, tuple):
        return tuple(_place(v, plain) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return -INT32_END <= value < INT32_END, plain or (value == 1, value % ALIGNMENT == 0)
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, tuple(value.block_shape)
    return value if value is None else type(value)
