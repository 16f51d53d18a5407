"""Experts of fp8 codes by digits of their inputs on a GPU; on the CPU `interpreted/check_digits.py` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecomp.lowerings import register
from fusecomp.lowerings.experts import quant_routed
from fusecomp.lowerings.experts.heuristics import DigitTiles, Tiles
from fusecomp.lowerings.experts.quant_routed import launch_routed_quant_experts, takes_digits
from fusecomp.ops.linear_experts import without_norm
from tests.lowerings.digits_cases import digits_of
from tests.lowerings.routed_cases import check_mixture, check_replays, make_quant_mixture

TILES = {
    "deep": DigitTiles(Tiles(128, 128, 4, 4, use_tma=True), Tiles(64, 128, 4, 6, use_tma=True)),
    "long": DigitTiles(Tiles(128, 256, 4, 3, use_tma=True), Tiles(64, 256, 4, 4, use_tma=True)),
    "wide": DigitTiles(Tiles(128, 128, 8, 4, use_tma=True), Tiles(128, 128, 4, 4, use_tma=True)),
}
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", TILES)]


@pytest.fixture(autouse=True)
def tiles(name, monkeypatch):
    """Whatever the tables say."""
    choose = quant_routed.quant_experts_config
    monkeypatch.setattr(quant_routed, "quant_experts_config", lambda *args: replace(choose(*args), digits=TILES[name]))
    register()


def mixture(tokens: int, experts: int) -> tuple[tuple, tuple]:
    args, exact = make_quant_mixture("qwen3", tokens, experts, 2048, 768, dtype=torch.bfloat16, device="cuda")
    return bare(args), bare(exact)


def bare(args: Sequence[Any]) -> tuple:
    """Arguments without the norm."""
    return args[0], *without_norm(list(args[1:-1])), args[-1]


@pytest.mark.parametrize(("tokens", "experts"), [(9, 32), (64, 128), (64, 32), (32, 4), (192, 32)])
def test_numerics_contract(tokens, experts):
    """Experts of none, one and several tiles, that share what is left and that cannot."""
    (x, *args), exact = mixture(tokens, experts)
    assert takes_digits(x, args)
    found = launch_routed_quant_experts(x, *args, digits=digits_of(x))
    assert found is not None
    check_mixture((x, *args), exact, found)


@pytest.mark.parametrize(("tokens", "experts"), [(64, 128), (192, 32)])
def test_replays_under_dependent_launch_are_bitwise_equal(tokens, experts):
    (x, *args), _ = mixture(tokens, experts)
    digits = digits_of(x)

    def layer(rows: Tensor) -> Tensor:
        # The experts multiply by digits of x; their residual and the router follow the layer before.
        found = launch_routed_quant_experts(rows, *args[:-1], rows, digits=digits)
        assert found is not None
        return found[1]

    check_replays(layer, x)
