"""The experts' kernels on codes under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs this file.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.experts import quant_lowering
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.quant_lowering import launch_quant_experts
from fusecomp.lowerings.quant.heuristics import fitting_columns
from fusecomp.ops import take_fallbacks
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec
from tests.lowerings.experts_cases import FORMS, GPT_OSS, naive, routings
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16, round_to_nearest
from tests.lowerings.quant_experts_cases import LAYOUTS, check_quant_contract, make_quant_layer
from tests.lowerings.searches import SETTINGS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

multiply_bfloat16()
round_to_nearest()


VECTOR = ExpertsConfig("vector", Tiles(8, 64), Tiles(4, 32))
IN_TURN = ExpertsConfig("vector", Tiles(8, 32), Tiles(2, 32))  # more than `AHEAD` tiles from 129 columns on
GROUPED = ExpertsConfig("grouped", Tiles(16, 32), Tiles(16, 16), 16)
SWAPPED = ExpertsConfig("grouped", Tiles(32, 64, per_sm=1), Tiles(16, 32), 8, swap=True, group_t=2)
TALL = ExpertsConfig("grouped", Tiles(16, 32), Tiles(32, 16), 64, swap=True)  # more tokens than columns
BY_TMA = ExpertsConfig("grouped", Tiles(32, 32, use_tma=True), Tiles(16, 32, use_tma=True), 16, swap=True)
CONFIGS = {
    "vector": VECTOR, "in turn": IN_TURN, "grouped": GROUPED, "swapped": SWAPPED, "tall": TALL, "tma": BY_TMA,
}  # fmt: skip


def run(layer, config: ExpertsConfig) -> torch.Tensor:
    """One call with this configuration, checked against the definition."""
    if config.method == "grouped":
        up, down = (
            replace(tiles, block_d=fitting_columns(tiles.block_d, spec.cols))
            for tiles, spec in ((config.up, layer.up.spec), (config.down, layer.down.spec))
        )
        config = replace(config, up=up, down=down)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_lowering, "quant_experts_config", lambda *_: config)
        out = layer.run(launch_quant_experts)
    assert take_fallbacks() == {}
    if layer.plain.residual is not None or (layer.plain.top_k_index < layer.experts).any():
        check_quant_contract(layer, out)
    else:
        assert (out == 0).all()
    return out


@st.composite
def specs(draw):
    """Every kind of codes, by rows, tensors, groups and blocks; and whether they have zero points."""
    kind, bits = draw(st.sampled_from([(INT, 4), (INT, 8), (FP8, 8), (FP4, 4), (NF4, 4)]))
    rows, cols = draw(st.sampled_from([(1, 0), (0, 0), (1, 16), (1, 32), (1, 128), (16, 32), (3, 48)]))
    return WeightSpec(kind, bits, rows, cols, "float32"), kind == INT and draw(st.booleans())


@st.composite
def layers(draw, tokens: st.SearchStrategy[int]):
    T, E = draw(tokens), draw(st.integers(1, 9))
    K = draw(st.integers(1, min(E, 4)))
    act = draw(st.sampled_from(["silu", "relu2", GPT_OSS]))
    # All experts, with sentinels, one that takes all, the last one with sentinels, sentinels alone.
    lo, hi = draw(st.sampled_from([(0, E - 1), (0, E), (0, 0), (E - 1, E), (E, E)]))
    index = torch.randint(lo, hi + 1, (T, K), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    sizes = 2 * draw(st.integers(1, 80)), 2 * draw(st.integers(1, 24))
    (up, zero), (down, down_zero) = draw(specs()), draw(specs())
    gated = act == GPT_OSS or draw(st.booleans())
    return make_quant_layer(
        T, K, E, *sizes, up=up, down=down, zeros=(zero, down_zero), act=act, gated=gated,
        interleaved=draw(st.booleans()), bias=draw(st.booleans()), residual=draw(st.booleans()), index=index,
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 9)),
    )  # fmt: skip


@settings(SETTINGS, max_examples=10)
@given(layers(st.integers(1, 3)), st.sampled_from([VECTOR, IN_TURN]))
def test_vector(layer, config):
    run(layer, config)


@settings(SETTINGS, max_examples=10)
@given(layers(st.integers(1, 40)), st.sampled_from([GROUPED, SWAPPED, TALL]))
def test_grouped(layer, config):
    run(layer, config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, config):
    """Each layout by each kernel; blocks of 128 rows and of 128 columns end inside tiles."""
    run(make_quant_layer(2, 1, 3, 144, 32, layout=layout, dtype=torch.bfloat16), CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("form", "routing"),
    # Routing does not follow what weights are: `check_experts` has every kind of it.
    [*((f, "sentinels") for f in FORMS if "transposed" not in FORMS[f]), ("plain", "one expert")],
)
def test_forms(form, routing, config):
    index = routings(5, 2, 8)[routing]
    layer = make_quant_layer(5, 2, 8, 32, 32, layout="mxfp4", index=index, dtype=torch.bfloat16, **FORMS[form])
    out = run(layer, CONFIGS[config])
    nothing, residual = (index == 8).all(1), layer.plain.residual
    assert torch.equal(out[nothing], torch.zeros_like(out[nothing]) if residual is None else residual[nothing])


@pytest.mark.parametrize(("T", "dtype"), [(1, torch.bfloat16), (6, torch.float16), (6, torch.float32)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_committed_choice(layout, T, dtype):
    layer = make_quant_layer(T, 2, 4, 48, 32, layout=layout, dtype=dtype)
    out = layer.run(launch_quant_experts)
    check_quant_contract(layer, out)
    assert take_fallbacks() == {}


def test_the_choice_to_dequantize(monkeypatch):
    chosen = ExpertsConfig("dequantize", Tiles(1, 1), Tiles(1, 1))
    monkeypatch.setattr(quant_lowering, "quant_experts_config", lambda *_: chosen)
    layer = make_quant_layer(6, 2, 4, 64, 32, layout="fp8 blocks", residual=True)
    torch.testing.assert_close(layer.run(launch_quant_experts), naive(layer.plain).float(), rtol=1e-4, atol=1e-5)
    assert take_fallbacks() == {}


def test_strided_inputs():
    layer = make_quant_layer(5, 2, 4, 32, 32, layout="int4 zero", residual=True)
    wide = torch.full((5, 40), float("nan"))
    wide[:, :32] = layer.plain.x
    for config in (GROUPED, VECTOR):
        run(replace(layer, plain=replace(layer.plain, x=wide[:, :32])), config)
        run(replace(layer, plain=replace(layer.plain, residual=wide[:, :32])), config)
