"""Layers of quantized weights, and what a launch on one is checked against; for the interpreter's checks."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from fusecomp.lowerings import device
from fusecomp.lowerings.quant.heuristics import fitting_columns
from fusecomp.lowerings.quant.launches import run_quant
from fusecomp.ops.linear import FULL, ROW, Program, linear_reference
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference
from fusecomp.patterns.quant_examples import random_weight

SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
PROGRAMS = {
    "plain": Program(1, (), (), "float32"),
    "residual": Program(1, (FULL,), (("add", "i0", "a0"),), "float32"),
    "bias": Program(1, (ROW,), (("add", "a0", "i0"),), "float32"),
    "swiglu": Program(2, (), SILU, "float32"),
}
NORMS = {"none": None, "rms": NormSpec("rms", 1e-5), "plus one": NormSpec("rms", 1e-5, True)}


@st.composite
def specs(draw):
    """Every kind of codes, by rows, tensors, groups and blocks."""
    kind, bits = draw(st.sampled_from([(INT, 4), (INT, 8), (FP8, 8), (FP4, 4), (NF4, 4)]))
    rows, cols = draw(st.sampled_from([(1, 0), (0, 0), (1, 16), (1, 32), (1, 128), (16, 32), (3, 48)]))
    return WeightSpec(kind, bits, rows, cols, draw(st.sampled_from(["float32", "float16", "bfloat16"])))


@st.composite
def folded_specs(draw):
    """Folded integers, by rows, groups within a block and groups of several."""
    fold, columns = draw(st.sampled_from([32, 64])), draw(st.sampled_from([0, 1, 2, 4, 8]))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    return WeightSpec(INT, 4, draw(st.sampled_from([1, 1, 0, 3])), columns * fold, dtype, fold)


@st.composite
def layers(draw, tokens, of=specs):
    """(x, weight, norm weight, operands, program, spec)."""
    spec, name = draw(of()), draw(st.sampled_from([*PROGRAMS]))
    count, n = draw(tokens), draw(st.integers(1, 50))
    if spec.fold:
        k = 4 * spec.fold * draw(st.integers(1, 5))
    else:
        k = 2 * draw(st.integers(1, 100) | st.sampled_from([8, 16, 40, 64, 72, 96]))
    norm = NORMS[draw(st.sampled_from([*NORMS]))]
    program = replace(PROGRAMS[name], dtype=spec.dtype, norm=norm)
    shape = (program.groups * n, k)
    zero = spec.kind == INT and draw(st.booleans())
    weight = list(random_weight(shape, spec, torch.float32, zero=zero, seed=draw(st.integers(0, 9))))
    if zero and draw(st.booleans()):
        weight[2] = weight[2].to(draw(st.sampled_from([torch.bfloat16, torch.float8_e4m3fn])))
    if spec.kind == FP4 and draw(st.booleans()):
        weight[1] = torch.randint(120, 126, weight[1].shape, dtype=torch.uint8)
    else:
        weight[1] = weight[1].to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    torch.manual_seed(0)
    x = torch.randn(count, k + 8, dtype=spec.torch_dtype)[:, :k] * 3
    operands = [torch.randn((count, n + 3) if part == FULL else (n,)).to(spec.torch_dtype) for part in program.operands]
    operands = [o[:, :n] if o.dim() == 2 else o for o in operands]
    norm_weight = torch.randn(k).to(spec.torch_dtype) if norm and (norm.plus_one or draw(st.booleans())) else None
    return x, tuple(weight), norm_weight, operands, program, spec


def check(found, layer) -> None:
    """Error against fp32 at most 1.5 times that of the unfused layer, or two roundings of its inputs."""
    x, (q, scale, zero), norm_weight, operands, program, spec = layer
    exact_program = replace(program, dtype="float64").to_text()
    weight = dequantize_reference(q, scale, zero, replace(spec, dtype="float64").to_text())
    doubles = [o.double() for o in operands]
    norm = None if norm_weight is None else norm_weight.double()
    exact = linear_reference(x.double(), weight, norm, None, doubles, exact_program)
    rounded = dequantize_reference(q, scale, zero, spec.to_text())
    unfused = linear_reference(x, rounded, norm_weight, None, operands, program.to_text()).double()
    assert found.isfinite().all()
    # Sums may cancel: the size of their terms says what a rounding of an input amounts to.
    size = linear_reference(
        x.double().abs(), weight.abs(), None if norm is None else norm.abs(), None, doubles, exact_program
    )
    eps = torch.finfo(x.dtype).eps
    floor = (4 if x.dtype == torch.float32 else 2) * eps * (size.norm() / max(1, x.shape[1]) ** 0.5 + exact.norm())
    error, allowed = (found.double() - exact).norm(), 1.5 * (unfused - exact).norm()
    assert error <= max(allowed, floor), (error, allowed, floor)


def run(layer, config):
    x, (q, scale, zero), norm_weight, operands, program, spec = layer
    tokens, n = x.shape[0], q.shape[0] // program.groups
    buffer = torch.full((tokens + 1, n + 3), float("nan"), dtype=spec.torch_dtype)
    out = buffer[:tokens, :n]
    if config.kernel == "tile":
        config = replace(config, block_k=fitting_columns(config.block_k, spec.cols))
    run_quant(config, x, q, scale, zero, norm_weight, operands, program, spec, out, False)
    assert buffer[tokens:].isnan().all() and buffer[:, n:].isnan().all(), "a store went past the output"
    for counters in device._arrival_counters.values():
        assert not counters.any(), "a launch left its counters raised"
    check(out, layer)
    return out
