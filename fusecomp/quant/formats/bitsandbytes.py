"""bitsandbytes nf4, as its tensors say it; its other types (fp4, int8) need its own code and are refused.

On disk: weight uint8 [N * K / 2, 1], the high nibble first; weight.absmax [N * K / B]: scale of B codes, in fp32, or as
uint8 codes of weight.nested_quant_map with weight.nested_absmax per block; weight.quant_map: the table; the rest JSON.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fusecomp.ops.quant import NF4_VALUES, WeightSpec
from fusecomp.quant.codes import Codes
from fusecomp.quant.files import TensorFiles
from fusecomp.quant.formats.base import Format, Parts, collect

STATE = "weight.quant_state.bitsandbytes__nf4"
REQUIRED = ("weight", "weight.absmax", "weight.quant_map", STATE)
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class Nf4(Format):
    method = "bitsandbytes"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        super().__init__(config, where)
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if not config.get("load_in_4bit") or kind != "nf4":
            raise self.unsupported(f"bitsandbytes {kind if config.get('load_in_4bit') else 'int8'}; supported is nf4")

    def find(self, files: TensorFiles) -> dict[str, Parts]:
        found = {name.removesuffix("." + STATE) for name in files.entries if name.endswith("." + STATE)}
        weights = {
            weight: {part: f"{weight}.{part}" for part in (*REQUIRED, *NESTED) if f"{weight}.{part}" in files.entries}
            for weight in found
        }
        packed = collect(files, (), REQUIRED[1:3])
        for weight, parts in (packed | weights).items():
            for part in REQUIRED:
                if f"{weight}.{part}" not in files.entries:
                    raise files.error(f"tensor '{weight}.{part}' is missing", f"{', '.join(parts.values())} need it")
        return weights

    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        state = self._state(parts[STATE], files)
        block = state.get("blocksize")
        if state.get("quant_type") != "nf4" or not isinstance(block, int) or block <= 0 or state.get("shape") != [n, k]:
            wanted = f"nf4 of [{n}, {k}] in blocks"
            raise files.error(f"tensor {parts[STATE]!r} describes {json.dumps(state)}, not {wanted}")
        if k % block:
            raise self.unsupported(f"weight {weight!r} [{n}, {k}] with blocks of {block} across rows")
        table = files.get(parts["weight.quant_map"], ("F32",), (16,))
        if not torch.allclose(table, torch.tensor(NF4_VALUES), rtol=0, atol=1e-6):
            raise self.unsupported(f"tensor {parts['weight.quant_map']!r} is not the nf4 table")
        packed = files.get(parts["weight"], ("U8",), (n * k // 2, 1))
        scale = self._scale(parts, files, n * k // block, state).reshape(n, k // block)
        q = (packed >> 4 | packed << 4).reshape(n, k // 2)
        return Codes(q, scale, None, WeightSpec("nf4", 4, 1, block, dtype))

    def _state(self, name: str, files: TensorFiles) -> dict[str, Any]:
        data = bytes(files.get(name, ("U8",), (None,)).tolist())
        try:
            state = json.loads(data)
        except ValueError as error:
            raise files.error(f"tensor {name!r} is not JSON", str(error)) from error
        if not isinstance(state, dict):
            raise files.error(f"tensor {name!r} holds a {type(state).__name__}, not an object")
        return state

    def _scale(self, parts: Parts, files: TensorFiles, count: int, state: dict[str, Any]) -> Tensor:
        name, nested = parts["weight.absmax"], parts.get("weight.nested_absmax")
        if nested is None:
            return files.get(name, ("F32",), (count,))
        if "weight.nested_quant_map" not in parts:
            raise files.error(f"tensor {nested.replace('absmax', 'quant_map')!r} is missing", f"{nested} needs it")
        codes, size = files.get(name, ("U8",), (count,)), state.get("nested_blocksize")
        offset = state.get("nested_offset", 0.0)
        if not isinstance(size, int) or size <= 0 or not isinstance(offset, int | float):
            raise files.error(f"tensor {parts[STATE]!r} has nested_blocksize={size!r} and nested_offset={offset!r}")
        table = files.get(parts["weight.nested_quant_map"], ("F32",), (256,))
        blocks = files.get(nested, ("F32",), (-(-count // size),))
        return table[codes.int()] * blocks.repeat_interleave(size)[:count] + offset
