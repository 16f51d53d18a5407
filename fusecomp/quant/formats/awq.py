"""AWQ (AutoAWQ), layout "gemm": 4 bits, zero points.

On disk, eight codes in a word, the lowest bits first; the code in lane i is that of column 8 w + LANES[i] of word w:
qweight int32 [K, N / 8] packed along N; qzeros int32 [G, N / 8]; scales [G, N]. value = (code - zero) * scale.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.codes import Codes, compact, pack, word_codes, zero_points
from fusecomp.quant.files import PLAIN, TensorFiles
from fusecomp.quant.formats.base import Format, Parts, collect

LANES = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Format):
    method = "awq"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        super().__init__(config, where)
        layout, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
        if layout != "gemm":
            raise self.unsupported(f"AWQ with version={layout!r}; supported is gemm")
        if bits != 4:
            raise self.unsupported(f"AWQ with bits={bits!r}; supported is 4")
        if not config.get("zero_point", True):
            raise self.unsupported("AWQ with zero_point=false")
        self.group_size = self.integer("group_size" if "group_size" in config else "q_group_size")
        if self.group_size == 0 or self.group_size < -1:
            raise self.malformed(f"quantization_config.group_size is {self.group_size}")

    def find(self, files: TensorFiles) -> dict[str, Parts]:
        return collect(files, ("qweight", "qzeros", "scales"), ())

    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        size = k if self.group_size == -1 else self.group_size
        groups = -(-k // size)
        if n % 8 or k % 2:
            raise self.unsupported(f"weight {weight!r} [{n}, {k}] does not fill words of 8 codes")
        scale = files.get(parts["scales"], PLAIN, (groups, n)).t()
        zero = _columns(files.get(parts["qzeros"], ("I32",), (groups, n // 8)))
        q = _columns(files.get(parts["qweight"], ("I32",), (k, n // 8)))
        spec = WeightSpec("int", 4, 1, 0 if groups == 1 else size, dtype)
        return Codes(pack(compact(q.t())), compact(scale), zero_points(zero.t(), 4, size, scale.dtype), spec)


def _columns(words: Tensor) -> Tensor:
    """Codes [R, N] of words [R, N / 8], in the order of the columns."""
    lane_of = [LANES.index(column) for column in range(8)]
    return word_codes(words, 4).unflatten(-1, (-1, 8))[..., lane_of].flatten(-2)
