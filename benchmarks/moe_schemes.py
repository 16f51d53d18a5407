"""Experts whose weights are codes, for `benchmarks.moe --scheme`: random layers, and configurations worth timing.

Legend: E experts, N rows and D columns of an expert's weight, F expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecomp.lowerings.experts.codes import Codes
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.quant_heuristics import DEQUANTIZE
from fusecomp.lowerings.quant.heuristics import fitting_columns
from fusecomp.ops.experts import Activation
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference

Frame = tuple[ExpertsConfig, list[Tiles], list[Tiles]]


@dataclass(frozen=True)
class Scheme:
    """A layout of codes.

    Attributes:
        zero: whether it has zero points.
        spread: about the deviation of what codes stand for, before the scale.
    """

    spec: WeightSpec
    zero: bool
    spread: float

    def bytes(self, n: int, d: int) -> float:
        """Of one expert's [N, D] weight, with scales and zero points."""
        scales = self.spec.scales(n, d)
        width = 1 if self.spec.kind == FP4 else 4 if self.spec.kind == FP8 else 2
        return n * d * self.spec.bits / 8 + scales[0] * scales[1] * (width + self.zero)


SCHEMES = {
    "fp8": Scheme(WeightSpec(FP8, 8, 1, 0, "bfloat16"), False, 50.0),
    "fp8-block": Scheme(WeightSpec(FP8, 8, 128, 128, "bfloat16"), False, 50.0),
    "int8": Scheme(WeightSpec(INT, 8, 1, 0, "bfloat16"), False, 73.0),
    "int4": Scheme(WeightSpec(INT, 4, 1, 128, "bfloat16"), True, 5.0),
    "mxfp4": Scheme(WeightSpec(FP4, 4, 1, 32, "bfloat16"), False, 3.0),
    "nf4": Scheme(WeightSpec(NF4, 4, 1, 64, "bfloat16"), False, 0.5),
}


def make_codes(scheme: Scheme, experts: int, n: int, d: int) -> tuple[Tensor, Codes]:
    """Random codes [E, N, D] on the GPU, and scales that make products near 1."""
    spec = scheme.spec
    shape = (experts, n, d * spec.bits // 8)
    if spec.kind == FP8:
        q = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
        for part in q:  # one expert's fp32 at a time
            part.copy_(torch.randn(part.shape, device="cuda") * scheme.spread)
    else:
        low, high = (-127, 128) if spec.bits == 8 else (0, 256)
        q = torch.randint(low, high, shape, dtype=spec.codes_dtype, device="cuda")
    size = (experts, *spec.scales(n, d))
    scale = (torch.rand(size, device="cuda") + 0.5) / (scheme.spread * d**0.5)
    if spec.kind == FP4:
        scale = (scale.log2().round() + 127).to(torch.uint8)
    elif spec.kind != FP8:
        scale = scale.to(torch.bfloat16)
    zero = torch.randint(4, 12, size, device="cuda").to(torch.float8_e4m3fn) if scheme.zero else None
    return q, Codes(scale, zero, spec)


def make_layer(scheme: Scheme, experts: int, hidden: int, width: int) -> Experts:
    """A gated layer of codes."""
    up, up_codes = make_codes(scheme, experts, 2 * width, hidden)
    down, down_codes = make_codes(scheme, experts, hidden, width)
    return Experts(up, None, down, None, Activation("silu"), True, False, False, up_codes, down_codes)


def expert_weight(weight: Tensor, codes: Codes | None, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's weight [N, D]; codes are dequantized to this dtype."""
    if codes is None:
        return weight[expert].to(dtype)
    spec = replace(codes.spec, dtype=str(dtype).removeprefix("torch.")).to_text()
    return dequantize_reference(
        weight[expert], codes.scale[expert], None if codes.zero is None else codes.zero[expert], spec
    )  # fmt: skip


# Rows and columns of a weight tile, warps; without matrix units. The columns are of 8-bit codes.
UP_VECTOR = (
    (2, 1024, 1), (4, 1024, 1), (4, 1024, 2), (8, 1024, 2), (2, 2048, 2), (4, 2048, 2), (4, 2048, 4), (8, 2048, 4),
    (8, 2048, 8), (16, 1024, 4),
)  # fmt: skip
DOWN_VECTOR = ((1, 256), (1, 512), (1, 1024), (2, 256), (2, 512), (2, 1024), (4, 256), (4, 512), (8, 256))
# Rows and columns of a weight tile, warps, stages, programs per multiprocessor, whether by TMA.
NARROW = (
    (64, 128, 4, 4, 0, False), (64, 128, 4, 6, 0, False), (64, 128, 4, 8, 0, False), (128, 128, 8, 4, 0, False),
    (128, 128, 4, 4, 0, False), (64, 256, 4, 3, 0, False), (64, 256, 4, 4, 0, False), (64, 256, 8, 4, 0, False),
    (128, 256, 8, 3, 0, False), (64, 256, 4, 4, 0, True),
)  # fmt: skip
WIDE = {  # by tokens of a tile
    64: (
        (128, 64, 4, 4, 0, False), (128, 64, 8, 4, 0, False), (128, 128, 8, 3, 0, False), (128, 128, 4, 3, 0, False),
        (256, 64, 8, 3, 0, False), (128, 128, 8, 3, 2, True),
    ),
    128: (
        (128, 64, 8, 4, 0, False), (128, 64, 8, 3, 2, False), (128, 64, 8, 4, 0, True), (128, 128, 8, 3, 0, False),
        (256, 64, 8, 4, 1, False), (256, 64, 8, 4, 1, True),
    ),
    256: ((128, 64, 8, 3, 1, False), (128, 64, 8, 4, 1, True), (64, 64, 4, 3, 0, False)),
}  # fmt: skip
PLAIN_ORDER = ((128, 64, 4, 3, 0, False), (128, 64, 8, 3, 2, False), (256, 64, 8, 3, 1, False))


def code_frames(scheme: Scheme, top_k: int, experts: int, width: int, tokens: int) -> Iterator[Frame]:
    """As `moe_tune.frames`."""
    rows, spec = tokens * top_k / experts, scheme.spec
    if tokens * top_k <= 32:
        ups = [Tiles(n, min(d * 8 // spec.bits, 2048), w) for n, d, w in UP_VECTOR]
        lanes = 1 << (top_k - 1).bit_length()
        downs = [
            Tiles(n, d * 8 // spec.bits, warps)
            for n, d in DOWN_VECTOR
            for warps in (2, 4, 8)
            if 32 <= n * d * lanes // (32 * warps) * 8 // spec.bits <= 128 and d * 8 // spec.bits < 2 * width
        ]
        yield ExpertsConfig("vector", ups[0], downs[0]), list(dict.fromkeys(ups)), downs
    if tokens == 1:
        return

    def tiles(pool: tuple) -> list[Tiles]:
        found = [Tiles(n, fitting_columns(d, spec.cols), w, s, per_sm, tma) for n, d, w, s, per_sm, tma in pool]
        return list(dict.fromkeys(found))

    if rows <= 48:
        heights = [t for t in (8, 16, 32, 64) if 0.7 * rows <= t <= 4 * rows + 8]
        pool = tiles(NARROW)
        for block_t in heights[:2]:
            yield ExpertsConfig("grouped", pool[0], pool[0], block_t, True, 1 if rows <= 4 else 2), pool, pool
    else:
        for block_t, wide in WIDE.items():
            if block_t <= 4 * rows:
                pool, group_t = tiles(wide), max(1, min(16, int(rows) // block_t))
                yield ExpertsConfig("grouped", pool[0], pool[0], block_t, True, group_t), pool, pool
        pool = tiles(PLAIN_ORDER)
        yield ExpertsConfig("grouped", pool[0], pool[0], 128, False, max(1, min(16, int(rows) // 128))), pool, pool
        none = [Tiles(1, 1)]
        yield ExpertsConfig(DEQUANTIZE, none[0], none[0]), none, none
