"""The canonical router ops: from logits, or from hidden states, to the chosen experts of each token and their weights.

Legend: T tokens, C hidden size, E experts, K chosen per token, G groups of E / G neighbouring experts.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fusecomp.ops.library import define
from fusecomp.ops.norm import norm_reference

SOFTMAX, SIGMOID, LOGITS, SPARSEMIXER = "softmax", "sigmoid", "logits", "sparsemixer"
NONE, SUM, OVER_CHOSEN = "none", "sum", "softmax"
MAX, TOP2 = "max", "top2"


@dataclass(frozen=True)
class RouteSpec:
    """One router.

    Attributes:
        kind: what the scores are: softmax over all experts, sigmoid, the logits themselves, or PhiMoE's sparsemixer,
            which takes the largest logit K times, each weighted by a softmax over those not far below it.
        k: experts chosen per token, those of the largest score (plus bias, where there is one; the bias never weighs).
        normalise: chosen scores are taken as they are, divided by their sum, or go through a softmax of their own.
        eps: added to the sum.
        floor: least value of the sum.
        groups: 1, or how many groups of experts compete before experts do.
        groups_chosen: groups whose experts may be chosen.
        group_score: a group's largest score, or the sum of its two largest.
        scale: multiplies the weights at last.
        threshold: sparsemixer hides what lies further below the largest logit, relative to the larger magnitude.
        dtype: of the weights, as torch names it.
    """

    kind: str
    k: int
    normalise: str = NONE
    eps: float = 0.0
    floor: float = 0.0
    groups: int = 1
    groups_chosen: int = 1
    group_score: str = MAX
    scale: float = 1.0
    threshold: float = 0.0
    dtype: str = "float32"

    def to_text(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> RouteSpec:
        """Parse `to_text`'s output."""
        return RouteSpec(**json.loads(text))

    def describe(self) -> str:
        """The router in a line, for reports."""
        names = {SOFTMAX: "softmax -> ", SIGMOID: "sigmoid -> ", SPARSEMIXER: "sparsemixer ", LOGITS: ""}
        text = names[self.kind]
        if self.groups > 1:
            text += f"{self.groups_chosen} of {self.groups} groups by {self.group_score} -> "
        text += f"top-{self.k}"
        text += {NONE: "", SUM: ", renormalised", OVER_CHOSEN: " -> softmax"}[self.normalise]
        return f"{text}{f', scaled by {self.scale:g}' if self.scale != 1 else ''}, {self.dtype} weights"


def _sparsemixer(z: Tensor, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    ids, weights, left = [], [], z
    for _ in range(spec.k):
        top, index = left.max(dim=-1, keepdim=True)
        hidden = (top - z) / z.abs().clamp(min=top) > spec.threshold
        gates = torch.softmax(left.masked_fill(hidden, -torch.inf), dim=-1)
        ids.append(index)
        weights.append(gates.gather(-1, index))
        left = left.scatter(-1, index, -torch.inf)
    return torch.cat(ids, -1), torch.cat(weights, -1)


def _within_groups(choice: Tensor, spec: RouteSpec) -> Tensor:
    """`choice` [T, E], -inf outside of each token's chosen groups."""
    grouped = choice.unflatten(-1, (spec.groups, -1))
    score = grouped.amax(-1) if spec.group_score == MAX else grouped.topk(2, dim=-1).values.sum(-1)
    chosen = score.topk(spec.groups_chosen, dim=-1).indices
    hidden = torch.ones_like(score, dtype=torch.bool).scatter(-1, chosen, False)
    return grouped.masked_fill(hidden[..., None], -torch.inf).flatten(-2)


def route_reference(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] int64, largest first, and their weights [T, K], of logits [T, E] and bias [E].

    Computed in fp32 (fp64 for fp64 logits); the choice is that of the exact scores wherever these differ in fp32.
    """
    parsed = RouteSpec.from_text(spec)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if parsed.kind == SPARSEMIXER:
        ids, weights = _sparsemixer(z, parsed)
    else:
        scores = z.softmax(-1) if parsed.kind == SOFTMAX else z.sigmoid() if parsed.kind == SIGMOID else z
        choice = scores if bias is None else scores + bias.to(z.dtype)
        if parsed.groups > 1:
            choice = _within_groups(choice, parsed)
        values, ids = choice.topk(parsed.k, dim=-1)
        weights = values if bias is None else scores.gather(-1, ids)
    if parsed.normalise == SUM:
        weights = weights / (weights.sum(-1, keepdim=True) + parsed.eps).clamp(min=parsed.floor)
    elif parsed.normalise == OVER_CHOSEN:
        weights = weights.softmax(-1)
    if parsed.scale != 1:
        weights = weights * parsed.scale
    return ids, weights.to(getattr(torch, parsed.dtype))


def _fake(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    parsed = RouteSpec.from_text(spec)
    shape = (logits.shape[0], parsed.k)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=getattr(torch, parsed.dtype)),
    )


define("route(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor)", route_reference, _fake)


def router_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: str,
    logits: str,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, ids, weights): `route` of the logits of y [T, C] by weight [E, C] and bias [E], in the dtype `logits` names.

    y is the norm that `norm` describes of x [T, C], which others read too; without one the logits are those of x, and
    y is empty.
    """
    y = norm_reference(x, norm_weight, norm_bias, norm) if norm else x
    dtype = torch.promote_types(x.dtype, getattr(torch, logits))
    wide = (None if t is None else t.to(dtype) for t in (y, weight, bias))
    ids, weights = route_reference(torch.nn.functional.linear(*wide), route_bias, spec)  # type: ignore[arg-type]
    return y if norm else x.new_empty(0), ids, weights


def _router_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: str,
    logits: str,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape) if norm else x.new_empty(0), *_fake(x, None, spec)


define(
    "router(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? route_bias, "
    "str norm, str logits, str spec) -> (Tensor, Tensor, Tensor)",
    router_reference,
    _router_fake,
)
