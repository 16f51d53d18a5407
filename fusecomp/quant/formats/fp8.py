"""HF `fp8` (DeepSeek's): float8_e4m3fn codes with a scale per block of rows and columns, or one for all.

On disk: weight F8_E4M3 [N, K]; weight_scale_inv [ceil(N / B0), ceil(K / B1)], a factor despite its name, in a float
type or as e8m0 exponents; activation_scale [] or [1] when activations are quantized by a fixed scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.quant import ActivationSpec, WeightSpec
from fusecomp.quant.codes import Codes
from fusecomp.quant.files import PLAIN, TensorFiles
from fusecomp.quant.formats.base import Format, Parts, collect, need

CODES = "F8_E4M3"


class Fp8(Format):
    method = "fp8"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        super().__init__(config, where)
        if config.get("fmt", "e4m3") != "e4m3":
            raise self.unsupported(f"fp8 with fmt={config['fmt']!r}; supported is e4m3")
        block = config.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
        ):
            raise self.malformed(f"quantization_config.weight_block_size is {block!r}, not two sizes")
        self.rows: int = block[0] if block else 0
        self.cols: int = block[1] if block else 0
        scheme = config.get("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise self.unsupported(f"fp8 with activation_scheme={scheme!r}; supported are dynamic and static")
        self.static = scheme == "static"
        if self.static:
            self.activation = ActivationSpec("fp8", granularity="tensor", dynamic=False)
        elif self.cols:
            self.activation = ActivationSpec("fp8", granularity="block", block=self.cols)
        else:
            self.activation = ActivationSpec("fp8")

    def find(self, files: TensorFiles) -> dict[str, Parts]:
        weights = collect(files, (), ("weight", "weight_scale_inv", "activation_scale"))
        plain = [w for w, p in weights.items() if p.keys() == {"weight"} and files.entries[p["weight"]].dtype != CODES]
        for weight in plain:
            del weights[weight]
        required = ("weight", "weight_scale_inv", *(("activation_scale",) if self.static else ()))
        for weight, parts in weights.items():
            need(files, weight, parts, required)
        return weights

    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        q = files.get(parts["weight"], (CODES,), (n, k))
        shapes = [(-(-n // self.rows), -(-k // self.cols))] if self.cols else [(), (1,), (1, 1)]
        scale = wide(files.get(parts["weight_scale_inv"], (*PLAIN, "F8_E8M0"), *shapes))
        given = files.get(parts["activation_scale"], PLAIN, (), (1,)) if self.static else None
        return Codes(
            q,
            scale.reshape(scale.shape if self.cols else (1, 1)),
            None,
            WeightSpec("fp8", 8, self.rows, self.cols, dtype),
            activation=self.activation,
            input_scale=None if given is None else given.float().reshape(1),
        )


def wide(scale: Tensor) -> Tensor:
    """Exponents as fp32: a block's scale is too rare to save bytes on."""
    return scale.to(torch.float32) if scale.dtype == torch.float8_e8m0fnu else scale
