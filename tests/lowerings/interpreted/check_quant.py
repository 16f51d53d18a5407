"""Kernels of quantized linears under Triton's interpreter; `tests/lowerings/test_quant.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import device
from fusecomp.lowerings.quant import lowering
from fusecomp.lowerings.quant.heuristics import QuantConfig, fitting_columns
from fusecomp.lowerings.quant.lowering import launch_dequantize, launch_quant_linear, run_quant
from fusecomp.ops.linear import FULL, ROW, Program, linear_reference
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference
from fusecomp.patterns.quant_examples import random_weight
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.interpreted.float8 import multiply_float8

SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
PROGRAMS = {
    "plain": Program(1, (), (), "float32"),
    "residual": Program(1, (FULL,), (("add", "i0", "a0"),), "float32"),
    "bias": Program(1, (ROW,), (("add", "a0", "i0"),), "float32"),
    "swiglu": Program(2, (), SILU, "float32"),
}
NORMS = {"none": None, "rms": NormSpec("rms", 1e-5), "plus one": NormSpec("rms", 1e-5, True)}


multiply_bfloat16()
multiply_float8()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


@settings(SETTINGS, max_examples=20)
@given(layers(st.just(1)), st.sampled_from([2, 8]), st.sampled_from([32, 64, 256]))
def test_one_token(layer, block_r, block_k):
    run(layer, QuantConfig("vector", 1, block_r, block_k))


@st.composite
def byte_layers(draw, counts):
    """8-bit codes with a scale a row or one for all, rows of a multiple of four columns, and 16-bit inputs."""
    x, weight, norm_weight, operands, program, spec = draw(
        layers(counts).filter(lambda layer: layer[-1].bits == 8 and layer[-1].cols == 0 and layer[1][2] is None)
    )
    k = x.shape[1] // 4 * 4 or 4
    dtype = draw(st.sampled_from(["float16", "bfloat16"]))
    spec, program = replace(spec, dtype=dtype), replace(program, dtype=dtype)
    q, scale, _ = random_weight((weight[0].shape[0], k), spec, torch.float32, seed=draw(st.integers(0, 9)))
    x = torch.randn(x.shape[0], k + 9, dtype=spec.torch_dtype)[:, draw(st.sampled_from([0, 1, 4])) :][:, :k] * 3
    norm_weight = None if norm_weight is None else torch.randn(k).to(spec.torch_dtype)
    return x, (q, scale, None), norm_weight, [o.to(spec.torch_dtype) for o in operands], program, spec


@settings(SETTINGS, max_examples=15)
@given(byte_layers(st.just(1)), st.sampled_from([2, 8]), st.sampled_from([32, 64, 256]))
def test_one_token_by_words(layer, block_r, block_k):
    run(layer, QuantConfig("words", 1, block_r, block_k))


@settings(SETTINGS, max_examples=20)
@given(
    layers(st.integers(1, 40)), st.sampled_from([16, 32]), st.sampled_from([16, 64]),
    st.sampled_from([16, 64, 128, 256]), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_tokens(layer, block_t, block_r, block_k, splits, early):
    run(layer, QuantConfig("tile", block_t, block_r, block_k, splits=splits, early=early))


@settings(SETTINGS, max_examples=15)
@given(
    byte_layers(st.integers(1, 40)), st.sampled_from([16, 64]), st.sampled_from([16, 64, 128]), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
def test_tokens_in_halves(layer, block_r, block_k, splits, early):
    run(layer, QuantConfig("tile", 16, block_r, block_k, splits=splits, early=early, halves=True))


@st.composite
def digit_layers(draw):
    """fp8 by rows, tensors or blocks, and bf16 inputs of tokens whose sizes are far apart, one of them zero."""
    rows, cols = draw(st.sampled_from([(1, 0), (0, 0), (128, 128), (1, 256)]))
    name, count, k = draw(st.sampled_from([*PROGRAMS])), draw(st.integers(1, 20)), 16 * draw(st.integers(1, 40))
    spec = WeightSpec(FP8, 8, rows, cols, "bfloat16")
    norm = NORMS[draw(st.sampled_from([*NORMS]))]
    program = replace(PROGRAMS[name], dtype=spec.dtype, norm=norm)
    n = draw(st.integers(1, 50))
    q, scale, _ = random_weight((program.groups * n, k), spec, torch.float32, seed=draw(st.integers(0, 9)))
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 1e-30, 0.0, 1e15, 3e-3])[torch.arange(count) % 5, None]
    x = (torch.randn(count, k + 8)[:, :k] * torch.logspace(-6, 0, k) * sizes).bfloat16()
    operands = [torch.randn((count, n) if part == FULL else (n,)).bfloat16() for part in program.operands]
    norm_weight = torch.randn(k).bfloat16() if norm and (norm.plus_one or draw(st.booleans())) else None
    return x, (q, scale, None), norm_weight, operands, program, spec


@settings(SETTINGS, max_examples=30)
@given(
    digit_layers(), st.sampled_from([8, 16]), st.sampled_from([16, 64]), st.sampled_from([32, 128]), st.integers(1, 4)
)
def test_digits(layer, block_t, block_r, block_k, splits):
    """By token, for sums over tokens would be those of the largest."""
    x, weight, norm_weight, operands, program, spec = layer
    config = QuantConfig("digits", block_t, block_r, block_k, splits=splits)
    found = run(layer, config)
    for t in range(len(x)):
        rows = [o[t : t + 1] if part == FULL else o for o, part in zip(operands, program.operands, strict=True)]
        check(found[t : t + 1], (x[t : t + 1], weight, norm_weight, rows, program, spec))


def test_digits_hold_every_input():
    """Every bf16 number within 2^12 of the largest, exactly; none that is no number becomes one."""
    bits = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    weight = (torch.eye(128).to(torch.float8_e4m3fn), torch.ones(128, 1), None)
    spec, program = WeightSpec(FP8, 8, 1, 0, "bfloat16"), PROGRAMS["plain"]
    for largest in (1.0, 1e-20, 1e20):
        near = bits[(bits.abs() <= largest) & (bits.abs() > largest * 2.0**-12)].float()
        x = torch.cat([near, torch.zeros(-len(near) % 127)]).view(-1, 127)
        x = torch.cat([torch.full((len(x), 1), largest), x], 1).bfloat16()
        found = torch.empty(len(x), 128)
        run_quant(QuantConfig("digits", 8, 64, 128), x, *weight, None, [], program, spec, found, False)
        assert torch.equal(found, x.float())
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 128).bfloat16()
        x[1, 5] = bad
        found = torch.empty(3, 128)
        run_quant(QuantConfig("digits", 8, 64, 128), x, *weight, None, [], program, spec, found, False)
        assert found[1].isnan().all() and torch.equal(found[::2], x[::2].float())


@settings(SETTINGS, max_examples=60)
@given(
    layers(st.integers(1, 40), folded_specs), st.sampled_from([16, 32]), st.sampled_from([16, 64]), st.integers(1, 4),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_folded(layer, block_t, block_r, splits, early, sums):
    sums &= layer[0].dtype != torch.float32  # which the bias would cost bits, hence `quant_config` does not choose it
    run(layer, QuantConfig("folded", block_t, block_r, splits=splits, early=early, sums=sums))


@settings(SETTINGS, max_examples=40)
@given(
    layers(st.integers(1, 40), folded_specs), st.sampled_from([16, 32]), st.sampled_from([16, 64]),
    st.sampled_from([64, 128, 256]), st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_folded_wide(layer, block_t, block_r, block_k, splits, use_tma):
    x, weight, _, operands, program, spec = layer
    layer = (x, weight, None, operands, replace(program, norm=None), spec)
    block_k = min(block_k, 4 * spec.fold)
    run(layer, QuantConfig("folded wide", block_t, block_r, block_k, splits=splits, use_tma=use_tma))


@pytest.mark.parametrize("tokens", [3, 33, 128])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["residual", "swiglu"])
def test_inputs_by_a_descriptor(monkeypatch, tokens, zero, name):
    """The same bits as by pointers, by which inputs are read that TMA does not take."""
    used = []

    def launch(*args, **options):
        used.append(options["USE_TMA"])
        launch_kernel(*args, **options)

    launch_kernel = lowering.launch
    monkeypatch.setattr(lowering, "launch", launch)
    spec, program = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), replace(PROGRAMS[name], dtype="bfloat16")
    n, k = 40, 512
    weight = random_weight((program.groups * n, k), spec, torch.bfloat16, zero=zero)
    operands = [torch.randn(tokens, n).bfloat16() for _ in program.operands]
    x = torch.randn(tokens, k + 8).bfloat16()[:, :k]
    for block_r, block_k in ((64, 128), (128, 256)):
        config = QuantConfig("folded wide", 64, block_r, block_k, splits=2)
        layer = x, weight, None, operands, program, spec
        found = run(layer, replace(config, use_tma=True))
        assert torch.equal(found, run(layer, config))
        odd = torch.zeros(tokens, k + 9, dtype=x.dtype)[:, 1 : k + 1].copy_(x)
        assert torch.equal(found, run((odd, *layer[1:]), replace(config, use_tma=True)))
    assert used == [True, False, False] * 2


@settings(SETTINGS, max_examples=60)
@given(
    layers(st.sampled_from([1, 1, 2, 7, 9, 20]), folded_specs), st.sampled_from([8, 16]), st.sampled_from([16, 32]),
    st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([2, 4]),
)  # fmt: skip
def test_folded_parts(layer, block_t, block_r, splits, early, sums, parts):
    sums &= layer[0].dtype != torch.float32
    config = QuantConfig(
        "folded", block_t, block_r, splits=splits, early=early, sums=sums, parts=parts, num_warps=parts
    )
    run(layer, config)


@st.composite
def held_layers(draw):
    """One token by whole products of rows, in bf16, with scales of 128 columns."""
    spec, name = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), draw(st.sampled_from([*PROGRAMS]))
    norm = NORMS[draw(st.sampled_from([*NORMS]))]
    program = replace(PROGRAMS[name], dtype=spec.dtype, norm=norm)
    n, k = 16 // program.groups * draw(st.integers(1, 5)), 256 * draw(st.integers(1, 9))
    weight = random_weight((program.groups * n, k), spec, torch.bfloat16, zero=draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 9)))
    x = torch.randn(1, k + 8).bfloat16()[:, :k] * draw(st.sampled_from([0.0, 1e-30, 3.0, 1e6]))
    operands = [torch.randn((1, n) if part == FULL else (n,)).bfloat16() for part in program.operands]
    gain = torch.randn(k).bfloat16() if norm and (norm.plus_one or draw(st.booleans())) else None
    return x, tuple(weight), gain, operands, program, spec


@settings(SETTINGS, max_examples=40)
@given(held_layers(), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans())
def test_folded_held(layer, products, parts, early):
    run(layer, QuantConfig("folded held", 1, 16 * products, num_warps=parts, parts=parts, early=early))


@settings(SETTINGS, max_examples=15)
@given(folded_specs(), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.sampled_from([(), (3,)]))
def test_unfold(spec, n, blocks, zero, leading):
    q, scale, zeros = random_weight((*leading, n, 4 * spec.fold * blocks), spec, torch.float32, zero=zero)
    found, exact = launch_dequantize(q, scale, zeros, spec), dequantize_reference(q, scale, zeros, spec.to_text())
    eps = 0.0 if spec.dtype in ("float32", "float16") else torch.finfo(spec.torch_dtype).eps
    assert torch.allclose(found.float(), exact.float(), rtol=eps, atol=0.0)


@settings(SETTINGS, max_examples=15)
@given(specs(), st.integers(1, 40), st.integers(1, 150), st.booleans(), st.sampled_from([(), (3,)]))
def test_dequantize(spec, n, half_k, zero, leading):
    q, scale, zeros = random_weight((*leading, n, 2 * half_k), spec, torch.float32, zero=zero and spec.kind == INT)
    found = launch_dequantize(q, scale, zeros, spec)
    exact = dequantize_reference(q, scale, zeros, spec.to_text())
    # The interpreter truncates where a GPU rounds to nearest.
    eps = 0.0 if spec.dtype in ("float32", "float16") else torch.finfo(spec.torch_dtype).eps
    assert torch.allclose(found.float(), exact.float(), rtol=eps, atol=0.0)


@pytest.mark.parametrize("kind", [INT, FP8, FP4, NF4])
def test_every_code(kind):
    """All codes, NaN among them, stand for what the reference says; and so do all e8m0 exponents."""
    bits = 8 if kind in (INT, FP8) else 4
    spec = WeightSpec(kind, bits, 1, 0, "float32")
    codes = torch.arange(256, dtype=torch.uint8)[None]
    q = codes if bits == 4 else codes.view(spec.codes_dtype)
    scale = torch.ones(1, 1)
    found, exact = launch_dequantize(q, scale, None, spec), dequantize_reference(q, scale, None, spec.to_text())
    assert torch.equal(found.nan_to_num(7777.0), exact.nan_to_num(7777.0))
    assert int(found.isnan().sum()) == (2 if kind == FP8 else 0)


@pytest.mark.parametrize("kind", [INT, FP8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_code_of_a_word(kind, dtype):
    """Each row has one code in one column, whose input alone is not zero."""
    spec = WeightSpec(kind, 8, 1, 0, dtype)
    column = torch.arange(256) % 8
    codes = torch.zeros(256, 8, dtype=torch.uint8)
    codes[torch.arange(256), column] = torch.arange(256, dtype=torch.uint8)
    for at in range(8):
        x, out = torch.zeros(1, 8, dtype=spec.torch_dtype), torch.empty(1, 256, dtype=spec.torch_dtype)
        x[0, at] = -2.0
        q, scale = codes.view(spec.codes_dtype), torch.ones(256, 1)
        run_quant(
            QuantConfig("words", 1, 8, 32), x, q, scale, None, None, [], Program(1, (), (), dtype), spec, out, False
        )
        exact = torch.where(column == at, -2.0 * q.float()[torch.arange(256), column], 0.0)
        numbers = ~q.float().isnan().any(1)
        assert torch.equal(out[0].float()[numbers], exact[numbers])
        assert out[0, ~numbers].isnan().all()  # NaN times zero is none either


def test_every_exponent():
    spec = WeightSpec(FP4, 4, 1, 0, "float32")
    q, scale = torch.full((256, 8), 0x22, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)[:, None]
    found, exact = launch_dequantize(q, scale, None, spec), dequantize_reference(q, scale, None, spec.to_text())
    assert torch.equal(found.nan_to_num(7777.0), exact.nan_to_num(7777.0)) and found[255].isnan().all()


@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("fold", [0, 32])
def test_launch(monkeypatch, tokens, norm, fold):
    """Norm, choice and kernel together."""
    monkeypatch.setattr(lowering, "quant_config", _small(lowering.quant_config))
    spec = WeightSpec(INT, 4, 1, 32, "bfloat16", fold)
    chosen = {"none": None, "rms": NORMS["rms"], "layer": NormSpec("layer", 1e-5)}[norm]
    program = replace(PROGRAMS["residual"], dtype="bfloat16", norm=chosen)
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 256).bfloat16(), random_weight((40, 256), spec, torch.bfloat16, zero=True)
    operands, gain = [torch.randn(tokens, 40).bfloat16()], torch.randn(256).bfloat16()
    found = launch_quant_linear(x, *weight, gain if chosen else None, None, operands, program, spec)
    assert found.shape == (tokens, 40)
    if tokens:
        check(found, (x, weight, gain if chosen else None, operands, program, spec))


def _small(original):
    def config(*args):
        found = original(*args)
        return replace(found, block_r=min(found.block_r, 16), block_k=min(found.block_k, 32))

    return config
