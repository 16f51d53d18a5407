"""Two linears as one op: its reference and cost, and both in turn on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusecomp.lowerings import register
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant.pair import explain_pair
from fusecomp.ops import OPS, op_cost, take_fallbacks
from fusecomp.ops.linear import FULL, LinearShape, Program
from fusecomp.ops.linear_pair import PairShape
from fusecomp.ops.norm import LAYER, RMS, NormSpec
from fusecomp.ops.quant import BLOCK, FP8, TOKEN, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import quant_shape
from fusecomp.patterns.quant_examples import random_weight
from fusecomp.runtime.verify import relative_error

RESIDUAL = Program(1, (FULL,), (("add", "i0", "a0"),), "float32")
PLAIN = Program(1, (), (), "float32")
NORM = NormSpec(RMS, 1e-5)


def linears(tokens: int, k: int, n: int, m: int, dtype: str, norm: NormSpec = NORM, device: str = "cpu") -> tuple:
    """(x, arguments of the first linear, those of the next)."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).to(getattr(torch, dtype))

    first, then = (replace(p, dtype=dtype) for p in (RESIDUAL, replace(PLAIN, norm=norm)))
    one = randn(n, k) / k**0.5, None, None, [randn(tokens, n)], first.to_text()
    two = randn(m, n) / n**0.5, 1 + randn(n) / 4, randn(n) if norm.kind == LAYER else None, [], then.to_text()
    return randn(tokens, k), one, two


def coded(
    tokens: int, k: int, n: int, m: int, activation: ActivationSpec, spec: WeightSpec, device: str = "cpu"
) -> tuple:
    """The same of `quant_linear`."""
    x, one, two = linears(tokens, k, n, m, spec.dtype, device=device)
    found = []
    for (_, gain, bias, operands, program), (rows, columns) in ((one, (n, k)), (two, (m, n))):
        q, scale, _ = random_weight((rows, columns), spec, torch.float32, seed=rows)
        weight = q.to(device), scale.to(device), None
        found.append((*weight, gain, bias, operands, program, spec.to_text(), None, activation.to_text()))
    return x, *found


def test_reference_and_cost():
    x, one, two = linears(5, 16, 8, 12, "bfloat16")
    h, z = OPS.linear_pair(x, *one, *two)
    assert torch.equal(h, OPS.linear(x, *one)) and torch.equal(z, OPS.linear(h, *two))
    assert op_cost("linear_pair", (x, *one, *two)) == op_cost("linear", (x, *one)) + op_cost("linear", (h, *two))


def test_reference_and_cost_of_codes():
    x, one, two = coded(5, 16, 8, 12, ActivationSpec(FP8, 8, TOKEN), WeightSpec(FP8, 8, 1, 0, "bfloat16"))
    h, z = OPS.quant_linear_pair(x, *one, *two)
    assert torch.equal(h, OPS.quant_linear(x, *one)) and torch.equal(z, OPS.quant_linear(h, *two))
    both = op_cost("quant_linear", (x, *one)) + op_cost("quant_linear", (h, *two))
    assert op_cost("quant_linear_pair", (x, *one, *two)) == both


def test_shapes_are_named_and_explained():
    """As the committed launches of an H200 have it; few tokens have the norm in the product."""
    down = LinearShape(2048, 8192, 1, "residual", "bfloat16")
    pair = PairShape(down, LinearShape(3072, 2048, 1, "identity", "bfloat16"))
    assert PairShape.parse(str(pair)) == pair and PairShape.parse(str(down)) is None
    assert explain_pair(SM90, pair, [1, 32, 33, 64, 256]) == [
        "1 to 32 tokens: one after the other",
        "33 to 256 tokens: the sum and the norm in one launch",
    ]
    weight, codes = WeightSpec(FP8, 8, 1, 0, "bfloat16"), ActivationSpec(FP8, 8, TOKEN, least_tokens=16)
    q = torch.empty(4096, 4096, dtype=torch.float8_e4m3fn, device="meta")
    shape = quant_shape(torch.bfloat16, q, None, RESIDUAL, weight, codes)
    pair = PairShape(shape, replace(shape, n=14336, groups=2, epilogue="other"))
    assert PairShape.parse(str(pair)) == pair
    assert explain_pair(SM90, pair, [1, 8, 64, 256]) == [
        "1 to 8 tokens: one after the other",
        "64 tokens: the sum, the norm and its codes in one launch",
        "256 tokens: one after the other",
    ]


SIZES = [(2048, 2048, 3072), (4096, 4096, 6144), (14336, 4096, 6144), (512, 1000, 96)]
TOKENS = [1, 16, 33, 64, 128, 256, 2048]


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", [RMS, LAYER])
def test_on_a_gpu(size, tokens, kind):
    """As near to fp32 as both in turn, and captured."""
    register()
    x, one, two = linears(tokens, *size, "bfloat16", NormSpec(kind, 1e-5), "cuda")
    take_fallbacks()
    h, z = OPS.linear_pair(x, *one, *two)
    wide = [[o.float() if isinstance(o, torch.Tensor) else o for o in given] for given in (one, two)]
    for given, program in zip(wide, (one[4], two[4]), strict=True):
        given[3], given[4] = [o.float() for o in given[3]], program.replace("bfloat16", "float32")
    exact = OPS.linear(x.float(), *wide[0])
    apart = OPS.linear(x, *one)
    assert relative_error(h, exact) <= 1.5 * relative_error(apart, exact)
    exact = OPS.linear(exact, *wide[1])
    assert relative_error(z, exact) <= 1.5 * relative_error(OPS.linear(apart, *two), exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = OPS.linear_pair(x, *one, *two)
    for _ in range(3):
        graph.replay()
        assert torch.equal(again[0], h) and torch.equal(again[1], z)
    assert not take_fallbacks()


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 80, 128, 256, 2048])
@pytest.mark.parametrize("granularity", [TOKEN, BLOCK])
def test_codes_on_a_gpu(size, tokens, granularity):
    """As near to fp32 as both in turn; one value in a few may be the neighbouring code."""
    register()
    block = 128 if granularity == BLOCK else 0
    activation = ActivationSpec(FP8, 8, granularity, block, least_tokens=16)
    x, one, two = coded(tokens, *size, activation, WeightSpec(FP8, 8, block or 1, block, "bfloat16"), "cuda")
    take_fallbacks()
    h, z = OPS.quant_linear_pair(x, *one, *two)
    apart = OPS.quant_linear(x, *one)
    assert relative_error(h, apart) <= 2e-3 and relative_error(z, OPS.quant_linear(h, *two)) <= 2e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = OPS.quant_linear_pair(x, *one, *two)
    for _ in range(3):
        graph.replay()
        assert torch.equal(again[0], h) and torch.equal(again[1], z)
    assert not take_fallbacks()
