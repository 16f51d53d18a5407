"""Mask classification by evaluation: what a mask function allows, found by calling it on concrete positions.

A mask is never inferred from a name. `classify_function` evaluates Hugging Face mask functions on rows of
positions up to the longest context served; `classify_matrix` reads an evaluated [T, T] visibility matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CAUSAL, BIDIRECTIONAL, UNKNOWN = "causal", "bidirectional", "unknown"


@dataclass(frozen=True)
class MaskSpec:
    """A proven mask. `window` > 0 limits a causal query to that many last keys, itself included.

    `proven_to` is the longest context the evaluation covered; `reason` says why an unknown mask is unknown.
    """

    kind: str
    window: int = 0
    proven_to: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == CAUSAL and self.window:
            return f"sliding({self.window})"
        return self.kind if self.kind != UNKNOWN else f"unknown: {self.reason}"


def unknown(reason: str) -> MaskSpec:
    """A mask that must not be rewritten, and why."""
    return MaskSpec(UNKNOWN, reason=reason)


def _query_rows(length: int) -> list[int]:
    """Query positions to evaluate: all small ones, both sides of every power of two, a stride, and the last."""
    rows = set(range(min(length, 40)))
    power = 1
    while power < length:
        rows.update((power - 1, power, power + 1))
        power *= 2
    rows.update(range(0, length, max(1, length // 61)))
    rows.add(length - 1)
    return sorted(r for r in rows if r < length)


def classify_rows(queries: Tensor, visible: Tensor, length: int) -> MaskSpec:
    """Classify visibility rows: `visible` [Q, length] says which keys each of `queries` [Q] sees."""
    keys = torch.arange(length)
    if bool(visible.all()):
        # A single token sees only itself under every mask: that proves nothing.
        return MaskSpec(BIDIRECTIONAL, 0, length) if length > 1 else unknown("evaluated on one position only")
    causal = keys[None] <= queries[:, None]
    if bool((visible & ~causal).any()):
        return unknown("some query sees a later key and some key is hidden from an earlier or later query")
    if not bool(visible.gather(1, queries[:, None]).all()):
        return unknown("some query does not see its own position")
    seen = visible.sum(1)
    if bool((visible == causal).all()):
        return MaskSpec(CAUSAL, 0, length)
    window = int(seen.max())
    if bool((visible == (causal & (keys[None] > queries[:, None] - window))).all()):
        return MaskSpec(CAUSAL, window, length)
    first = visible.int().argmax(1)
    if bool((first[1:] >= first[:-1]).all()) and bool((seen == queries - first + 1).all()):
        return unknown(f"looks chunked: query {int(queries[-1])} sees keys from {int(first[-1])}")
    return unknown("visibility is neither causal nor a sliding window")


def classify_function(mask_function: Callable, length: int) -> MaskSpec:
    """Classify a Hugging Face mask function `f(batch, head, q, kv) -> bool tensor` for contexts up to `length`.

    It is evaluated for two batch and two head indices; dependence on either, or any exception, means unknown.
    """
    queries = torch.tensor(_query_rows(length))
    keys = torch.arange(length)
    rows = []
    try:
        for batch, head in ((0, 0), (1, 0), (0, 1)):
            index = (torch.tensor(batch), torch.tensor(head))
            visible = mask_function(*index, queries[:, None], keys[None])
            rows.append(torch.as_tensor(visible).expand(len(queries), length).bool())
    except Exception as error:  # any failure of foreign mask code means the mask is not proven
        return unknown(f"the mask function cannot be evaluated on positions: {type(error).__name__}: {error}")
    if not all(torch.equal(rows[0], other) for other in rows[1:]):
        return unknown("the mask depends on the batch row or on the head")
    return classify_rows(queries, rows[0], length)


def classify_matrix(visible: Tensor) -> MaskSpec:
    """Classify an evaluated visibility matrix [T, T] (True where the query of that row sees the key)."""
    return classify_rows(torch.arange(visible.shape[0]), visible, visible.shape[1])
