"""Router and experts by lists of rows under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs it."""

from __future__ import annotations

import pytest
import torch

from fusecomp.lowerings import quant_registration, registration
from fusecomp.lowerings.experts import listed_launch, quant_routed, routed
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.quant_routed import launch_routed_quant_experts
from fusecomp.lowerings.experts.routed import launch_routed_experts
from fusecomp.lowerings.route.kernel import MOST_FROM, empty_lists, list_capacity
from fusecomp.lowerings.route.router import launch_router
from fusecomp.ops.routed_experts import routed_experts_reference
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16, round_to_nearest
from tests.lowerings.routed_cases import (
    MIXTURES,
    check_mixture,
    make_mixture,
    make_quant_mixture,
    serve_codes_by_lists,
)

multiply_bfloat16()
round_to_nearest()

CONFIGS = {
    "narrow": ExpertsConfig("grouped", Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 2), 8, True),
    "wide": ExpertsConfig("grouped", Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2), 16, True, 2),
}


@pytest.fixture(autouse=True, params=CONFIGS)
def config(request, monkeypatch):
    config = CONFIGS[request.param]
    serve_codes_by_lists(monkeypatch, config)
    monkeypatch.setattr(routed, "routed_config", lambda *_, **__: None)
    monkeypatch.setattr(routed, "experts_config", lambda *_, **__: config)
    return config


@pytest.mark.parametrize(("tokens", "experts"), [(2, 8), (19, 5), (40, 128)])
def test_lists_have_the_rows_of_each_expert_once(tokens, experts, config):
    """Counts begin at zero in memory that holds anything."""
    g = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 64, generator=g), torch.randn(experts, 64, generator=g)
    spec, capacity = RouteSpec(SOFTMAX, 3, SUM), list_capacity(tokens, config.block_t)
    assert capacity % config.block_t == 0 and 0 <= capacity - tokens < config.block_t
    lists = empty_lists(tokens, experts, config.block_t, x.device).fill_(-7)
    _, ids, _ = launch_router(x, weight, None, None, None, None, torch.float32, spec, False, lists)
    counts, finished, most, rows = lists.split([experts, experts, 1, experts * capacity])
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=experts).int()) and not finished.any()
    assert most.item() == (counts.max().item() if counts.max() > MOST_FROM.value else 0)
    for expert, (count, found) in enumerate(zip(counts, rows.view(experts, capacity), strict=True)):
        assert found[:count].sort().values.tolist() == torch.where(ids.flatten() == expert)[0].tolist()
        assert (found[count:] == -7).all()


@pytest.mark.parametrize(("tokens", "hidden"), [(2, 40), (19, 64)])
@pytest.mark.parametrize("name", MIXTURES)
def test_is_the_reference(name, tokens, hidden):
    """With and without a norm, residual, biases and gates; ragged sizes; experts of none, one and several tiles."""
    x, *args = make_mixture(name, tokens, C=hidden)
    wide = torch.full((tokens, hidden + 5), float("nan"))
    wide[:, :hidden] = x
    found, expected = launch_routed_experts(wide[:, :hidden], *args), routed_experts_reference(x, *args)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_transposed_weights():
    x, *args = make_mixture("gpt-oss", 9, transposed=True)
    found, expected = launch_routed_experts(x, *args), routed_experts_reference(x, *args)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [35, 67])
def test_all_tokens_choose_the_same_experts(tokens):
    """Three experts of several units: those of 35 tokens are shared by the other five's programs, of 67 by none."""
    x, *args = make_mixture("qwen3", tokens)
    x[:] = x[0]
    args[-1][:] = args[-1][0]
    _, out = launch_routed_experts(x, *args)
    assert torch.equal(out, out[:1].expand_as(out))
    torch.testing.assert_close(out, routed_experts_reference(x, *args)[1], rtol=1e-4, atol=1e-4)


def test_some_experts_have_most_rows():
    """Two in three tokens choose the same experts, the others any: programs without rows share what these leave."""
    x, *args = make_mixture("qwen3", 30, 16)
    x[10:] = x[10]
    found, expected = launch_routed_experts(x, *args), routed_experts_reference(x, *args)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["fp8", "int8"])
def test_codes(layout, monkeypatch):
    args, exact = make_quant_mixture("qwen3", 11, C=144, width=144, layout=layout, dtype=torch.bfloat16)

    def apart(*_: object) -> None:
        raise AssertionError("launched apart")

    monkeypatch.setattr(quant_registration, "run_router", apart)
    check_mixture(args, exact, quant_registration._routed_quant_experts(*args))


def test_what_lists_do_not_serve_is_launched_apart(monkeypatch):
    """Scales of columns, one token, a norm with a bias, a router in another dtype, persistent programs, many rows."""
    for layout in ("fp8 blocks", "int4 zero", "mxfp4", "nf4"):
        (x, *args), _ = make_quant_mixture("qwen3", 3, layout=layout, dtype=torch.bfloat16)
        assert launch_routed_quant_experts(x, *args) is None
    (x, *args), _ = make_quant_mixture("qwen3", 3, dtype=torch.bfloat16)
    assert launch_routed_quant_experts(x, *args) is not None
    assert launch_routed_quant_experts(x[:1], *args[:-1], None) is None
    assert launch_routed_quant_experts(x, args[0], args[1], args[2], args[2], *args[4:]) is None
    assert launch_routed_quant_experts(x, args[0].float(), *args[1:]) is None
    monkeypatch.setattr(listed_launch, "SINGLE_LAUNCH_ROWS", 8)
    assert launch_routed_quant_experts(x, *args) is None
    monkeypatch.undo()
    persistent = ExpertsConfig("grouped", Tiles(32, 32, 4, 2, 1), Tiles(16, 32, 4, 2), 8, True)
    monkeypatch.setattr(quant_routed, "quant_experts_config", lambda *_: persistent)
    assert launch_routed_quant_experts(x, *args) is None


def test_an_op_that_lists_is_its_halves():
    x, *args = make_mixture("qwen3", 5)
    y, ids, weights = registration.run_router(x, *args[:8])
    found = registration._routed_experts(x, *args)
    assert torch.equal(found[0], y)
    torch.testing.assert_close(found[1], registration._experts(y, ids, weights, *args[8:]), rtol=1e-5, atol=1e-5)
