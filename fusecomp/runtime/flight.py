"""Steps in flight: launched on the device, sampled ids on their way to the host, not yet accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusecomp.runtime.choice import Sampled
from fusecomp.runtime.logprobs import PromptTokens
from fusecomp.runtime.scheduler import ScheduledStep


@dataclass(frozen=True)
class Flight:
    """One launched step.

    Attributes:
        step: what was scheduled.
        tokens: sampled ids [S] on the device; valid until the next launch's kernels run, in stream order.
        prompt: which prompt tokens it scored.
    """

    step: ScheduledStep
    tokens: Tensor
    prompt: PromptTokens | None
    _host: Tensor
    _scores: Tensor | None
    _prompt_scores: Tensor | None
    _arrived: torch.cuda.Event | None

    def token_ids(self) -> list[int]:
        """Wait for the sampled ids, one a row, padding rows included."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()

    def scores(self) -> np.ndarray | None:
        """Packed log-probabilities [S, 2 K + 3] of the sampled tokens, after `token_ids`; None when no row asked."""
        return None if self._scores is None else self._scores.numpy()

    def prompt_scores(self) -> np.ndarray:
        """The same [N, 2 K + 3] of the tokens of `prompt`."""
        assert self._prompt_scores is not None
        return self._prompt_scores.numpy()


class Runway:
    """Makes flights: two pinned host buffers, so that one step's ids can be read while the next one's arrive."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.empty(max_rows, dtype=torch.int64, pin_memory=self._cuda) for _ in range(2)]
        self._turn = 0

    def launch(
        self,
        step: ScheduledStep,
        sampled: Sampled,
        prompt: PromptTokens | None = None,
        prompt_scores: Tensor | None = None,
    ) -> Flight:
        """Queue the copies of what the step gives to the host, behind its kernels."""
        self._turn ^= 1
        tokens = sampled.tokens
        host = self._buffers[self._turn][: tokens.shape[0]]
        if self._cuda:
            from fusecomp.lowerings.feed import launch_deliver

            launch_deliver(tokens, host)
        else:
            host.copy_(tokens)
        scores, prompt_scores = self._to_host(sampled.scores), self._to_host(prompt_scores)
        arrived = None
        if self._cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return Flight(step, tokens, prompt, host, scores, prompt_scores, arrived)

    def _to_host(self, scores: Tensor | None) -> Tensor | None:
        """A copy in memory of its own: log-probabilities are few, and torch keeps freed pinned memory."""
        if scores is None:
            return None
        host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=self._cuda)
        return host.copy_(scores, non_blocking=True)
