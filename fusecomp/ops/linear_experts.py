"""A canonical linear and the mixture of experts that reads its result, as one op.

In most models the linear is the attention's output projection, which ends in the residual stream. As one op, since a
lowering then knows while it sums the linear's product that the norm of a router follows.

Legend: T tokens, C hidden size, N features of a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusecomp.ops.experts_linear import LINEAR_ARGS as LAST_ARGS
from fusecomp.ops.experts_linear import experts_linear_reference
from fusecomp.ops.library import define
from fusecomp.ops.linear import LinearShape, Program, linear_reference
from fusecomp.ops.linear_pair import LINEAR_ARGS, QUANT_ARGS, linear_schema, quant_schema
from fusecomp.ops.quant_linear import QuantShape, quant_linear_reference
from fusecomp.ops.routed_experts import routed_experts_reference
from fusecomp.ops.routed_quant_experts import routed_quant_experts_reference

# Where these are among a mixture's arguments behind h: the norm's weight, then its bias; its spec; the residual.
NORM_WEIGHT, NORM, RESIDUAL, QUANT_RESIDUAL = 2, 5, 16, 22
BEFORE_NORM = " before a router's norm"


@dataclass(frozen=True)
class NormedShape:
    """What decides where the norm of a router is made, besides the number of tokens: the linear before it."""

    first: LinearShape | QuantShape

    def __str__(self) -> str:
        return f"{self.first}{BEFORE_NORM}"

    @classmethod
    def parse(cls, text: str) -> NormedShape | None:
        """The shape that `str` gave, or None for another text."""
        if not text.endswith(BEFORE_NORM):
            return None
        first = text.removesuffix(BEFORE_NORM)
        shape = LinearShape.parse(first) or QuantShape.parse(first)
        return None if shape is None else cls(shape)


def mixture_args(args: tuple, count: int, residual: int, h: Tensor) -> list[Any]:
    """Arguments of the mixture behind h, of an op's behind x: the last says whether h is the residual as well.

    Args:
        count: of the linear's arguments, which come first.
        residual: which of the mixture's is the residual.
    """
    *rest, adds = args[count:]
    if adds:
        rest[residual] = h
    return rest


def without_norm(rest: list[Any]) -> list[Any]:
    """A mixture's arguments behind h, of one that reads the norm's result instead."""
    return [*rest[:NORM_WEIGHT], None, None, *rest[NORM_WEIGHT + 2 : NORM], "", *rest[NORM + 1 :]]


def linear_experts_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(h, y, out): h [T, C] = `linear` of x, then y and out [T, C] of `routed_experts` of h.

    Arguments: those of `linear`, those of `routed_experts` without its x, which is h, and whether h is its residual,
    which is None then.
    """
    h = linear_reference(x, *args[:LINEAR_ARGS])
    return h, *routed_experts_reference(h, *mixture_args(args, LINEAR_ARGS, RESIDUAL, h))


def linear_experts_linear_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h, y, out, z): the same of `experts_linear`, z [T, N] its linear's result."""
    h = linear_reference(x, *args[:LINEAR_ARGS])
    return h, *experts_linear_reference(h, *mixture_args(args, LINEAR_ARGS, RESIDUAL, h))


def quant_linear_experts_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(h, y, out): `quant_linear`, with all of its arguments, and `routed_quant_experts` of its result."""
    h = quant_linear_reference(x, *args[:QUANT_ARGS])
    return h, *routed_quant_experts_reference(h, *mixture_args(args, QUANT_ARGS, QUANT_RESIDUAL, h))


def _fake(count: int, program_at: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        program, router, norm = Program.from_text(args[program_at]), args[count], args[count + 5]
        h = x.new_empty(x.shape[0], router.shape[1], dtype=program.torch_dtype)
        return h, h.new_empty(h.shape if norm else 0), h.new_empty(h.shape)

    return fake


def _fake_with_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, program = args[-1 - LAST_ARGS], Program.from_text(args[-2])
    z = x.new_empty(x.shape[0], weight.shape[0] // program.groups, dtype=program.torch_dtype)
    return *_fake(LINEAR_ARGS, 4)(x, *args), z


ROUTER = (
    "Tensor router, Tensor? router_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? route_bias, str norm, "
    "str logits, str spec"
)
FORM = "str act, bool gated, bool interleaved, bool transposed"
EXPERTS = f"Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, {FORM}, Tensor? residual"
QUANT_EXPERTS = (
    "Tensor up, Tensor up_scale, Tensor? up_zero, Tensor? up_bias, Tensor down, Tensor down_scale, Tensor? down_zero, "
    f"Tensor? down_bias, {FORM}, str up_spec, str down_spec, Tensor? residual"
)

define(
    f"linear_experts(Tensor x, {linear_schema('first_')}, {ROUTER}, {EXPERTS}, bool adds) -> (Tensor, Tensor, Tensor)",
    linear_experts_reference,
    _fake(LINEAR_ARGS, 4),
)
define(
    f"linear_experts_linear(Tensor x, {linear_schema('first_')}, {ROUTER}, {EXPERTS}, {linear_schema('next_')}, "
    "bool adds) -> (Tensor, Tensor, Tensor, Tensor)",
    linear_experts_linear_reference,
    _fake_with_linear,
)
define(
    f"quant_linear_experts(Tensor x, {quant_schema('first_')}, {ROUTER}, {QUANT_EXPERTS}, bool adds) "
    "-> (Tensor, Tensor, Tensor)",
    quant_linear_experts_reference,
    _fake(QUANT_ARGS, 6),
)
