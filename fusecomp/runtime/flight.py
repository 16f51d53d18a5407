"""Steps in flight: launched on the device, sampled ids on their way to the host, not yet accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusecomp.runtime.choice import Sampled
from fusecomp.runtime.logprobs import PromptTokens
from fusecomp.runtime.mailbox import Mailbox
from fusecomp.runtime.scheduler import ScheduledStep


@dataclass(frozen=True)
class Flight:
    """One launched step.

    Attributes:
        step: what was scheduled.
        prompt: which prompt tokens it scored.
    """

    step: ScheduledStep
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
    """Makes flights. Ids arrive in the halves of the mailbox by turns, so that those before can still be read."""

    def __init__(self, mailbox: Mailbox, device: torch.device) -> None:
        self._mailbox, self._cuda = mailbox, device.type == "cuda"
        self._half = 0

    def half(self) -> int:
        """Where the next step's ids are to arrive."""
        self._half ^= 1
        return self._half

    def flight(
        self,
        step: ScheduledStep,
        sampled: Sampled,
        half: int,
        prompt: PromptTokens | None = None,
        prompt_scores: Tensor | None = None,
    ) -> Flight:
        """Of a step that was launched and delivers to `half`; queues the copies of what else it gives to the host."""
        host = self._mailbox.delivered[half, : sampled.tokens.shape[0]]
        scores, prompt_scores = self._to_host(sampled.scores), self._to_host(prompt_scores)
        arrived = None
        if self._cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return Flight(step, prompt, host, scores, prompt_scores, arrived)

    def _to_host(self, scores: Tensor | None) -> Tensor | None:
        """A copy in memory of its own: log-probabilities are few, and torch keeps freed pinned memory."""
        if scores is None:
            return None
        host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=self._cuda)
        return host.copy_(scores, non_blocking=True)
