"""Quantized layers for `benchmarks.quant_linear`: layouts of codes, random weights, committed configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.linear import default_configs
from benchmarks.linear_chain import EPS, Kind, Model
from benchmarks.linear_layers import Layer
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.quant.heuristics import quant_config
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec
from fusecomp.ops.quant_linear import QuantShape

SCHEMES = {
    "fp8": (WeightSpec(FP8, 8, 1, 0, "bfloat16"), False),
    "int4": (WeightSpec(INT, 4, 1, 128, "bfloat16", 64), False),
    "int4-zero": (WeightSpec(INT, 4, 1, 128, "bfloat16", 64), True),
    "int4-32": (WeightSpec(INT, 4, 1, 32, "bfloat16", 32), False),
    "int8": (WeightSpec(INT, 8, 1, 0, "bfloat16"), False),
    "fp8-block": (WeightSpec(FP8, 8, 128, 128, "bfloat16"), False),
    "mxfp4": (WeightSpec(FP4, 4, 1, 32, "bfloat16"), False),
    "nf4": (WeightSpec(NF4, 4, 1, 64, "bfloat16"), False),
}
LAYERS = 4  # of a chain
SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
Weight = tuple[Tensor, Tensor, Tensor | None]


def program_of(kind: Kind) -> Program:
    """The epilogue and norm of a kind of layer as `linear`'s program."""
    norm = NormSpec("rms", EPS) if kind.norm else None
    if kind.epilogue is SWIGLU:
        return Program(2, (), SILU, "bfloat16", norm)
    if kind.epilogue is RESIDUAL:
        return Program(1, (FULL,), (("add", "a0", "i0"),), "bfloat16", norm)
    return Program(1, (), (), "bfloat16", norm)


def quant_shape_of(scheme: str, kind: Kind | Layer) -> QuantShape:
    """Of a layer's weight, as the choice of its kernel sees it."""
    spec, zero = SCHEMES[scheme]
    layout = (spec.kind, spec.bits, spec.rows, spec.cols)
    return QuantShape(kind.n, kind.k, kind.groups, "bfloat16", *layout, zero, fold=spec.fold)


def make_weight(rows: int, k: int, spec: WeightSpec, zero: bool) -> Weight:
    """Random codes, scales that make products near 1, and integer zero points."""
    if spec.bits == 4:
        q = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device="cuda")
    elif spec.kind == INT:
        q = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda")
    else:
        q = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) * 50).to(torch.float8_e4m3fn)
    size = spec.scales(rows, k)
    spread = {(INT, 4): 5.0, (INT, 8): 73.0, (FP8, 8): 50.0, (NF4, 4): 0.5, (FP4, 4): 3.0}[spec.kind, spec.bits]
    scale = (torch.rand(size, device="cuda") + 0.5) / (spread * k**0.5)
    if spec.bits == 4 or spec.cols:  # of whole rows of 8 bits they are fp32
        scale = scale.bfloat16()
    if spec.kind == FP4:
        scale = torch.randint(118, 121, size, dtype=torch.uint8, device="cuda")
    return q, scale, torch.randint(4, 12, size, device="cuda").bfloat16() if zero else None


def committed_configs(scheme: str, model: Model, tokens: int) -> dict[str, Any]:
    """By kind of layer, lm_head's in bf16."""
    target = device_target(0)
    found: dict[str, Any] = {
        name: quant_config(target, quant_shape_of(scheme, kind), tokens)
        for name, kind in model.kinds.items()
        if name != "lm_head"
    }
    return found | {"lm_head": default_configs(model, tokens)["lm_head"]}
