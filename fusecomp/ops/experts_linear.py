"""The canonical mixture of experts with the linear that follows, in most models the next layer's first projection.

As one op, since a lowering then knows while it routes which weight is read after the experts.

Legend: T tokens, C hidden size, N features of the linear.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusecomp.ops.library import define
from fusecomp.ops.linear import Program, linear_reference
from fusecomp.ops.routed_experts import routed_experts_reference

LINEAR_ARGS = 5  # at the end: weight, norm weight and bias, operands, program


def experts_linear_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, out, z): y and out [T, C] of `routed_experts`, and z = `linear` of out [T, N].

    Arguments: those of `routed_experts`, the residual in any case; then those of `linear` without x.
    """
    y, out = routed_experts_reference(*args[:-LINEAR_ARGS])
    return y, out, linear_reference(out, *args[-LINEAR_ARGS:])


def _fake(x: Tensor, router: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, program = args[-LINEAR_ARGS], Program.from_text(args[-1])
    z = x.new_empty(x.shape[0], weight.shape[0] // program.groups, dtype=program.torch_dtype)
    return x.new_empty(x.shape) if args[4] else x.new_empty(0), x.new_empty(x.shape), z


define(
    "experts_linear(Tensor x, Tensor router, Tensor? router_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? route_bias, str norm, str logits, str spec, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
    "str act, bool gated, bool interleaved, bool transposed, Tensor? residual, Tensor weight, "
    "Tensor? next_norm_weight, Tensor? next_norm_bias, Tensor[] operands, str program) -> (Tensor, Tensor, Tensor)",
    experts_linear_reference,
    _fake,
)
