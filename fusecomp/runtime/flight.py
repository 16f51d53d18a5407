"""Steps in flight: launched on the device, sampled ids on their way to the host, not yet accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusecomp.runtime.scheduler import ScheduledStep


@dataclass(frozen=True)
class Flight:
    """One launched step.

    Attributes:
        step: what was scheduled.
        tokens: sampled ids [S] on the device; valid until the next launch's kernels run, in stream order.
    """

    step: ScheduledStep
    tokens: Tensor
    _host: Tensor
    _arrived: torch.cuda.Event | None

    def token_ids(self) -> list[int]:
        """Wait for the sampled ids, one a row, padding rows included."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class Runway:
    """Makes flights: two pinned host buffers, so that one step's ids can be read while the next one's arrive."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.empty(max_rows, dtype=torch.int64, pin_memory=self._cuda) for _ in range(2)]
        self._turn = 0

    def launch(self, step: ScheduledStep, tokens: Tensor) -> Flight:
        """Queue the copy of `tokens` to the host behind the step's kernels."""
        self._turn ^= 1
        host = self._buffers[self._turn][: tokens.shape[0]]
        host.copy_(tokens, non_blocking=True)
        arrived = None
        if self._cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return Flight(step, tokens, host, arrived)
