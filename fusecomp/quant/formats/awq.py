"""AWQ (AutoAWQ), layout "gemm": 4 bits, zero points.

On disk, eight codes in a word, the lowest bits first; the code in lane i is that of column 8 w + LANES[i] of word w:
qweight int32 [K, N / 8] packed along N; qzeros int32 [G, N / 8]; scales [G, N]. value = (code - zero) * scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.codes import Codes, byte_view, compact, pack, word_codes, zero_points
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
        q = _repack(files.get(parts["qweight"], ("I32",), (k, n // 8)))
        spec = WeightSpec("int", 4, 1, 0 if groups == 1 else size, dtype)
        return Codes(q, compact(scale), zero_points(zero.t(), 4, size, scale.dtype), spec)


def _repack(words: Tensor) -> Tensor:
    """Bytes [N, K / 2] of words [K, N / 8], lane by lane: six times as fast as by way of all codes."""
    lanes = byte_view(words).unflatten(-1, (-1, 4))  # [K, N / 8, 4], two lanes in each byte
    packed = torch.empty((lanes.shape[1], 8, lanes.shape[0] // 2), dtype=torch.uint8)
    for lane, column in enumerate(LANES):
        codes = lanes[..., lane // 2] >> 4 if lane % 2 else lanes[..., lane // 2] & 15
        packed[:, column] = pack(codes.t())
    return packed.flatten(0, 1)


def _columns(words: Tensor) -> Tensor:
    """Codes [R, N] of words [R, N / 8], in the order of the columns."""
    lane_of = [LANES.index(column) for column in range(8)]
    return word_codes(words, 4).unflatten(-1, (-1, 8))[..., lane_of].flatten(-2)
