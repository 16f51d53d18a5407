"""What stands for a device that graphs are captured on, where there is no GPU."""

from __future__ import annotations

import torch


class Rerun:
    """Stands for a device: a replay runs the function again and writes its first results. Each graph takes `nbytes`;
    from the `room`-th on there is no memory."""

    def __init__(self, *, nbytes: int = 0, room: float = float("inf"), seconds=lambda shape: 1e-6) -> None:
        self.count, self.nbytes, self.room, self._seconds = 0, nbytes, room, seconds

    def record(self, run):
        if self.count >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        self.count += 1
        result = run()

        def replay() -> None:
            again = run()
            for old, new in zip(result, again, strict=True):
                if old is not None:
                    old.copy_(new)

        replay.rows = result.tokens.shape[0]
        return replay, result

    def seconds(self, replay) -> float:
        return self._seconds(replay.rows)

    def used_bytes(self) -> int:
        return self.count * self.nbytes
