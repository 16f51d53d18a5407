"""The tensors of a checkpoint by name, checked against what a format expects before they are read.

In: the headers of its safetensors files. Out: tensors on the CPU, one at a time, or an error that names the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fusecomp.errors import CheckpointError

PLAIN = ("BF16", "F16", "F32")  # names of the safetensors format
CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8")
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
REMEDY = "copy or download the checkpoint again, with its own config.json"


@dataclass(frozen=True)
class Entry:
    """One tensor: the file it lies in, its dtype as safetensors names it, its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """Tensors of a folder's safetensors files."""

    def __init__(self, folder: Path, headers: Mapping[str, Mapping[str, Any]]) -> None:
        """`headers`: per file name, the tensor table of its header."""
        self.folder = folder
        self.entries = {
            name: Entry(file, str(entry["dtype"]), tuple(entry["shape"]))
            for file, table in sorted(headers.items())
            for name, entry in table.items()
        }
        self._open: dict[str, Any] = {}

    def get(self, name: str, dtypes: Iterable[str], *shapes: tuple[int | None, ...]) -> Tensor:
        """Tensor `name`, of one of `dtypes` and one of `shapes` (None: any size).

        Raises:
            CheckpointError: it is absent or of another dtype or shape.
        """
        entry, dtypes = self.entries.get(name), tuple(dtypes)
        if entry is None:
            raise self.error(f"tensor {name!r} is missing")
        if entry.dtype not in dtypes:
            raise self.error(f"tensor {name!r} is {entry.dtype}, not {' or '.join(dtypes)}")
        if shapes and not any(_fits(entry.shape, shape) for shape in shapes):
            wanted = " or ".join(str(["any" if size is None else size for size in shape]) for shape in shapes)
            raise self.error(f"tensor {name!r} has shape {list(entry.shape)}, not {wanted}")
        return self._file(entry.file).get_tensor(name)

    def later(self, name: str) -> Any:
        """Tensor `name` as a slice that is read when it is indexed."""
        return self._file(self.entries[name].file).get_slice(name)

    def plain_dtype(self, names: Iterable[str]) -> torch.dtype:
        """The floating dtype that most elements among `names` have; float32 without any."""
        sizes: dict[str, int] = {}
        for name in names:
            entry = self.entries[name]
            if entry.dtype in PLAIN:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
        return _TORCH[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else torch.float32

    def error(self, what: str, why: str = "", remedy: str = REMEDY) -> CheckpointError:
        """An error about this checkpoint."""
        return CheckpointError(what, where=str(self.folder), why=why, remedy=remedy)

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self._open.clear()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt", device="cpu")
        return self._open[name]


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))
