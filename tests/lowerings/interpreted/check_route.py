"""The router kernel under Triton's interpreter, against the eager reference. `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.route import router
from fusecomp.lowerings.route.kernel import MAX_EXPERTS, launch_route, supports
from fusecomp.lowerings.route.lowering import launch_router_op
from fusecomp.ops.norm import LAYER, RMS, NormSpec, norm_reference
from fusecomp.ops.router import SIGMOID, SOFTMAX, SPARSEMIXER, RouteSpec, route_reference
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.patterns.test_router import inputs, routers

multiply_bfloat16()


@settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate], max_examples=30)
@given(routers(), st.integers(0, 99))
def test_routers(case, seed):
    spec, tokens, experts, dtype, biased = case
    logits, bias = inputs(tokens, experts, dtype, biased, seed)
    wide = torch.full((tokens, experts + 3), float("nan"), dtype=dtype)
    wide[:, :experts] = logits
    ids, weights = launch_route(wide[:, :experts], bias, spec, False)
    expected_ids, expected = route_reference(logits, bias, spec.to_text())
    assert ids.dtype == torch.int64 and weights.dtype == expected.dtype
    # Equal logits of low precision may be taken in another order, with the same weights.
    rows = [i for i, row in enumerate(logits.tolist()) if len(set(row)) == len(row)]
    assert torch.equal(ids[rows], expected_ids[rows])
    # The interpreter truncates where a GPU rounds.
    eps = torch.finfo(weights.dtype).eps
    torch.testing.assert_close(weights[rows].float(), expected[rows].float(), rtol=2 * eps + 1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [SOFTMAX, SIGMOID, SPARSEMIXER])
def test_ids_are_experts_whatever_the_logits_are(kind):
    logits = torch.full((3, 5), float("nan"))
    logits[1] = float("-inf")
    logits[2, 3] = float("inf")
    ids, _ = launch_route(logits, None, RouteSpec(kind, 2, threshold=0.02), False)
    assert ((ids >= 0) & (ids < 5)).all() and (ids[:, 0] != ids[:, 1]).all()


def test_equal_scores_are_taken_in_order():
    ids, weights = launch_route(torch.zeros(1, 6), None, RouteSpec(SOFTMAX, 3, "sum"), False)
    assert ids.tolist() == [[0, 1, 2]] and weights.tolist() == [pytest.approx([1 / 3] * 3)]


def test_no_tokens():
    ids, weights = launch_route(torch.empty(0, 6), None, RouteSpec(SOFTMAX, 3), False)
    assert ids.shape == weights.shape == (0, 3)


def test_what_is_not_supported_is_said():
    spec = RouteSpec(SOFTMAX, 3)
    assert supports(torch.float32, 8, spec) is None
    assert "float64" in supports(torch.float64, 8, spec)
    assert str(MAX_EXPERTS) in supports(torch.float32, MAX_EXPERTS + 1, spec)


@settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate], max_examples=30)
@given(routers(), st.integers(0, 99), st.sampled_from([20, 300]), st.sampled_from([None, RMS, LAYER]), st.booleans())
def test_from_hidden_states(case, seed, hidden, kind, biased):
    """Logits in steps of 1 / 8 apart from each other, so that no rounding of a sum changes what is chosen."""
    spec, tokens, experts, _, corrected = case
    generator = torch.Generator().manual_seed(seed)
    # One column speaks for each expert; the others are as large, and weigh nothing.
    wanted = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)]) / 8 - 2.0
    x = torch.randn(tokens, hidden + experts, generator=generator)
    weight = torch.zeros(experts, hidden + experts)
    weight[:, hidden:] = torch.eye(experts)
    x[:, hidden:] = wanted
    norm = kind and NormSpec(kind, 1e-5, plus_one=kind == RMS and biased)
    norm_weight = torch.randn(hidden + experts, generator=generator) if kind else None
    bias, route_bias = (torch.zeros(experts) if flag else None for flag in (biased, corrected))
    norm_bias = torch.randn(hidden + experts, generator=generator) if kind == LAYER and biased else None
    wide = torch.full((tokens, hidden + experts + 3), float("nan"))
    wide[:, : hidden + experts] = x
    y, ids, weights = launch_router_op(
        wide[:, : hidden + experts], weight, bias, norm_weight, norm_bias, route_bias, norm, x.dtype, spec
    )  # fmt: skip
    expected = norm_reference(x, norm_weight, norm_bias, norm.to_text()) if norm else x
    if norm:
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    else:
        assert y.numel() == 0
    expected_ids, expected_weights = route_reference(expected @ weight.T, route_bias, spec.to_text())
    if norm is None:
        assert torch.equal(ids, expected_ids)
    rows = (ids == expected_ids).all(1)
    assert rows.float().mean() > 0.8  # a norm's weight may bring logits together
    eps = torch.finfo(weights.dtype).eps
    torch.testing.assert_close(weights[rows].float(), expected_weights[rows].float(), rtol=2 * eps + 1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "splits"), [(1, 16), (5, 3), (37, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_to_split_gives_the_same(tokens, splits, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-1, 2, (tokens, 700), generator=generator).to(dtype)
    weight = (torch.randint(-1, 2, (12, 700), generator=generator) / 16).to(dtype)
    spec = RouteSpec(SOFTMAX, 3)
    monkeypatch.setattr(router, "router_config", lambda *_: router.RouterConfig(splits, 32, 4))
    _, ids, weights = launch_router_op(x, weight, None, None, None, None, None, dtype, spec)
    logits = (x.double() @ weight.double().T).to(dtype)  # multiples of 1 / 16 that bf16 holds: exact
    expected_ids, expected = route_reference(logits, None, spec.to_text())
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    distinct = [i for i, row in enumerate(logits.tolist()) if len(set(row)) == len(row)]
    assert tokens < 9 or distinct
    assert torch.equal(ids[distinct], expected_ids[distinct])
