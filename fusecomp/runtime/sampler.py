"""Logits to tokens on the device, with no sync and no data-dependent shape: traceable and capturable. Constants enter
by `masked_fill`, whose scalar is a kernel argument; an eager `torch.where` may copy it from the host, which a capture
forbids.

Legend: N rows, V vocabulary.

A row whose logits are not usable (a NaN, a +inf, or nothing above -inf) gives `INVALID_TOKEN`, never a token.

Randomness is counter-based: the noise of vocabulary id `v` is a pure function of (seed, position, v), so a seeded
request draws the same tokens in any batch, row or order. The draw is the arg-max of `logit / temperature + noise`
(Gumbel-max: with standard Gumbel noise G, arg-max_v(x_v + G_v) is distributed as softmax(x)).
"""

from __future__ import annotations

import torch

from fusecomp.ops import OPS
from fusecomp.ops.sampling import INVALID_TOKEN

# Below this a temperature is taken as 0 (vLLM's bound): a division by a denormal would give inf and NaN.
MIN_TEMPERATURE = 1e-5

# Probability mass in fixed point: sums are exact, so the top-p cut depends neither on the order of a parallel sum
# nor on the batch. A row sums to at most V * 2**40 < 2**63 for V < 2**23.
_MASS_ONE = float(2**40)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


# Constants of splitmix64 (Steele, Lea, Flood 2014): the golden-ratio increment and the finalizer's multipliers.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_A = _signed(0xBF58476D1CE4E5B9)
_MIX_B = _signed(0x94D049BB133111EB)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Arg-max of each row, the first of equals. logits [N, V] float -> [N] int64; `INVALID_TOKEN` for bad rows."""
    return OPS.greedy(logits)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    ids: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    typical_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a row. Everything is computed in float32.

    Order and meaning are Hugging Face's: temperature, then top-k (all tokens tied with the k-th stay), then top-p over
    what is left (the smallest prefix, by falling probability, that reaches p; at least one token; of equal
    probabilities the lower id comes first), then min-p, then typical-p over what is left. vLLM has no typical-p and
    applies min-p before top-k, which differs only where min-p and top-p are given together. top-k and top-p need a sort
    of each row, typical-p another; min-p needs none, since the most likely token is always kept.

    Args:
        logits: [N, V] float.
        temperature: [N] float32; under `MIN_TEMPERATURE` the row takes its arg-max.
        top_k: [N] int; 1 takes the arg-max, 0 and less keep all. None: no row has a top-k.
        top_p: [N] float32; 1 and more keep all. None: no row has a top-p.
        seeds: [N] int64.
        positions: [N] int64, any number that differs from draw to draw of one seed: the position of the last token.
        ids: [V] int64, 0 to V - 1; made here when None. Compiled callers give it, because Inductor of torch 2.11
            multiplies a range made inside by 64-bit constants in 32 bits, and Triton refuses that.
        min_p: [N] float32; 0 keeps all. None: no row has a min-p.
        typical_p: [N] float32; 1 and more keep all. None: no row has a typical-p.

    Returns: [N] int64; `INVALID_TOKEN` for bad rows.
    """
    if ids is None:
        ids = torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.float()
    best = logits.amax(dim=-1)
    take_best = temperature < MIN_TEMPERATURE
    if top_k is not None:
        take_best = take_best | (top_k == 1)
    # The maximum becomes 0 before the division, so a small temperature cannot overflow; 1 keeps the order of logits.
    scores = (logits - best[:, None]) / temperature.masked_fill(take_best, 1.0)[:, None]
    if top_k is None and top_p is None and typical_p is None:
        if min_p is not None:
            scores = scores.masked_fill(scores < min_p.log()[:, None], float("-inf"))
        token = (scores + _noise(seeds, positions, ids, take_best)).argmax(dim=-1)
    else:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        keep = _keep(scores, top_k, top_p, min_p)
        if typical_p is not None:
            keep = _keep_typical(scores, keep, typical_p)
        # The arg-max of a greedy row comes first in order, and typical-p may drop it.
        keep = keep | take_best[:, None]
        kept = scores.masked_fill(~keep, float("-inf"))
        pick = (kept + _noise(seeds, positions, order, take_best)).argmax(dim=-1)
        token = order.gather(1, pick[:, None])[:, 0]
    return token.masked_fill(~best.isfinite(), INVALID_TOKEN)


def _keep(
    scores: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None = None
) -> torch.Tensor:
    """Which tokens survive top-k, top-p, then min-p. scores [N, V] in falling order, maximum 0 -> [N, V] bool."""
    vocab = scores.shape[-1]
    keep = torch.ones_like(scores, dtype=torch.bool)
    if top_k is not None:
        kth = top_k.masked_fill(top_k <= 0, vocab).clamp(max=vocab).long() - 1
        keep = scores >= scores.gather(1, kth[:, None])
    if top_p is not None:
        mass = (scores.exp() * _MASS_ONE).masked_fill(~keep, 0.0).long()
        reached = mass.cumsum(dim=-1)
        before = (reached - mass).double()
        target = top_p.double()[:, None] * reached[:, -1:].double()
        keep = keep & ((before < target) | (top_p >= 1)[:, None])
    if min_p is not None:  # a score is the logarithm of a probability's share of the greatest
        keep = keep & (scores >= min_p.log()[:, None])
    return keep


def _keep_typical(scores: torch.Tensor, keep: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Which of the kept tokens survive typical-p (Meister et al. 2022): those whose surprise -log p is nearest to the
    entropy, until their probability reaches `typical_p`; all tied with the last one stay.

    scores [N, V], maximum 0; keep [N, V] bool; typical_p [N] float32 -> [N, V] bool.
    """
    mass = (scores.exp() * _MASS_ONE).masked_fill(~keep, 0.0).long()
    total = mass.sum(dim=-1, keepdim=True)
    surprise = (total.double() / _MASS_ONE).log() - scores.double()
    # The entropy in fixed point too: at most log(V) * 2**40.
    share = mass.double() / total.double()
    parts = (share * surprise.masked_fill(~keep, 0.0) * _MASS_ONE).long()
    entropy = parts.sum(dim=-1, keepdim=True).double() / _MASS_ONE
    distance = (surprise - entropy).abs().float().masked_fill(~keep, float("inf"))
    nearest, order = distance.sort(dim=-1, stable=True)
    reached = mass.gather(1, order).cumsum(dim=-1).double()
    last = (reached < typical_p.double()[:, None] * total.double()).sum(dim=-1, keepdim=True)
    typical = distance <= nearest.gather(1, last.clamp(max=scores.shape[-1] - 1))
    return keep & (typical | (typical_p >= 1)[:, None])


def _noise(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, finite; 0 in rows that are `off`.

    seeds, positions [N] int64; ids [V] or [N, V] int64; off [N] bool -> [N, V].
    """
    row = _mix(_mix(seeds + _GOLDEN) ^ (positions * _GOLDEN))
    bits = _mix(row[:, None] + ids * _GOLDEN)
    # 63 bits as a float: a relative error of 2**-24 even near 0, where an exponential decides who wins; a fixed grid of
    # 2**-24 would tie among 100,000 tokens. The bounds keep both logarithms finite.
    uniform = _shift(bits, 1).float() * 2.0**-63
    exponential = -torch.log1p(-uniform.clamp(2.0**-64, 1 - 2.0**-24))
    return (-exponential.log()).masked_fill(off[:, None], 0.0)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64: a bijection whose every output bit depends on every input bit."""
    x = (x ^ _shift(x, 30)) * _MIX_A
    x = (x ^ _shift(x, 27)) * _MIX_B
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64 (`>>` copies the sign)."""
    return (x >> by) & ((1 << (64 - by)) - 1)
