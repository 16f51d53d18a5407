"""Router and experts in three launches under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs it."""

from __future__ import annotations

import pytest
import torch

from fusecomp.lowerings import quant_registration, registration
from fusecomp.lowerings.experts import quant_routed, routed
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.quant_routed import launch_routed_quant_experts
from fusecomp.lowerings.experts.routed import launch_routed_experts
from fusecomp.ops.experts_linear import experts_linear_reference
from fusecomp.ops.linear import ROW, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.routed_experts import routed_experts_reference
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16, round_to_nearest
from tests.lowerings.routed_cases import CODE_LAYOUTS, MIXTURES, check_mixture, make_mixture, make_quant_mixture

multiply_bfloat16()
round_to_nearest()


@pytest.mark.parametrize(("tokens", "hidden", "block_n"), [(1, 64, 16), (3, 40, 32)])
@pytest.mark.parametrize("name", MIXTURES)
def test_is_the_reference(name, tokens, hidden, block_n, monkeypatch):
    config = ExpertsConfig("vector", Tiles(block_n, 64), Tiles(block_n, 32))
    monkeypatch.setattr(routed, "routed_config", lambda *_, **__: config)
    x, *args = make_mixture(name, tokens, C=hidden)
    wide = torch.full((tokens, hidden + 5), float("nan"))
    wide[:, :hidden] = x
    found, expected = launch_routed_experts(wide[:, :hidden], *args), routed_experts_reference(x, *args)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_with_the_linear_that_follows(monkeypatch):
    config = ExpertsConfig("vector", Tiles(16, 64), Tiles(16, 32))
    monkeypatch.setattr(routed, "routed_config", lambda *_, **__: config)
    x, *args = make_mixture("qwen3", 2)
    g = torch.Generator().manual_seed(2)
    weight, scale, bias = (torch.randn(*size, generator=g) / 8 for size in ((24, 64), (64,), (24,)))
    program = Program(1, (ROW,), (("add", "a0", "i0"),), "float32", NormSpec(RMS, 1e-5)).to_text()
    rest = weight, scale, None, [bias], program
    found, expected = registration._experts_linear(x, *args, *rest), experts_linear_reference(x, *args, *rest)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


CODES_CONFIGS = {  # all tiles of a row at once; more than `AHEAD` of them, one after the other
    "at once": ExpertsConfig("vector", Tiles(64, 64), Tiles(64, 64)),
    "in turn": ExpertsConfig("vector", Tiles(64, 32), Tiles(64, 32)),
}
CODES_CASES = [
    *((layout, "at once", torch.bfloat16) for layout in CODE_LAYOUTS),
    *((layout, "in turn", torch.bfloat16) for layout in ("fp8", "int8 groups zero", "int4")),
    ("fp8", "at once", torch.float32),
]


def run_codes(args: tuple, config: ExpertsConfig, patch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """By the op's implementation, which must not launch its halves, twice: equal bits."""

    def apart(*_: object) -> None:
        raise AssertionError("launched apart")

    patch.setattr(quant_routed, "routed_codes_config", lambda *_: config)
    patch.setattr(quant_registration, "run_router", apart)
    found = quant_registration._routed_quant_experts(*args)
    again = quant_registration._routed_quant_experts(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return found


@pytest.mark.parametrize(("layout", "config", "dtype"), CODES_CASES, ids=str)
def test_codes_of_each_layout(layout, config, dtype, monkeypatch):
    args, exact = make_quant_mixture("qwen3", 2, C=144, width=144, layout=layout, dtype=dtype)
    check_mixture(args, exact, run_codes(args, CODES_CONFIGS[config], monkeypatch))


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (3, 48)])
@pytest.mark.parametrize("name", MIXTURES)
def test_codes_of_each_mixture(name, tokens, hidden, monkeypatch):
    """With and without a norm, residual, biases and gates; ragged sizes; any stride of rows."""
    (x, *args), exact = make_quant_mixture(name, tokens, C=hidden, layout="int8 groups zero", dtype=torch.bfloat16)
    wide = torch.full((tokens, hidden + 5), float("nan"), dtype=x.dtype)
    wide[:, :hidden] = x
    given = (wide[:, :hidden], *args)
    check_mixture(given, exact, run_codes(given, CODES_CONFIGS["at once"], monkeypatch))


def test_codes_without_an_entry_are_launched_apart():
    (x, *args), _ = make_quant_mixture("qwen3", 1, dtype=torch.bfloat16)
    assert launch_routed_quant_experts(x, *args) is None
    y, ids, weights = registration.run_router(x, *args[:8])
    found = quant_registration._routed_quant_experts(x, *args)
    assert torch.equal(found[0], y)
    assert torch.equal(found[1], quant_registration._quant_experts(y, ids, weights, *args[8:]))
