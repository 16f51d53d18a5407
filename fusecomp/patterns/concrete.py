"""Runs a part of Dynamo's graph on given values, in fp64 on the CPU, at sizes of one's choice.

Casts between float types are left out, memory that would be uninitialised holds NaN, and every value must have the
shape that the graph records for it, at the sizes chosen: what is not written for any size is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from fusecomp.patterns.base import fake_value, op_name
from fusecomp.patterns.functional import size_key

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double")
UNINITIALISED = ("empty", "empty_like", "new_empty", "empty_strided")
GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


class NotConcrete(Exception):
    """The part cannot be run at these sizes; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """What stands for the graph's sizes.

    Attributes:
        symbols: value of each symbol; those that depend on data are added when they are met.
        widths: static sizes that are replaced, in shapes and in integer arguments.
    """

    symbols: dict[Any, int]
    widths: Mapping[int, int]

    def of(self, size: Any) -> int:
        """The chosen value of a size.

        Raises:
            NotConcrete: it depends on a symbol without a value.
        """
        key = size_key(size)
        if isinstance(key, int):
            return self.widths.get(key, key)
        if not key.free_symbols <= self.symbols.keys():
            raise NotConcrete(f"the size {key} is not known")
        return int(key.xreplace(self.symbols))

    def meet(self, size: Any, value: Any) -> None:
        """Take the value of a size that depends on data from an evaluation."""
        key = size_key(size)
        if getattr(key, "is_Symbol", False) and isinstance(value, int):
            self.symbols.setdefault(key, value)

    def shape(self, fake: Tensor) -> tuple[int, ...]:
        """The shape that a value has at these sizes."""
        return tuple(self.of(size) for size in fake.shape)

    def value(self, fake: Any) -> Any:
        """A size, or a tuple of sizes, at these sizes."""
        return torch.Size([self.of(size) for size in fake]) if isinstance(fake, tuple) else self.of(fake)


def run(members: tuple[Node, ...], given: Mapping[Node, Any], sizes: Sizes) -> Tensor:
    """Value of the last of `members`, in graph order, from a value for each leaf.

    Raises:
        NotConcrete: something fails, or has another shape than the graph says.
    """
    values: dict[Node, Any] = dict(given)
    for node in members:
        try:
            value = _call(node, values, sizes)
        except Exception as error:  # a foreign subgraph may fail in any way; then nothing is proven
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise NotConcrete(f"{op_name(node)} fails on trial values ({what[:160]})") from error
        fake = fake_value(node)
        if isinstance(fake, Tensor):
            for size, actual in zip(fake.shape, getattr(value, "shape", ()), strict=False):
                sizes.meet(size, actual)
            if not isinstance(value, Tensor) or tuple(value.shape) != sizes.shape(fake):
                raise NotConcrete(f"{op_name(node)} does not keep to its shape at other sizes")
            if fake.dtype in FLOATS and value.dtype != torch.float64:
                value = value.double()
        elif isinstance(fake, torch.SymInt):
            sizes.meet(fake, value)
        values[node] = value
    return values[members[-1]]


def _call(node: Node, values: Mapping[Node, Any], sizes: Sizes) -> Any:
    arguments: Any = map_aggregate((node.args, node.kwargs), lambda arg: _argument(arg, values, sizes))
    args, kwargs = arguments
    name, fake = op_name(node), fake_value(node)
    source: Any = args[0] if args else None
    if name in CASTS and isinstance(source, Tensor) and isinstance(fake, Tensor) and fake.dtype in FLOATS:
        same = source.is_floating_point() and fake_value(node.args[0]).dtype == fake.dtype
        return source if same else source.to(torch.float64, copy=True)
    if name in GROUPED:
        return _grouped_mm(*args, **kwargs)
    if name == "histc":
        return torch.histc(source.double(), *args[1:], **kwargs).to(
            torch.float64 if fake.dtype in FLOATS else fake.dtype
        )
    if name in UNINITIALISED and isinstance(fake, Tensor):
        filling = torch.nan if fake.dtype in FLOATS else torch.iinfo(fake.dtype).min
        return torch.full(sizes.shape(fake), filling, dtype=torch.float64 if fake.dtype in FLOATS else fake.dtype)
    if node.op == "call_method":
        return source if name == "cuda" else getattr(source, name)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _argument(arg: Any, values: Mapping[Node, Any], sizes: Sizes) -> Any:
    if isinstance(arg, Node):
        return values[arg]
    if isinstance(arg, int) and not isinstance(arg, bool):
        return sizes.widths.get(arg, arg)
    if isinstance(arg, torch.dtype):
        return torch.float64 if arg in FLOATS else arg
    if isinstance(arg, torch.device) or (isinstance(arg, str) and arg.startswith("cuda")):
        return torch.device("cpu")
    return arg


def _grouped_mm(
    rows: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Rows [S, K] by weights [E, K, N], each group of rows by its own; rows past the last group are undefined."""
    offs = options.get("offs", offs)
    if offs is None or rows.dim() != 2 or weight.dim() != 3 or len(offs) != len(weight):
        raise ValueError("grouped_mm of other operands than rows, a weight per group and their ends")
    out = torch.full((len(rows), weight.shape[2]), torch.nan, dtype=torch.float64)
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        out[begin:end] = rows[begin:end] @ weight[expert] + (0 if bias is None else bias[expert])
        begin = end
    return out
