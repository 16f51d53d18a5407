"""What sampling options mean, row by row in NumPy and float64, written from the definitions."""

from __future__ import annotations

import numpy as np


def adjusted(logits, prompt, output, params, eos=()):
    """Logits [V] after bias, bans and penalties."""
    x = np.asarray(logits, np.float64).copy()
    known = [*prompt, *output]
    for token, value in params.logit_bias.items():
        x[token] += value
    for word in params.bad_words:
        *prefix, last = word
        if not prefix or known[-len(prefix) :] == prefix:
            x[last] = -np.inf
    if params.allowed_token_ids is not None:
        x[[i for i in range(len(x)) if i not in params.allowed_token_ids]] = -np.inf
    if len(output) < params.min_tokens:
        x[[*params.stop_token_ids, *(() if params.ignore_eos else eos)]] = -np.inf
    for token in set(known):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def kept(logits, params):
    """Ids that survive temperature, top-k, top-p, min-p and typical-p, in this order."""
    x = np.asarray(logits, np.float64) / params.temperature

    def probabilities():
        p = np.exp(x - x.max())
        return p / p.sum()

    if params.top_k > 0:
        x[x < np.sort(x)[-min(params.top_k, len(x))]] = -np.inf
    if params.top_p < 1:
        p = probabilities()
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        x[order[before >= params.top_p]] = -np.inf
    if params.min_p > 0:
        p = probabilities()
        x[p < params.min_p * p.max()] = -np.inf
    if params.typical_p < 1:
        p = probabilities()
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(p)
            distance = np.abs(surprise - np.nansum(p * surprise))
        order = np.argsort(distance, kind="stable")
        last = order[min(np.sum(np.cumsum(p[order]) < params.typical_p), len(x) - 1)]
        x[distance > distance[last]] = -np.inf
    return {int(i) for i in np.flatnonzero(np.isfinite(x))}
