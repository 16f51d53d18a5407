"""What lies between the scores q @ k^T and the softmax, fitted by evaluating it: scale, softcap and mask.

It is evaluated at two lengths and on scores of all magnitudes: what depends on the number of tokens, on other scores
or on their size is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fusecomp.patterns.base import PassContext
from fusecomp.patterns.evaluate import Inputs, NotProvable, evaluate, static_length
from fusecomp.patterns.masks import MaskSpec, classify_matrix, unknown

# Added to a masked score; models use finfo.min, -inf, -1e9 or -1e4.
MASKED_BELOW = -9.9e3


@dataclass
class ScoreFacts:
    """What lies between q @ k^T and the softmax: scale, softcap (0 for none), and the mask."""

    scale: float
    softcap: float
    mask: MaskSpec


def proof_length(q: Tensor, context: PassContext) -> int:
    """Positions to evaluate: the graph's own length when it is fixed, else what the context asks for."""
    return static_length(q, -2) or context.proof_length


def mask_from_node(node: Node, q: Tensor, context: PassContext) -> MaskSpec:
    """Classify a boolean or additive mask node by evaluating it."""
    length = proof_length(q, context)
    try:
        masks = [evaluate(node, q.shape[-2], Inputs(length, seed)) for seed in (0, 1)]
    except NotProvable as error:
        return unknown(str(error))
    visible = []
    for mask in masks:
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask < MASKED_BELOW)).all()):
            return unknown("the mask adds a bias to visible scores")
        visible.append(mask if mask.dtype == torch.bool else mask == 0)
    if not torch.equal(visible[0], visible[1]):
        return unknown("the mask depends on token ids")
    try:
        matrix = _one_matrix(visible[0], length)
        if (shorter := _shorter(q, length)) and not torch.equal(
            _visible(evaluate(node, q.shape[-2], Inputs(shorter)), shorter), matrix[:shorter, :shorter]
        ):
            return unknown("the mask depends on the number of tokens")
        return classify_matrix(matrix)
    except NotProvable as error:
        return unknown(str(error))


def _visible(mask: Tensor, length: int) -> Tensor:
    return _one_matrix(mask if mask.dtype == torch.bool else mask == 0, length)


def _shorter(q: Tensor, length: int) -> int:
    """Another length to evaluate, since what depends on the number of tokens differs there; 0 when it is fixed."""
    return 0 if static_length(q, -2) else length // 2


def _one_matrix(values: Tensor, length: int) -> Tensor:
    """The [length, length] matrix that every batch row and head shares."""
    matrices = values.expand(*values.shape[:-2], length, length).reshape(-1, length, length)
    if not bool((matrices == matrices[:1]).all()):
        raise NotProvable("the mask depends on the batch row or on the head")
    return matrices[0]


def fit_scores(final: Node, scores: Node, q: Tensor, context: PassContext) -> ScoreFacts:
    """Fit `final = softcap(scale * scores) + mask` by evaluating the chain on constant scores."""
    length = proof_length(q, context)
    shorter = _shorter(q, length)

    def chain(value: float | Tensor, seed: int = 0, size: int = length) -> Tensor:
        given = {scores: torch.zeros(1, 1, size, size) + value}
        out = evaluate(final, q.shape[-2], Inputs(size, seed), given)
        return _one_matrix(out.float(), size)

    try:
        at = {x: chain(x) for x in (0.0, 1e-3, 1.0, -2.0, 30.0, 1e6)}
        other_ids = chain(0.0, seed=1)
        varied = _varied_scores(length)
        at_varied = chain(varied)
        at_shorter = chain(varied[:shorter, :shorter], size=shorter) if shorter else at_varied
    except NotProvable as error:
        return ScoreFacts(0.0, 0.0, unknown(str(error)))
    visible = at[0.0] > MASKED_BELOW
    if not bool(visible.any()):
        return ScoreFacts(0.0, 0.0, unknown("every score is masked"))
    if not torch.equal(visible, other_ids > MASKED_BELOW):
        return ScoreFacts(0.0, 0.0, unknown("the mask depends on token ids"))
    seen = {x: values[visible] for x, values in at.items()}
    # A masked score must stay far below any visible one whatever it was before (the largest probe aside).
    if any(bool((at[x][~visible] > MASKED_BELOW / 2).any()) for x in (1.0, -2.0, 30.0)):
        return ScoreFacts(0.0, 0.0, unknown("masking scales scores instead of replacing or lowering them"))
    if bool((seen[0.0] != 0).any()):
        return ScoreFacts(0.0, 0.0, unknown("a bias is added to visible scores (ALiBi or relative positions?)"))
    if any(bool((v != v[0]).any()) for v in seen.values()):
        return ScoreFacts(0.0, 0.0, unknown("the scale depends on the position"))
    point = {x: float(v[0]) for x, v in seen.items()}
    scale, softcap = point[1.0], 0.0
    if not math.isclose(point[30.0], 30 * scale, rel_tol=1e-3):
        scale, softcap = point[1e-3] / 1e-3, point[1e6]
        fitted = {x: softcap * math.tanh(scale * x / softcap) if softcap > 0 else math.nan for x in point}
        if not all(math.isclose(fitted[x], point[x], rel_tol=1e-3, abs_tol=1e-6) for x in point):
            return ScoreFacts(0.0, 0.0, unknown("scores go through a function that is neither a scale nor a softcap"))
    elif not math.isclose(point[-2.0], -2 * scale, rel_tol=1e-5):
        return ScoreFacts(0.0, 0.0, unknown("scores go through a non-linear function"))
    # Constant scores cannot show that one score changes another (a mean, a rank): varied ones must fit as well.
    fit = softcap * torch.tanh(scale * varied / softcap) if softcap else scale * varied
    if not torch.allclose(at_varied[visible], fit[visible], rtol=1e-3, atol=1e-5) or bool(
        (at_varied[~visible] > MASKED_BELOW / 2).any()
    ):
        return ScoreFacts(0.0, 0.0, unknown("what becomes of a score depends on other scores"))
    if shorter and not torch.allclose(at_shorter, at_varied[:shorter, :shorter], rtol=1e-5):
        return ScoreFacts(0.0, 0.0, unknown("what becomes of a score depends on the number of tokens"))
    large = 1e4 ** torch.rand(length, length, generator=torch.Generator().manual_seed(3)) * varied.sign()
    fit = softcap * torch.tanh(scale * large / softcap) if softcap else scale * large
    if not torch.allclose(chain(large)[visible], fit[visible], rtol=1e-3, atol=1e-5):
        return ScoreFacts(0.0, 0.0, unknown("large scores are treated differently from small ones"))
    return ScoreFacts(scale, softcap, classify_matrix(visible))


def _varied_scores(length: int) -> Tensor:
    return 4 * torch.randn(length, length, generator=torch.Generator().manual_seed(2))
