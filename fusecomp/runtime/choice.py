"""From a step's logits to its tokens: which variant of the sampler a batch needs, and running it.

A variant (`Kind`) is all that decides which kernels run, so it is, with the bucket, the key of a CUDA graph. Variants
are few: how tokens are drawn, whether rows adjust their logits and by which tables, and how many log-probabilities are
kept.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusecomp._compat import distinct_sizes
from fusecomp.runtime.adjust import MIN_P, TYPICAL_P, RowTables, adjust
from fusecomp.runtime.logprobs import exact_score, pack, score, width_for
from fusecomp.runtime.sampler import greedy, sample
from fusecomp.runtime.step_batch import StepBatch

GREEDY, PLAIN, FILTERED, TYPICAL = "greedy", "plain", "filtered", "typical"


class Kind(NamedTuple):
    """A variant of the sampler.

    Attributes:
        draw: how: the arg-max, without a sort, with top-k and top-p, and with typical-p too.
        tables: `RowTables.version` when some row adjusts its logits, else 0.
        logprobs: K of `runtime/logprobs.py`; 0 for none.
    """

    draw: str = GREEDY
    tables: int = 0
    logprobs: int = 0


class Sampled(NamedTuple):
    """Tokens [S] int64, and their packed log-probabilities [S, 2 K + 3] int32 when some row asked for them."""

    tokens: Tensor
    scores: Tensor | None = None


class TokenChoice:
    """The sampler of one engine.

    Args:
        tables: what rows adjust.
        device: of the logits. On CUDA the functions are compiled, once for all batch sizes.
        deterministic: what a row gives depends on that row alone, bit for bit.
    """

    def __init__(self, tables: RowTables, device: torch.device, *, deterministic: bool = False) -> None:
        self.tables = tables
        self._deterministic = deterministic
        self._ids = torch.zeros(0, dtype=torch.int64, device=device)
        self._distinct_sizes = distinct_sizes()
        self._functions: dict[tuple[str, Any], Callable] = {}

    def _function(self, function: Callable, variant: Any) -> Callable:
        """`function` as this device runs it. Variants are compiled apart: Dynamo bounds what one code object holds."""
        if self._ids.device.type != "cuda":
            return self._by_rows(function) if self._deterministic and function is not adjust else function
        if self._deterministic:  # compiled code for one row is not that for several
            return function
        key = function.__name__, variant
        if key not in self._functions:
            own: Any = types.FunctionType(
                function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
            )
            self._functions[key] = torch.compile(own, dynamic=True)
        compiled = self._functions[key]

        def call(*args: Any) -> Any:
            with self._distinct_sizes:
                return compiled(*args)

        return call

    def _by_rows(self, function: Callable) -> Callable:
        """`function` of one row after the other: on the CPU a row's place decides by what code it is rounded.

        `adjust`, which reads rows of tables, needs none of this: it only adds, multiplies and divides.
        """

        def call(*args: Any) -> Any:
            rows = []
            for row in range(len(args[0])):
                own = (a if a is None or a is self._ids else a[row : row + 1].clone() for a in args)
                rows.append(function(*own))
            if isinstance(rows[0], tuple):
                return tuple(map(torch.cat, zip(*rows, strict=True)))
            return torch.cat(rows)

        return call

    def pack(self, logits: Tensor, tokens: Tensor, width: int) -> Tensor:
        """Packed log-probabilities of `tokens`: see `logprobs.pack`."""
        function = exact_score if self._deterministic else score
        return pack(logits, tokens, width, self._function(function, None), stable=self._deterministic)

    def set_vocabulary(self, size: int) -> None:
        """Say how many logits a row has, once it is known."""
        self.tables.vocab = size
        self._ids = torch.arange(size, device=self._ids.device)

    def kind(self, batch: StepBatch) -> Kind:
        """The variant that `batch` needs."""
        if batch.all_greedy:
            draw = GREEDY
        else:
            draw = TYPICAL if batch.typical else FILTERED if batch.filtered else PLAIN
        logprobs = 0 if batch.logprobs < 0 else width_for(batch.logprobs)
        return Kind(draw, self.tables.version if batch.adjusted else 0, logprobs)

    def __call__(self, logits: Tensor, batch: StepBatch, kind: Kind) -> Sampled:
        """Draw a token for each row of logits [S, V]; everything on the device."""
        raw = logits
        if kind.draw != GREEDY or kind.tables:  # else nothing stands between the logits and their arg-max
            positions = batch.tokens[1][batch.logit_indices]
        if kind.tables:
            logits = self._adjusted(logits, batch, positions)
        if kind.draw == GREEDY:
            tokens = greedy(logits)
        else:
            wishes = self.tables.params[batch.rows]
            top_k, top_p = (None, None) if kind.draw == PLAIN else (batch.top_k, batch.top_p)
            typical_p = wishes[:, TYPICAL_P] if kind.draw == TYPICAL else None
            tokens = self._function(sample, kind.draw)(
                logits,
                batch.temperature,
                top_k,
                top_p,
                batch.seeds,
                positions,
                self._ids,
                wishes[:, MIN_P],
                typical_p,
            )
        if not kind.logprobs:
            return Sampled(tokens)
        return Sampled(tokens, self.pack(raw, tokens, kind.logprobs))

    def _adjusted(self, logits: Tensor, batch: StepBatch, positions: Tensor) -> Tensor:
        t = self.tables
        t.note_fed(batch.rows, positions, batch.tokens[0][batch.logit_indices])
        variant = t.bias is None, t.counts is None, t.recent is None
        return self._function(adjust, variant)(
            logits, batch.rows, positions, t.params, t.bias, t.counts, t.recent, t.prefixes, t.banned, t.until, t.back
        )
