"""What crosses between host and device at a step: the host's letter to a step of decodes, and the ids that come back.

Both ways lead through pinned memory that two kernels use (`lowerings/feed.py`): `feed` is the first of a decode step,
`deliver` the last. They stand inside the step's CUDA graph, whose arguments never change. So there is one place for
letters, and the rules are:

- The host fills `arrays`, then numbers the letter (`send`) and launches a step that feeds. A feed takes a letter whose
  number it has not seen, and writes the number back; before that, `wait` keeps the host from filling the next one. A
  step is launched before the one before it has ended, but its letter is written when that one has begun, which was
  long before: the host read the tokens of yet another one in between.
- A run that finds no new letter leaves its inputs as they are and delivers nothing. So a step may run any number of
  times (a check, a measurement, a capture) and is the same step. Only, no such run may be under way when the next
  letter is sent, or it would take it: whoever queues one and does not wait for it says so (`hold`).
- Ids lie in `ids`, where the next step finds those that its rows continue from, and in that half of `delivered` which
  the letter names, so that the host can read one step's while the next one's arrive.

Steps that are not all decodes are given by copies and deliver by a kernel launched behind them: their graphs are
few, and larger than what a gap costs.

Legend: S rows, P pages per row of the block table.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.lowerings.letter import BLOCK, NOWHERE, Letter, deliver_reference, feed_reference

LISTS = {  # of a letter
    "ids": torch.int32,
    "slots": torch.int64,
    "seq_lens": torch.int32,
    "moved_at": torch.int32,
    "moved_to": torch.int32,
    "continues": torch.int32,
}
NUMBER, COUNT, MOVED, HALF = range(4)  # of `header`
# Seconds for which the host looks whether a letter was taken, before it asks the device what happened.
PATIENCE = 10.0


class Mailbox:
    """One engine's.

    Args:
        max_rows: most rows of a step.
        device: of the steps.

    Attributes:
        arrays: the letter in the making, `LISTS` of at least max_rows: of each row its id, KV slot, length and the row
            of `ids` that it continues from, below 0 for none; and places in the block tables with their new blocks.
        ids: [max_rows] int64 on the device: what the latest step sampled, valid until the next one's end.
        delivered: [2, max_rows] int64 on the host, pinned.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        cuda = device.type == "cuda"

        def on_host(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=cuda)

        def on_device(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        header, taken, rows = on_host((4,)), on_host((1,)), -(-max_rows // BLOCK) * BLOCK
        lists = {name: on_host((rows,), dtype) for name, dtype in LISTS.items()}
        self._letter = Letter(header, taken, **lists)
        self.arrays = {name: tensor.numpy() for name, tensor in lists.items()}
        self.delivered = on_host((2, max_rows))
        self.ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._header, self._taken = header.numpy(), taken.numpy()
        self._half, self._halves = on_device(NOWHERE), (on_device(0), on_device(1))
        self._seen = on_device(0)
        self._held = False
        self._feed: Callable[..., None] = feed_reference
        self._deliver: Callable[..., None] = deliver_reference
        self._drain: Callable[[], None] = _nothing
        if cuda:
            from fusecomp.lowerings.feed import launch_deliver, launch_feed

            self._feed, self._deliver = launch_feed, launch_deliver
            self._drain = torch.cuda.synchronize

    def wait(self) -> None:
        """Return when the letter sent last was taken: `arrays` may be filled."""
        if self._held:
            self._drain()
            self._held = False
        number = self._header[NUMBER]
        if self._taken[0] == number:
            return
        limit = time.monotonic() + PATIENCE
        while self._taken[0] != number:
            if time.monotonic() > limit:
                self._drain()  # raises what the device failed of
                if self._taken[0] != number:
                    raise RuntimeError(f"letter {number} to a step was sent, and no step that takes it was launched")

    def send(self, count: int, moved: int, half: int) -> None:
        """Number the letter in `arrays`; the step that takes it must be launched next, before another `wait`.

        Args:
            count: rows of `continues` that hold.
            moved: entries of block tables.
            half: of `delivered`, or `NOWHERE`.
        """
        self._header[COUNT], self._header[MOVED], self._header[HALF] = count, moved, half
        self._header[NUMBER] += 1

    def feed(self, tokens: Tensor, seq_lens: Tensor, tables: Tensor, size: int) -> None:
        """Queue the first kernel of a step of `size` decodes, which takes the letter if it is new.

        Args:
            tokens: [>= 3 * size] int64.
            seq_lens: [>= size] int32.
            tables: [S, P] int32, contiguous.
        """
        self._feed(self._letter, self.ids, self._seen, self._half, tokens, seq_lens, tables, size)

    def skip(self) -> None:
        """The step that was to take the letter was only compiled."""
        self._taken[0] = self._header[NUMBER]

    def deliver(self, sampled: Tensor, half: int | None = None) -> None:
        """Queue the last kernel of a step: sampled [S] int64 go to `ids`, and to a half, by default the letter's."""
        self._deliver(sampled, self._half if half is None else self._halves[half], self.ids, self.delivered)

    def hold(self) -> None:
        """Runs of steps were queued that have no letter; the next letter waits for them."""
        self._held = True


def _nothing() -> None:
    pass
