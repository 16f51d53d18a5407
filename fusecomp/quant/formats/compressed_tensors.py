"""compressed-tensors (llm-compressor): packed 4 and 8 bits, int8 and fp8, with and without quantized activations.

On disk, codes signed: weight_packed int32 [N, K / P] packed along K, lowest bits first, each code plus 2 ** (bits - 1);
or weight int8 or F8_E4M3 [N, K]; weight_scale [1], [N, 1], [N, G] or [blocks of rows, blocks of columns];
weight_zero_point int8 like the scale, packed along N where the weight is; weight_g_idx int32 [K]; input_scale [1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.codes import Codes, byte_view, column_order, nibbles, pack, signed, word_codes, zero_points
from fusecomp.quant.files import PLAIN, TensorFiles
from fusecomp.quant.formats.base import Format, Parts, collect, need
from fusecomp.quant.formats.schemes import Scheme, Schemes

INTEGERS, CODES = ("I8",), ("I8", "F8_E4M3")
PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale")
LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


class CompressedTensors(Format):
    method = "compressed-tensors"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        super().__init__(config, where)
        layout = config.get("format", "dense")
        if layout not in LAYOUTS:
            raise self.unsupported(f"compressed-tensors with format={layout!r}; supported are {', '.join(LAYOUTS)}")
        if config.get("transform_config"):
            raise self.unsupported("compressed-tensors with transform_config")
        if ((config.get("sparsity_config") or {}).get("format") or "dense") != "dense":
            raise self.unsupported("compressed-tensors with sparsity_config")
        self.schemes = Schemes(self)

    def find(self, files: TensorFiles) -> dict[str, Parts]:
        weights = {}
        for weight, parts in collect(files, (), PARTS).items():
            packed = "weight_packed" in parts
            if parts.keys() == {"weight"} and files.entries[parts["weight"]].dtype not in CODES:
                continue
            need(files, weight, parts, ("weight_packed" if packed else "weight", "weight_scale"))
            weights[weight] = parts
        return weights

    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        scheme = self.schemes.of(weight)
        rows, cols = scheme.block(k)
        shape = (-(-n // rows) if rows else 1, -(-k // cols) if cols else 1)
        flat: list[tuple[int, ...]] = [(shape[0],)] if shape[1] == 1 else []
        flat += [()] if shape == (1, 1) else []
        scale = files.get(parts["weight_scale"], PLAIN, shape, *flat).reshape(shape)
        groups = shape[1]
        order = None
        if "weight_g_idx" in parts:
            order = column_order(files, parts["weight_g_idx"], k, groups, cols or k)
        activation = scheme.activation
        needs = ("input_scale",) if activation and not activation.dynamic else ()
        need(files, weight, parts, (*needs, *(() if scheme.symmetric else ("weight_zero_point",))))
        given = files.get(parts["input_scale"], PLAIN, (), (1,)).float().reshape(1) if needs else None
        packed = "weight_packed" in parts
        read = self._packed if packed else self._plain
        q = read(scheme, parts, files, n, k, order)
        zero = None if scheme.symmetric else _zero(scheme, parts, files, shape, packed, cols, scale.dtype)
        spec = WeightSpec(scheme.kind, scheme.bits, rows, cols, dtype)
        return Codes(q, scale, zero, spec, order, activation, given)

    def _packed(self, s: Scheme, parts: Parts, files: TensorFiles, n: int, k: int, order: Tensor | None) -> Tensor:
        if s.kind != "int":
            raise files.error(f"tensor {parts['weight_packed']!r} holds integers, and the configuration says {s.kind}")
        if "weight_shape" in parts:
            shape = files.get(parts["weight_shape"], ("I64", "I32"), (2,)).tolist()
            if shape != [n, k]:
                raise files.error(f"tensor {parts['weight_shape']!r} is {shape}; the model has [{n}, {k}]")
        words = -(-k * s.bits // 32)  # the last word of a row may be partly unused
        q = byte_view(files.get(parts["weight_packed"], ("I32",), (n, words)))
        if s.bits == 8:
            return signed((q[:, :k] if order is None else q[:, order]).contiguous())
        if k % 2:
            raise self.unsupported(f"weight {parts['weight_packed']!r} with {k} columns of 4 bits, an odd number")
        return q[:, : k // 2].contiguous() if order is None else pack(nibbles(q).index_select(1, order))

    def _plain(self, s: Scheme, parts: Parts, files: TensorFiles, n: int, k: int, order: Tensor | None) -> Tensor:
        q = files.get(parts["weight"], INTEGERS if s.kind == "int" else ("F8_E4M3",), (n, k))
        q = q if order is None else q.view(torch.uint8)[:, order].view(q.dtype)
        return pack((q + 8).view(torch.uint8)) if s.bits == 4 else q


def _zero(
    s: Scheme, parts: Parts, files: TensorFiles, shape: tuple[int, int], packed: bool, cols: int, dtype: torch.dtype
) -> Tensor | None:
    """Zero points of unsigned codes, [N, G] as `Codes` keeps them."""
    name, half = parts["weight_zero_point"], 1 << s.bits - 1
    if packed and files.entries[name].dtype == "I32":  # packed along N
        words = files.get(name, ("I32",), (-(-shape[0] * s.bits // 32), shape[1]))
        zero = word_codes(words.t(), s.bits).t()[: shape[0]].to(torch.int32)
    else:
        flat = [(shape[0],)] if shape[1] == 1 else []
        zero = files.get(name, INTEGERS, shape, *flat).reshape(shape).to(torch.int32) + half
    return zero_points(zero, s.bits, cols, dtype)
