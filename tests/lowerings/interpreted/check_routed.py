"""Router and experts in three launches under Triton's interpreter. `tests/lowerings/test_routed.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from fusecomp.lowerings import registration
from fusecomp.lowerings.experts import routed
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.routed import launch_routed_experts
from fusecomp.ops.experts_linear import experts_linear_reference
from fusecomp.ops.linear import ROW, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.routed_experts import routed_experts_reference
from tests.lowerings.routed_cases import MIXTURES, make_mixture


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
