"""Generates the epilogue hook of the linear kernels from a program.

A hook is a Triton function `(accs, args, strides, m, n, mask) -> tile`: accumulators in fp32, pointers to the operands,
their row strides, token and feature indices that broadcast to the tile, and the valid elements. Its source is made from
the program alone, so every process that meets the program makes the same function and finds the same compiled kernels.
"""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusecomp.ops.linear import COLUMN, FULL, ROW, SCALAR, Program


@triton.jit
def tanh(x):
    """Hyperbolic tangent: a series near 0, where the quotient of exponentials loses its digits."""
    squared = x * x
    series = x * (1.0 + squared * (-1.0 / 3.0 + squared * (2.0 / 15.0 + squared * (-17.0 / 315.0))))
    magnitude = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.125, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def log1p(x):
    """log(1 + x), with the digits of small x that 1 + x rounds away put back."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


EXPRESSIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "abs": "tl.abs({})",
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "log1p": "log1p({})",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "tl.rsqrt({})",
    "reciprocal": "1.0 / {}",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{}))",
    "tanh": "tanh({})",
    "erf": "tl.erf({})",
    # A NaN must reach the output, as it does in eager mode.
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "where": "tl.where({}, {}, {})",
}

LOADS = {
    FULL: "tl.load(args[{0}] + m * strides[{0}] + n, mask=mask, other=0.0).to(tl.float32)",
    ROW: "tl.load(args[{0}] + n, mask=mask, other=0.0).to(tl.float32)",
    COLUMN: "tl.load(args[{0}] + m, mask=mask, other=0.0).to(tl.float32)",
    SCALAR: "tl.load(args[{0}]).to(tl.float32)",
}


def _literal(argument: Any) -> str:
    if isinstance(argument, str):
        return argument
    value = float(argument)
    if not math.isfinite(value):
        return f'float("{value}")'
    return f"({value!r})"


def epilogue_source(program: Program) -> str:
    """Source of the hook, a function named after the program's hash."""
    body = [f"    a{i} = accs[{i}]" for i in range(program.groups)]
    body += [f"    i{i} = {LOADS[layout].format(i)}" for i, layout in enumerate(program.operands)]
    for i, (function, *arguments) in enumerate(program.steps):
        body.append(f"    t{i} = {EXPRESSIONS[function].format(*map(_literal, arguments))}")
    body.append(f"    return {f't{len(program.steps) - 1}' if program.steps else 'a0'}")
    text = "\n".join(body)
    name = f"epilogue_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return f"def {name}(accs, args, strides, m, n, mask):\n{text}\n"


@cache
def epilogue_hook(program: Program) -> Any:
    """The Triton function for a program's epilogue; its norm and dtype play no part."""
    source = epilogue_source(program)
    name = source[4 : source.index("(")]
    filename = f"<fusecomp {name}>"
    # Triton reads a function's source through `inspect`, which looks here for code that is in no file.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {"tl": tl, "tanh": tanh, "log1p": log1p, "__name__": __name__}
    exec(compile(source, filename, "exec"), scope)
    return triton.jit(scope[name])


def operand_strides(program: Program, operands: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Row stride of each operand, 0 where it has no rows."""
    return tuple(o.stride(0) if layout == FULL else 0 for o, layout in zip(operands, program.operands, strict=True))


def unit_stride(x: Tensor) -> Tensor:
    """`x` with a contiguous last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def full_rows(operands: Sequence[Tensor], program: Program) -> tuple[Tensor, ...]:
    """A program's operands; those of every token and feature with a contiguous last dim."""
    return tuple(unit_stride(o) if layout == FULL else o for o, layout in zip(operands, program.operands, strict=True))
