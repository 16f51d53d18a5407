"""Canonical op of greedy sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.library import define

INVALID_TOKEN = -1  # of a row with a NaN, a +inf, or nothing above -inf


def greedy_reference(logits: Tensor) -> Tensor:
    """Arg-max of each row, the first of equals. logits [N, V] float -> [N] int64; `INVALID_TOKEN` for bad rows."""
    # max propagates NaN, so the value at the arg-max tells whether the row has one.
    best, token = logits.max(dim=-1)
    return token.masked_fill(~best.isfinite(), INVALID_TOKEN)


def _fake(logits: Tensor) -> Any:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


define("greedy(Tensor logits) -> Tensor", greedy_reference, _fake)
