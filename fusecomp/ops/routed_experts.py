"""The canonical mixture of experts from hidden states on: norm, router and experts as one op.

Where nothing else reads what is chosen, a lowering may leave ids and weights in registers.

Legend: T tokens, C hidden size, E experts, K chosen per token, F expert intermediate size.
"""

from __future__ import annotations

from torch import Tensor

from fusecomp.ops.experts import experts_reference
from fusecomp.ops.library import define
from fusecomp.ops.router import router_reference


def routed_experts_reference(
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
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, out): y = norm(x) [T, C] and residual + `experts` of y [T, C], by the ids and weights that `router` chooses.

    Arguments as those ops have them; `router` [E, C] is the weight of the logits. Without a norm the experts read x,
    and y is empty.
    """
    args = (router, router_bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    y, ids, weights = router_reference(x, *args)
    form = (up, up_bias, down, down_bias, act, gated, interleaved, transposed)
    return y, experts_reference(y if norm else x, ids, weights, *form, residual)


def _fake(x: Tensor, router: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape) if args[4] else x.new_empty(0), x.new_empty(x.shape)


define(
    "routed_experts(Tensor x, Tensor router, Tensor? router_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? route_bias, str norm, str logits, str spec, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
    "str act, bool gated, bool interleaved, bool transposed, Tensor? residual=None) -> (Tensor, Tensor)",
    routed_experts_reference,
    _fake,
)
