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
# One copy moves all of these that a step brings; the block tables, by far the longest, last.
PACKED = (
    "cu_q_lens", "logit_indices", "seq_lens", "temperature", "top_k", "top_p", "seeds", "rows", "block_tables",
)  # fmt: skip
ALIGNMENT = 16  # bytes, of a list in a pack


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


class Pack:
    """The lists of `PACKED` behind one another, which one copy moves.

    Attributes:
        tensors: by name, views of the memory.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device, *, pinned: bool = False) -> None:
        self._places: dict[str, int] = {}
        end = 0
        for name in PACKED:
            self._places[name] = end
            size = shapes[name][0] * DTYPES[name].itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._bytes = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors = {
            name: self._bytes[at : at + shapes[name][0] * DTYPES[name].itemsize].view(DTYPES[name])
            for name, at in self._places.items()
        }

    def copy_(self, other: Pack, counts: dict[str, int]) -> None:
        """Queue the copy of the first elements of some lists, with what lies between them."""
        begin = min(self._places[name] for name in counts)
        end = max(self._places[name] + count * DTYPES[name].itemsize for name, count in counts.items())
        self._bytes[begin:end].copy_(other._bytes[begin:end], non_blocking=True)


class Staging:
    """Buffers of one step in the making, pinned for CUDA, seen by torch and by numpy.

    `wait` returns once the copies out of them have ended, `record` marks that all of a step's copies are issued.

    Attributes:
        tensors, arrays: by name, the same memory.
        pack: of it the lists of `PACKED`.
        used: something was copied since `record`.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._event = torch.cuda.Event() if pinned else None
        self.used = False
        self.pack = Pack(shapes, torch.device("cpu"), pinned=pinned)
        self.tensors = self.pack.tensors | {
            name: torch.zeros(shape, dtype=DTYPES[name], pin_memory=pinned)
            for name, shape in shapes.items()
            if name not in PACKED
        }
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def record(self) -> None:
        if self._event is not None and self.used:
            self._event.record()
        self.used = False

    def copy(self, name: str, to: torch.Tensor, size: int) -> None:
        """Queue to[:size] = the buffer's first `size` elements."""
        to[:size].copy_(self.tensors[name][:size], non_blocking=True)
        self.used = True
