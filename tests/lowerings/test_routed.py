"""Router and experts as one op: references and costs, when they run in three launches, and their kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from fusecomp.lowerings import register
from fusecomp.lowerings.experts.heuristics import (
    VECTOR_ELEMENTS,
    load_table,
    routed_config,
)
from fusecomp.lowerings.experts.later import BYTES, MAX_TOKENS, asked_bytes
from fusecomp.lowerings.experts.routed import launch_routed_experts
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS
from fusecomp.ops import OPS, op_cost, take_fallbacks
from fusecomp.ops.linear import ROW, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.routed_experts import routed_experts_reference
from tests.lowerings.experts_cases import CONTRACT, relative_rms
from tests.lowerings.routed_cases import (
    MIXTURES,
    check_replays,
    make_mixture,
    widened,
)

QWEN3 = {"experts": 128, "top_k": 8, "hidden": 2048, "width": 768}


@pytest.mark.parametrize("name", MIXTURES)
def test_reference_is_router_then_experts(name):
    x, *args = make_mixture(name, 5)
    y, ids, weights = OPS.router(x, *args[:8])
    out = OPS.experts(y if args[5] else x, ids, weights, *args[8:])
    assert all(torch.equal(a, b) for a, b in zip(routed_experts_reference(x, *args), (y, out), strict=True))


def test_costs_less_than_its_halves_by_what_is_chosen():
    x, *args = make_mixture("qwen3", 5)
    _, ids, weights = OPS.router(x, *args[:8])
    halves = op_cost("router", (x, *args[:8])) + op_cost("experts", (x, ids, weights, *args[8:]))
    whole = op_cost("routed_experts", (x, *args))
    T, C, width, K = 5, x.shape[1], x.element_size(), ids.shape[1]
    saved = T * K * (8 + weights.element_size()) + T * C * width  # and the rows, which the experts need not read again
    assert (halves.at(T, 1, 1)[0] - whole.at(T, 1, 1)[0], halves.flops - whole.flops) == (saved, 0)


def test_reference_with_the_linear_that_follows():
    x, *args = make_mixture("qwen3", 5)
    weight, scale, bias = torch.randn(12, x.shape[1]), torch.rand(x.shape[1]), torch.randn(12)
    program = Program(1, (ROW,), (("add", "a0", "i0"),), "float32", NormSpec(RMS, 1e-5)).to_text()
    rest = weight, scale, None, [bias], program
    y, out, z = OPS.experts_linear(x, *args, *rest)
    halves = OPS.routed_experts(x, *args)
    assert torch.equal(y, halves[0]) and torch.equal(out, halves[1])
    assert torch.equal(z, OPS.linear(out, *rest))
    costs = op_cost("routed_experts", (x, *args)) + op_cost("linear", (out, *rest))
    assert op_cost("experts_linear", (x, *args, *rest)) == costs


class TestAskedAhead:
    WEIGHT = torch.empty(5120, 2048, dtype=torch.bfloat16)

    def test_as_measured(self):
        assert asked_bytes(self.WEIGHT, 1, 128, 4, True) * 128 == BYTES
        assert asked_bytes(self.WEIGHT, 1, 256, 1, True) * 256 <= BYTES

    @pytest.mark.parametrize("programs", [1, 7, 128, 4096])
    def test_never_past_the_end_and_in_whole_pieces(self, programs):
        for rows in (1, 3, 100):
            for warps in (1, 4, 8):
                asked = asked_bytes(self.WEIGHT[:rows], 1, programs, warps, True)
                assert asked * programs <= self.WEIGHT[:rows].nbytes and asked % (32 * warps * 16) == 0

    def test_nothing(self):
        assert asked_bytes(None, 1, 128, 4, True) == 0
        assert asked_bytes(self.WEIGHT, 1, 128, 4, False) == 0
        assert asked_bytes(self.WEIGHT, MAX_TOKENS + 1, 256, 4, True) == 0
        assert asked_bytes(self.WEIGHT.mT, 1, 128, 4, True) == 0
        assert asked_bytes(self.WEIGHT.flatten()[1:], 1, 128, 4, True) == 0


class TestConfiguration:
    @pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
    def test_fits_registers_whatever_the_shape(self, target):
        for experts, top_k, hidden, width in ((128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 2048)):
            config = routed_config(
                target, experts=experts, top_k=top_k, hidden=hidden, width=width, tokens=1, itemsize=2
            )
            columns = 1 << (hidden - 1).bit_length()
            assert config is not None and config.up.block_n >= 2
            assert config.up.block_n * columns <= 2 * VECTOR_ELEMENTS * 32 * config.up.num_warps

    def test_serves_what_was_measured(self):
        most = max(entry["tokens"] for entry in load_table(SM90.table)["routed"])
        assert routed_config(SM90, tokens=most, itemsize=2, **QWEN3) is not None
        assert routed_config(SM90, tokens=most + 1, itemsize=2, **QWEN3) is None
        assert routed_config(SM90, tokens=1, itemsize=4, **QWEN3) is None

    def test_what_the_kernels_do_not_serve_is_launched_apart(self):
        x, *args = make_mixture("qwen3", dtype=torch.bfloat16, transposed=True)
        assert launch_routed_experts(x, *args) is None
        x, *args = make_mixture("qwen3", dtype=torch.bfloat16)
        assert launch_routed_experts(x[:0], *args[:-1], None) is None
        args[0] = args[0].mT.contiguous().mT
        assert launch_routed_experts(x, *args) is None


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def kernels(self):
        register()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("tokens", [1, 2, 9])
    @pytest.mark.parametrize("name", MIXTURES)
    def test_numerics_contract(self, name, tokens, dtype):
        x, *args = make_mixture(name, tokens, C=200, width=72, dtype=dtype, device="cuda")
        exact = routed_experts_reference(x.double(), *widened(args))
        take_fallbacks()
        found, unfused = OPS.routed_experts(x, *args), routed_experts_reference(x, *args)
        assert take_fallbacks() == {}
        # In fp32 the order of sums is all there is: one chain of the products of both matmuls (see `linear_cases`).
        chain = torch.finfo(dtype).eps * ((200 + 72) / 24) ** 0.5 if dtype == torch.float32 else 0.0
        for actual, plain, wanted in zip(found, unfused, exact, strict=True):
            if wanted.numel():
                allowed = max(relative_rms(plain, wanted), torch.finfo(dtype).eps / 4)
                assert relative_rms(actual, wanted) <= CONTRACT * allowed + chain

    @pytest.mark.parametrize("tokens", [1, 2, 9])
    def test_with_the_linear_that_follows(self, tokens):
        """Bit for bit the two ops, with or without a weight asked for."""
        x, *args = make_mixture("qwen3", tokens, 128, 2048, 768, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(5120, 2048, dtype=torch.bfloat16, device="cuda") / 45
        scale = torch.rand(2048, dtype=torch.bfloat16, device="cuda")
        program = Program(1, (), (), "bfloat16", NormSpec(RMS, 1e-5)).to_text()
        found = OPS.experts_linear(x, *args, weight, scale, None, [], program)
        y, out = OPS.routed_experts(x, *args)
        expected = y, out, OPS.linear(out, weight, scale, None, [], program)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_replays_under_dependent_launch_are_bitwise_equal(self):
        x, *args = make_mixture("qwen3", 1, 128, 2048, 768, dtype=torch.bfloat16, device="cuda")
        check_replays(lambda rows: OPS.routed_experts(rows, *args[:-1], rows)[1], x)
