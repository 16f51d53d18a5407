"""MXFP4 (gpt-oss): experts as e2m1 codes, 32 of which share an e8m0 exponent.

On disk: <parameter>_blocks uint8 [E, N, K / 32, 16], two codes in a byte, the low nibble first; <parameter>_scales
uint8 [E, N, K / 32]: the exponent plus 127. [E, N, K] is the parameter transposed.
"""

from __future__ import annotations

from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.codes import Codes
from fusecomp.quant.files import TensorFiles
from fusecomp.quant.formats.base import Format, Parts, collect

BLOCK = 32


class Mxfp4(Format):
    method = "mxfp4"
    names_parameters = True

    def find(self, files: TensorFiles) -> dict[str, Parts]:
        return collect(files, ("blocks", "scales"), (), sep="_")

    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        if k % BLOCK:
            raise self.unsupported(f"weight {weight!r} has {k} columns, which do not fill blocks of {BLOCK}")
        q = files.get(parts["blocks"], ("U8",), (None, n, k // BLOCK, BLOCK // 2)).flatten(-2)
        scale = files.get(parts["scales"], ("U8",), (q.shape[0], n, k // BLOCK))
        return Codes(q, scale, None, WeightSpec("fp4", 4, 1, BLOCK, dtype))
