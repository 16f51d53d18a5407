"""A linear and the mixture behind it as one op: its reference, its cost, and a GPU's results."""

from __future__ import annotations

import pytest
import torch

from fusecomp.lowerings import register
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.lowerings.quant.pair import explain_normed
from fusecomp.ops import OPS, op_cost, take_fallbacks
from fusecomp.ops.linear import LinearShape, Program
from fusecomp.ops.linear_experts import BEFORE_NORM, NormedShape
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.quant import FP8, TOKEN, ActivationSpec, WeightSpec
from fusecomp.ops.quant_linear import quant_shape
from tests.lowerings.linear_experts_cases import RESIDUAL, make_linear_experts, make_quant_linear_experts

LAST = Program(1, (), (), "float32", NormSpec(RMS, 1e-5))


def test_reference_and_cost():
    x, first, rest = make_linear_experts("qwen3", 5)
    h, y, out = OPS.linear_experts(x, *first, *rest, True)
    alone = OPS.routed_experts(h, *rest[:-1], h)
    assert torch.equal(h, OPS.linear(x, *first)) and torch.equal(y, alone[0]) and torch.equal(out, alone[1])
    costs = op_cost("linear", (x, *first)) + op_cost("routed_experts", (h, *rest))
    assert op_cost("linear_experts", (x, *first, *rest, True)) == costs
    last = torch.randn(12, x.shape[1]), torch.ones(x.shape[1]), None, [], LAST.to_text()
    found = OPS.linear_experts_linear(x, *first, *rest, *last, True)
    assert all(map(torch.equal, found, (h, y, out, OPS.linear(out, *last))))
    whole = op_cost("linear_experts_linear", (x, *first, *rest, *last, True))
    assert whole == costs + op_cost("linear", (out, *last))


def test_reference_and_cost_of_codes():
    x, first, rest = make_quant_linear_experts("qwen3", 9, "fp8")
    h, y, out = OPS.quant_linear_experts(x, *first, *rest[:-1], x, False)
    alone = OPS.routed_quant_experts(h, *rest[:-1], x)
    assert torch.equal(h, OPS.quant_linear(x, *first)) and torch.equal(y, alone[0]) and torch.equal(out, alone[1])
    costs = op_cost("quant_linear", (x, *first)) + op_cost("routed_quant_experts", (h, *rest))
    assert op_cost("quant_linear_experts", (x, *first, *rest, True)) == costs


def test_shapes_are_named_and_explained():
    """Output projections of Qwen3-30B-A3B, as the committed launches of an H200 have them."""
    plain = NormedShape(LinearShape(2048, 4096, 1, "residual", "bfloat16"))
    weight, codes = WeightSpec(FP8, 8, 1, 0, "bfloat16"), ActivationSpec(FP8, 8, TOKEN, least_tokens=16)
    q = torch.empty(2048, 4096, dtype=torch.float8_e4m3fn, device="meta")
    coded = NormedShape(quant_shape(torch.bfloat16, q, None, RESIDUAL, weight, codes))
    for shape in (plain, coded):
        assert NormedShape.parse(str(shape)) == shape
        assert NormedShape.parse(str(shape.first)) is None and LinearShape.parse(str(shape)) is None
        assert NormedShape.parse(f"{shape.first} and others{BEFORE_NORM}") is None
    once, in_turn = "the sum and the router's norm in one launch", "one after the other"
    assert explain_normed(SM90, plain, [1, 32, 64, 192]) == [f"1 to 32 tokens: {in_turn}", f"64 to 192 tokens: {once}"]
    assert explain_normed(SM90, coded, [0, 8, 32, 64]) == [f"8 to 32 tokens: {in_turn}", f"64 tokens: {once}"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 16, 33, 64, 192, 700])
@pytest.mark.parametrize("layout", ["", "fp8", "int8"])
def test_on_a_gpu(layout, tokens):
    """Within two roundings of linear and experts in turn, and captured."""
    register()
    sizes = {"E": 32, "C": 2048, "width": 768, "dtype": torch.bfloat16, "device": "cuda"}
    if layout:
        x, first, rest = make_quant_linear_experts("qwen3", tokens, layout, **sizes)
        op, linear, experts = OPS.quant_linear_experts, OPS.quant_linear, OPS.routed_quant_experts
    else:
        x, first, rest = make_linear_experts("qwen3", tokens, **sizes)
        op, linear, experts = OPS.linear_experts, OPS.linear, OPS.routed_experts
    take_fallbacks()
    found = op(x, *first, *rest, True)
    assert not take_fallbacks()
    h = linear(x, *first)
    for actual, right in zip(found, (h, *experts(h, *rest[:-1], h)), strict=True):
        assert (actual.float() - right.float()).norm() <= 2**-8 * right.float().norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = op(x, *first, *rest, True)
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, again, found))
