"""The router kernel under Triton's interpreter, against the eager reference. `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.route.kernel import MAX_EXPERTS, launch_route, supports
from fusecomp.ops.router import SIGMOID, SOFTMAX, SPARSEMIXER, RouteSpec, route_reference
from tests.patterns.test_router import inputs, routers


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate], max_examples=30)
@given(routers(), st.integers(0, 99))
def test_routers(case, seed):
    spec, tokens, experts, dtype, biased = case
    logits, bias = inputs(tokens, experts, dtype, biased, seed)
    wide = torch.full((tokens, experts + 3), float("nan"), dtype=dtype)
    wide[:, :experts] = logits
    ids, weights = launch_route(wide[:, :experts], bias, spec)
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
    ids, _ = launch_route(logits, None, RouteSpec(kind, 2, threshold=0.02))
    assert ((ids >= 0) & (ids < 5)).all()


def test_equal_scores_are_taken_in_order():
    ids, weights = launch_route(torch.zeros(1, 6), None, RouteSpec(SOFTMAX, 3, "sum"))
    assert ids.tolist() == [[0, 1, 2]] and weights.tolist() == [pytest.approx([1 / 3] * 3)]


def test_no_tokens():
    ids, weights = launch_route(torch.empty(0, 6), None, RouteSpec(SOFTMAX, 3))
    assert ids.shape == weights.shape == (0, 3)


def test_what_is_not_supported_is_said():
    spec = RouteSpec(SOFTMAX, 3)
    assert supports(torch.zeros(1, 8), spec) is None
    assert "float64" in supports(torch.zeros(1, 8, dtype=torch.float64), spec)
    assert str(MAX_EXPERTS) in supports(torch.zeros(1, MAX_EXPERTS + 1), spec)
