"""Kernels of quantized linears on a GPU, against fp32."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant.heuristics import (
    QuantConfig,
    digit_entries,
    entries,
)
from fusecomp.lowerings.quant.launches import input_tiles, run_quant
from fusecomp.lowerings.quant.lowering import launch_quant_linear
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import NormSpec, norm_reference
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec, dequantize_reference, fold_codes
from fusecomp.ops.quant_linear import quant_linear_reference
from fusecomp.patterns.quant_examples import random_weight

pytestmark = pytest.mark.gpu

SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
SWIGLU = Program(2, (), SILU, "bfloat16")
GPU_CASES = [
    (WeightSpec(INT, 4, 1, 128, "bfloat16", 64), False),
    (WeightSpec(INT, 4, 1, 128, "bfloat16", 64), True),
    (WeightSpec(INT, 4, 1, 32, "bfloat16", 32), True),
    (WeightSpec(INT, 4, 1, 0, "float16", 64), False),
    (WeightSpec(INT, 4, 1, 64, "float16", 32), True),
    (WeightSpec(INT, 4, 1, 16, "bfloat16"), True),
    (WeightSpec(INT, 8, 1, 0, "bfloat16"), False),
    (WeightSpec(FP8, 8, 1, 0, "bfloat16"), False),
    (WeightSpec(FP8, 8, 1, 0, "float16"), False),
    (WeightSpec(FP8, 8, 128, 128, "bfloat16"), False),
    (WeightSpec(FP4, 4, 1, 32, "bfloat16"), False),
    (WeightSpec(NF4, 4, 1, 64, "bfloat16"), False),
]


@pytest.mark.parametrize(("spec", "zero"), GPU_CASES, ids=lambda v: v.describe() if isinstance(v, WeightSpec) else v)
def test_gpu(spec, zero):
    """Error against fp32 at most 1.5 times that of the dequantized layer in its dtype, of every size of launch."""
    widest = 4096 + (256 if spec.fold else 96)
    for (n, k), tokens in itertools.product(((192, 1024), (100, widest)), (1, 2, 7, 16, 33, 64, 130, 600)):
        weight = [
            None if part is None else part.cuda() for part in random_weight((2 * n, k), spec, torch.float32, zero=zero)
        ]
        weight[1] = weight[1].to(spec.torch_dtype)
        torch.manual_seed(0)
        x, gain = (torch.randn(shape, device="cuda", dtype=spec.torch_dtype) for shape in ((tokens, k), (k,)))
        program = replace(SWIGLU, dtype=spec.dtype, norm=NormSpec("rms", 1e-5))
        found = launch_quant_linear(x, *weight, gain, None, [], program, spec)
        exact_spec, exact_program = (replace(v, dtype="float32").to_text() for v in (spec, program))
        exact = quant_linear_reference(
            x.float(), *weight, gain.float(), None, [], exact_program, exact_spec
        )  # fmt: skip
        dense = dequantize_reference(*weight, spec.to_text())
        y = torch.nn.functional.rms_norm(x, (k,), gain, 1e-5) @ dense.T
        unfused = torch.nn.functional.silu(y[:, :n]) * y[:, n:]
        error, allowed = ((value.float() - exact).norm() for value in (found, unfused))
        assert error <= 1.5 * allowed, (n, k, tokens, float(error), float(allowed))


def test_gpu_digits():
    """Launches of an H200's table, at its shapes: each token's error, whatever its size; an infinity is no number."""
    spec = WeightSpec(FP8, 8, 1, 0, "bfloat16")
    for entry in digit_entries(SM90.table):
        config, k, groups = QuantConfig(**entry["config"]), entry["k"], entry["groups"]
        assert config.kernel == "digits"
        n = entry["rows"] // groups
        q, scale, _ = (None if p is None else p.cuda() for p in random_weight((groups * n, k), spec, torch.float32))
        program = replace(SWIGLU if groups == 2 else Program(1, (), (), "bfloat16"), norm=NormSpec("rms", 1e-30))
        gain = torch.randn(k, device="cuda", dtype=torch.bfloat16)
        for tokens in (entry["tokens"], entry["tokens"] - 1, 2):
            sizes = torch.tensor([1.0, 1e-12, 1e12, 3e-3], device="cuda")[torch.arange(tokens) % 4, None]
            x = (torch.randn(tokens, k, device="cuda") * sizes).bfloat16()
            outs = [torch.full((tokens, n), float("nan"), device="cuda", dtype=x.dtype) for _ in range(3)]
            bad = x.clone()
            bad[-1, 7] = float("inf")
            for rows, out in zip((x, x, bad), outs, strict=True):
                run_quant(config, rows, q, scale, None, gain, [], program, spec, out, True)
            dense = q.float() * scale
            exact, unfused = (_normed(x.to(d), gain.to(d), dense.to(d), n, groups) for d in (torch.float32, x.dtype))
            error, allowed = ((y.float() - exact).norm(dim=1) for y in (outs[0], unfused))
            assert (error <= 1.5 * allowed).all(), (entry, tokens, error / allowed)
            assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0][:-1], outs[2][:-1])
            assert outs[2][-1].isnan().all()


def _normed(x, gain, weight, n, groups):
    """The unfused layer."""
    y = torch.nn.functional.rms_norm(x, (x.shape[1],), gain, 1e-30) @ weight.T
    return torch.nn.functional.silu(y[:, :n]) * y[:, n:] if groups == 2 else y


def test_gpu_inputs_by_a_descriptor():
    """Launches of an H200's table, at its shapes: the same bits as by pointers, for fewer tokens too."""
    chosen = [e for e in entries(SM90.table) if e["config"].get("use_tma")]
    assert chosen
    for entry in chosen:
        spec, config = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), QuantConfig(**entry["config"])
        (n, k), groups = (entry["rows"] // entry["groups"], entry["k"]), entry["groups"]
        weight = [part.cuda() for part in random_weight((groups * n, k), spec, torch.bfloat16, zero=True)]
        program = SWIGLU if groups == 2 else Program(1, (), (), "bfloat16")
        for tokens in (entry["tokens"], entry["tokens"] - 1, 33):
            x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
            assert input_tiles(x, config) is not None
            outs = [torch.full((tokens, n), float("nan"), device="cuda", dtype=x.dtype) for _ in range(2)]
            for out, use_tma in zip(outs, (True, False), strict=True):
                run_quant(replace(config, use_tma=use_tma), x, *weight, None, [], program, spec, out, True)
            assert not outs[0].isnan().any() and torch.equal(*outs), entry


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [INT, FP8])
def test_gpu_every_code_of_a_word(kind, dtype):
    """Each row has one code in one column, whose input alone is not zero."""
    spec, i = WeightSpec(kind, 8, 1, 0, dtype), torch.arange(256, device="cuda")
    codes = torch.zeros(256, 1024, dtype=torch.uint8, device="cuda")
    codes[i, i % 8] = i.to(torch.uint8)
    q, scale = codes.view(spec.codes_dtype), torch.ones(256, 1, device="cuda")
    numbers = ~q.float().isnan().any(1)
    for at in range(8):
        x = torch.zeros(1, 1024, dtype=spec.torch_dtype, device="cuda")
        x[0, at] = -2.0
        out = torch.full((1, 256), float("nan"), dtype=spec.torch_dtype, device="cuda")
        config, program = QuantConfig("words", 1, 4, 1024), Program(1, (), (), dtype)
        run_quant(config, x, q, scale, None, None, [], program, spec, out, True)
        exact = torch.where(i % 8 == at, -2.0 * q.float()[i, i % 8], 0.0)
        assert torch.equal(out[0].float()[numbers], exact[numbers]) and out[0, ~numbers].isnan().all()


def coded(shape: tuple[int, int], spec: WeightSpec, zero: bool) -> list[torch.Tensor | None]:
    """A random weight's codes, scales, and zero points or None."""
    return [p if p is None else p.cuda() for p in random_weight(shape, spec, spec.torch_dtype, zero=zero)]


def normed(groups: int, plus_one: bool | None) -> Program:
    """One matmul or SwiGLU's two, behind an RMSNorm, or none."""
    norm = None if plus_one is None else NormSpec("rms", 1e-5, plus_one)
    return replace(SWIGLU if groups == 2 else Program(1, (), (), "bfloat16"), norm=norm)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("parts", "tokens"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 2), (2, 2), (4, 2), (8, 2)])
def test_gpu_held_inputs(parts, tokens, early):
    """Every number of warps, with and without splits, norms, zero points and rows to spare, at every block of rows."""
    spec = WeightSpec(INT, 4, 1, 128, "bfloat16", 64)
    cases = itertools.product((256 * parts, 640 * parts // 256 * 256 + 256), (1, 2), (None, False, True))
    for i, (k, groups, plus_one) in enumerate(cases):
        n, rows, zero = 16 // groups * 13, (16, 48, 128, 208)[i % 4], i // 2 % 2 == 0
        weight = coded((groups * n, k), spec, zero)
        program = normed(groups, plus_one)
        norm = program.norm
        x, gain = (torch.randn(s, device="cuda", dtype=spec.torch_dtype) * 3 for s in ((tokens, k), (k,)))
        gain = None if norm is None else gain
        config = QuantConfig("folded held", 1, rows, 256, parts, 3, early=early, parts=parts, ahead=i % 3)
        outs = [torch.full((tokens, n), float("nan"), device="cuda", dtype=x.dtype) for _ in range(2)]
        for out in outs:
            run_quant(config, x, *weight, gain, [], program, spec, out, True)
        exact_spec, exact_program = (replace(v, dtype="float32").to_text() for v in (spec, program))
        wide = None if gain is None else gain.float()
        exact = quant_linear_reference(x.float(), *weight, wide, None, [], exact_program, exact_spec)
        unfused = quant_linear_reference(x, *weight, gain, None, [], program.to_text(), spec.to_text())
        error, allowed = ((value.float() - exact).norm() for value in (outs[0], unfused))
        assert error <= 1.5 * allowed, (k, groups, plus_one, zero, rows, float(error), float(allowed))
        assert torch.equal(*outs)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("cols", "fold"), [(128, 64), (0, 64), (512, 64), (64, 32), (128, 32)])
def test_gpu_folded_digits(cols, fold, zero):
    """Tokens and rows to spare, splits, norms, inputs of one sign and some that are larger than others."""
    spec = WeightSpec(INT, 4, 1, cols, "bfloat16", fold)
    sizes = itertools.product((1, 2), ((8, 64, 4), (16, 64, 4), (16, 128, 8), (32, 64, 4)), (None, False, True))
    for i, (groups, (block_t, rows, warps), plus_one) in enumerate(sizes):
        n, k, tokens, splits = 8 * (13 + i), 512 * (1 + i % 4), (1, 7, 16, 33)[i % 4], 1 + i % 3
        weight = coded((groups * n, k), spec, zero)
        weight[1] = weight[1].to((torch.bfloat16, torch.bfloat16, torch.float32)[i % 3])
        program = normed(groups, plus_one)
        norm = program.norm
        x, gain = (torch.randn(s, device="cuda", dtype=spec.torch_dtype) for s in ((tokens, k), (k,)))
        x[::2] += 2.0
        x[1::3, ::97] *= 100.0
        gain = None if norm is None else gain
        config = QuantConfig("folded digits", block_t, rows * groups, 4 * fold, warps, 3, splits)
        outs = [torch.full((tokens, n), float("nan"), device="cuda", dtype=x.dtype) for _ in range(2)]
        for out in outs:
            run_quant(config, x, *weight, gain, [], program, spec, out, True)
        exact_spec, exact_program = (replace(v, dtype="float32").to_text() for v in (spec, program))
        wide = None if gain is None else gain.float()
        exact = quant_linear_reference(x.float(), *weight, wide, None, [], exact_program, exact_spec)
        y = x if norm is None else norm_reference(x, gain, None, norm.to_text())
        y = y @ dequantize_reference(*weight, spec.to_text()).T
        unfused = y if groups == 1 else torch.nn.functional.silu(y[:, :n]) * y[:, n:]
        error, allowed = ((value.float() - exact).norm() for value in (outs[0], unfused))
        assert error <= 1.5 * allowed, (groups, block_t, plus_one, tokens, splits, float(error), float(allowed))
        assert torch.equal(*outs)
        x[0, 1] = float("inf")
        run_quant(config, x, *weight, gain, [], program, spec, outs[0], True)
        assert outs[0][0].isnan().all() and torch.equal(outs[0][1:], outs[1][1:])


@pytest.mark.parametrize("fold", [64, 32])
def test_gpu_every_folded_code_is_a_digit(fold):
    """Each row has another code in one column, whose input alone is not zero: products are exact."""
    spec, k, program = WeightSpec(INT, 4, 1, 2 * fold, "bfloat16", fold), 8 * fold, Program(1, (), (), "bfloat16")
    for column in (0, 1, fold - 1, fold, 2 * fold, 3 * fold + 1, 5 * fold, k - 1):
        codes = torch.full((16, k), 3, dtype=torch.uint8, device="cuda")
        codes[:, column] = torch.arange(16, device="cuda")
        q = fold_codes(codes[:, ::2] | codes[:, 1::2] << 4, fold)
        scale = torch.full(spec.scales(16, k), 0.5, dtype=torch.bfloat16, device="cuda")
        x = torch.zeros(9, k, dtype=torch.bfloat16, device="cuda")
        x[:, column] = torch.tensor([1.0, -1.0, 0.0, 257 / 256, 3.3125, 1e-30, -255 / 64, 1e30, 2.0])
        out = torch.full((9, 16), float("nan"), dtype=torch.bfloat16, device="cuda")
        config = QuantConfig("folded digits", 16, 64, 4 * fold)
        run_quant(config, x, q, scale, torch.full_like(scale, 7.0), None, [], program, spec, out, True)
        exact = x[:, column, None].float() * (torch.arange(16, device="cuda") - 7.0) * 0.5
        assert torch.equal(out, exact.bfloat16()), column
