"""Expert layers whose weights are codes, for tests.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference
from fusecomp.patterns.quant_examples import random_weight
from tests.lowerings.experts_cases import CONTRACT, Layer, hf_style, make_layer, naive, relative_rms

LAYOUTS = {  # layout of both weights, and whether they have zero points
    "fp8": (WeightSpec(FP8, 8, 1, 0, "float32"), False),
    "fp8 tensor": (WeightSpec(FP8, 8, 0, 0, "float32"), False),
    "fp8 blocks": (WeightSpec(FP8, 8, 128, 128, "float32"), False),
    "int8": (WeightSpec(INT, 8, 1, 0, "float32"), False),
    "int8 zero": (WeightSpec(INT, 8, 1, 0, "float32"), True),
    "int8 groups zero": (WeightSpec(INT, 8, 1, 32, "float32"), True),
    "int4": (WeightSpec(INT, 4, 1, 128, "float32"), False),
    "int4 groups": (WeightSpec(INT, 4, 1, 32, "float32"), False),
    "int4 zero": (WeightSpec(INT, 4, 1, 128, "float32"), True),
    "int4 groups zero": (WeightSpec(INT, 4, 1, 16, "float32"), True),
    "mxfp4": (WeightSpec(FP4, 4, 1, 32, "float32"), False),
    "nf4": (WeightSpec(NF4, 4, 1, 64, "float32"), False),
}


@dataclass(frozen=True)
class Codes:
    """A weight [E, N, D] as codes."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: WeightSpec

    def numbers(self, dtype: torch.dtype) -> Tensor:
        spec = replace(self.spec, dtype=str(dtype).removeprefix("torch."))
        return dequantize_reference(self.q, self.scale, self.zero, spec.to_text())

    def parts(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        return (*(None if t is None else t.to(device) for t in (self.q, self.scale, self.zero)),)  # type: ignore[return-value]


@dataclass(frozen=True)
class QuantLayer:
    """`plain` has the same weights dequantized exactly, in fp64, on the CPU or as on the device."""

    plain: Layer
    up: Codes
    down: Codes

    @property
    def experts(self) -> int:
        return len(self.up.q)

    def run(self, function) -> Tensor:
        """`function` takes the arguments of `fusecomp::quant_experts`."""
        p = self.plain
        device, dtype = p.x.device, str(p.x.dtype).removeprefix("torch.")
        specs = [replace(codes.spec, dtype=dtype).to_text() for codes in (self.up, self.down)]
        return function(
            p.x, p.top_k_index, p.top_k_weights, *self.up.parts(device), p.up_bias, *self.down.parts(device),
            p.down_bias, p.act, p.gated, p.interleaved, p.transposed, *specs, p.residual,
        )  # fmt: skip


def make_codes(shape: tuple[int, ...], spec: WeightSpec, zero: bool, dtype: torch.dtype, seed: int) -> Codes:
    """Scales of a float type, or exponents where codes are fp4; they make products near 1."""
    q, scale, zeros = random_weight(shape, spec, torch.float32, zero=zero, seed=seed)
    if spec.kind == FP4:
        scale = (scale.log2().round() + 127).to(torch.uint8)
    elif spec.kind != FP8:
        scale = scale.to(dtype)
    if zeros is not None:
        zeros = zeros.to(torch.float8_e4m3fn if spec.bits == 4 else dtype)  # as checkpoints' are kept
    return Codes(q, scale, zeros, spec)


def make_quant_layer(
    T=7, K=2, E=4, C=64, width=32, *, layout="fp8", up=None, down=None, zeros=None, dtype=torch.float32, device="cpu",
    seed=0, gated=True, **form,
) -> QuantLayer:  # fmt: skip
    """As `make_layer`; both weights in `layout`, or in the layouts given, with zero points where `zeros` says so."""
    spec, zero = LAYOUTS[layout]
    up, down, zeros = up or spec, down or spec, zeros or (zero, zero)
    plain = make_layer(T, K, E, C, width, gated=gated, dtype=dtype, device=device, seed=seed, **form)
    first = make_codes((E, 2 * width if gated else width, C), up, zeros[0], dtype, seed)
    second = make_codes((E, C, width), down, zeros[1], dtype, seed + 1)
    numbers = (codes.numbers(torch.float64).to(device) for codes in (first, second))
    return QuantLayer(replace(plain, up=next(numbers), down=next(numbers)), first, second)


def check_quant_contract(layer: QuantLayer, out: Tensor, contract: float = CONTRACT) -> None:
    """Error against fp64 at most `contract` times that of dequantized weights in the layer's dtype, all unfused."""
    plain, dtype = layer.plain, layer.plain.x.dtype
    assert out.dtype == dtype and out.shape == plain.x.shape
    exact = naive(plain.map(lambda t: t.cpu())).to(plain.x.device)
    unfused = replace(plain, up=plain.up.to(dtype), down=plain.down.to(dtype))
    allowed = max(relative_rms(hf_style(unfused), exact), torch.finfo(dtype).eps / 4)
    assert relative_rms(out, exact) <= (2 * contract if dtype == torch.float32 else contract) * allowed
