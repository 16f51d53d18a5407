"""Scales of input channels and ranges of groups that make a layer's outputs err least on calibration inputs.

Scales move what is hard to round from activations to weights (SmoothQuant) or make weights of large inputs finer (AWQ):
s = |x|^a / |w|^b. Ranges: a group's codes span a share of it, and its largest weights are cut.

Legend: R rows (tokens), N rows, K columns of a weight, E experts, G groups of C columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecomp.ops.quant import fake_quantize_reference
from fusecomp.quant.online.observe import ExpertInputs
from fusecomp.quant.online.rounding import MOST_ELEMENTS, round_trip
from fusecomp.quant.online.schemes import Scheme

EXPONENTS = tuple(i / 10 for i in range(1, 11))
# 1 comes first: of equals, and for experts that no token met, the first is taken.
SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass
class Weight:
    """One weight of a search and its inputs.

    Attributes:
        values: fp32 [N, K], or the parameter itself [E, N, K] of experts.
        rows: of linears: inputs [R, K] fp32.
        inputs: of experts: statistics.
        scheme, dtype: by which, and to what, it is quantized.
        symmetric: of int4.
    """

    scheme: Scheme
    dtype: torch.dtype
    values: Tensor
    rows: Tensor | None
    inputs: ExpertInputs | None
    symmetric: bool = True

    @functools.cached_property
    def exact(self) -> Tensor:
        """Outputs [R, N] of a linear."""
        assert self.rows is not None
        return self.rows @ self.values.t()


def search_scale(weights: Sequence[Weight], sizes: Tensor, constrain: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The scales of channels under which `weights`, which share an input, err least.

    Args:
        sizes: of each channel of the input, [K], or [E, K] when every expert has scales of its own.
        constrain: turns wished scales into allowed ones.

    Returns:
        As sizes; None when none is better than no scales.
    """
    best = _error(weights, None)
    found: Tensor | None = None
    for wished in _candidates(weights, sizes):
        s = constrain(wished)
        error = _error(weights, s)
        if error < best:
            best, found = error, s
    return found


def input_sizes(x: Tensor | ExpertInputs, scheme: Scheme) -> Tensor:
    """Largest magnitude of each channel where inputs are rounded, mean magnitude otherwise: [K], or [E, K]."""
    if isinstance(x, Tensor):
        return x.abs().amax(0) if scheme.activation else x.abs().mean(0)
    met = x.tokens.unsqueeze(-1) > 0
    return torch.where(met, x.magnitudes / x.tokens.clamp(min=1).unsqueeze(-1), 1.0)


def _candidates(weights: Sequence[Weight], x: Tensor) -> Iterator[Tensor]:
    scheme = weights[0].scheme
    w = _weight_sizes(weights, x.dim() == 2)
    for a in EXPONENTS:
        for b in (1 - a,) if scheme.activation else (0.0, 1 - a):
            s = x.clamp(min=1e-5) ** a / w.clamp(min=1e-5) ** b
            s = s / (s.amax(-1, keepdim=True) * s.amin(-1, keepdim=True)).sqrt()
            yield s.clamp(2.0**-10, 2.0**10)


def _weight_sizes(weights: Sequence[Weight], per_expert: bool) -> Tensor:
    """As `input_sizes`, of the columns of all weights together."""
    sizes = []
    for weight in weights:
        magnitudes = [part.float().abs() for part in _slices(weight.values)]
        columns = [m.amax(-2) if weight.scheme.activation else m.mean(-2) for m in magnitudes]
        joined = torch.cat([c.reshape(-1, c.shape[-1]) for c in columns])
        sizes.append(joined if per_expert else joined.mean(0))
    return torch.stack(sizes).amax(0)


def _slices(values: Tensor) -> list[Tensor]:
    """A weight, or so many experts at a time that fp32 copies stay small."""
    if values.dim() == 2:
        return [values]
    return list(values.split(max(1, MOST_ELEMENTS // (values.shape[1] * values.shape[2]))))


def _error(weights: Sequence[Weight], s: Tensor | None) -> float:
    """Squared error of outputs relative to their squares, summed over the weights."""
    return sum(_experts_error(w, s) if w.rows is None else _linear_error(w, s) for w in weights)


def _linear_error(weight: Weight, s: Tensor | None) -> float:
    rows, scheme = weight.rows, weight.scheme
    assert rows is not None
    scaled, x = (weight.values, rows) if s is None else (weight.values * s, rows / s)
    if scheme.activation is not None:
        x = fake_quantize_reference(x, None, scheme.from_tokens(0).activation.to_text())  # type: ignore[union-attr]
    found = x @ round_trip(scaled, weight.scheme, weight.dtype, weight.symmetric).t()
    return float((found - weight.exact).square().sum() / weight.exact.square().sum().clamp(min=1e-30))


def _experts_error(weight: Weight, s: Tensor | None) -> float:
    """By the second moments within groups: what lies between groups is left out, as it would take K * K numbers."""
    inputs = weight.inputs
    assert inputs is not None
    error = energy = torch.zeros((), device=weight.values.device)
    start = 0
    for part in _slices(weight.values):
        values = part.float()
        here = slice(start, start + len(values))
        start += len(values)
        scaled = values if s is None else values * (s if s.dim() == 1 else s[here].unsqueeze(-2))
        found = round_trip(scaled, weight.scheme, weight.dtype, weight.symmetric)
        if s is not None:
            found = found / (s if s.dim() == 1 else s[here].unsqueeze(-2))
        error = error + _quadratic(found - values, inputs.moments[here]).sum()
        energy = energy + _quadratic(values, inputs.moments[here]).sum()
    return float(error / energy.clamp(min=1e-30))


def _quadratic(values: Tensor, moments: Tensor) -> Tensor:
    """v^T M v of each group: [..., N, G] of values [..., N, K] and moments [..., G, C, C]."""
    groups = values.unflatten(-1, (-1, moments.shape[-1])).transpose(-2, -3)  # [..., G, N, C]
    return ((groups @ moments) * groups).sum(-1).transpose(-1, -2)


def search_clip(weight: Weight, s: Tensor | None) -> tuple[Tensor, float]:
    """The share of each group's range that its codes span, [..., N, G], and the error left relative to the output.

    Args:
        s: scales of the channels, [K] or [E, K].
    """
    cols = weight.scheme.group(weight.values.shape[-1])
    assert cols
    shares, error, energy = [], 0.0, 0.0
    start = 0
    for part in _slices(weight.values):
        values = part.float()
        here = slice(start, start + len(values))
        start += len(values)
        by = None if s is None else s if s.dim() == 1 else s[here]
        moments = _moments(weight, cols, by, here)
        scaled = values if by is None else values * (by if by.dim() == 1 else by.unsqueeze(-2))
        best = chosen = None
        for share in SHARES:
            clip = torch.full((*scaled.shape[:-1], scaled.shape[-1] // cols), share, device=scaled.device)
            loss = _quadratic(round_trip(scaled, weight.scheme, weight.dtype, weight.symmetric, clip) - scaled, moments)
            if best is None or chosen is None:
                best, chosen = loss, clip
            else:
                chosen = torch.where(loss < best, clip, chosen)
                best = torch.minimum(loss, best)
        assert best is not None and chosen is not None
        shares.append(chosen)
        error += float(best.sum())
        energy += float(_quadratic(scaled, moments).sum())
    return torch.cat(shares) if weight.values.dim() == 3 else shares[0], error / max(energy, 1e-30)


def _moments(weight: Weight, cols: int, s: Tensor | None, here: slice) -> Tensor:
    """Second moments within groups, [..., G, C, C], of inputs divided by s."""
    if weight.rows is not None:
        rows = weight.rows if s is None else weight.rows / s
        groups = rows.unflatten(-1, (-1, cols)).transpose(0, 1)  # [G, R, C]
        return groups.transpose(1, 2) @ groups
    assert weight.inputs is not None
    moments = weight.inputs.moments[here]
    if s is None:
        return moments
    by = s.unflatten(-1, (-1, cols))  # [..., G, C]
    return moments / (by.unsqueeze(-1) * by.unsqueeze(-2))
