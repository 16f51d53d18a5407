"""Experts by the lists of rows that their router makes: what is served, what programs wait for, and a GPU's results."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fusecomp.lowerings import quant_registration, register, registration
from fusecomp.lowerings.aot import compile_one
from fusecomp.lowerings.experts import experts_aot
from fusecomp.lowerings.experts.experts_aot import Shape
from fusecomp.lowerings.experts.grouped import down_kernel, up_kernel
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles, experts_config
from fusecomp.lowerings.experts.listed import down_listed_kernel, up_listed_kernel
from fusecomp.lowerings.experts.listed_aot import QWEN3, specializations
from fusecomp.lowerings.experts.listed_launch import LEAST_ROWS, listed_constants
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.ops import OPS, take_fallbacks
from fusecomp.ops.routed_experts import routed_experts_reference
from tests.lowerings.experts_cases import CONTRACT, relative_rms
from tests.lowerings.routed_cases import (
    MIXTURES,
    check_mixture,
    check_replays,
    make_mixture,
    make_quant_mixture,
    widened,
)

CONFIG = ExpertsConfig("grouped", Tiles(64, 128, 4, 6), Tiles(64, 128, 4, 4), 8, True)


class TestWhoAsks:
    def asking(self, experts=128, tokens=64, row_bytes=4096, use_pdl=True) -> tuple[int, bool]:
        ups, downs = listed_constants(CONFIG, (experts, 1536, 8, tokens), row_bytes, 132, use_pdl, 16, 16)
        return ups["ASKING"], bool(downs["ASKS"])

    def test_the_first_programs_on_the_card_where_few_experts_have_no_row(self):
        assert self.asking() == (264, True)
        assert self.asking(experts=4) == (96, True)  # all others read what no expert has
        assert self.asking(tokens=16) == (0, False)
        assert self.asking(use_pdl=False) == (0, False)

    @pytest.mark.parametrize("row_bytes", [0, 4088, 256])
    def test_nobody_for_rows_that_are_not_whole_pieces_or_fewer_than_are_asked_for(self, row_bytes):
        assert self.asking(row_bytes=row_bytes)[0] == 0

    @pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (8, 2), (60, 4)])
    def test_it_begins_where_another_entry_serves(self, experts, top_k):
        """Else a step of a size between would have its kernel compiled while it is served."""
        last = next(t for t in range(1, 999) if (t + 1) * top_k >= LEAST_ROWS * experts)
        sources = {
            experts_config(
                SM90, experts=experts, top_k=top_k, hidden=2048, width=768, tokens=tokens, itemsize=2
            ).source.split("(")[0]
            for tokens in (last, last + 1)
        }
        assert len(sources) == 2


def compiled(kernel, shape: Shape) -> str:
    spec = next(s for s in specializations(SM90, shape) if s.kernel is kernel)
    return compile_one(spec, "sm_90")[1].asm["ptx"]


@pytest.mark.parametrize("shape", [QWEN3, replace(QWEN3, codes="fp8")], ids=str)
def test_an_expert_is_waited_for_by_its_blocks_alone(shape):
    """Weights are asked for before the routing is known; a block is signalled when all threads have stored its rows."""
    up, down = compiled(up_listed_kernel, shape), compiled(down_listed_kernel, shape)
    signal = re.search(r"(atom|red)\.global\.\S*release\S*", up).start()
    assert "st.global" in up and "st.global" not in up[up.rindex("bar.sync", 0, signal) : signal]
    wait, then = up.index("griddepcontrol.wait"), up.index("griddepcontrol.launch_dependents")
    assert up.index("cp.async.bulk.prefetch.L2") < wait < then < up.index("st.global")
    assert not re.search(r"ld\.global", up[:wait])
    # Down waits for the launch before only when a program has stored all it has.
    waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", down)]
    assert len(waits) == 1
    assert "st.global" not in down[waits[0] : down.index("ret;", waits[0])]
    assert re.search(r"(atom|ld)\.global\.\S*acquire", down)


@pytest.mark.parametrize("codes", ["", "fp8", "int8"])
def test_two_tiles_of_tokens_take_no_more_room_than_one(codes):
    """Else fewer programs would be on a multiprocessor for what few experts need."""
    for tokens in (8, 64, 192):
        shape = replace(QWEN3, tokens=tokens, codes=codes)
        grouped = {s.kernel: s for s in experts_aot.specializations(SM90, shape)}
        for spec in specializations(SM90, shape):
            one = grouped[up_kernel if spec.kernel is up_listed_kernel else down_kernel]
            assert compile_one(spec, "sm_90")[0].shared_bytes <= 1.03 * compile_one(one, "sm_90")[0].shared_bytes


@pytest.mark.parametrize("tokens", [64, 128])
def test_no_code_is_converted_where_rows_are_digits(tokens):
    """Codes are operands of the matrix units as they lie in memory; the up projection makes digits of hidden rows."""
    shape = replace(QWEN3, tokens=tokens, codes="fp8")
    for spec in specializations(SM90, shape, by_digits=True):
        ptx = compile_one(spec, "sm_90")[1].asm["ptx"]
        assert "wgmma.mma_async.sync.aligned.m64n" in ptx and ".f32.e4m3.e4m3" in ptx
        assert "f16x2.e4m3x2" not in ptx
        assert ("e4m3x2.f32" in ptx) == (spec.kernel is up_listed_kernel)
    plain = [compile_one(s, "sm_90")[1].asm["ptx"] for s in specializations(SM90, shape)]
    assert all("f16x2.e4m3x2" in ptx for ptx in plain)


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch):
        """Where lists do not serve, halves are launched one after the other: here they may not be."""

        def apart(*_: object) -> None:
            raise AssertionError("launched apart")

        register()
        monkeypatch.setattr(registration, "run_router", apart)
        monkeypatch.setattr(quant_registration, "run_router", apart)

    @pytest.mark.parametrize(
        ("tokens", "dtype"),
        [(9, torch.bfloat16), (70, torch.bfloat16), (256, torch.bfloat16), (70, torch.float16)],
        ids=str,
    )
    @pytest.mark.parametrize("name", MIXTURES)
    def test_numerics_contract(self, name, tokens, dtype):
        x, *args = make_mixture(name, tokens, 32, C=200, width=72, dtype=dtype, device="cuda")
        exact = routed_experts_reference(x.double(), *widened(args))
        take_fallbacks()
        found, unfused = OPS.routed_experts(x, *args), routed_experts_reference(x, *args)
        assert take_fallbacks() == {}
        for actual, plain, wanted in zip(found, unfused, exact, strict=True):
            if wanted.numel():
                allowed = max(relative_rms(plain, wanted), torch.finfo(dtype).eps / 4)
                assert relative_rms(actual, wanted) <= CONTRACT * allowed

    @pytest.mark.parametrize("tokens", [16, 64, 192])
    @pytest.mark.parametrize("layout", ["fp8", "int8"])
    def test_codes(self, layout, tokens):
        args, exact = make_quant_mixture(
            "qwen3", tokens, 32, 2048, 768, layout=layout, dtype=torch.bfloat16, device="cuda"
        )
        take_fallbacks()
        found = OPS.routed_quant_experts(*args)
        assert take_fallbacks() == {}
        check_mixture(args, exact, found)

    def test_transposed_weights(self):
        x, *args = make_mixture("gpt-oss", 64, 32, 320, 256, dtype=torch.bfloat16, device="cuda", transposed=True)
        wanted = routed_experts_reference(x.double(), *widened(args))[1]
        unfused, found = routed_experts_reference(x, *args)[1], OPS.routed_experts(x, *args)[1]
        assert relative_rms(found, wanted) <= CONTRACT * relative_rms(unfused, wanted)

    def test_all_tokens_choose_the_same_experts(self):
        x, *args = make_mixture("qwen3", 64, 128, 2048, 768, dtype=torch.bfloat16, device="cuda")
        x[:] = x[0]
        args[-1][:] = args[-1][0]
        wanted = routed_experts_reference(x[:1].double(), *widened([*args[:-1], args[-1][:1]]))[1]
        unfused, found = routed_experts_reference(x, *args)[1], OPS.routed_experts(x, *args)[1]
        assert torch.equal(found, found[:1].expand_as(found))
        assert relative_rms(found[:1], wanted) <= CONTRACT * relative_rms(unfused[:1], wanted)

    @pytest.mark.parametrize("tokens", [16, 64, 192])
    @pytest.mark.parametrize("layout", ["", "fp8", "int8"])
    def test_replays_under_dependent_launch_are_bitwise_equal(self, layout, tokens):
        """Lists come in another order every time."""
        sizes = ("qwen3", tokens, 128, 2048, 768)
        if layout:
            (x, *args), _ = make_quant_mixture(*sizes, layout=layout, dtype=torch.bfloat16, device="cuda")
            op = OPS.routed_quant_experts
        else:
            x, *args = make_mixture(*sizes, dtype=torch.bfloat16, device="cuda")
            op = OPS.routed_experts
        check_replays(lambda rows: op(rows, *args[:-1], rows)[1], x)
