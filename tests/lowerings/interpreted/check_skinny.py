"""The skinny matmul under Triton's interpreter. `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import device
from fusecomp.lowerings.linear import skinny
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.linear_cases import EPILOGUES, Linear
from tests.lowerings.searches import SETTINGS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = ["none", "unit", "weight", "plus one"]


multiply_bfloat16()


def run(layer: Linear, config: SkinnyConfig) -> torch.Tensor:
    tokens, n = layer.x.shape[0], layer.weight.shape[0] // layer.epilogue.groups
    buffer = torch.full((tokens + 1, n + 3), float("nan"), dtype=layer.x.dtype)
    out = buffer[:tokens, :n]
    skinny.run_skinny(config, layer.x, layer.weight, out, *layer.call, False)
    assert buffer[tokens:].isnan().all() and buffer[:, n:].isnan().all(), "a store went past the output"
    for counters in device._arrival_counters.values():
        assert not counters.any(), "a launch left its counters raised"
    # The interpreter truncates where a GPU rounds: normalized inputs, and the output.
    layer.assert_accurate(out, ulps=2.0)
    return out


@st.composite
def layers(draw, tokens: st.SearchStrategy[int]):
    return Linear.random(
        draw(tokens), draw(st.integers(1, 70)), draw(st.integers(1, 200)), epilogue=draw(st.sampled_from([*EPILOGUES])),
        norm=draw(st.sampled_from(NORMS)), dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 9)),
    )  # fmt: skip


@settings(SETTINGS, max_examples=50)
@given(layers(st.just(1)), st.sampled_from([2, 8]), st.sampled_from([32, 64, 256]))
def test_one_token(layer, block_r, block_k):
    run(layer, SkinnyConfig("vector", 1, block_r, block_k, 4))


@settings(SETTINGS, max_examples=80)
@given(
    layers(st.integers(1, 40)), st.sampled_from([16, 32]), st.sampled_from([16, 64]), st.sampled_from([16, 64]),
    st.integers(1, 5), st.sampled_from([1, 3]), st.booleans(),
)  # fmt: skip
def test_tokens(layer, block_t, block_r, block_k, splits, stages, early):
    run(layer, SkinnyConfig("tile", block_t, block_r, block_k, 4, splits, stages, early=early))


def test_equal_whatever_the_order_of_arrival(monkeypatch):
    """The sum over splits is taken in their order, so scratch of an earlier launch cannot show."""
    layer = Linear.random(5, 40, 190, norm="weight", dtype=torch.bfloat16)
    config = SkinnyConfig("tile", 16, 16, 16, 4, 4)
    assert torch.equal(run(layer, config), run(layer, config))


def test_half_precision_does_not_overflow():
    layer = Linear.random(3, 20, 64, norm="weight", dtype=torch.float16)
    layer.x *= 5e3
    layer.norm_weight = layer.norm_weight * 30
    run(layer, SkinnyConfig("tile", 16, 16, 16, 4, 2))
    layer.x = layer.x[:1]
    run(layer, SkinnyConfig("vector", 1, 4, 64, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(20, 65)}, "weight"),
        ({"x": torch.zeros(64, 3).T}, "contiguous"),
        ({"out": torch.zeros(4, 20)}, "tokens"),
        ({"config": SkinnyConfig("vector", 1, 4, 64, 4)}, "one token"),
    ],
)
def test_refusals(change, message):
    layer = Linear.random(3, 20, 64, dtype=torch.float32)
    given = {"config": SkinnyConfig("tile", 16, 16, 16, 4, 2), "x": layer.x, "weight": layer.weight}
    given |= {"out": torch.zeros(3, 20), **change}
    with pytest.raises(ValueError, match=message):
        skinny.run_skinny(*given.values(), *layer.call, False)
