"""Canonical linear op: a matmul with a norm in front and a pointwise chain behind, both described by a program.

`out[T, N] = epilogue(norm(x)[T, K] @ weight[G * N, K]^T)`. The weight's rows are G groups of N, each with its own
accumulator: 1, or 2 where a gate and an up projection were merged. The program is text (canonical JSON), so it
travels in a graph, in a cache key and to a code generator; `epilogue` is any single-output pointwise expression.

Legend: T tokens, N output features, K input features, G groups.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.library import define
from fusecomp.ops.norm import NormSpec, norm_reference

# How an operand is laid out against [T, N]: all of it, one value a feature, one a token, or one for all.
FULL, ROW, COLUMN, SCALAR = "full", "row", "column", "scalar"

# Pointwise functions a program may use. A lowering has one expression for each.
FUNCTIONS: dict[str, Callable] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "where": torch.where,
}


@dataclass(frozen=True)
class Program:
    """What surrounds one matmul.

    Attributes:
        groups: accumulators G; the epilogue names them a0, a1.
        operands: layout of each further input, named i0, i1, ...
        steps: pointwise operations in order, each (function, arguments...), named t0, t1, ...; an argument is a name
            or a number. The last step is the output; with no steps it is a0.
        dtype: of the output, as torch names it.
        norm: what is applied to x first, or None.
    """

    groups: int
    operands: tuple[str, ...]
    steps: tuple[tuple, ...]
    dtype: str
    norm: NormSpec | None = None

    def to_text(self) -> str:
        """Canonical JSON: equal programs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> Program:
        """Parse `to_text`'s output.

        Raises:
            ValueError: the text is not a program.
        """
        data = json.loads(text)
        norm = NormSpec(**data.pop("norm")) if data["norm"] else data.pop("norm")
        steps = tuple(tuple(step) for step in data.pop("steps"))
        program = Program(operands=tuple(data.pop("operands")), steps=steps, norm=norm, **data)
        for step in program.steps:
            if step[0] not in FUNCTIONS:
                raise ValueError(f"linear program: unknown function {step[0]!r}")
        return program

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def kind(self) -> str:
        """What the epilogue amounts to, for a choice of kernel: identity, bias, residual or other."""
        if not self.steps:
            return "identity"
        if len(self.steps) == 1 and self.groups == 1 and self.steps[0] in (("add", "a0", "i0"), ("add", "i0", "a0")):
            return {FULL: "residual", ROW: "bias"}.get(self.operands[0], "other")
        return "other"

    def describe(self) -> str:
        """The program in a line, for reports."""
        norm = f"{self.norm.describe()} -> " if self.norm else ""
        matmul = "matmul" if self.groups == 1 else f"{self.groups} matmuls"
        names = [step[0] for step in self.steps]
        return f"{norm}{matmul}{' -> ' + ' '.join(names) if names else ''}"


@dataclass(frozen=True)
class LinearShape:
    """What the choice of a linear's kernel depends on, besides the number of tokens.

    Attributes:
        n: output features of one group.
        k: input features.
        groups: accumulators.
        kind: `Program.kind`.
        dtype: of activations and weight, as torch names it.
    """

    n: int
    k: int
    groups: int
    kind: str
    dtype: str

    def __str__(self) -> str:
        groups = f"{self.groups} x " if self.groups > 1 else ""
        return f"linear {groups}{self.n} x {self.k} {self.kind} {self.dtype}"

    @classmethod
    def parse(cls, text: str) -> LinearShape | None:
        """The shape that `str` gave, or None for another text."""
        found = re.fullmatch(r"linear (?:(\d+) x )?(\d+) x (\d+) (\w+) (\w+)", text)
        return cls(int(found[2]), int(found[3]), int(found[1] or 1), found[4], found[5]) if found else None

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize


def run_epilogue(program: Program, accumulators: Sequence[Tensor], operands: Sequence[Tensor]) -> Tensor:
    """The epilogue in torch, on accumulators [T, N] of any float dtype.

    Operands are [T, N], [N], [T] or [1], as the program's layouts say.
    """
    dtype = accumulators[0].dtype
    values: dict[str, Any] = {f"a{i}": acc for i, acc in enumerate(accumulators)}
    for i, (operand, layout) in enumerate(zip(operands, program.operands, strict=True)):
        values[f"i{i}"] = operand.to(dtype).unsqueeze(-1) if layout == COLUMN else operand.to(dtype)
    result: Any = accumulators[0]
    for i, (function, *arguments) in enumerate(program.steps):
        given = [values[a] if isinstance(a, str) else a for a in arguments]
        if function in ("maximum", "minimum", "where") or not isinstance(given[0], Tensor):
            given = [a if isinstance(a, Tensor) else torch.tensor(a, dtype=dtype, device=result.device) for a in given]
        result = values[f"t{i}"] = FUNCTIONS[function](*given)
    return result


def linear_reference(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    operands: Sequence[Tensor],
    program: str,
) -> Tensor:
    """Epilogue(norm(x) @ weight^T) [T, N], accumulated and evaluated in fp32 (fp64 for fp64 inputs)."""
    parsed = Program.from_text(program)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if parsed.norm is not None:
        x = norm_reference(x.to(dtype), norm_weight, norm_bias, parsed.norm.to_text())
    product = torch.matmul(x.to(dtype), weight.to(dtype).t())
    return run_epilogue(parsed, product.chunk(parsed.groups, -1), operands).to(parsed.torch_dtype)


def _fake(x: Tensor, weight: Tensor, norm_weight: Any, norm_bias: Any, operands: Any, program: str) -> Tensor:
    parsed = Program.from_text(program)
    return x.new_empty(x.shape[0], weight.shape[0] // parsed.groups, dtype=parsed.torch_dtype)


define(
    "linear(Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor[] operands, str program) -> Tensor",
    linear_reference,
    _fake,
)
