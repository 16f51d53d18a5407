"""Host buffers that a step's copies start from: pinned, and filled by numpy while the device may read another set.

Legend: S rows, T tokens, P pages per row of the block table.
"""

from __future__ import annotations

import torch

DTYPES = {
    "tokens": torch.int64,
    "logit_indices": torch.int64,
    "cu_q_lens": torch.int32,
    "seq_lens": torch.int32,
    "block_tables": torch.int32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "seeds": torch.int64,
    "rows": torch.int64,
    "continues": torch.int64,
}
ON_HOST_ONLY = ("continues",)


def buffer_shapes(S: int, T: int, P: int) -> dict[str, tuple[int, ...]]:
    """Of each name in `DTYPES`, its shape; ids, positions and slots of tokens lie behind one another."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(DTYPES, (S,))
    return shapes | {"tokens": (3 * T,), "cu_q_lens": (S + 1,), "block_tables": (S * P,)}


def device_buffers(shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, torch.Tensor]:
    """Zeros, of what copies go to."""
    return {
        name: torch.zeros(shape, dtype=DTYPES[name], device=device)
        for name, shape in shapes.items()
        if name not in ON_HOST_ONLY
    }


class Staging:
    """Buffers of one step in the making, pinned for CUDA, seen by torch and by numpy.

    `wait` returns once the copies out of them have ended, `record` marks that all of a step's copies are issued.

    Attributes:
        tensors, arrays: by name, the same memory.
        used: something was copied since `record`.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._event = torch.cuda.Event() if pinned else None
        self.used = False
        self.tensors = {
            name: torch.zeros(shape, dtype=DTYPES[name], pin_memory=pinned) for name, shape in shapes.items()
        }
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        # The latest copy of each: its size, and the two views, which need not be made again for the next one.
        self._copies: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def record(self) -> None:
        if self._event is not None and self.used:
            self._event.record()
        self.used = False

    def copy(self, name: str, to: torch.Tensor, size: int) -> None:
        """Queue to[:size] = the buffer's first `size` elements; `to` is always the same for a name."""
        latest = self._copies.get(name)
        if latest is None or latest[0] != size:
            latest = self._copies[name] = size, to[:size], self.tensors[name][:size]
        latest[1].copy_(latest[2], non_blocking=True)
        self.used = True
