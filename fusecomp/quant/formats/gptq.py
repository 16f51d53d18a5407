"""GPTQ (AutoGPTQ, GPTQModel): 4 and 8 bits, any group size, act-order, both conventions of zero points.

On disk, with P = 32 / bits codes in a word, the lowest bits first:
qweight int32 [K / P, N] packed along K; qzeros int32 [G, N / P]; scales [G, N]; g_idx int32 [K]: the group of a column.
value = (code - zero) * scale, unsigned codes; format v1 stores zero - 1.
"""

from __future__ import annotations

import re
from typing import Any

from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.codes import Codes, byte_view, column_order, compact, nibbles, pack, signed, word_codes, zero_points
from fusecomp.quant.files import PLAIN, TensorFiles
from fusecomp.quant.formats.base import Format, Parts, collect

STORED_LESS = {"gptq": 1, "gptq_v2": 0}  # what each format subtracts from a zero point


class Gptq(Format):
    method = "gptq"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        super().__init__(config, where)
        layout = config.get("checkpoint_format", config.get("format", "gptq"))
        if layout not in STORED_LESS or config.get("is_marlin_format"):
            raise self.unsupported(f"GPTQ with checkpoint_format={layout!r}; supported are {', '.join(STORED_LESS)}")
        self.stored_less = STORED_LESS[layout]
        self.bits, self.group_size = self.integer("bits"), self.integer("group_size", -1)
        self._check(self.bits, self.group_size, "")
        overrides = config.get("dynamic") or {}
        if not isinstance(overrides, dict):
            raise self.malformed(f"quantization_config.dynamic is a {type(overrides).__name__}, not an object")
        self.overrides = {pattern: change for pattern, change in overrides.items() if not pattern.startswith("-")}

    def _check(self, bits: Any, group_size: Any, name: str) -> None:
        of = f" of {name}" if name else ""
        if bits not in (4, 8):
            raise self.unsupported(f"GPTQ{of} with bits={bits!r}; supported are 4 and 8")
        if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
            raise self.malformed(f"quantization_config.group_size{of} is {group_size!r}")

    def settings(self, weight: str) -> tuple[int, int]:
        """Bits and group size of one weight: the first pattern of `dynamic` that matches its name changes them."""
        for pattern, change in self.overrides.items():
            try:
                matches = re.match(pattern.removeprefix("+:"), weight)
            except re.error as error:
                raise self.malformed(f"quantization_config.dynamic: pattern {pattern!r}: {error}") from error
            if matches and isinstance(change, dict):
                bits, size = change.get("bits", self.bits), change.get("group_size", self.group_size)
                self._check(bits, size, weight)
                return bits, size
        return self.bits, self.group_size

    def find(self, files: TensorFiles) -> dict[str, Parts]:
        return collect(files, ("qweight", "qzeros", "scales"), ("g_idx",))

    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        bits, size = self.settings(weight)
        size = k if size == -1 else size
        per_word, groups = 32 // bits, -(-k // size)
        if k % per_word or n % per_word:
            raise self.unsupported(f"weight {weight!r} [{n}, {k}] does not fill words of {per_word} codes")
        words = files.get(parts["qweight"], ("I32",), (k // per_word, n))
        scale = files.get(parts["scales"], PLAIN, (groups, n)).t()
        stored = word_codes(files.get(parts["qzeros"], ("I32",), (groups, n // per_word)), bits).t()
        zero = zero_points(stored.int() + self.stored_less, bits, size, scale.dtype)
        order = column_order(files, parts["g_idx"], k, groups, size) if "g_idx" in parts else None
        q = byte_view(words.t())
        if bits == 8:
            q = signed(q if order is None else q.index_select(1, order))
        elif order is not None:
            q = pack(nibbles(q).index_select(1, order))
        return Codes(q, compact(scale), zero, WeightSpec("int", bits, 1, 0 if groups == 1 else size, dtype), order)
