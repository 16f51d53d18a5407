"""Two canonical linears, of which the second reads what the first gives, as one op.

In most models the first ends in the residual stream and the second begins with its norm. As one op, since a lowering
then knows while it sums the first's product that a norm follows.

Legend: T tokens, N features of the first linear, M of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusecomp.ops.library import define
from fusecomp.ops.linear import LinearShape, Program, linear_reference
from fusecomp.ops.quant_linear import QuantShape, quant_linear_reference

LINEAR_ARGS = 5  # of `linear`, without x
QUANT_ARGS = 10  # of `quant_linear`, without x


@dataclass(frozen=True)
class PairShape:
    """What the choice of a pair's kernels depends on, besides the number of tokens: two shapes of one kind."""

    first: LinearShape | QuantShape
    then: LinearShape | QuantShape

    def __str__(self) -> str:
        return f"pair of {self.first} and {self.then}"

    @classmethod
    def parse(cls, text: str) -> PairShape | None:
        """The shape that `str` gave, or None for another text."""
        if not text.startswith("pair of "):
            return None
        parts = text.removeprefix("pair of ").split(" and ")
        for kind in (LinearShape, QuantShape):
            shapes = [kind.parse(part) for part in parts]
            if len(shapes) == 2 and shapes[0] and shapes[1]:
                return cls(shapes[0], shapes[1])
        return None


def linear_pair_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(h, z): h [T, N] = `linear` of x, z [T, M] = `linear` of h.

    Arguments: those of `linear`, then those of the next one without its x, which is h.
    """
    return _in_turn(linear_reference, LINEAR_ARGS, x, *args)


def quant_linear_pair_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """As `linear_pair_reference`, of two `quant_linear`, each with all of its arguments."""
    return _in_turn(quant_linear_reference, QUANT_ARGS, x, *args)


def _in_turn(linear: Callable[..., Tensor], count: int, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    h = linear(x, *args[:count])
    return h, linear(h, *args[count:])


def _fake(x: Tensor, args: tuple, count: int, program_at: int) -> tuple[Tensor, Tensor]:
    found = []
    for given in (args[:count], args[count:]):
        weight, program = given[0], Program.from_text(given[program_at])
        found.append(x.new_empty(x.shape[0], weight.shape[0] // program.groups, dtype=program.torch_dtype))
    return found[0], found[1]


def linear_schema(prefix: str) -> str:
    """Arguments of `linear` behind x, their names with a prefix, as a schema has them."""
    norm = f"Tensor? {prefix}norm_weight, Tensor? {prefix}norm_bias, "
    return f"Tensor {prefix}weight, {norm}Tensor[] {prefix}operands, str {prefix}program"


def quant_schema(prefix: str) -> str:
    """The same of `quant_linear`, none by default."""
    weight = f"Tensor {prefix}q, Tensor {prefix}scale, Tensor? {prefix}zero, "
    norm = f"Tensor? {prefix}norm_weight, Tensor? {prefix}norm_bias, "
    rest = f"Tensor[] {prefix}operands, str {prefix}program, str {prefix}spec, "
    return f"{weight}{norm}{rest}Tensor? {prefix}x_scale, str {prefix}activation"


define(
    f"linear_pair(Tensor x, {linear_schema('')}, {linear_schema('next_')}) -> (Tensor, Tensor)",
    linear_pair_reference,
    lambda x, *args: _fake(x, args, LINEAR_ARGS, 4),
)
define(
    f"quant_linear_pair(Tensor x, {quant_schema('')}, {quant_schema('next_')}) -> (Tensor, Tensor)",
    quant_linear_pair_reference,
    lambda x, *args: _fake(x, args, QUANT_ARGS, 6),
)
