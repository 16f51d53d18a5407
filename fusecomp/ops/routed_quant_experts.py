"""The canonical mixture of experts of codes from hidden states on: `routed_experts` by quantized weights.

Legend: T tokens, C hidden size, E experts.
"""

from __future__ import annotations

from torch import Tensor

from fusecomp.ops.experts import quant_experts_reference
from fusecomp.ops.library import define
from fusecomp.ops.router import router_reference

ROUTER_ARGS, EXPERTS_ARGS = 8, 14  # arguments behind x: of the router, of the experts without their residual


def routed_quant_experts_reference(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: str,
    logits: str,
    spec: str,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    up_spec: str,
    down_spec: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, out): y = norm(x) [T, C] and residual + `quant_experts` of y [T, C], by what `router` chooses.

    Arguments as those ops have them; `router` [E, C] is the weight of the logits. Without a norm the experts read x,
    and y is empty.

    Raises:
        ValueError: what a text describes is none, or scales do not fit their codes.
    """
    args = (router, router_bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    y, ids, weights = router_reference(x, *args)
    parts = (up, up_scale, up_zero, up_bias, down, down_scale, down_zero, down_bias)
    form = (act, gated, interleaved, transposed, up_spec, down_spec)
    return y, quant_experts_reference(y if norm else x, ids, weights, *parts, *form, residual)


def _fake(x: Tensor, router: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape) if args[4] else x.new_empty(0), x.new_empty(x.shape)


define(
    "routed_quant_experts(Tensor x, Tensor router, Tensor? router_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? route_bias, str norm, str logits, str spec, Tensor up, Tensor up_scale, Tensor? up_zero, Tensor? up_bias, "
    "Tensor down, Tensor down_scale, Tensor? down_zero, Tensor? down_bias, str act, bool gated, bool interleaved, "
    "bool transposed, str up_spec, str down_spec, Tensor? residual=None) -> (Tensor, Tensor)",
    routed_quant_experts_reference,
    _fake,
)
