"""Registration of canonical ops, and the count of fallbacks taken while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from fusecomp.errors import FallbackError
from fusecomp.ops.mode import batch_invariant

NOT_INVARIANT = "use deterministic=False for this model"
_LIB = torch.library.Library("fusecomp", "DEF")
OPS = torch.ops.fusecomp
_fallbacks: Counter[tuple[str, str]] = Counter()


def define(schema: str, reference: Callable, fake: Callable) -> None:
    """Register `fusecomp::<schema>` with its eager reference for the CPU and its fake implementation.

    Kernels for other devices are registered by `fusecomp.lowerings`.
    """
    name = schema.split("(", 1)[0]
    # Kernels take any strides with a contiguous last dim, so Inductor need not copy operands into a layout.
    _LIB.define(schema, tags=(torch.Tag.flexible_layout,))
    _LIB.impl(name, reference, "CPU")
    torch.library.register_fake(f"fusecomp::{name}", fake, lib=_LIB)


def implement(name: str, kernel: Callable, dispatch_key: str) -> None:
    """Register `kernel` as the implementation of `fusecomp::<name>` on another device."""
    _LIB.impl(name, kernel, dispatch_key)


def record_fallback(op: str, reason: str) -> None:
    """Count one run of the eager reference where a kernel was expected.

    Raises:
        FallbackError: where sums must not depend on the batch, which the reference's do.
    """
    if batch_invariant():
        raise FallbackError(
            f"{op} would run its eager reference, whose sums depend on the batch", why=reason, remedy=NOT_INVARIANT
        )
    _fallbacks[(op, reason)] += 1


def require_any_order(op: str) -> None:
    """FallbackError where sums must not depend on the batch: `op` has no kernel of which that is true."""
    if batch_invariant():
        raise FallbackError(f"{op} has no batch-invariant kernel", remedy=NOT_INVARIANT)


def take_fallbacks() -> dict[tuple[str, str], int]:
    """Return the fallbacks counted since the last call, and start over."""
    taken = dict(_fallbacks)
    _fallbacks.clear()
    return taken
