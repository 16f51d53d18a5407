"""Products of codes by codes: their choices, refusals, and their kernels on a GPU."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

from fusecomp.lowerings import register
from fusecomp.lowerings.paged_attention.heuristics import GFX942, SM80, SM90, TARGETS
from fusecomp.lowerings.quant import scaled_heuristics
from fusecomp.lowerings.quant.activations import explain_scaled, refusal, scaled_shape
from fusecomp.lowerings.quant.lowering import explain_choices
from fusecomp.lowerings.quant.scaled_heuristics import (
    LIBRARY,
    LONGEST_SUM,
    PERSISTENT,
    TILE,
    ScaledConfig,
    ScaledShape,
    own_config,
    scaled_config,
)
from fusecomp.lowerings.quant.tables import TABLES
from fusecomp.ops import OPS
from fusecomp.ops.library import take_fallbacks
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.quant import BLOCK, FP8, INT, TENSOR, TOKEN, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import QuantShape, quant_linear_reference, quant_shape
from fusecomp.patterns.quant_examples import random_weight
from fusecomp.runtime.verify import relative_error


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_configuration(target):
    """It fits in shared memory, keeps to blocks, and sums no more columns alone than was found good enough."""
    sizes = (32, 1008, 4096, 14336, 28672)
    for n, k, groups, tokens in itertools.product(sizes, sizes, (1, 2), (1, 16, 65, 500, 5000, 70000)):
        for kind, block, precise in (
            (FP8, 0, False),
            (FP8, 0, True),
            (FP8, 128, False),
            (INT, 0, False),
            (INT, 32, False),
        ):
            shape = ScaledShape(n, k, groups, kind, block, "other", precise)
            for config in (scaled_config(target, shape, tokens), own_config(target, shape, tokens)):
                whole = k <= LONGEST_SUM and not precise
                if config.method == LIBRARY:
                    assert config.exact or kind == INT or whole
                    continue
                rows = config.block_t + groups * config.block_n
                assert config.num_stages * rows * config.block_k <= target.smem_bytes
                assert not block or block % config.block_k == 0
                assert not config.swap or groups == 1
                if kind == FP8 and not block and not whole:
                    columns = config.chunk * config.block_k
                    assert 0 < columns <= (LONGEST_SUM if config.method == PERSISTENT else config.block_k)
                    assert config.method == TILE or not precise
                else:
                    assert config.chunk == 0
            assert own_config(target, shape, tokens).method != LIBRARY


def test_the_table_names_known_configurations():
    """Entries are complete, and each is found again, by its own card, as the exact one."""
    for path in sorted(TABLES.glob("*_scaled.json")):
        table = json.loads(path.read_text())
        target = replace(SM90, name=table["gpu"])
        assert table["entries"] and path.name == f"{target.table}_scaled.json"
        for entry in table["entries"]:
            shape = ScaledShape(*(entry[key] for key in ("n", "k", "groups", "kind", "block", "epilogue")))
            config = scaled_config(target, shape, entry["tokens"])
            assert "(exact)" in config.source and config.method == entry["config"]["method"]
            assert ScaledConfig(**entry["config"]) and own_config(target, shape, entry["tokens"]).method != LIBRARY


@pytest.mark.parametrize("tokens", (17, 65, 72, 80, 96, 129, 136, 160, 176, 192, 257, 300))
@pytest.mark.parametrize("n, k, groups, epilogue", ((6144, 4096, 1, "identity"), (14336, 4096, 2, "other")))
def test_few_tokens_are_served_as_the_next_larger_number(tokens, n, k, groups, epilogue):
    """A tile that holds almost all of them would read the weights, or wait for them, a second time."""
    shape = ScaledShape(n, k, groups, FP8, 0, epilogue)
    found = int(re.search(r"tokens=(\d+)", scaled_config(SM90, shape, tokens).source)[1])
    entries = scaled_heuristics.entries(SM90)
    tuned = [e["tokens"] for e in entries if (e["kind"], e["block"], e["n"], e["k"]) == (FP8, 0, n, k)]
    assert found == min(size for size in tuned if size >= tokens)


def test_refusals_have_reasons():
    token = ActivationSpec(FP8)
    fp8, int8 = WeightSpec(FP8, 8, 1, 0, "bfloat16"), WeightSpec(INT, 8, 1, 0, "bfloat16")
    assert refusal(SM90, 4096, fp8, False, token) is None
    assert refusal(GFX942, 4096, int8, False, ActivationSpec(INT)) is None
    assert "has no products of fp8" in refusal(SM80, 4096, fp8, False, token)
    assert "has no products of fp8" in refusal(GFX942, 4096, fp8, False, token)
    assert "zero points" in refusal(SM90, 4096, fp8, True, token)
    assert "the weight int8" in refusal(SM90, 4096, int8, False, token)
    assert "not aligned" in refusal(SM90, 4100, fp8, False, token)
    assert "float32" in refusal(SM90, 4096, replace(fp8, dtype="float32"), False, token)
    assert "no power of 2" in refusal(SM90, 4096, fp8, False, ActivationSpec(FP8, 8, BLOCK, 96))
    assert "no power of 2" in refusal(SM90, 4096, replace(fp8, cols=16), False, token)
    assert scaled_shape(64, 64, 1, "float16", fp8, 0, "bias").precise


def test_shape_is_its_text():
    weight = WeightSpec(FP8, 8, 128, 128, "bfloat16")
    program = Program(2, (), (("mul", "a0", "a1"),), "bfloat16")
    q = torch.empty(64, 256, dtype=torch.float8_e4m3fn)
    for activation in (
        ActivationSpec(FP8, 8, BLOCK, 128, True, 16),
        ActivationSpec(FP8, 8, TENSOR),
        ActivationSpec(FP8),
    ):
        shape = quant_shape(torch.bfloat16, q, None, program, weight, activation)
        assert shape.granularity == activation.granularity and shape.epilogue == "other"
        assert QuantShape.parse(str(shape)) == shape


def test_choices_are_explained():
    """Few tokens by weight-only kernels, the others by codes, or a reason why none are."""
    shape = QuantShape(4096, 4096, 1, "bfloat16", FP8, 8, 1, 0, False, TOKEN, 0, 16, "residual")
    lines = explain_choices(SM90, shape, [1, 8, 64, 8192])
    assert [line.split(" tokens: ")[0] for line in lines if "codes by codes" in line] == ["64", "8192"]
    assert any(line.startswith("1 tokens: quantized words") for line in lines)
    assert any(line.startswith("8 tokens: quantized digits") for line in lines)
    refused = explain_choices(SM80, shape, [1, 64])
    assert "has no products of fp8" in refused[0] and any(line.startswith("64 tokens: quantized") for line in refused)
    assert explain_scaled(SM90, replace(shape, least=0), [1, 2])[1] == [1]


SILU = (("neg", "a0"), ("exp", "t0"), ("add", "t1", 1), ("div", "a0", "t2"), ("mul", "t3", "a1"))
PROGRAMS = {
    "residual": Program(1, (FULL,), (("add", "i0", "a0"),), "bfloat16"),
    "swiglu": Program(2, (), SILU, "bfloat16"),
}
SCHEMES = {
    "fp8 token": (ActivationSpec(FP8), WeightSpec(FP8, 8, 1, 0, "bfloat16")),
    "fp8 tensor": (ActivationSpec(FP8, 8, TENSOR), WeightSpec(FP8, 8, 0, 0, "bfloat16")),
    "fp8 static": (ActivationSpec(FP8, 8, TENSOR, 0, False), WeightSpec(FP8, 8, 0, 0, "bfloat16")),
    "fp8 block": (ActivationSpec(FP8, 8, BLOCK, 128), WeightSpec(FP8, 8, 128, 128, "bfloat16")),
    "int8 token": (ActivationSpec(INT), WeightSpec(INT, 8, 1, 0, "bfloat16")),
    "fp8 in fp16": (ActivationSpec(FP8), WeightSpec(FP8, 8, 1, 0, "float16")),
    "from 16 tokens": (ActivationSpec(FP8, least_tokens=16), WeightSpec(FP8, 8, 1, 0, "bfloat16")),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 130, 700, 3000])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_that_quantizes(scheme, program, tokens):
    """The op, norm included, against fp32: at most 1.5 times the error of the unfused graph; no fallback."""
    activation, spec = SCHEMES[scheme]
    n, k, dtype = 384, 1024, spec.torch_dtype
    parsed = replace(PROGRAMS[program], dtype=spec.dtype, norm=NormSpec("rms", 1e-5))
    q, scale, _ = (
        None if p is None else p.cuda() for p in random_weight((parsed.groups * n, k), spec, torch.float32)
    )  # fmt: skip
    torch.manual_seed(tokens)
    x, gain = torch.randn(tokens, k, device="cuda").to(dtype), torch.rand(k, device="cuda").to(dtype)
    operands = [torch.randn(tokens, n, device="cuda").to(dtype) for _ in parsed.operands]
    given = None if activation.dynamic else torch.tensor([0.01], device="cuda")
    register()
    take_fallbacks()
    texts = (parsed.to_text(), spec.to_text(), given, activation.to_text())
    found = OPS.quant_linear(x, q, scale, None, gain, None, operands, *texts)
    assert not take_fallbacks()
    exact = quant_linear_reference(
        x, q, scale, None, gain, None, operands, replace(parsed, dtype="float32").to_text(), *texts[1:]
    )
    # Unfused: the norm, and then what its codes stand for, rounded to 16 bits; a product of 16-bit operands.
    normed = OPS.norm(x, gain, None, parsed.norm.to_text())
    rounded = OPS.fake_quantize(normed, given, activation.to_text())
    weight = OPS.dequantize(q, scale, None, spec.to_text())
    y = rounded @ weight.t()
    if parsed.groups == 2:
        gate, up = y.chunk(2, 1)
        y = torch.nn.functional.silu(gate) * up
    y = y + operands[0] if operands else y
    assert found.isfinite().all() and relative_error(found, exact) <= 1.5 * relative_error(y, exact)
    again = OPS.quant_linear(x, q, scale, None, gain, None, operands, *texts)
    assert torch.equal(found, again)
